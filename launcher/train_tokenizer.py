"""deepspeed launcher/train_tokenizer.py --config configs/quickstart/tokenizer.yaml run_dir=… tower=… images.shards=…"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from pipelines.train_tokenizer import run

if __name__ == "__main__":
    run_entry_point(TrainTokenizerConfig, run, "Train LaVIT's dynamic visual tokenizer on a frozen vision tower.")
