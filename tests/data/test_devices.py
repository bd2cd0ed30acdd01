"""Pixels stay on their GPU: devices are followed without data (torch's fake tensors), so that no GPU is needed."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lavit_dist.data.image import normalise, resized
from lavit_dist.data.latent_encoder import for_latents


@pytest.fixture
def pixels():
    with FakeTensorMode():
        yield torch.zeros(2, 3, 40, 40, dtype=torch.uint8, device="cuda")


def test_what_towers_and_autoencoders_see_is_made_there(pixels):
    for size, made in ((32, resized(normalise(pixels), 32)), (24, for_latents(normalise(pixels), 24))):
        assert made.device.type == "cuda"
        assert made.shape == (2, 3, size, size)


def test_the_check_can_fail(pixels):
    with pytest.raises(RuntimeError, match="same device"):
        pixels + torch.ones(3, 1, 1)
