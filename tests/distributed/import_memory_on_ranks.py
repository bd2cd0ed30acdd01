"""Program of the memory test: builds this rank's layers from a LLaMA folder; writes OUT/RANK.json.

Data-parallel ranks share weights out as ZeRO-3 does.

import_memory_on_ranks.py FOLDER TENSOR_SIZE PIPELINE_SIZE DATA_SIZE OUT
"""

import json
import re
import sys
from pathlib import Path

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.checkpoint.llama_source import LlamaSource
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import rank
from lavit_dist.parallel.topology import Layout, start_model_parallel

ZERO_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def main(folder: Path, layout: Layout, out: Path) -> None:
    start_model_parallel(layout, 1)
    from lavit_dist.engine.llama_engine import build_module, share_out

    before = memory("VmRSS")
    opened = LlamaFolder(folder)
    words = Vocabulary(opened.rows, 126)
    source = LlamaSource(opened, opened.config, words, new_rows="mean_noise")
    layer_built = share_out("fp32", ZERO_3) if layout.data_size > 1 else None
    module, _ = build_module(opened.config, layout, words, source, seq_len=128, layer_built=layer_built)
    own = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in module.parameters())
    (out / f"{rank()}.json").write_text(json.dumps({"taken": memory("VmHWM") - before, "own": own}))


def memory(name: str) -> int:
    """A figure of this process, bytes: VmRSS is what is resident, VmHWM the most that ever was."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Layout(*map(int, sys.argv[2:5])), Path(sys.argv[5]))
