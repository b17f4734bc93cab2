"""Several adapters on one model, chosen, weighted and switched off; LoRA of convolutions, dropout, dtypes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from tests.adapter.common import factors, images, net, shake
from tests.support.problems import randn
from tests.support.tolerances import assert_relative

NAMES = ("default", "style", "subject")


def several(dtype=torch.float64):
    """LoRA and LoKr, on layers that are in part the same; all with factors that are not zero."""
    model = net(dtype)
    lnn.adapt(model, "lora", ["conv", "block"], rank=2, verbose=False)
    shake(model, 1)
    lnn.adapt(model, "lokr", ["block.fc", "fc"], rank=2, adapter_name="style", verbose=False)
    shake(model, 20)
    lnn.adapt(model, "lora", ["block.fc", "conv"], rank=3, use_rslora=True, adapter_name="subject", verbose=False)
    return shake(model, 40)


def expected(model, weights):
    """By the definition: each layer with the weight W + sum of w * delta."""
    plain = net(torch.float64)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, lnn.adapter_base.Adapter) and module.is_first:
                mine = plain.get_submodule(name)
                for key, adapter in module.named_adapters().items():
                    mine.weight += weights.get(key, 0) * adapter.delta()
    return plain


@pytest.mark.parametrize(
    "chosen, weights",
    [
        (("style",), None),
        (NAMES, None),
        (("subject", "default"), (0.5, -2.0)),
        (("style", "default"), 0.25),
        ((), None),
        (NAMES, (0.0, 1.5, 0.0)),
    ],
)
def test_chosen_and_weighted(chosen, weights):
    model, x = several(), images(torch.float64).requires_grad_()
    lnn.set_adapter(model, chosen, weights)
    values = (weights,) * len(chosen) if isinstance(weights, float) else weights or (1.0,) * len(chosen)
    plain = expected(model, dict(zip(chosen, values)))
    y, truth = model(x), plain(x)
    assert_relative("y", y, truth, 1e-12)
    (grad,), (right,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(truth.sum(), x)
    assert_relative("gradient of x", grad, right, 1e-12)
    assert_relative("merged", lnn.merge(model)(x), truth, 1e-12)
    lnn.unmerge(model)
    for name, layer in plain.named_modules():
        if name in ("conv", "fc", "block.fc", "block.fc_1"):
            assert_relative(name, model.get_submodule(name).weight, layer.weight, 1e-12)
    assert_relative("unmerged", model(x), truth, 1e-12)


@pytest.mark.parametrize("names", [("style",), ("subject", "default"), NAMES])
def test_gradients_of_factors(names):
    """Those of the weight built in full; the others get none."""
    model, x = several(), images(torch.float64)
    lnn.set_adapter(model, names, (0.5, 2.0, -1.0)[: len(names)])
    model(x).square().sum().backward()
    got = {name: p.grad for name, p in factors(model).items()}
    model.zero_grad()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lnn.adapter_base.Adapter) and m.is_first}
    built = {f"{n}.weight": m.weight for n, m in layers.items()}
    torch.func.functional_call(net(torch.float64), built, (x,)).square().sum().backward()
    learning = {name for name, p in factors(model).items() if p.requires_grad}
    assert learning == {n for n, g in got.items() if g is not None} and learning
    for name in learning:
        assert_relative(name, got[name], factors(model)[name].grad, 1e-10)


def test_what_learns():
    model = several()
    of = {
        "default": {"conv.a", "block.fc_1.b", "block.fc.a"},
        "style": {"fc.w1", "block.fc.adapters.style.w1"},
        "subject": {"conv.adapters.subject.a", "block.fc.adapters.subject.b"},
    }
    for name, mine in of.items():
        lnn.set_adapter(model, name)
        learning = {n for n, p in factors(model).items() if p.requires_grad}
        assert mine < learning and not any(others & learning for key, others in of.items() if key != name)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base" in n or n.startswith("norm"))


@pytest.mark.parametrize("merged", [False, True])
def test_switched_off(merged):
    model, x, base = several(), images(torch.float64), net(torch.float64)
    lnn.set_adapter(model, NAMES)
    y = model(x)
    if merged:
        lnn.merge(model)
    with lnn.disable_adapter(model) as inside:
        assert inside is model and torch.equal(model(x), base(x)) and torch.equal(model.conv.weight, base.conv.weight)
        with lnn.disable_adapter(model):
            pass
        assert torch.equal(model(x), base(x))
    assert model.conv.merged == merged
    assert_relative("on again", model(x), y, 1e-12)
    with pytest.raises(RuntimeError, match="inside"), lnn.disable_adapter(model):
        raise RuntimeError("inside")
    assert_relative("on after an error", model(x), y, 1e-12)
    assert torch.equal(lnn.unmerge(model).conv.base.weight, base.conv.weight)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_they_travel(way, merged):
    model, x = several(), images(torch.float64)
    lnn.set_adapter(model, ["subject", "style"], [0.5, 2.0])
    y = model(x)
    if merged:
        lnn.merge(model)
    if way == "state_dict":
        kept = io.BytesIO()
        torch.save(model.state_dict(), kept)
        kept.seek(0)
        other = lnn.set_adapter(several(), ["subject", "style"], [0.5, 2.0])
        shake(other, 99)
        other.load_state_dict(torch.load(kept, weights_only=True))
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert len([p for n, p in other.named_parameters() if "base" in n]) == 8  # each base once
    assert other.block["fc"].adapters["style"].base is other.block["fc"].base
    assert torch.equal(other(x), model(x)) and other.fc.merged == merged
    assert_relative("unmerged", lnn.unmerge(other)(x), y, 1e-12)
    assert_relative("weight", other.fc.base.weight, net(torch.float64).fc.weight, 1e-14)


@pytest.mark.parametrize("kind", [lnn.LoRALinear, lnn.LoKrLinear])
def test_of_a_version_that_knew_one_adapter_a_layer(kind):
    """Its merged module, as a pickle of it holds."""
    layer = shake(kind(nn.Linear(16, 16)))
    x, base = randn(2, 16), layer.base.weight.clone()
    y = layer(x)
    layer.merge()
    state = {**vars(layer), "_merged": layer._merged["default"][0]}
    for name in ("active", "enabled", "adapter_name", "use_rslora", "dropout", "rank_dropout", "module_dropout"):
        state.pop(name, None)
    del state["_rounded"]
    old = kind.__new__(kind)
    old.__setstate__(state)
    assert old.merged
    assert_relative("unmerged", old.unmerge().train()(x), y, 1e-5)
    assert_relative("base", old.base.weight, base, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_unmerge_is_exact(kind, dtype):
    """Also of changes much larger and much smaller than the weight, and of weights that are zero."""
    model = lnn.adapt(net(dtype), kind, ["conv", "block", "fc"], rank=2, verbose=False)
    with torch.no_grad():
        for i, p in enumerate(factors(model).values()):
            p.copy_(randn(*p.shape, seed=i) * 10.0 ** (i % 5 - 2))
        model.fc.base.weight[::2] = 0
    before = {n: p.clone() for n, p in model.named_parameters()}
    lnn.merge(model)
    assert not torch.equal(model.fc.base.weight, before["fc.base.weight"])
    shake(model, 7)
    lnn.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "base" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_factors_over_half_precision(kind, dtype):
    """float32, unless that is switched off; small steps of theirs are not lost."""
    layers = ["conv", "block", "fc"]
    model = lnn.adapt(net(dtype), kind, layers, verbose=False)
    assert {p.dtype for p in factors(model).values()} == {torch.float32} and model.fc.base.weight.dtype == dtype
    shake(model)
    y = model(images(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in factors(model).values())
    exact = copy.deepcopy(model).double()(images(dtype).double())
    assert_relative("y", y.double(), exact, 0.1)
    assert_relative("merged", lnn.merge(model)(images(dtype)).double(), exact, 0.1)
    halves = lnn.adapt(net(dtype), kind, layers, autocast_adapter_dtype=False, verbose=False)
    assert {p.dtype for p in factors(halves).values()} == {dtype}


def test_rank_stabilised_scale():
    for kind in (lnn.LoRALinear, lnn.LoKrLinear):
        layer = kind(nn.Linear(256, 256), rank=4, alpha=6.0, use_rslora=True)
        assert layer.scale == 3.0 and kind(nn.Linear(256, 256), rank=4, alpha=6.0).scale == 1.5


CONVS = {
    "plain": dict(kernel_size=3),
    "all": dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": dict(kernel_size=(2, 3), padding="same"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "grouped": dict(kernel_size=3, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, groups=4, stride=2),
    "1x1": dict(kernel_size=1, bias=False),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_lora_of_a_convolution(name, second):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **CONVS[name]).double()
    model = lnn.adapt(nn.Sequential(copy.deepcopy(conv)), "lora", "0", rank=2, verbose=False)
    shake(model)
    if second:
        lnn.adapt(model, "lora", "0", rank=3, adapter_name="second", verbose=False)
        shake(model, 9)
        lnn.set_adapter(model, ["second", "default"], [2.0, 0.5])
    x = randn(2, 4, 7, 8, dtype=torch.float64).requires_grad_()
    y = model(x)
    adapters = model[0].named_adapters()
    change = 2 * adapters["second"].delta() + 0.5 * adapters["default"].delta() if second else model[0].delta()
    assert change.shape == conv.weight.shape
    weight = (conv.weight + change).detach().requires_grad_()
    right = conv._conv_forward(x, weight, conv.bias)
    assert_relative("y", y, right, 1e-12)
    (grad_x,) = torch.autograd.grad(right.square().sum(), x, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(right.square().sum(), weight)
    grads = torch.autograd.grad(y.square().sum(), [x, *factors(model).values()])
    assert_relative("gradient of x", grads[0], grad_x, 1e-12)
    for (key, p), grad in zip(factors(model).items(), grads[1:]):
        (truth,) = torch.autograd.grad(change, p, grad_weight, retain_graph=True)
        assert_relative(key, grad, truth, 1e-12)
    assert_relative("without a batch", model(x[0]), right[0], 1e-12)
    assert_relative("merged", lnn.merge(model)(x), right, 1e-12)


@pytest.mark.parametrize("kind, option", [("lora", "dropout"), ("lokr", "rank_dropout"), ("lokr", "module_dropout")])
def test_dropout(kind, option):
    """In training alone; its mean is the layer without; of LoKr whole rows, or the whole change."""
    torch.manual_seed(0)
    base, x = nn.Linear(6, 8).double(), randn(2, 6, dtype=torch.float64)
    model = lnn.adapt(nn.Sequential(base), kind, rank=2, verbose=False, **{option: 0.25})
    shake(model)
    whole = model.eval()(x) - base(x)
    assert_relative("evaluation", whole, x @ model[0].delta().t(), 1e-12)
    model.train()
    draws = torch.stack([model(x) - base(x) for _ in range(1000)])
    kept = 1.0 if kind == "lora" else 0.75
    assert_relative("mean", draws.mean(0), kept * whole, 0.15)
    if kind == "lokr":
        gone = (draws.abs() < 1e-9).all(1)  # of a row for both inputs
        assert torch.allclose(draws, torch.where(gone[:, None], 0.0, whole), atol=1e-9)
        assert 0.15 < gone.double().mean() < 0.35
        assert (gone.all(1) | ~gone.any(1)).all() == (option == "module_dropout")
    with lnn.disable_adapter(model):
        assert torch.equal(model(x), base(x))
    torch.manual_seed(1)
    model(x).sum().backward()
    assert kind == "lokr" or all(p.grad is not None for p in factors(model).values())


@pytest.mark.unpoisoned
@pytest.mark.parametrize("names", [("default",), NAMES])
def test_compiled(names):
    torch._dynamo.reset()
    model, x = lnn.set_adapter(several(), names), images(torch.float64)
    assert_relative("y", torch.compile(model, backend="aot_eager")(x), model(x), 1e-12)


def test_a_tied_weight_and_several():
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, i):
            return self.head(self.emb(i))

    torch.manual_seed(0)
    model = lnn.adapt(LM(), "lora", "head", verbose=False)
    shake(model)
    lnn.adapt(model, "lokr", "head", adapter_name="second", verbose=False)
    shake(model, 5)
    lnn.set_adapter(model, ["default", "second"])
    i, before = torch.arange(9), model.emb.weight.detach().clone()
    y = model(i)
    assert_relative("merged", lnn.merge(model)(i), y, 1e-5)
    assert torch.equal(model.emb.weight, before)
    state = copy.deepcopy(model.state_dict())
    lnn.unmerge(model)
    assert model.head.base.weight is model.emb.weight
    model.load_state_dict(state)
    assert model.head.merged and torch.equal(model.emb.weight, before)
    assert_relative("loaded", model(i), y, 1e-5)


def test_set_adapter_is_refused():
    model = several()
    for arguments, message in [
        (("sytle",), "adapter_name must be of default, subject, style, got 'sytle'"),
        ((["style", "default"], [1.0]), "weights must be 2 numbers"),
        (("style", float("nan")), "weights must be finite, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            lnn.set_adapter(model, *arguments)
    with pytest.raises(ValueError, match="adapter_name must be of an adapter of model, which has none, got 'x'"):
        lnn.set_adapter(net(), "x")
    lnn.merge(model)
    with pytest.raises(ValueError, match="model must not be merged, got 'conv' merged"):
        lnn.set_adapter(model, "style")
    with pytest.raises(ValueError, match="model must not be merged, got 'conv' merged"):
        lnn.adapt(model, "lora", adapter_name="fourth")


def test_a_second_adapter_that_is_refused_changes_nothing():
    model = several()
    before, y = [(n, p.requires_grad) for n, p in model.named_parameters()], model(images(torch.float64))
    for options in (dict(adapter_name="style"), dict(adapter_name="a.b"), dict(adapter_name="fourth", rank=0)):
        with pytest.raises(ValueError):
            lnn.adapt(model, "lora", verbose=False, **options)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert torch.equal(model(images(torch.float64)), y)


def test_what_adapt_says_of_a_second_one(capsys):
    model = lnn.adapt(net(), "lora", "block", verbose=False)
    lnn.adapt(model, "lokr", ["block.fc", "fc"], adapter_name="second")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["lokr: 2 layers adapted", "  block.fc  LoKrLinear(second, rank=1, alpha=4.0, scale=4)"]
    assert said[3:] == ["left alone", "  conv  Conv2d: not in target", "  block.fc_1  LoRALinear: not in target"]


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 4).double()
    nn.init.normal_(layer.bias)
    model = shake(lnn.adapt(nn.Sequential(layer), "lora", rank=2, verbose=False))
    lnn.adapt(model, "lokr", adapter_name="second", verbose=False)
    shake(model, 9)
    lnn.set_adapter(model, ["default", "second"])
    x, adapters = randn(3, 4, dtype=torch.float64), model[0].named_adapters()
    weight = layer.weight.t() + adapters["default"].delta() + adapters["second"].delta()
    right, kept = F.linear(x, weight, layer.bias), layer.weight.clone()
    assert_relative("y", model(x), right, 1e-12)
    assert_relative("merged", lnn.merge(model)(x), right, 1e-12)
    assert torch.equal(lnn.unmerge(model)[0].base.weight, kept)
