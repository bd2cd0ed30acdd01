"""Program of the reshape tests: goes on from checkpoints of other layouts, in the same processes.

    train_reshaped.py CONFIG RUNS OUT

RUNS is a list of `[setting, checkpoint]`: OUT/NAME/metrics.json has the steps from the one at which `checkpoint`, a folder, was written, or
with null from the first; OUT/NAME/checkpoints has that step, as it was loaded, or reached.
"""

import json
import sys
from pathlib import Path

from saving import save
from settings import Setting
from train_on_layouts import COMPARED, on_layouts

from lavit_dist.checkpoint.llama_state import read_facts
from lavit_dist.config.base import load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.parallel.distributed import barrier, init_distributed, rank
from lavit_dist.parallel.lean_imports import import_megatron
from pipelines.pretrain import open_batches

SAVED_STEP = 4


def main(config_path: str, runs_path: str, out: Path) -> None:
    base = load_config(PretrainConfig, config_path)
    batches = open_batches(base)
    init_distributed(base.num_threads)
    import_megatron()
    runs = [(Setting(**values), checkpoint) for values, checkpoint in json.loads(Path(runs_path).read_text())]
    settings = on_layouts([setting for setting, _ in runs], base, batches)
    for (setting, checkpoint), (_, config, layout, _) in zip(runs, settings, strict=True):
        run(config, layout, batches, checkpoint and Path(checkpoint), out / setting.name)


def run(config, layout, batches, checkpoint, folder) -> None:
    from lavit_dist.engine.pretraining import Pretraining

    training = Pretraining(config, layout, batches)
    first = 0
    if checkpoint is not None:
        training.load(checkpoint)
        first = read_facts(checkpoint).step
    steps = []
    for step in range(first, config.total_steps):
        if step == SAVED_STEP:
            save(folder / "checkpoints", step, training)
        metrics = training.train_step(step)
        steps.append({name: metrics[name] for name in COMPARED if name in metrics})
    if rank() == 0:
        (folder / "metrics.json").write_text(json.dumps(steps[max(0, SAVED_STEP - first) :]))
    barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
