"""What does not fit is refused by name before a weight moves, or left as it is: layers, options, states, names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import lgkernels.nn as lnn
from lgkernels.optim import fuse_update
from tests.fused_update.test_fused_update import OPTIMIZERS, assert_same_weights, batch, network


class Halved(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


OTHERS = {"Halved": lambda: Halved(6, 6), "Standardised": lambda: Standardised(6, 6, 1), "Parametrized": parametrized}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_layer_that_computes_something_else(kind):
    torch.manual_seed(0)
    plain = nn.ModuleList([OTHERS[kind](), nn.Linear(6, 6)])
    fused = copy.deepcopy(plain)
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in (plain, fused)]
    with pytest.raises(ValueError, match=f"include: layer '0' must be nn.* itself .*, got the subclass {kind}"):
        fuse_update(fused, optimizers[1], include=["0", "1"])
    assert fuse_update(fused, optimizers[1], min_weights=1, exclude=["0"]).layers == ["1"]
    for layer in fused:
        vars(layer).pop("forward", None)
    assert fuse_update(fused, optimizers[1], min_weights=1).layers == ["1"]
    for model, optimizer in zip((plain, fused), optimizers):
        x = batch(0)[..., None, None] if kind == "Standardised" else batch(0)
        for _ in range(2):
            optimizer.zero_grad()
            model[1](model[0](x).flatten(1)).square().mean().backward()
            optimizer.step()
    assert_same_weights(plain, fused, rtol=1e-5, atol=1e-6)


def test_what_convert_makes_is_fused():
    for rule in ("fa", "usf"):
        model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Flatten(1), nn.Linear(6, 6))
        model = lnn.convert(model, rule, last_layer="convert", verbose=False)
        assert fuse_update(model, torch.optim.SGD(model.parameters(), 0.1), min_weights=1).layers == ["0", "2"]


def _amsgrad_checkpoint(optimizer):
    other = torch.optim.Adam(network().parameters(), amsgrad=True)
    optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("how", [_amsgrad_checkpoint, lambda o: o.param_groups[0].update(amsgrad=True)])
def test_options_that_come_later(how):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    fuse_update(model, optimizer, min_weights=1)
    how(optimizer)
    model(batch(0)).sum().backward()
    with pytest.raises(ValueError, match="optimizer must not have amsgrad=True"):
        optimizer.step()
    assert_same_weights(model, network(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("adam", dict(exp_avg=torch.zeros(3, 3)), r"'exp_avg', a tensor of shape \(8, 10\), .*, got shape \(3, 3\)"),
        ("adam", dict(exp_avg=None), "'exp_avg', .*, got none"),
        ("adam", dict(exp_avg_sq=torch.zeros(8, 10, dtype=torch.int64)), "'exp_avg_sq', .*, got shape .* int64"),
        ("adam", dict(exp_avg_sq=torch.zeros(8, 10, device="meta")), "'exp_avg_sq', .* on cpu, got .* on meta"),
        ("adam", dict(step=3.0), "'step', a tensor of one number, got 3.0"),
        ("momentum", dict(momentum_buffer=torch.zeros(3, 3)), r"'momentum_buffer', .*, got shape \(3, 3\)"),
    ],
)
def test_states_that_do_not_fit(kind, changes, message):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    fuse_update(model, optimizer, min_weights=1)
    model(batch(0)).sum().backward()
    optimizer.step()
    state = optimizer.state[model[2].weight]
    state.update(changes)
    for key in [key for key, value in state.items() if value is None]:
        del state[key]
    before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state[model[0].weight])
    model(batch(1)).sum().backward()
    with pytest.raises(RuntimeError, match=f"weight of layer '2' must have {message}.*: load the state of the same"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    torch.testing.assert_close(optimizer.state[model[0].weight], moments, rtol=0, atol=0)


def test_a_momentum_that_is_not_yet_there():
    """SGD keeps None for a weight whose buffer it has not made; a wrong buffer without momentum is nobody's."""
    model, plain = network(), network()
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        optimizer.state[m[0].weight]["momentum_buffer"] = None
        if m is model:
            fuse_update(m, optimizer, min_weights=1)
        m(batch(0)).sum().backward()
        optimizer.step()
    assert_same_weights(model, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(include=["0"]), r"include: the weight of layer '0' is frozen \(requires_grad=False\)"),
        (dict(include=["0", "2"]), "include: the weight of layer '0' is frozen"),
        (dict(include=["2"], exclude=["2"]), r"include must name a layer that exclude does not, got \('2',\) and"),
        (dict(min_weights=1, exclude=["2", "4"]), "no linear layer to fuse: .*, beside those in exclude"),
    ],
)
def test_names(arguments, message):
    model = network()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        fuse_update(model, torch.optim.SGD(model.parameters(), 0.1), **arguments)
    fused = fuse_update(model, torch.optim.SGD(model.parameters(), 0.1), include=["0", "2"], exclude=["0"])
    assert fused.layers == ["2"]
