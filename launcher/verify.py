"""Proof of a port or a conversion, or that data is whole.

python launcher/verify.py reference FOLDER
    compares what this code computes with the weights in FOLDER with the reference vectors there: config.json,
    vectors.safetensors, visual_tokenizer/ in the released layout, and where there are some, state_dict_keys.txt and SHA256SUMS.
    What no vector depends on (a tower's norm and head, the bias of attention's keys, codes that no image has) is covered only in a
    set that is known here, or by SHA256SUMS; notes under the table say what is left

python launcher/verify.py hf FOLDER [--tensor N] [--pipeline N]
    loads the Hugging Face LLaMA in FOLDER into N x N processes of its own and compares logits of random packed documents with those
    of transformers' LlamaForCausalLM, which reads each document alone: at most 1e-4 apart, in fp32. Holds the model twice

python launcher/verify.py ids FOLDER_OR_URL [key=value ...]
    reads every shard of an id set where it lies, and names each that is missing, cut off or altered. key=value are settings of
    `id_cache` in pretraining, such as storage_options.endpoint_url=https://…

Exit code 0: all equal. 1: something differs, or is missing. 2: FOLDER is no such folder, or can't be cut so, there are fewer
GPUs than processes, or a process failed: the sentence names it and what it said last.
"""

import argparse
import sys

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import exit_on_user_error
from lavit_dist.config.id_cache import IdCacheConfig

DIFFERENT = 1
"""Exit code when the comparison fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="reference|hf|ids")
    reference = what.add_parser("reference", help="a folder of reference vectors of the visual tokenizer")
    hf = what.add_parser("hf", help="a Hugging Face LLaMA, in a parallel layout")
    ids = what.add_parser("ids", help="a set of shards of ids, on disk or in a store")
    for each in (reference, hf, ids):
        each.add_argument("folder", help="the folder to verify")
    hf.add_argument("--tensor", type=int, default=1, metavar="N", help="processes that share each layer")
    hf.add_argument("--pipeline", type=int, default=1, metavar="N", help="consecutive groups of layers")
    ids.add_argument("cache", nargs="*", metavar="key=value", help="settings of id_cache: attempts, storage_options.…")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from pipelines import verify  # imports torch, which takes seconds: not before the command line is known to be right

    if arguments.what == "reference":
        equal = verify.reference(arguments.folder)
    elif arguments.what == "ids":
        equal = verify.ids(arguments.folder, load_config(IdCacheConfig, None, arguments.cache))
    else:
        equal = verify.hf(arguments.folder, arguments.tensor, arguments.pipeline)
    if not equal:
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    main()
