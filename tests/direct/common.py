"""Shared by the tests of DirectTrainer: a small network and its data, and an optimizer that keeps its gradients."""

import torch
from torch import nn

RULES = ("dfa", "sdfa", "drtp", "shallow")


class Kept(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(trainer):
    return [g for optimizer in trainer.optimizers if optimizer for g in optimizer.seen]


def network(norm=False):
    torch.manual_seed(3)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), *middle, nn.Tanh(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(24, 12), nn.Tanh()),
        nn.Linear(12, 3),
    ]


def images(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3


def kept(parameters):
    return Kept(parameters, lr=1.0)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def weights(trainer):
    return {
        f"{i}.{name}": p.detach().clone()
        for i, block in enumerate(trainer.blocks)
        for name, p in block.state_dict().items()
    }


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
