"""`convert(model, "dfa")` of models with several outputs, and of forwards that are not one layer after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lgkernels import convert


class Layers(nn.Module):
    """Three layers, and two heads behind them; `way(model, x)` is the forward."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.mid, self.head, self.box, self.way = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 4), way

    def through(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.way(self, x)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator), torch.arange(6) % 3


def model_of(way, **options):
    return convert(Layers(way), "dfa", verbose=False, **options)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_heads(model, x):
    h = model.through(x)
    return model.head(h), model.box(h)


def test_several_outputs():
    """A second head has its exact gradient; the last unit has the sum, as for any loss; the others get one error."""
    x, target = data()
    both, first, second = (model_of(two_heads) for _ in range(3))
    scores, box = both(x)
    (F.cross_entropy(scores, target) + box.square().mean()).backward()
    F.cross_entropy(first(x)[0], target).backward()
    exact = Layers(two_heads)
    exact.layers[2].register_forward_pre_hook(lambda layer, arguments: (arguments[0].detach(),))
    exact(x)[1].square().mean().backward()
    found, parts = grads(both), [grads(first), grads(exact)]
    assert {"head.weight", "box.weight", "layers.0.0.weight", "layers.2.0.weight"} < set(found)
    for name, value in found.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts if name in part))
    with pytest.raises(RuntimeError, match=r"taken of the output '0' of 'the model'.*output=\.\.\."):
        second(x)[1].sum().backward()
    named = convert(copy.deepcopy(second), "dfa", output="box", verbose=False)
    named(x)[1].sum().backward()
    assert {"box.weight", "layers.0.0.weight"} < set(grads(named))


def test_the_output_named_logits():
    """Wherever it stands; the same tensor under two names is tied once."""

    def named(model, x):
        h = model.through(x)
        logits = model.head(h)
        return {"features": h, "logits": logits, "same": logits}

    (x, target), plain = data(), model_of(lambda model, x: model.head(model.through(x)))
    F.cross_entropy(plain(x), target).backward()
    for key in ("logits", "same"):
        model = model_of(named)
        F.cross_entropy(model(x)[key], target).backward()
        assert grads(model).keys() == grads(plain).keys()
        assert all(torch.equal(value, grads(plain)[name]) for name, value in grads(model).items())
    model = model_of(lambda model, x: (h := model.through(x), model.head(h)))
    with pytest.raises(RuntimeError, match=r"taken of the output '0' .*output=\.\.\."):
        F.cross_entropy(model(x)[1], target).backward()


def without_hooks(model, x):
    for layer in model.layers:
        x = layer.forward(x)
    return model.head(x)


def test_layers_that_are_not_called():
    """The gradients would be those of back-propagation, in silence."""
    x, target = data()
    model = model_of(without_hooks)
    with torch.no_grad():
        assert model(x).shape == (6, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has called none of the layers .*not layer\.forward\(x\)"):
            model(x)
    model.way = lambda model, x: model.head(model.through(x))
    F.cross_entropy(model(x), target).backward()
    assert "layers.0.0.weight" in grads(model)


def test_layers_that_run_twice():
    """Both passes through a unit take part."""
    (x, target), signals = data(), []
    model = model_of(lambda model, x: model.head(model.through(model.through(x))))
    for layer in model.layers[:2]:
        place = layer.direct_feedback
        place.signal = lambda e, h, p=place: signals.append(p) or type(p).signal(p, e, h)
    F.cross_entropy(model(x), target).backward()
    assert len(signals) == 4 and len(set(signals)) == 2


@pytest.mark.parametrize("ran", [(0, 2, 3), (0, 3), (1, 2)])
def test_layers_that_a_forward_drops(ran):
    """The last of a unit that has run is its end, with the unit's matrix; what comes before belongs to the first."""

    def dropping(model, x):
        x = model.mid(x)
        for i in ran:
            x = checkpoint(model.layers[i], x, use_reentrant=False) if model.saving else model.layers[i](x)
        return model.head(x)

    (x, target), models = data(), [Layers(dropping) for _ in range(3)]
    for model, saving, units in zip(models, (False, True, False), ([2], [2], [1, 2]), strict=True):
        model.saving = saving
        model.layers.append(copy.deepcopy(model.layers[2]))
        convert(model, "dfa", units=units, verbose=False)
    models[2].layers[0].direct_feedback = models[0].layers[1].direct_feedback
    for model in models:
        F.cross_entropy(model(x), target).backward()
    expected = grads(models[2])
    names = ["mid", "head", *(f"layers.{i}.0" for i in ran)]
    assert sorted(expected) == sorted(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))
    for model in models[:2]:
        found = grads(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def between(model, x):
    return model.head(model.layers[2](model.layers[1](model.mid(model.layers[0](x)))))


def beside(model, x):
    scale = model.mid(x)
    for layer in model.layers:
        x = layer(x) + scale
    return model.head(x)


def test_what_learns_between_units():
    """It would get no gradient, in silence."""
    x, target = data()
    model = model_of(between)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'mid\.weight' acts between two units alone"):
            model(x)
    model.mid.requires_grad_(False)
    for each in (model, model_of(between, units=[2]), model_of(beside)):
        F.cross_entropy(each(x), target).backward()
        assert ("mid.weight" in grads(each)) == each.mid.weight.requires_grad
        assert {"layers.0.0.weight", "layers.2.0.weight"} < set(grads(each))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.unpoisoned
def test_under_compile(parts):
    """As one graph, and where it breaks between units: the gradients are the same."""

    def way(model, x):
        for i, layer in enumerate(model.layers):
            if parts and i == 1:
                torch._dynamo.graph_break()
            x = layer(x)
        return model.head(x)

    (x, target), model = data(), model_of(way)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    F.cross_entropy(torch.compile(model, fullgraph=not parts, backend="aot_eager")(x), target).backward()
    F.cross_entropy(plain(x), target).backward()
    assert grads(model).keys() == grads(plain).keys() and "layers.0.0.weight" in grads(model)
    for name, value in grads(model).items():
        torch.testing.assert_close(value, grads(plain)[name])
