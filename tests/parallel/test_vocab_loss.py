"""What is reported of the loss."""

import pytest
import torch

from lavit_dist.parallel.vocab_loss import LossReport


def test_losses_by_modality_are_plain_means_whatever_tokens_weigh():
    cross_entropy = torch.tensor([1.0, 3.0, 10.0, 20.0, 99.0])
    modality = torch.tensor([0, 0, 1, 1, 0], dtype=torch.uint8)
    for text, image in ((1.0, 1.0), (2.0, 0.01)):
        weight = torch.tensor([text, text, image, image, 0.0]) / (2 * text + 2 * image)
        report = LossReport()
        report.add((weight * cross_entropy).sum(), cross_entropy, weight, modality)
        sums = report.take()
        assert (sums.text_loss, sums.text_tokens, sums.image_loss, sums.image_tokens) == (4, 2, 30, 2)
        assert sums.loss == pytest.approx((2 * text * 2 + 2 * image * 15) / (2 * text + 2 * image))
