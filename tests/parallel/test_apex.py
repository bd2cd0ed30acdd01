"""NVIDIA's apex is told from the other package of that name without importing it, and with its kernels from without."""

from pathlib import Path

import pytest

from lavit_dist.errors import UserError
from lavit_dist.parallel.apex import check_apex, has_apex_kernels


def test_no_apex_is_fine() -> None:
    check_apex()
    assert not has_apex_kernels("amp_C")


def test_nvidias_is_used_with_its_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    check_apex()
    assert not has_apex_kernels("amp_C")  # a Python-only build
    (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_apex_kernels("amp_C")


def test_the_web_toolkit_is_refused_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="unrelated web toolkit"):
        check_apex()
