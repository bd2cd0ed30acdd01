"""Finished id sets: proof that one is whole, what is in it, other sizes of shards, several sets in one, no image
twice.

python data_prep/id_set.py verify FOLDER_OR_URL [key=value ...]
    reads every shard of an id set where it lies, and names each that is missing, cut off, altered or holds other than its record
    says, each sidecar and quarantine file that disagrees with the manifest, and what an interrupted program left

python data_prep/id_set.py stats FOLDER_OR_URL [key=value ...] [--output DIR]
    prints counts, tokens, lengths and use of codes, and writes them to DIR/stats.json with charts

python data_prep/id_set.py reshard FOLDER --output DIR (--shard-mb N | --shards N)
    writes the same documents in the same order to shards of another size

python data_prep/id_set.py merge FOLDER FOLDER ... --output DIR
    writes several sets that were encoded alike to one

python data_prep/id_set.py deduplicate FOLDER --output DIR [--max-distance BITS] [--against FOLDER ...]
    writes the set without images that are copies of earlier ones, or of images in other sets, such as the held-out ones

FOLDER is that of one split, such as ids/train. key=value are settings of `id_cache` in pretraining, such as
storage_options.endpoint_url=https://…
DIR of the last three is a new folder, and appears when it is whole: after a kill give the command again.

Exit code 0: done, or nothing is wrong. 1: `verify` found something wrong. 2: the sentence says what can't be done, and why.
"""

import argparse
import sys

from lavit_dist.config.base import load_config
from lavit_dist.config.command_line import exit_on_user_error
from lavit_dist.config.id_cache import IdCacheConfig

FLAWED = 1
"""Exit code when a set is not what its manifest says."""


def main() -> None:
    arguments = parse(sys.argv[1:])
    exit_on_user_error(lambda: run(arguments))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 when it can't be understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="verify|stats|reshard|merge|deduplicate")
    verify = what.add_parser("verify", help="whether a set is what its manifest says")
    stats = what.add_parser("stats", help="counts, lengths and use of codes")
    reshard = what.add_parser("reshard", help="the same documents in shards of another size")
    merge = what.add_parser("merge", help="several sets in one")
    deduplicate = what.add_parser("deduplicate", help="a set without copies of images")
    for reader in (verify, stats):
        reader.add_argument("folder", metavar="FOLDER_OR_URL", help="a set of shards of ids, on disk or in a store")
        reader.add_argument("cache", nargs="*", metavar="key=value", help="settings of id_cache: attempts, storage_options.…")
    stats.add_argument("--output", default="id_set_stats", metavar="DIR", help="folder of stats.json and charts (%(default)s)")
    reshard.add_argument("folder", metavar="FOLDER", help="a set on disk")
    merge.add_argument("folders", nargs="+", metavar="FOLDER", help="sets on disk, in the order of their documents")
    deduplicate.add_argument("folder", metavar="FOLDER", help="a set on disk")
    deduplicate.add_argument(
        "--max-distance",
        type=int,
        default=2,
        metavar="BITS",
        help="of the 64 of a perceptual hash in which copies may differ (%(default)s)",
    )
    deduplicate.add_argument("--against", nargs="+", default=[], metavar="FOLDER", help="sets whose images count as earlier ones")
    for writer in (reshard, merge, deduplicate):
        writer.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    size = reshard.add_mutually_exclusive_group(required=True)
    size.add_argument("--shard-mb", type=float, metavar="N", help="mean size of a shard at most, in 10^6 bytes")
    size.add_argument("--shards", type=int, metavar="N", help="number of shards")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says; exits with code 1 when a set is flawed."""
    from pipelines import id_set  # imports torch, which takes seconds: not before the command line is known to be right

    if arguments.what == "verify":
        if not id_set.verify(arguments.folder, load_config(IdCacheConfig, None, arguments.cache)):
            sys.exit(FLAWED)
    elif arguments.what == "stats":
        id_set.stats(arguments.folder, load_config(IdCacheConfig, None, arguments.cache), arguments.output)
    elif arguments.what == "reshard":
        id_set.reshard(arguments.folder, arguments.output, num_shards=arguments.shards, shard_mb=arguments.shard_mb)
    elif arguments.what == "deduplicate":
        id_set.deduplicate(arguments.folder, arguments.output, max_distance=arguments.max_distance, against=arguments.against)
    else:
        id_set.merge(arguments.folders, arguments.output)


if __name__ == "__main__":
    main()
