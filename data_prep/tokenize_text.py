"""Turns text corpora into shards of ids with a frozen tokenizer, on this machine or a Ray cluster.

python data_prep/tokenize_text.py --config configs/text/tokenize_text.yaml [--ray-address HOST:PORT] [key=value ...]
"""

from lavit_dist.config.command_line import run_ray_entry_point
from lavit_dist.config.tokenize_text import TokenizeTextConfig
from pipelines.tokenize_text import run

if __name__ == "__main__":
    run_ray_entry_point(TokenizeTextConfig, run, "Turn text corpora into shards of ids, as documents of text alone.")
