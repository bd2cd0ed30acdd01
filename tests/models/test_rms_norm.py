"""The norm and its gradients are those of the definition, and of torch."""

import pytest
import torch
import torch.nn.functional as F

from lavit_dist.models.rms_norm import RMSNorm

EPS = 1e-5


def gradients(output: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), of)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (4, 2, 16)])
def test_the_norm_and_its_gradients_are_those_of_the_definition(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(16, EPS)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    given = x.detach().clone()
    expected = norm.weight * (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt())
    found = norm(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, x, norm.weight), gradients(expected, x, norm.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, given)


def test_bf16_is_as_exact_as_torchs() -> None:
    norm = RMSNorm(64, EPS).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = (1e3 * torch.randn(50, 64)).bfloat16().requires_grad_()
    exact_x, exact_weight = (of.detach().double().requires_grad_() for of in (x, norm.weight))
    exact = F.rms_norm(exact_x, (64,), exact_weight, EPS)
    torchs = F.rms_norm(x, (64,), norm.weight, EPS)
    ours = norm(x)

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.detach().double() - wanted.detach()).norm() / wanted.norm())

    assert error(ours, exact) <= 1.1 * error(torchs, exact)
    wanted = gradients(exact, exact_x, exact_weight)
    for mine, other, right in zip(gradients(ours, x, norm.weight), gradients(torchs, x, norm.weight), wanted, strict=True):
        assert error(mine, right) <= 1.1 * error(other, right)
