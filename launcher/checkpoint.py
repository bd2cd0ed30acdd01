"""Checkpoints: what is in one, whether they are whole, fewer of them, and one of the language model as a Hugging Face folder.

python launcher/checkpoint.py inspect RUN_DIR/checkpoints/step-00001000
    prints the steps taken, the sizes, what wrote it and, of the language model, the layout and the rows trained on

python launcher/checkpoint.py verify RUN_DIR/checkpoints
    reads every file of every step, or of the step that is named, and compares it with its digest

python launcher/checkpoint.py prune RUN_DIR/checkpoints --keep-last 2 [--keep-every 10000 --keep-best 1]
    removes all steps but the newest, those of every so many steps, and those with the lowest mean loss

python launcher/checkpoint.py fetch s3://bucket/run --run-dir RUN_DIR [--storage-options '{"endpoint_url": "http://…"}']
    gets the newest checkpoint that `checkpoint.copy_to` has copied there; the run then goes on from it

python launcher/checkpoint.py export RUN_DIR/checkpoints/step-00001000 --text-tokenizer FOLDER --output DIR
    writes what `LlamaForCausalLM.from_pretrained` reads; DIR is a new folder, and appears when it is whole

Any layout reads a checkpoint, so there is nothing to reshape: start the run with other `parallel` sizes or another number of processes.

Exit code 0: done, or all are whole. 1: `verify` found something wrong. 2: the sentence says what can't be done, and why.
"""

import argparse
import json
import sys
from typing import Any

from lavit_dist.config.command_line import exit_on_user_error

DAMAGED = 1
"""Exit code when a step is not what its manifest says."""


def main() -> None:
    arguments = parse(sys.argv[1:])
    exit_on_user_error(lambda: run(arguments))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 when it can't be understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="inspect|verify|prune|fetch|export")
    inspect = what.add_parser("inspect", help="what is in a step")
    verify = what.add_parser("verify", help="whether steps are whole")
    prune = what.add_parser("prune", help="fewer steps")
    export = what.add_parser("export", help="a step as a Hugging Face folder")
    for each, which in (
        (inspect, "a step folder"),
        (verify, "a step folder, or that of all steps"),
        (prune, "that of all steps"),
        (export, "a step folder"),
    ):
        each.add_argument("folder", metavar="FOLDER", help=which)
    prune.add_argument("--keep-last", type=_at_least_one, required=True, metavar="N", help="how many of the newest stay")
    prune.add_argument("--keep-every", type=_not_negative, default=0, metavar="STEPS", help="multiples of it stay")
    prune.add_argument(
        "--keep-best", type=_not_negative, default=0, metavar="N", help="so many of those with the lowest mean loss stay"
    )
    fetch = what.add_parser("fetch", help="back from a store")
    fetch.add_argument("url", metavar="URL", help="what checkpoint.copy_to was")
    fetch.add_argument("--run-dir", required=True, metavar="DIR", help="the run folder, which has no checkpoints")
    fetch.add_argument("--storage-options", type=_json_object, default={}, metavar="JSON", help="what fsspec opens the store with")
    export.add_argument("--text-tokenizer", required=True, metavar="FOLDER", help="the text tokenizer of the run")
    export.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    return parser.parse_args(words)


def _at_least_one(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _not_negative(word: str) -> int:
    number = int(word)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def _json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says; exits with code 1 when a step is damaged."""
    from pipelines import checkpoint  # imports torch, which takes seconds: not before the command line is known to be right

    if arguments.what == "inspect":
        checkpoint.inspect(arguments.folder)
    elif arguments.what == "prune":
        from lavit_dist.checkpoint.store import Retention

        checkpoint.prune(arguments.folder, Retention(arguments.keep_last, arguments.keep_every, arguments.keep_best))
    elif arguments.what == "fetch":
        checkpoint.fetch(arguments.url, arguments.run_dir, arguments.storage_options)
    elif arguments.what == "export":
        checkpoint.export(arguments.folder, arguments.output, arguments.text_tokenizer)
    elif not checkpoint.verify_steps(arguments.folder):
        sys.exit(DAMAGED)


if __name__ == "__main__":
    main()
