"""A small tokenizer that the tests of its parts share."""

import pytest
import torch

from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from tests.small_tokenizer import SMALL


@pytest.fixture(scope="session")
def tokenizer() -> VisualTokenizer:
    """Untrained, of the sizes of `SMALL`."""
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(SMALL)
    initialise(tokenizer)
    return tokenizer
