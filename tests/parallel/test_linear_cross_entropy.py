"""The fused loss equals the plain one: values, gradients, z-loss, tables with padding, and chunks of any size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.parallel import linear_cross_entropy
from lavit_dist.parallel.linear_cross_entropy import LinearCrossEntropy, TableShare

WIDTH = 16


def plain(hidden, labels, weight, tables, rows, z_loss):
    """The definition, with all logits in memory."""
    logits = hidden @ torch.cat([table[:count] for table, count in zip(tables, rows, strict=True)]).t()
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return (weight * (cross_entropy + z_loss * logits.logsumexp(-1).square())).sum(), cross_entropy


@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(0, 30), st.integers(1, 50), st.sampled_from([0.0, 1e-3]), st.integers(0, 99)
)
def test_loss_and_gradients_are_those_of_the_plain_one(positions, text, visual, chunk, z_loss, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = text, visual
    hidden = torch.randn(positions, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(count + 5, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True) for count in rows]
    labels = torch.randint(text + visual, (positions,), generator=generator)
    weight = torch.rand(positions, generator=generator) * (torch.rand(positions, generator=generator) > 0.3)
    shares = [TableShare(0, text), TableShare(text, visual)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "CHUNK_POSITIONS", chunk)
        patch.setattr(linear_cross_entropy, "CPU_POSITIONS", max(1, chunk // 3))
        loss, each = LinearCrossEntropy.apply(hidden, labels, weight, shares, z_loss, None, *tables)
    expected, expected_each = plain(hidden, labels, weight, tables, rows, z_loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(each.double(), expected_each, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(3 * loss, (hidden, *tables))
    theirs = torch.autograd.grad(3 * expected, (hidden, *tables))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("below", [10.0, 60.0, 300.0])
def test_labels_whose_whole_table_lies_far_below_the_other_have_their_gradients(below: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.cat([torch.ones(6, 1), 0.1 * torch.randn(6, WIDTH - 1, generator=generator)], 1).requires_grad_()
    tables = [torch.randn(count, WIDTH, generator=generator) for count in (7, 4)]
    tables[1][:, 0] -= below
    inputs = [hidden, *(table.requires_grad_() for table in tables)]
    labels, weight = torch.tensor([0, 7, 8, 9, 10, 7]), torch.ones(6)
    loss, _ = LinearCrossEntropy.apply(hidden, labels, weight, [TableShare(0, 7), TableShare(7, 4)], 0.0, None, *tables)
    expected, _ = plain(hidden, labels, weight, tables, (7, 4), 0.0)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_labels_that_are_all_but_certain_have_their_gradients_in_bf16() -> None:
    """What is left of their probability, 1 - p, is far below bf16's steps around 1."""
    generator = torch.Generator().manual_seed(0)
    table = 0.5 * torch.randn(40, WIDTH, generator=generator)
    table[:8] = 4 * torch.eye(8, WIDTH)
    hidden = (4 * torch.eye(8, WIDTH) + 0.1 * torch.randn(8, WIDTH, generator=generator)).bfloat16().requires_grad_()
    table = table.bfloat16().requires_grad_()
    labels = torch.arange(8)
    loss, _ = LinearCrossEntropy.apply(hidden, labels, torch.ones(8), [TableShare(0, 40)], 0.0, None, table)
    probability = (hidden @ table.t()).double().softmax(-1)  # of logits in bf16, as they are
    left = 1 - probability.gather(-1, labels[:, None])
    assert left.max() < 2**-9
    of_logits = probability - torch.eye(8, 40)
    for ours, right in zip(
        torch.autograd.grad(loss, (hidden, table)), (of_logits @ table.double(), of_logits.t() @ hidden.double()), strict=True
    ):
        assert (ours.double() - right).norm() < 1e-2 * right.norm()


def test_a_partition_whose_gradient_is_0_leaves_the_label_its_own() -> None:
    hidden, table = (torch.full((1, 1), value, requires_grad=True) for value in (1.0, -1.0))
    loss, _ = LinearCrossEntropy.apply(hidden, torch.tensor([0]), torch.ones(1), [TableShare(0, 1)], 0.5, None, table)
    of_hidden, of_table = torch.autograd.grad(loss, (hidden, table))  # of (log_partition^2) / 2, which is -1 by its one logit
    assert (of_hidden.item(), of_table.item()) == pytest.approx((1.0, -1.0))


def test_no_positions_have_no_gradient() -> None:
    table = torch.randn(5, WIDTH, requires_grad=True)
    loss, each = LinearCrossEntropy.apply(
        torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64), torch.empty(0), [TableShare(0, 4)], 0.0, None, table
    )
    (gradient,) = torch.autograd.grad(loss, table)
    assert loss == 0 and not len(each) and not gradient.any()


@pytest.mark.parametrize("frozen", [(True, False), (False, True), (True, True)])
def test_frozen_tables_get_no_gradient_and_change_none(frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, WIDTH, generator=generator, requires_grad=True)
    tables = [torch.randn(count, WIDTH, generator=generator, requires_grad=True) for count in (7, 4)]
    labels, weight = torch.arange(9), torch.ones(9)
    shares = [TableShare(0, 7), TableShare(7, 4)]

    def gradients(tables):
        loss, _ = LinearCrossEntropy.apply(hidden, labels, weight, shares, 0.0, None, *tables)
        return torch.autograd.grad(loss, [tensor for tensor in (hidden, *tables) if tensor.requires_grad])

    of_hidden, *of_tables = gradients(tables)
    found = gradients([table.detach() if still else table for table, still in zip(tables, frozen, strict=True)])
    learning = [of for of, still in zip(of_tables, frozen, strict=True) if not still]
    assert len(found) == 1 + len(learning)
    assert all(map(torch.equal, found, [of_hidden, *learning]))


def test_no_logits_of_all_positions_are_ever_made(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_POSITIONS", 16)
    monkeypatch.setattr(linear_cross_entropy, "CPU_POSITIONS", 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    hidden, table = torch.randn(256, WIDTH, requires_grad=True), torch.randn(1000, WIDTH, requires_grad=True)
    with Watch():
        loss, _ = LinearCrossEntropy.apply(
            hidden, torch.randint(1000, (256,)), torch.ones(256), [TableShare(0, 1000)], 0.0, None, table
        )
        loss.backward()
    assert largest < 256 * 1000 * 4 / 8  # all logits, in fp32, would be 8 times this
