"""Muon beside AdamW: who moves what, kernels as matrices, and a state that continues exactly."""

import copy

import torch
from torch import nn

from lavit_dist.config.training import OptimizerConfig
from lavit_dist.engine.muon import MOMENTUM, MuonWithAdamW

CONFIG = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.02, muon_weight_decay=0.01)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(4, 6, 3, padding=1)])
        self.blocks = nn.ModuleList([nn.Linear(6, 5)])
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down_blocks[0](self.conv_in(x).relu()).relu().mean((2, 3))
        return self.head(self.blocks[0](x))


def take_steps(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for parameter in net.parameters():
            parameter.grad = None
        net(x).square().mean().backward()
        optimizer.step()


def test_hidden_matrices_and_kernels_go_to_muon_and_the_rest_to_adamw() -> None:
    net = Net()
    adamw, muon = MuonWithAdamW(net, CONFIG).parts
    of_muon = {tensor.data_ptr() for group in muon.param_groups for tensor in group["params"]}
    of_adamw = {tensor.data_ptr() for group in adamw.param_groups for tensor in group["params"]}
    assert of_muon == {net.blocks[0].weight.data_ptr(), net.down_blocks[0].weight.data_ptr()}
    assert of_muon | of_adamw == {parameter.data_ptr() for parameter in net.parameters()}
    assert not of_muon & of_adamw


def test_a_kernel_moves_as_its_matrix_would() -> None:
    net = Net()
    kernel = net.down_blocks[0].weight
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    alone = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.01, momentum=MOMENTUM, adjust_lr_fn="original")
    optimizer = MuonWithAdamW(net, CONFIG)
    for step in range(3):
        take_steps(net, optimizer, range(step, step + 1))
        matrix.grad = kernel.grad.flatten(1).clone()
        alone.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_a_restored_state_goes_on_as_if_nothing_had_been() -> None:
    net = Net()
    optimizer = MuonWithAdamW(net, CONFIG)
    take_steps(net, optimizer, range(3))
    weights = copy.deepcopy(net.state_dict())
    kept = {name: copy.deepcopy(optimizer.states()[weight]) for name, weight in net.named_parameters()}
    take_steps(net, optimizer, range(3, 6))
    other = Net()
    resumed = MuonWithAdamW(other, CONFIG)
    other.load_state_dict(weights)
    resumed.begin()
    states = resumed.states()
    for name, weight in other.named_parameters():
        assert states[weight].keys() == kept[name].keys()
        for kind, value in kept[name].items():
            states[weight][kind].copy_(value.view(states[weight][kind].shape))
    take_steps(other, resumed, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
