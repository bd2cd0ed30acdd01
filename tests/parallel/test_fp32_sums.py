"""Sums of gradients are exact to fp32, however they are cut, and only the total changes."""

import pytest
import torch

from lavit_dist.parallel import fp32_sums
from lavit_dist.parallel.fp32_sums import add_to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (29,), (7, 5), (3, 50), (0, 4)])
def test_the_sum_is_that_of_the_terms_in_fp32(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32_sums, "CPU_NUMBERS", 10)
    total, term = torch.randn(shape), torch.randn(shape).to(dtype)
    expected, given = total + term.float(), term.clone()
    add_to(total, term)
    assert torch.equal(total, expected)
    assert torch.equal(term, given)
