"""deepspeed --num_gpus 4 launcher/pretrain.py --config configs/quickstart/pretrain.yaml run_dir=… ids=… text_tokenizer=…"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.pretrain import PretrainConfig
from pipelines.pretrain import run

if __name__ == "__main__":
    run_entry_point(PretrainConfig, run, "Pretrain the language model on packed rows of text and visual codes.")
