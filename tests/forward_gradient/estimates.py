"""Exact expectations of `forward_gradient`, and three small networks to take them of.

The estimate is quadratic in the noise, so its expectation over signs is its mean over any set of sign vectors whose
second moments are those of independent ones. The rows of a Hadamard matrix are such a set: as many draws as there are
perturbed elements give the expectation exactly.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lgkernels.functional import forward_gradient
from lgkernels.random import RandomFeedback
from tests.support.tolerances import GOLDEN, assert_relative

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of passes through a few numbers: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Hadamard(RandomFeedback):
    """Element j of draw i is the sign (i, j) of a Hadamard matrix of `draws` rows, times scale."""

    def __init__(self, draws, scale=1.0):
        super().__init__(0, law="sign", scale=scale)
        self.draws, self.first, self.elements = draws, {}, 0

    def materialize(self, shape, device=None, dtype=None, *, offset=(0, 0)):
        region, row = divmod(offset[0], 2**32 // (2 * self.draws))  # each draw has a region for weights, and another
        draw, of_outputs = divmod(region, 2)
        count = int(np.prod(shape))
        if (of_outputs, row) not in self.first:
            self.first[of_outputs, row] = self.elements
            self.elements += count
        columns = np.arange(count) + self.first[of_outputs, row]
        assert self.elements <= self.draws, f"{self.draws} draws are too few for {self.elements} elements"
        odd = np.array([bin(draw & j).count("1") & 1 for j in columns.tolist()])
        return torch.from_numpy(self.scale * (1.0 - 2.0 * odd)).view(shape).to(device=device, dtype=dtype)


def expectation(function, *inputs, draws, scale=1.0, **options):
    torch.manual_seed(3)
    return forward_gradient(function, *inputs, draws=draws, noise=Hadamard(draws, scale), **options)


def exact(function, *inputs, modules):
    """By back-propagation, from the same masks of dropout."""
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        loss = function(*inputs).mean()
    parameters = dict(modules.named_parameters())
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return loss, {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(learning.items(), gradients)}


def check(function, *inputs, modules, draws, tolerance=GOLDEN["float64"], **options):
    loss, gradients = expectation(function, *inputs, modules=modules, draws=draws, **options)
    true_loss, expected = exact(function, *inputs, modules=modules)
    assert_relative("loss", loss, true_loss, tolerance)
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        parameter = dict(modules.named_parameters())[name]
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
    together = [
        torch.cat([g.flatten() for g in of.values()]) for of in (gradients, expected)
    ]  # a bias before a norm is 0
    assert_relative("gradients", *together, tolerance)


class CNN(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, stride=2, padding="valid"), norm or nn.GroupNorm(1, 2)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.second = nn.Conv2d(2, 2, 2, padding="same", groups=2, padding_mode="circular")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(self.relu(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)).flatten(1))


class Block(nn.Module):
    """A transformer block on tokens with a learned position, and the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(5, 3, padding_idx=0), nn.Parameter(torch.randn(2, 3) / 3)
        self.block = nn.TransformerEncoderLayer(3, 1, 2, dropout=0.2, batch_first=True, activation="gelu")
        self.head = nn.Linear(3, 3)

    def forward(self, indices):
        return self.head(self.block(self.token(indices) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell=nn.GRUCell):
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(2, 2), cell(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 3, dtype=x.dtype)
        for step in range(x.shape[1]):  # the same layer at each step
            state = self.cell(torch.tanh(self.embed(x[:, step])), state)
        return self.head(state)


TARGET = torch.tensor([0, 2, 1])


@functools.cache
def image():
    return torch.randn(3, 1, 5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


@functools.cache
def sequence():
    return torch.randn(3, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


INDICES = torch.tensor([[1, 4], [2, 0], [3, 2]])
REAL = {"cnn": (CNN, image), "attention": (Block, lambda: INDICES), "recurrent": (Recurrent, sequence)}
DRAWS = 128  # more than elements that are perturbed


def real(name, dtype=DOUBLE):
    torch.manual_seed(0)
    make, x = REAL[name]
    x = x()
    return make().to(dtype), x.to(dtype) if x.is_floating_point() else x


def losses_of(model, reduction="none"):
    return lambda x, target: F.cross_entropy(model(x), target, reduction=reduction)
