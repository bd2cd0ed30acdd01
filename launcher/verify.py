"""Proof of a port or a conversion.

python launcher/verify.py reference FOLDER
    compares what this code computes with the weights in FOLDER with the reference vectors there: config.json,
    vectors.safetensors, visual_tokenizer/ in the released layout, and where there are some, state_dict_keys.txt and SHA256SUMS

What no vector depends on (a tower's norm and head, the bias of attention's keys, codes that no image has) is covered only in a set that
is known here, or by SHA256SUMS; notes under the table say what is left.

Exit code 0: all equal. 1: something differs, or is missing. 2: FOLDER is no such folder.
"""

import argparse
import sys

from lavit_dist.config.command_line import exit_on_user_error

DIFFERENT = 1
"""Exit code when the comparison fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference",), help="what to verify")
    parser.add_argument("folder", help="a folder of reference vectors")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: run(arguments.folder))


def run(folder: str) -> None:
    from pipelines import verify  # imports torch, which takes seconds: not before the command line is known to be right

    if not verify.reference(folder):
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    main()
