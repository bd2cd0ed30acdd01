"""Turns text corpora into shards of ids with a frozen tokenizer, on this machine or a Ray cluster.

python data_prep/tokenize_text.py --config configs/text/tokenize_text.yaml [--ray-address HOST:PORT] [key=value ...]
"""

import argparse

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import add_overrides, exit_on_user_error
from lavit_dist.config.tokenize_text import TokenizeTextConfig
from pipelines.tokenize_text import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn text corpora into shards of ids, as documents of text alone.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the job; see configs/")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="running Ray cluster, or `auto`; short for ray.address=…")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    address = [f"ray.address={arguments.ray_address}"] if arguments.ray_address else []
    exit_on_user_error(lambda: run(load_config(TokenizeTextConfig, arguments.config, [*arguments.overrides, *address])))


if __name__ == "__main__":
    main()
