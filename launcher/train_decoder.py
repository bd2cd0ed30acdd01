"""deepspeed launcher/train_decoder.py --config configs/quickstart/decoder.yaml run_dir=… pairs=… tokenizer=…"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.decoder import TrainDecoderConfig
from pipelines.train_decoder import run

if __name__ == "__main__":
    run_entry_point(TrainDecoderConfig, run, "Train the diffusion decoder that paints what LaVIT's visual tokenizer reconstructs.")
