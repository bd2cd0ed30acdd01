"""Writing a checkpoint outside of a training loop."""

from pathlib import Path

from lavit_dist.checkpoint.store import CheckpointStore, Retention
from lavit_dist.checkpoint.writer import CheckpointWriter


def save(root: Path, step: int, training) -> Path:
    """Writes step `step` under `root`, keeping all others, and says where. Collective."""
    store = CheckpointStore(root)
    writer = CheckpointWriter(store, Retention(last=1000))
    writer.begin(step, training.snapshot())
    writer.finish()
    return store.step_folder(step)
