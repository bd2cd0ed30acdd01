"""The moving average: where it ends, and what is copied instead."""

import torch
from torch import nn

from lavit_dist.engine.averaged_weights import AveragedWeights


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_it_approaches_weights_that_stay_and_copies_what_no_gradient_moves():
    live = module()
    averages = AveragedWeights(live, 0.9)
    live[1].weight.requires_grad_(False)
    with torch.no_grad():
        live[0].weight.add_(1.0)
        live[1].weight.add_(1.0)
        live[1].running_mean.add_(1.0)
    averages.update(1000)
    mean = averages.product
    torch.testing.assert_close(live[0].weight - mean[0].weight, torch.full((3, 3), 0.9))
    assert torch.equal(mean[1].weight, live[1].weight)
    assert torch.equal(mean[1].running_mean, live[1].running_mean)
    for step in range(1001, 1200):
        averages.update(step)
    torch.testing.assert_close(mean[0].weight, live[0].weight)
    assert not any(parameter.requires_grad for parameter in mean.parameters())


def test_without_a_decay_the_product_is_the_module():
    live = module()
    averages = AveragedWeights(live, 0.0)
    averages.update(0)
    assert averages.product is live
    assert averages.state_dict() == {}


def test_its_state_restores_it():
    first, second = AveragedWeights(module(), 0.5), AveragedWeights(module(), 0.5)
    with torch.no_grad():
        first.module[0].weight.add_(1.0)
    first.update(100)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.product[0].weight, second.product[0].weight)
