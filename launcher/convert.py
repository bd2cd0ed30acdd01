"""Weights in another form.

python launcher/convert.py tower SOURCE DESTINATION [--config FILE] [key=value …]
    an EVA-CLIP tower in LaVIT's, BAAI's, timm's or open_clip's layout, to DESTINATION/visual_tokenizer/eva_vitg_psz14.bin
python launcher/convert.py tokenizer SOURCE DESTINATION [--config FILE] [form=official|safetensors] [dtype=fp32|bf16|fp16]
    a tokenizer's folder in another form or type
"""

import argparse

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import add_overrides, exit_on_user_error
from lavit_dist.config.convert import ConvertTokenizerConfig, ConvertTowerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tower", "tokenizer"), help="what SOURCE is")
    parser.add_argument("source", help="a file of EVA-CLIP weights, or the folder of a tokenizer")
    parser.add_argument("destination", help="the folder that is written to")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from pipelines import convert  # imports torch, which takes seconds: not before the command line is known to be right

    if arguments.what == "tower":
        tower = load_config(ConvertTowerConfig, arguments.config, arguments.overrides)
        convert.tower(tower, arguments.source, arguments.destination)
    else:
        tokenizer = load_config(ConvertTokenizerConfig, arguments.config, arguments.overrides)
        convert.tokenizer(tokenizer, arguments.source, arguments.destination)


if __name__ == "__main__":
    main()
