"""Which layers `convert` takes by name, and layers that a rule never reaches."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lgkernels.nn as lnn


def net():
    return nn.ModuleDict(
        {
            "enc": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)),
            "dec": nn.Sequential(nn.Linear(4, 4)),
            "block[0]": nn.Linear(4, 4),
            "block0": nn.Sequential(nn.Linear(4, 4)),
        }
    )


def converted(model):
    return [name for name, module in model.named_modules() if hasattr(module, "rule")]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(include="enc"), ["enc.0", "enc.1"]),
        (dict(include="enc.*"), ["enc.0", "enc.1"]),
        (dict(include="block[0]"), ["block[0]"]),
        (dict(include=["b*[0]"]), ["block0", "block0.0"][1:]),
        (dict(exclude=["enc", "block0"]), ["dec.0", "block[0]"]),
        (dict(exclude=lambda name, module: False), ["enc.0", "enc.1", "dec.0", "block[0]", "block0.0"]),
    ],
)
def test_names(arguments, expected):
    assert converted(lnn.convert(net(), "usf", last_layer="convert", verbose=False, **arguments)) == expected


def test_a_pattern_whose_brackets_are_the_names():
    model = nn.ModuleDict({"block[0]": nn.Linear(4, 4), "block[1]": nn.Linear(4, 4)})
    assert converted(lnn.convert(model, "usf", include="b*[1]", last_layer="convert", verbose=False)) == ["block[1]"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(include="encoder.*"), "include must name modules of the model, got 'encoder.*', which matches none"),
        (dict(include=["enc", "dec.1"]), "got 'dec.1', which matches none; near it: enc.1, dec.0"),
        (dict(exclude="decoder.0"), "exclude must name modules of the model, got 'decoder.0', which matches none"),
        (dict(exclude=nn.GRU), "exclude must hold classes of modules of the model ("),
        (dict(include=lambda name, module: False), "include must pick a layer that convert can change (enc.0, enc.1"),
    ],
)
@pytest.mark.parametrize("rule", ["usf", "bp"])
def test_what_picks_nothing(arguments, message, rule):
    model = net()
    with pytest.raises(ValueError) as caught:
        lnn.convert(model, rule, verbose=False, **arguments)
    assert message in str(caught.value) and not converted(model)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre, self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.zeros_(self.out.weight)  # which is no use of it

    def forward(self, x):
        q, k, v = F.linear(self.pre(x), self.qkv.weight).chunk(3, -1)
        return self.out(q + k + v)


class Hidden(nn.Module):
    """Reads weights in a way that no look at its code shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x):
        for layer in list(self.children())[:2]:
            x = F.linear(x, layer.weight.flatten(1), layer.bias)
        return self.last(x)


def test_a_layer_whose_weight_alone_is_read(capsys):
    model = nn.Sequential(Attention(), nn.Linear(8, 2))
    lnn.convert(model, "fa")
    assert converted(model) == ["0.pre", "0.out"]
    assert "  0.qkv  Linear: its forward is never called, Attention reads its weight" in capsys.readouterr().out


def test_a_layer_that_the_rule_never_reaches():
    """Named at the first training forward, once; in copies and files too; not where all is well."""
    model = nn.Sequential(Hidden(), nn.Linear(8, 2))
    lnn.convert(model, "usf", verbose=False)
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.warns(UserWarning, match=r"^0\.first, 0\.second: converted, but the forward of Hidden is over"):
            one(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one(x)
        assert not one[0]._forward_hooks
    lnn.convert(model, "fa", exclude=["0.first", "0.second"], verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lnn.convert(model, "usf", include="0.last", verbose=False)(x)


def test_parametrised_layers_do_not_stay_behind():
    model = lnn.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "fa", verbose=False)
    parametrizations.orthogonal(model[0])
    for rule in ("bp", "usf"):
        with pytest.raises(ValueError, match="layer '0' must be of a class .* got ParametrizedFeedbackAlignmentLinear"):
            lnn.convert(model, rule, verbose=False)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(lnn.convert(model, "bp", verbose=False)[0]) is nn.Linear
