"""Proof of a port or a conversion.

python launcher/verify.py reference FOLDER
    compares what this code computes with the weights in FOLDER with the reference vectors there: config.json,
    vectors.safetensors, visual_tokenizer/ in the released layout, and where there are some, state_dict_keys.txt and SHA256SUMS.
    What no vector depends on (a tower's norm and head, the bias of attention's keys, codes that no image has) is covered only in a
    set that is known here, or by SHA256SUMS; notes under the table say what is left

python launcher/verify.py hf FOLDER [--tensor N] [--pipeline N]
    loads the Hugging Face LLaMA in FOLDER into N x N processes of its own and compares logits of random packed documents with those
    of transformers' LlamaForCausalLM, which reads each document alone: at most 1e-4 apart, in fp32. Holds the model twice

Exit code 0: all equal. 1: something differs, or is missing. 2: FOLDER is no such folder, or can't be cut so, there are fewer
GPUs than processes, or a process failed: the sentence names it and what it said last.
"""

import argparse
import sys

from lavit_dist.config.command_line import exit_on_user_error

DIFFERENT = 1
"""Exit code when the comparison fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="reference|hf")
    reference = what.add_parser("reference", help="a folder of reference vectors of the visual tokenizer")
    hf = what.add_parser("hf", help="a Hugging Face LLaMA, in a parallel layout")
    for each in (reference, hf):
        each.add_argument("folder", help="the folder to verify")
    hf.add_argument("--tensor", type=int, default=1, metavar="N", help="processes that share each layer")
    hf.add_argument("--pipeline", type=int, default=1, metavar="N", help="consecutive groups of layers")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from pipelines import verify  # imports torch, which takes seconds: not before the command line is known to be right

    if arguments.what == "reference":
        equal = verify.reference(arguments.folder)
    else:
        equal = verify.hf(arguments.folder, arguments.tensor, arguments.pipeline)
    if not equal:
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    main()
