"""Turns the images of pairs into shards of latents and codes, which decoder training reads in their place.

python data_prep/cache_latents.py --config configs/lavit-7b/cache_latents.yaml [--ray-address HOST:PORT] [key=value ...]
"""

from lavit_dist.config.cache_latents import CacheLatentsConfig
from lavit_dist.config.command_line import run_ray_entry_point
from pipelines.cache_latents import run

if __name__ == "__main__":
    run_ray_entry_point(CacheLatentsConfig, run, "Turn images into latents and codes, for decoder training.")
