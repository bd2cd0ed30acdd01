"""Runs a training program in which the gradients of chosen steps are not finite.

    POISONED_STEPS=7,30 deepspeed --num_gpus 2 benchmarks/poisoned.py launcher/pretrain.py --config …

The harm is done by a hook on one weight of one rank, where a broken device would do it; the program itself knows nothing of it.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
STEPS = {int(step) for step in os.environ.get("POISONED_STEPS", "").split(",") if step}


def poison(initialize: Any) -> Any:
    """`deepspeed.initialize`, with a hook on the first weight that learns."""

    def poisoned(*arguments: Any, **settings: Any) -> Any:
        engine, *others = initialize(*arguments, **settings)
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
        if last and weights:
            weights[0].register_hook(lambda gradient: gradient * float("nan") if engine.global_steps in STEPS else gradient)
        return engine, *others

    return poisoned


if __name__ == "__main__":
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    program, *arguments = [word for word in sys.argv[1:] if word not in local_rank]
    if STEPS:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.initialize = poison(deepspeed.initialize)
    sys.argv = [program, *arguments, *local_rank]
    runpy.run_path(program, run_name="__main__")
