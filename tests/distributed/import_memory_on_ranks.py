"""Program of the memory test: builds this rank's layers from a LLaMA folder; writes OUT/RANK.json.

import_memory_on_ranks.py FOLDER TENSOR_SIZE PIPELINE_SIZE OUT
"""

import json
import re
import sys
from pathlib import Path

from lavit_dist.checkpoint.llama_folder import LlamaFolder
from lavit_dist.checkpoint.llama_source import LlamaSource
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.distributed import init_distributed, rank
from lavit_dist.parallel.lean_imports import import_megatron
from lavit_dist.parallel.topology import Layout, init_model_parallel


def main(folder: Path, tensor: int, pipeline: int, out: Path) -> None:
    layout = Layout(tensor, pipeline, 1)
    init_distributed(1)
    import_megatron()
    init_model_parallel(layout)
    from lavit_dist.engine.llama_engine import build_module

    before = memory("VmRSS")
    opened = LlamaFolder(folder)
    words = Vocabulary(opened.rows, 126)
    source = LlamaSource(opened, opened.config, words, new_rows="mean_noise")
    module, _ = build_module(opened.config, layout, words, source, seq_len=128)
    own = sum(parameter.nbytes for parameter in module.parameters())
    (out / f"{rank()}.json").write_text(json.dumps({"taken": memory("VmHWM") - before, "own": own}))


def memory(name: str) -> int:
    """A figure of this process, bytes: VmRSS is what is resident, VmHWM the most that ever was."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
