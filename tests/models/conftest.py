"""A small tokenizer that the tests of its parts share."""

import pytest
import torch

from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer

SMALL = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=32, layers=2, head_width=8, mlp_hidden=64, head_out=16),
    merger=MergerConfig(layers=2, heads=4, mlp_hidden=64),
    codebook=CodebookConfig(size=24, dim=8),
    decoder=TokenizerDecoderConfig(depth=2, heads=4, mlp_hidden=64, unet_dim=16),
)


@pytest.fixture(scope="session")
def tokenizer() -> VisualTokenizer:
    """Untrained; 16 patches of 32 channels, 24 codes of 8."""
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(SMALL)
    initialise(tokenizer)
    return tokenizer
