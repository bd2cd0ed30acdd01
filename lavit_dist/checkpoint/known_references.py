"""Reference sets that are known here by their vectors, with the digests of the weights that belong to them.

Some weights show in no vector (a tower's `head`, the bias of attention's keys, which a softmax cancels), or too little to tell from
rounding. In a set that is known, these are compared too. `known_references.json` holds, by the digest of a set's vectors, that of each
module's tensors by the name of its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lavit_dist.checkpoint.digests import tensors_digest
from lavit_dist.checkpoint.official import Part

KNOWN = Path(__file__).with_suffix(".json")


def known_digests(vectors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Digests of the modules' weights, of the set that these vectors belong to; None for a set not known."""
    sets: dict[str, dict[str, str]] = json.loads(KNOWN.read_text())
    return sets.get(tensors_digest(vectors))


def altered_modules(parts: Iterable[Part], known: Mapping[str, str]) -> list[str]:
    """The modules whose tensors aren't those of the known set, or that are missing."""
    found = module_digests(parts)
    return sorted(name for name, digest in known.items() if found.get(name) != digest)


def module_digests(parts: Iterable[Part]) -> dict[str, str]:
    """`tensors_digest` of each module, whichever files hold it: what `known_references.json` records."""
    return {Path(part.stem).name: tensors_digest(dict(part.file.read(part.module.state_dict()))) for part in parts}
