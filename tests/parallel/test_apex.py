"""NVIDIA's apex is used where it is; the other package of that name is told apart without importing it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lavit_dist.errors import UserError
from lavit_dist.models.llama import RMSNorm
from lavit_dist.parallel.apex import check_apex, rms_norm

NVIDIAS = """
import torch
class FusedRMSNorm(torch.nn.RMSNorm):
    pass
"""


@pytest.fixture(autouse=True)
def forget_apex() -> Iterator[None]:
    """Each test imports its own `apex`, or none."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_without_apex_the_plain_norm_is_built() -> None:
    check_apex()
    assert type(rms_norm(8, 1e-5)) is RMSNorm


def test_nvidias_fused_norm_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "normalization" / "__init__.py").write_text(NVIDIAS)
    monkeypatch.syspath_prepend(tmp_path)
    check_apex()
    assert type(rms_norm(8, 1e-5)).__name__ == "FusedRMSNorm"


def test_the_web_toolkit_is_refused_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="unrelated web toolkit"):
        check_apex()


def test_the_norm_is_that_of_llama() -> None:
    norm = RMSNorm(16, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 16)
    expected = norm.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(norm(x), expected)
