"""Program of the layout tests: trains on every rank, saves in the middle, trains on, goes back and trains again.

    train_on_layout.py CONFIG OUT

OUT then holds metrics.json (all steps, and those after going back), model/ (the export of the last step), and from the last
stage logits.pt of the first micro-batch after it.
"""

import json
import sys
from pathlib import Path

import torch

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.base import load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.parallel.distributed import barrier, init_distributed, rank, world_size
from lavit_dist.parallel.lean_imports import import_megatron
from lavit_dist.parallel.topology import Layout, init_model_parallel
from pipelines.pretrain import open_batches

SAVED_STEP = 12
COMPARED = ("loss", "text_loss", "image_loss", "grad_norm", "learning_rate", "tokens")


def main(config_path: str, out: Path) -> None:
    config = load_config(PretrainConfig, config_path)
    layout = Layout.of(config.parallel, world_size())
    batches = open_batches(config)
    init_distributed(config.num_threads)
    import_megatron()
    init_model_parallel(layout)
    from lavit_dist.engine.pretraining import Pretraining

    def train(training: Pretraining, first: int, last: int) -> list[dict[str, float]]:
        steps = []
        for step in range(first, last):
            metrics = training.train_step(step)
            steps.append({name: metrics[name] for name in COMPARED if name in metrics})
        return steps

    store = CheckpointStore(out / "checkpoints")
    training = Pretraining(config, layout, batches)
    straight = train(training, 0, SAVED_STEP)
    store.save(SAVED_STEP, training.save)
    straight += train(training, SAVED_STEP, config.total_steps)
    store.save(config.total_steps, training.save)

    logits: list[torch.Tensor] = []
    if training.place.pipe == layout.pipe_size - 1:
        layers = training.engine.module if layout.pipe_size == 1 else training.engine.module.forward_funcs
        record = layers[-1].projection.register_forward_pre_hook(lambda head, inputs: logits.append(head.logits(inputs[0])))
        training.train_step(config.total_steps)
        record.remove()
    else:
        training.train_step(config.total_steps)
    if logits and training.place.data == training.place.tensor == 0:
        torch.save(logits[0], out / "logits.pt")

    again = Pretraining(config, layout, batches)
    again.load(store.step_folder(SAVED_STEP))
    resumed = train(again, SAVED_STEP, config.total_steps)
    if rank() == 0:
        (out / "metrics.json").write_text(json.dumps({"straight": straight, "resumed": resumed}))
        export_hf(store.step_folder(config.total_steps), out / "model", config.text_tokenizer)
    barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
