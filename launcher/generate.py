"""Captions, pictures and reconstructions from trained models.

python launcher/generate.py caption IMAGE… --config FILE [key=value …]
python launcher/generate.py image "PROMPT"… --config FILE [key=value …]
python launcher/generate.py reconstruct IMAGE… --config FILE [key=value …]

An argument of the form name=value is a setting; a file of such a name is given as ./name=value.
"""

import argparse

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import exit_on_user_error, split_settings
from lavit_dist.config.generate import GenerateConfig
from lavit_dist.errors import check

MODES = {"caption": "image files", "image": "prompts", "reconstruct": "image files"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES, help="what to do")
    parser.add_argument("items", nargs="*", metavar="ITEM", help="image files or prompts; and settings, as key=value")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; see configs/")
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: run(arguments.mode, arguments.items, arguments.config))


def run(mode: str, arguments: list[str], config_file: str | None) -> None:
    settings, items = split_settings(arguments)
    config = load_config(GenerateConfig, config_file, settings)
    check(bool(items), f"Nothing to {mode}: name one or more {MODES[mode]} after the word {mode}.")
    check(all(item.strip() for item in items), f"One of the {MODES[mode]} is empty; remove it, or say what you mean.")
    from pipelines import (
        generate,
    )  # imports the models' libraries, which takes seconds: not before the settings are known to be right

    {"caption": generate.caption, "image": generate.draw, "reconstruct": generate.reconstruct}[mode](config, items)


if __name__ == "__main__":
    main()
