"""Packed rows as pretraining sees them, and the proof that an epoch has every document once.

python launcher/inspect_data.py CONFIG --rows 0:4 [--output DIR] [--images FOLDER] [--source NAME] [key=value ...]
    prints rows of the run that the pretraining YAML file CONFIG describes, and writes DIR/row-000000.png and so on. RUN_DIR/config.yaml is
    one that is complete; of others, key=value fill in what is missing, as for launcher/pretrain.py. With NAME they are rows of that
    source alone. FOLDER holds the tars that the ids were made from, if they aren't where data_prep/pretokenize.py found them

python launcher/inspect_data.py CONFIG --audit [--epoch N] [--source NAME] [key=value ...]
    walks all rows of an epoch of each id set. A document that fits must come exactly once, and no row be over length

Exit code 0: rows were shown, or an epoch has what it should. 1: it has not; the first offenders are named. 2: wrong settings.
"""

import argparse
import re
import sys

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import exit_on_user_error, split_settings
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import check

WRONG_EPOCH = 1
"""Exit code when an epoch doesn't have what it should."""
ROWS = re.compile(r"(\d+)(?::(\d+))?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="CONFIG", help="YAML file of a pretraining run; and settings, as key=value")
    parser.add_argument("--config", metavar="FILE", help="the same file, as other programs take it")
    parser.add_argument("--rows", metavar="A:B", help="rows A to B - 1 of the run, from 0; or one row")
    parser.add_argument("--output", default="inspected", metavar="DIR", help="folder of the pictures (%(default)s)")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the tars that the ids were made from")
    parser.add_argument("--source", metavar="NAME", help="one of the run's sources, alone")
    parser.add_argument("--audit", action="store_true", help="walk a whole epoch and count")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="the epoch to walk (%(default)s)")
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    settings, files = split_settings(arguments.items)
    files += [arguments.config] if arguments.config else []
    check(len(files) == 1, f"There must be one configuration file, but {', '.join(files) or 'none'} is named; give CONFIG once.")
    check(arguments.rows is not None or arguments.audit, "Nothing to do: give --rows A:B to see rows, or --audit.")
    check(arguments.epoch >= 0, f"--epoch {arguments.epoch} must be at least 0.")
    rows = None if arguments.rows is None else parse_rows(arguments.rows)
    config = load_config(PretrainConfig, files[0], settings)
    from pipelines import inspect_data  # imports torch: not before the settings are known to be right

    if rows is not None:
        inspect_data.show(config, rows, arguments.output, arguments.images, arguments.source)
    if arguments.audit:
        exit_unless(inspect_data.audit(config, arguments.epoch, arguments.source))


def exit_unless(holds: bool) -> None:
    """Ends with `WRONG_EPOCH` where an audit failed."""
    if not holds:
        sys.exit(WRONG_EPOCH)


def parse_rows(words: str) -> range:
    """`A:B`, or `A` for one row. Raises `UserError` for anything else."""
    match = ROWS.fullmatch(words)
    rows = range(0)
    if match is not None:
        first = int(match[1])
        rows = range(first, first + 1 if match[2] is None else int(match[2]))
    check(len(rows) > 0, f"--rows {words} names no rows; write A:B with A below B, such as 0:4, or one number.")
    return rows


if __name__ == "__main__":
    main()
