"""Program of the checks' tests: trains with checks, then does harm of several kinds, each on one rank, and undoes it.

    check_on_layout.py CONFIG OUT

OUT then holds said-RANK.json: per harm, what the checks said on that rank, and the name and rank that were harmed.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from saving import save

from lavit_dist.config.base import load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel.distributed import barrier, rank, world_size
from lavit_dist.parallel.topology import Layout, start_model_parallel
from pipelines.pretrain import open_batches

STEPS = 3
NORM = "1.layer.input_layernorm.weight"
MATRIX = "1.layer.mlp.linear_fc2.weight"


@contextlib.contextmanager
def flipped(tensor: torch.Tensor | None) -> Iterator[None]:
    """Within it, the lowest bit of the last number of `tensor` is another; nothing is done to None."""
    if tensor is None:
        yield
        return
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).flatten()
    bits[-1] ^= 1
    yield
    bits[-1] ^= 1


@contextlib.contextmanager
def filled(tensor: torch.Tensor, value: float) -> Iterator[None]:
    """Within it, the first number of `tensor` is `value`."""
    before = tensor.flatten()[0].clone()
    tensor.view(-1)[0] = value
    yield
    tensor.view(-1)[0] = before


def main(config_path: str, out: Path) -> None:
    config = load_config(PretrainConfig, config_path)
    layout = Layout.of(config.parallel, world_size())
    batches = open_batches(config)
    start_model_parallel(layout, config.num_threads)
    from lavit_dist.engine.held_weights import HeldWeight, held_weights
    from lavit_dist.engine.pretraining import Pretraining

    training = Pretraining(config, layout, batches)
    for step in range(STEPS):
        training.train_step(step)
    saved = save(out / "checkpoints", STEPS, training)
    training = Pretraining(config, layout, batches)
    training.load(saved)
    training.train_step(STEPS)

    said: dict[str, Any] = {}

    def try_harm(kind: str, harmed: int, harm: contextlib.AbstractContextManager[None]) -> None:
        with harm if rank() == harmed else contextlib.nullcontext():
            try:
                training.checks.check_state("Here")
                said[kind] = ""
            except UserError as error:
                said[kind] = str(error)

    last = layout.world_size - 1
    held: dict[str, HeldWeight] = {weight.name: weight for weight in held_weights(training.engine)}
    # The first stage's last rank; where there is no pipeline, the last of all.
    harmed = last // layout.pipe_size
    norm, matrix = held.get(NORM), held.get(MATRIX)
    if norm is not None and matrix is not None:
        shared = norm.whole if norm.whole is not None else norm.part
        try_harm("norm", harmed, flipped(shared))
        try_harm("matrix", harmed, flipped(matrix.whole))
        masters = [weight for weight in held.values() if weight.master is not None and len(weight.master)]
        try_harm("master", harmed, filled(masters[0].master, 9.0) if masters else contextlib.nullcontext())
        moments = [weight for weight in held.values() if weight.moments and len(weight.moments["exp_avg"])]
        try_harm("moment", harmed, filled(moments[0].moments["exp_avg"], torch.nan))
        said["master of"], said["moment of"] = masters[0].name if masters else "", moments[0].name
    else:
        for kind in ("norm", "matrix", "master", "moment"):
            try_harm(kind, harmed, contextlib.nullcontext())
    state = next(iter(training.engine.basic_optimizer.state.values()))
    steps = [state["step"] for state in training.engine.basic_optimizer.state.values()]
    assert state["step"] == STEPS + 1

    @contextlib.contextmanager
    def late() -> Iterator[None]:
        for step in steps:
            step -= 1
        yield
        for step in steps:
            step += 1

    try_harm("step", last, late())

    @contextlib.contextmanager
    def faster() -> Iterator[None]:
        group = training.engine.basic_optimizer.param_groups[0]
        plain = training.engine.get_lr
        training.engine.get_lr = lambda: [group["lr"] * 2]
        yield
        training.engine.get_lr = plain

    try_harm("learning rate", last, faster())

    @contextlib.contextmanager
    def steeper() -> Iterator[None]:
        plain = training.engine._global_grad_norm
        training.engine._global_grad_norm = plain * 1.5
        yield
        training.engine._global_grad_norm = plain

    try_harm("gradient norm", last, steeper())
    try_harm("nothing", last, contextlib.nullcontext())

    # A gradient that isn't finite is no harm, since the step isn't taken: the run goes on, or back.
    poisoned = next(weight for weight in training.engine.module.parameters() if weight.requires_grad)
    hook = poisoned.register_hook(lambda gradient: gradient * torch.nan if rank() == last else gradient)
    before = [part.clone() for part in _masters(held_weights(training.engine))]
    norm_of_step = training.train_step(STEPS + 1)["grad_norm"]
    hook.remove()
    after = _masters(held_weights(training.engine))
    said["skipped"] = {"not finite": not math.isfinite(norm_of_step), "weights as before": all(map(torch.equal, before, after))}
    training.load(saved)
    training.train_step(STEPS)
    (out / f"said-{rank()}.json").write_text(json.dumps(said))
    barrier()


def _masters(held: Iterable[Any]) -> list[torch.Tensor]:
    """What each weight on this rank is in full precision."""
    of_weights = (weight.whole if weight.master is None else weight.master for weight in held)
    return [tensor.detach() for tensor in of_weights if tensor is not None]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
