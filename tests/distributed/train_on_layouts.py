"""Program of the layout tests: trains under one setting after the other, in the same processes.

    train_on_layouts.py CONFIG SETTINGS OUT

OUT/NAME/metrics.json then holds the steps of each setting. A setting that `resumes` also saves in the middle, trains on, goes back
and trains again; OUT/NAME then also holds model/ (the export of the last step), and, of data rank 0,
logits.pt of the first micro-batch after it.
"""

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from row_variants import OneDocumentPerRow, OneSidedSupervision
from saving import save
from settings import ONE_PER_ROW, ONE_SIDED, Setting

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.base import build, load_config, to_dict
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.parallel.distributed import barrier, init_distributed, rank, world_size
from lavit_dist.parallel.lean_imports import import_megatron
from lavit_dist.parallel.topology import Layout, init_model_parallel
from pipelines.pretrain import open_batches

COMPARED = ("loss", "text_loss", "image_loss", "grad_norm", "learning_rate", "tokens")
ROW_OF_ONE_DOCUMENT = 64
"""Tokens: more than any document has."""
ROWS_OF_ONE_DOCUMENT = 64
"""Rows of a step: more than any global batch has documents."""


def main(config_path: str, settings_path: str, out: Path) -> None:
    base = load_config(PretrainConfig, config_path)
    settings = [Setting(**values) for values in json.loads(Path(settings_path).read_text())]
    packed = open_batches(base)
    init_distributed(base.num_threads)
    import_megatron()
    for setting, config, layout, batches in on_layouts(settings, base, packed):
        folder = out / setting.name
        folder.mkdir(exist_ok=True)
        run(setting, config, layout, batches, folder)


def on_layouts(
    settings: Iterable[Setting], base: PretrainConfig, packed: GlobalBatches
) -> Iterator[tuple[Setting, PretrainConfig, Layout, GlobalBatches]]:
    """Each setting with its configuration, layout and batches, while megatron-core's groups are those of its layout."""
    from megatron.core import parallel_state

    current: Layout | None = None
    for setting in settings:
        config, batches = variant(setting, base, packed)
        layout = Layout.of(config.parallel, world_size())
        if layout != current:
            if current is not None:
                parallel_state.destroy_model_parallel()
            init_model_parallel(layout)
            current = layout
        yield setting, config, layout, batches
        gc.collect()  # engines hold themselves in cycles


def variant(setting: Setting, base: PretrainConfig, packed: GlobalBatches) -> tuple[PretrainConfig, GlobalBatches]:
    """The configuration and the batches of a setting."""
    changes = dict(setting.changes)
    batches = packed
    if setting.rows == ONE_PER_ROW:
        changes |= {"seq_len": ROW_OF_ONE_DOCUMENT, "global_batch_size": ROWS_OF_ONE_DOCUMENT, "micro_batch_size": 8}
        batches = OneDocumentPerRow(packed, ROW_OF_ONE_DOCUMENT, ROWS_OF_ONE_DOCUMENT)
    elif setting.rows == ONE_SIDED:
        batches = OneSidedSupervision(packed)
    return build(PretrainConfig, to_dict(base) | changes), batches


def run(setting: Setting, config: PretrainConfig, layout: Layout, batches: GlobalBatches, folder: Path) -> None:
    from lavit_dist.engine.pretraining import Pretraining

    def train(training: Pretraining, first: int, last: int) -> list[dict[str, float]]:
        steps = []
        for step in range(first, last):
            metrics = training.train_step(step)
            steps.append({name: metrics[name] for name in COMPARED if name in metrics})
        return steps

    training = Pretraining(config, layout, batches)
    saved_step = config.total_steps * 3 // 5
    straight = train(training, 0, saved_step)
    checkpoints = folder / "checkpoints"
    if setting.resumes:
        save(checkpoints, saved_step, training)
    straight += train(training, saved_step, config.total_steps)
    resumed = []
    if setting.resumes:
        last = save(checkpoints, config.total_steps, training)
        save_logits(training, config.total_steps, folder)
        again = Pretraining(config, layout, batches)
        again.load(CheckpointStore(checkpoints).step_folder(saved_step))
        resumed = train(again, saved_step, config.total_steps)
    if rank() == 0:
        if setting.resumes:
            export_hf(last, folder / "model", config.text_tokenizer)
        (folder / "metrics.json").write_text(json.dumps({"straight": straight, "resumed": resumed}))  # the last: the run is whole
    barrier()


def save_logits(training, step: int, folder: Path) -> None:
    """The logits of the first micro-batch of `step`, which is trained on."""
    logits: list[torch.Tensor] = []
    if training.place.pipe == training.layout.pipe_size - 1:
        layers = training.engine.module if training.layout.pipe_size == 1 else training.engine.module.forward_funcs
        record = layers[-1].projection.register_forward_pre_hook(lambda head, inputs: logits.append(head.logits(inputs[0])))
        training.train_step(step)
        record.remove()
    else:
        training.train_step(step)
    if logits and training.place.data == training.place.tensor == 0:
        torch.save(logits[0], folder / "logits.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
