"""SwiGLU and its gradient are those of the definition, and its input is kept as it was."""

import torch
import torch.nn.functional as F

from lavit_dist.parallel.swiglu import SwiGLU


def test_values_and_gradients_are_those_of_the_definition() -> None:
    gate_and_up = torch.randn(5, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU.apply, gate_and_up)
    gate, up = gate_and_up.chunk(2, -1)
    torch.testing.assert_close(SwiGLU.apply(gate_and_up), F.silu(gate) * up)


def test_nothing_but_the_input_is_kept() -> None:
    kept: list[torch.Tensor] = []
    gate_and_up = torch.randn(3, 8, requires_grad=True)
    given = gate_and_up.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        hidden = SwiGLU.apply(gate_and_up)
    hidden.sum().backward()
    assert [tensor.data_ptr() for tensor in kept] == [gate_and_up.data_ptr()]
    assert torch.equal(gate_and_up, given)
