"""Turns image-text pairs into shards of ids with frozen tokenizers, on this machine or a Ray cluster.

python data_prep/pretokenize.py --config configs/quickstart/pretokenize.yaml [--ray-address HOST:PORT] [key=value ...]
"""

from lavit_dist.config.command_line import run_ray_entry_point
from lavit_dist.config.pretokenize import PretokenizeConfig
from pipelines.pretokenize import run

if __name__ == "__main__":
    run_ray_entry_point(PretokenizeConfig, run, "Turn image-text pairs into shards of ids with frozen tokenizers.")
