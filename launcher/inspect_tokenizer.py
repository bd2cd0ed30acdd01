"""What a visual tokenizer makes of pictures: OUT/index.html and OUT/page.png.

python launcher/inspect_tokenizer.py IMAGE… tokenizer=FOLDER [pairs=FOLDER] [decoder=FOLDER] [out=FOLDER] [key=value …]
python launcher/inspect_tokenizer.py SHARD.tar --config FILE [key=value …]

An argument of the form name=value is a setting; a file of such a name is given as ./name=value.
"""

import argparse

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import exit_on_user_error, split_settings
from lavit_dist.config.inspect_tokenizer import InspectTokenizerConfig
from lavit_dist.errors import check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="image files and tars; and settings, as key=value")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; see configs/")
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: run(arguments.items, arguments.config))


def run(arguments: list[str], config_file: str | None) -> None:
    settings, names = split_settings(arguments)
    config = load_config(InspectTokenizerConfig, config_file, settings)
    check(bool(names), "Nothing to inspect: name one or more image files, or a tar of pictures.")
    from pipelines import inspect_tokenizer  # imports torch: not before the settings are known to be right

    inspect_tokenizer.run(config, names)


if __name__ == "__main__":
    main()
