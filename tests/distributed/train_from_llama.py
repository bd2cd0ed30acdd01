"""Program of the tests of initial weights: starts on every rank from `init_from`, exports, trains, exports again.

    train_from_llama.py CONFIG OUT

OUT then holds before/, after/ and resumed/, three Hugging Face folders, the last of a second start, without `init_from`, from the
checkpoint of after/; and metrics.json; or refused.txt, if the settings were refused.
"""

import json
import sys
from pathlib import Path

from saving import save

from lavit_dist.checkpoint.hf import export_hf
from lavit_dist.checkpoint.llama_source import llama_source
from lavit_dist.checkpoint.store import CheckpointStore
from lavit_dist.config.base import load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel.distributed import barrier, rank, world_size
from lavit_dist.parallel.topology import Layout, start_model_parallel
from pipelines.pretrain import open_batches


def main(config_path: str, out: Path) -> None:
    config = load_config(PretrainConfig, config_path)
    layout = Layout.of(config.parallel, world_size())
    batches = open_batches(config)
    source = llama_source(config, batches.rows.vocabulary, batches.rows.encoding.visual_tokenizer)
    start_model_parallel(layout, config.num_threads)
    from lavit_dist.engine.pretraining import Pretraining

    try:
        training = Pretraining(config, layout, batches, source)
    except UserError as error:
        (out / "refused.txt").write_text(str(error))
        return
    checkpoints = out / "checkpoints"
    resumed: Pretraining | None = None

    def export(step: int, name: str) -> None:
        saved = save(checkpoints, step, resumed or training)
        if rank() == 0:
            export_hf(saved, out / name, config.text_tokenizer)
        barrier()

    export(0, "before")
    metrics = [training.train_step(step) for step in range(config.total_steps)]
    export(config.total_steps, "after")
    resumed = Pretraining(config, layout, batches)
    resumed.load(CheckpointStore(checkpoints).step_folder(config.total_steps))
    export(config.total_steps, "resumed")
    if rank() == 0:
        (out / "metrics.json").write_text(json.dumps([dict(step) for step in metrics]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
