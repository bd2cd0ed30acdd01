"""Compiled functions work wherever the package lies."""

import numpy as np
from numba.core.caching import CompileResultCacheImpl

from lavit_dist.data.compiled import compiled


def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result


def test_what_can_not_be_kept_is_compiled_all_the_same(monkeypatch):
    assert compiled(total)(np.arange(5)) == 10
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(total)(np.arange(6)) == 15
