"""Program of the gathering test: every rank brings as many rows as its rank, and writes what it gathered to OUT/RANK.json."""

import json
import sys
from pathlib import Path

import torch

from lavit_dist.parallel.distributed import gather_objects, gather_rows, init_distributed, rank


def main(out: Path) -> None:
    init_distributed(1)
    own = rank()
    rows = gather_rows(torch.tensor([[own, place] for place in range(own)], dtype=torch.float64).reshape(own, 2))
    (out / f"{own}.json").write_text(json.dumps({"rows": rows.tolist(), "objects": gather_objects({"rank": own})}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
