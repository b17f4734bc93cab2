"""Which layers `adapt` takes, what it says of them, and weights that have a second owner."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lgkernels.nn as lnn
from tests.support.problems import randn
from tests.support.tolerances import assert_relative


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.mid = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, i):
        return self.lm_head(torch.tanh(self.mid(self.emb(i))))


def shake(model):
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "delta"):
                for p in module.parameters(recurse=False):
                    p.normal_()
    return model


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_tied_weight(kind, one_by_one):
    torch.manual_seed(0)
    model = shake(lnn.adapt(LM(), kind, "lm_head", verbose=False))
    i, embedding = torch.arange(10), model.emb.weight
    before, y = embedding.detach().clone(), model(i).detach()
    model.lm_head.merge() if one_by_one else lnn.merge(model)
    assert model.emb.weight is embedding and torch.equal(embedding, before)
    assert_relative("merged", model(i), y, 1e-5)
    state = copy.deepcopy(model.state_dict())
    model.lm_head.unmerge() if one_by_one else lnn.unmerge(model)
    assert model.lm_head.base.weight is embedding and torch.equal(embedding, before)  # tied again, bit for bit
    assert_relative("unmerged", model(i), y, 1e-5)

    other = lnn.adapt(LM(), kind, "lm_head", verbose=False)  # a merged state goes into a tied model
    other.load_state_dict(state)
    assert torch.equal(other.emb.weight, before) and other.lm_head.merged
    assert_relative("loaded", other(i), y, 1e-5)
    twin = copy.deepcopy(other)
    lnn.unmerge(twin)
    assert_relative("copied and unmerged", twin(i), y, 1e-5)


def test_two_adapters_on_one_weight():
    torch.manual_seed(0)
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model = shake(lnn.adapt(nn.Sequential(a, nn.Tanh(), b), "lora", verbose=False))
    x, w = randn(3, 8), a.weight.detach().clone()
    y = model(x).detach()
    assert_relative("merged", lnn.merge(model)(x), y, 1e-5)
    assert_relative("unmerged", lnn.unmerge(model)(x), y, 1e-5)
    assert model[0].base.weight is model[2].base.weight and torch.equal(model[0].base.weight, w)


def test_a_merged_adapter_says_that_it_does_not_learn():
    layer = lnn.LoRALinear(nn.Linear(4, 4)).merge()
    with pytest.warns(UserWarning, match="this LoRALinear is merged: its factors get no gradient; unmerge"):
        layer(randn(2, 4))
    layer.unmerge()(randn(2, 4)).sum().backward()
    assert layer.a.grad is not None


def layers(count=12):
    pairs = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}) for _ in range(count))
    return nn.ModuleDict({"layers": pairs, "block[0]": nn.Linear(4, 4), "block0": nn.Linear(4, 4)})


def adapted(model):
    return [name for name, module in model.named_modules() if hasattr(module, "delta")]


@pytest.mark.parametrize(
    "target, expected",
    [
        ("layers.1", ["layers.1.fc1", "layers.1.fc2"]),
        ("1.fc2", ["layers.1.fc2"]),
        ("layers.1*.fc1", ["layers.1.fc1", "layers.10.fc1", "layers.11.fc1"]),
        ("block[0]", ["block[0]"]),
        (["layers.3.fc1", "lock0"], ["layers.3.fc1", "block0"]),
        ("s.1", ["layers.1.fc1", "layers.1.fc2"]),
        ("0.fc2", ["layers.0.fc2"]),
    ],
)
def test_names(target, expected):
    assert adapted(lnn.adapt(layers(), "lora", target, verbose=False)) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(target=["layers.1", "layers.99"]), "with target='layers.99'; near it: layers"),
        (dict(target="fc3"), "with target='fc3'; near it: "),
        (dict(train_head="block1"), "train_head must name submodules of model, got 'block1'; near it: block0"),
    ],
)
def test_a_text_that_picks_nothing(arguments, message):
    model = layers()
    with pytest.raises(ValueError) as caught:
        lnn.adapt(model, "lora", **arguments)
    assert message in str(caught.value)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())


class PreNorm(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(8), inner


class NormFreeBlock(nn.Sequential):
    pass


class NormGate(nn.Sequential):
    """Of a layer whose weight has the shape of a scale."""


class NormalizedScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))


class ChannelRMSNorm(NormalizedScale):
    pass


class BatchNormAct2d(nn.BatchNorm2d):
    pass


def test_train_norm():
    model = nn.ModuleDict(
        {
            "pre": PreNorm(nn.Linear(8, 8)),
            "free": NormFreeBlock(nn.Linear(8, 8)),
            "gate": NormGate(nn.Linear(8, 1)),
            "scaled": NormalizedScale(),
            "rms": ChannelRMSNorm(),
            "act": BatchNormAct2d(8),
            "group": nn.GroupNorm(2, 8),
        }
    )
    lnn.adapt(model, "lora", train_norm=True, verbose=False)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{layer}.{factor}" for layer in ("pre.fn", "free.0", "gate.0") for factor in "ab"}
    norms = {f"{layer}.{p}" for layer in ("pre.norm", "act", "group") for p in ("weight", "bias")}
    assert learning == adapters | norms | {"rms.scale"}


def test_what_adapt_says(capsys):
    model = nn.ModuleDict({"lm": LM(), "conv": nn.Conv2d(2, 2, 3), "head": nn.Linear(4, 2)})
    lnn.adapt(model, "lora", "lm", train_head="head")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "lora: 2 layers adapted" and said[3] == "left alone"
    assert said[1].startswith("  lm.mid  LoRALinear(") and said[2].endswith(
        "the weight is also that of lm.emb, which keeps it"
    )
    assert said[4:] == [
        "  lm.emb  Embedding: no lora adapter for this kind of layer",
        "  conv  Conv2d: not in target",
        "  head  Linear: learns in full (train_head)",
    ]


@pytest.mark.parametrize("convention, scale", [("lycoris", 1.0), ("peft", 0.25)])
def test_scale_convention(convention, scale):
    layer = lnn.LoKrLinear(nn.Linear(8, 8), rank=16, alpha=4.0, scale_convention=convention)
    assert len(list(layer.parameters(recurse=False))) == 2 and layer.scale == scale
    factored = lnn.LoKrLinear(nn.Linear(64, 64), rank=2, alpha=4.0, scale_convention=convention)
    assert factored.scale == 2.0
    with pytest.raises(ValueError, match="scale_convention must be one of 'lycoris', 'peft', got 'lora'"):
        lnn.LoKrLinear(nn.Linear(8, 8), scale_convention="lora")


@pytest.mark.parametrize("groups, out", [(8, 8), (8, 16), (2, 6), (4, 8)])
@pytest.mark.parametrize("both", [False, True])
def test_lokr_of_grouped_convolutions(groups, out, both):
    """Depthwise, of several outputs a channel, and grouped: the reshaped product, with its gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, out, 3, stride=2, padding=1, groups=groups))
    lnn.adapt(model, "lokr", rank=1, decompose_both=both, verbose=False)
    shake(model)
    x = randn(2, 8, 5, 5)
    base = model[0].base
    weight = (base.weight + model[0].delta()).detach().requires_grad_()
    expected = nn.functional.conv2d(x, weight, base.bias, 2, 1, 1, groups)
    y = model(x)
    assert_relative("y", y, expected, 1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p in model[0].parameters(recurse=False):
        (grad,) = torch.autograd.grad(model[0].delta(), p, weight.grad)
        assert_relative("gradient", p.grad, grad, 1e-4)
    assert_relative("merged", lnn.merge(model).eval()(x), expected, 1e-5)


def test_the_layer_is_named_that_cannot_be_adapted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3, padding="same"))
    with pytest.raises(ValueError, match="layer '1': base must pad with zeros by a number"):
        lnn.adapt(model, "lokr")


def test_conv1d_of_transformers():
    """GPT-2's linear layer, whose weight lies the other way round."""

    class Conv1D(nn.Module):
        __module__ = "transformers.pytorch_utils"

        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    for kind in ("lora", "lokr"):
        layer = Conv1D(6, 4)
        model = shake(lnn.adapt(nn.Sequential(layer), kind, verbose=False))
        x = randn(3, 4)
        y = model(x)
        assert_relative("y", y, x @ (layer.weight + model[0].delta().t()) + layer.bias, 1e-5)
        assert_relative("merged", lnn.merge(model).eval()(x), y, 1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("made", ["prune", "weight_norm", "spectral_norm"])
def test_a_weight_that_is_made_at_each_forward(made):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    if made == "prune":
        prune.l1_unstructured(model[2], "weight", amount=0.3)
    else:
        getattr(torch.nn.utils, made)(model[2])
    learning = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="layer '2' must hold its weight as a parameter, got one that is made at each"):
        lnn.adapt(model, "lora", verbose=False)
    assert type(model[0]) is nn.Linear and [p.requires_grad for p in model.parameters()] == learning
    lnn.adapt(model, "lora", ["0"], verbose=False)


def test_lora_of_convolutions_is_asked_for():
    with pytest.raises(ValueError, match="with target=None; None takes no convolution: name them"):
        lnn.adapt(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "lora")
