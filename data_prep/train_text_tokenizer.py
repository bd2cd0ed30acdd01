"""python data_prep/train_text_tokenizer.py --config configs/quickstart/text_tokenizer.yaml [key=value ...]"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.text_tokenizer import TrainTextTokenizerConfig
from pipelines.train_text_tokenizer import run

if __name__ == "__main__":
    run_entry_point(TrainTextTokenizerConfig, run, "Train a byte-level BPE on the captions of a pair set.")
