"""The digest by which ranks compare weights tells apart what differs in one bit or in the order of two numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.base import build, load_config
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.config.training import ChecksConfig
from lavit_dist.errors import UserError
from lavit_dist.parallel.lean_imports import import_megatron

import_megatron()
from lavit_dist.engine.checks import _digest  # noqa: E402 (import_megatron comes before all that names megatron)

REQUIRED = ["run_dir=r", "ids=i", "text_tokenizer=t", "total_steps=1", "global_batch_size=1", "micro_batch_size=1"]


@given(st.integers(1, 5000), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), st.data())
def test_a_change_of_one_bit_or_an_exchange_changes_the_digest(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    digest = _digest(values)
    assert _digest(values.clone()) == digest
    first, second = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    bits = values.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    bits[first] ^= 1 << data.draw(st.integers(0, 14))
    assert _digest(bits.view(dtype)) != digest
    exchanged = values.clone()
    exchanged[first], exchanged[second] = values[second], values[first]
    assert (_digest(exchanged) == digest) == (values[first] == values[second])


@pytest.mark.parametrize(
    ("argument", "every_steps"), [("checks=true", 100), ("checks=false", 0), ("checks.every_steps=7", 7), ("seed=0", 0)]
)
def test_checks_are_a_switch_or_a_cadence(argument: str, every_steps: int) -> None:
    config = load_config(PretrainConfig, None, [*REQUIRED, argument])
    assert config.checks == ChecksConfig(every_steps=every_steps)
    assert build(PretrainConfig, {**dict(item.split("=") for item in REQUIRED), "checks": {"every_steps": every_steps}}) == config


@pytest.mark.parametrize("argument", ["checks.every_step=7", "checks=often", "checks.every_steps=-1"])
def test_a_wrong_cadence_is_named(argument: str) -> None:
    with pytest.raises(UserError, match="checks"):
        load_config(PretrainConfig, None, [*REQUIRED, argument])
