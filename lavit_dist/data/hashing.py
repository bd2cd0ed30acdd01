"""One hash for every choice that is made per sample, so that the choice depends on names and seeds, never on a random stream."""

from __future__ import annotations

import hashlib

HASH_BITS = 64


def stable_hash(*parts: str | int) -> int:
    """A uniform integer in [0, 2**64) that is the same on every machine, in every process and Python version."""
    joined = "\x1f".join(map(str, parts)).encode(errors="surrogatepass")  # file names need not be UTF-8
    digest = hashlib.blake2b(joined, digest_size=HASH_BITS // 8).digest()
    return int.from_bytes(digest, "little")


def stable_fraction(*parts: str | int) -> float:
    """`stable_hash` as a number in [0, 1): below `p` for a share `p` of all names."""
    return (stable_hash(*parts) >> (HASH_BITS - 53)) / 2**53  # the bits that a float holds exactly
