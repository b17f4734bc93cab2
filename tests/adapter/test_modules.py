"""LoRA and LoKr modules: adapt, merge, sizes and starting point."""

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.nn.adapter import factorization
from tests.support.problems import randn
from tests.support.tolerances import assert_relative


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Flatten(),
        nn.Linear(12 * 9, 24),
        nn.Linear(24, 5),
    )


def shake(model):
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data.copy_(randn(*p.shape, seed=i) * 0.3)


@pytest.mark.parametrize(
    "dim, expected",
    [
        (64, (8, 8)),
        (128, (8, 16)),
        (256, (16, 16)),
        (512, (16, 32)),
        (768, (24, 32)),
        (1024, (32, 32)),
        (2048, (32, 64)),
        (2304, (48, 48)),
        (3072, (48, 64)),
        (7, (1, 7)),
        (1, (1, 1)),
    ],
)
def test_factorization(dim, expected):
    assert factorization(dim) == expected


@pytest.mark.parametrize(
    "dim, factor, expected", [(8, 2, (2, 4)), (6, 2, (2, 3)), (6, 3, (2, 3)), (12, 5, (3, 4)), (360, 7, (6, 60))]
)
def test_factorization_with_a_factor(dim, factor, expected):
    assert factorization(dim, factor) == expected


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("options", [dict(), dict(rank=2, alpha=1.0), dict(rank=40), dict(decompose_both=True)])
def test_adapted_model(kind, options):
    """Starts as the base; then forward, merged forward and unmerged forward agree to rounding."""
    if kind == "lora" and "decompose_both" in options:
        options = {"rank": 3}
    base, x = network().double().eval(), randn(2, 6, 7, 7, dtype=torch.float64)
    expected, weights = base(x), {n: p.clone() for n, p in base.named_parameters()}
    model = lnn.adapt(base, kind, **options)
    assert_relative("start", model(x), expected, 1e-14)
    shake(model)
    changed = model(x)
    assert (changed - expected).abs().max() > 1e-2
    assert_relative("merged", lnn.merge(model)(x), changed, 1e-13)
    assert_relative("unmerged", lnn.unmerge(model)(x), changed, 1e-13)
    for name, module in model.named_modules():
        if hasattr(module, "delta"):
            assert_relative(name, module.base.weight, weights[f"{name}.weight"], 1e-14)
            assert module.delta().shape == module.base.weight.shape


def test_scale_is_one_where_both_are_full():
    assert lnn.LoKrLinear(nn.Linear(24, 36), rank=8, alpha=3.0).scale == 1.0
    assert lnn.LoKrLinear(nn.Linear(24, 36), rank=1).scale == 4.0
    assert lnn.LoRALinear(nn.Linear(24, 36), rank=8, alpha=4.0).scale == 0.5


def test_what_learns():
    model = lnn.adapt(network(), "lokr", train_norm=True, train_head="6")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{i}.{w}" for i in (0, 3, 5) for w in ("w1", "w2_a", "w2_b")} | {
        "1.weight",
        "1.bias",
        "6.weight",
        "6.bias",
    }
    assert type(model[6]) is nn.Linear
    model(randn(2, 6, 7, 7)).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in names)


@pytest.mark.parametrize(
    "target, expected", [("5", ["5"]), (["0", "3"], ["0", "3"]), (lambda name, m: isinstance(m, nn.Linear), ["5", "6"])]
)
def test_target(target, expected):
    model = lnn.adapt(network(), "lokr", target)
    assert [n for n, m in model.named_modules() if hasattr(m, "delta")] == expected


def test_sizes_of_the_paper():
    """ResNet-50's convolutions with LoKr rank 1: 20,179 parameters; ViT-B/16's qkv with LoRA: 36,864 (spec 1.7, 5)."""

    def block(width, inner, count):
        yield from ((width, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1), (width, 4 * inner, 1))
        for _ in range(count - 1):
            yield from ((4 * inner, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1))

    shapes = [(3, 64, 7)]
    for width, inner, count in ((64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 512, 3)):
        shapes += block(width, inner, count)
    layers = [lnn.LoKrConv2d(nn.Conv2d(i, o, k, bias=False, device="meta")) for i, o, k in shapes]
    assert sum(p.numel() for m in layers for p in m.parameters() if p.requires_grad) == 20_179
    vit = lnn.LoRALinear(nn.Linear(768, 2304, device="meta"))
    assert 12 * sum(p.numel() for p in vit.parameters() if p.requires_grad) == 36_864


def test_state_dict_round_trip():
    first, second = (lnn.adapt(network(), "lokr") for _ in range(2))
    shake(first)
    second.load_state_dict(first.state_dict())
    x = randn(2, 6, 7, 7)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_state_dict_of_a_merged_model(kind):
    """Says that it is merged: what loads it neither adds the change twice nor forgets how to take it off."""
    first, second = (lnn.adapt(network().double(), kind).eval() for _ in range(2))
    base, x = first[5].base.weight.clone(), randn(2, 6, 7, 7, dtype=torch.float64)
    shake(first)
    second.load_state_dict(lnn.merge(first).state_dict())
    assert torch.equal(second(x), first(x)) and second[5].merged
    assert_relative("unmerged", lnn.unmerge(second)[5].base.weight, base, 1e-14)
    first.load_state_dict(second.state_dict())
    assert not first[5].merged and torch.equal(second(x), first(x))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_unmerge_after_the_factors_changed(kind):
    layer = lnn.adapt(network().double(), kind)[5]
    base = layer.base.weight.clone()
    shake(layer)
    layer.merge()
    shake(nn.ModuleList(nn.ParameterList([p]) for p in list(layer.parameters())[::-1]))
    now = [p.clone() for p in layer.parameters(recurse=False)]
    layer.unmerge()
    assert_relative("base", layer.base.weight, base, 1e-14)
    assert all(map(torch.equal, layer.parameters(recurse=False), now))


@pytest.mark.parametrize("target", [None, "2"])
def test_a_layer_at_two_places_stays_one(target):
    layer = nn.Linear(8, 8)
    model = lnn.adapt(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 2)), "lora", target)
    assert type(model[0]) is lnn.LoRALinear and model[0] is model[2] and model[0].base is layer
    assert (type(model[3]) is lnn.LoRALinear) == (target is None)


def test_in_torchs_transformer_layer():
    """Which in evaluation reads the weights of its linear layers."""
    torch.manual_seed(0)
    model = lnn.adapt(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), "lora")
    shake(model)
    x = randn(2, 5, 16)
    with torch.no_grad():
        assert_relative("fast path", model.eval()(x), model.train()(x), 1e-5)
    assert (model.linear1.in_features, model.linear1.bias is model.linear1.base.bias) == (16, True)


def test_a_refused_model_is_unchanged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3, padding="same"))
    with pytest.raises(ValueError, match="base must pad"):
        lnn.adapt(model, "lokr")
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (
            lambda: lnn.adapt(lnn.adapt(network(), "lora"), "lokr"),
            ValueError,
            "adapter_name must be one that model has not yet, got 'default', which is a LoRALinear at '5'",
        ),
        (
            lambda: lnn.adapt(network(), "lora", train_head=["fc"]),
            ValueError,
            "train_head must name submodules of model, got 'fc'; it has 0, 1, 2, 3, 4, 5, 6",
        ),
        (lambda: lnn.adapt(network(), "lora", alpha="x"), TypeError, "alpha must be a number, got str"),
        (lambda: lnn.adapt(network(), "lora", alpha=float("nan")), ValueError, "alpha must be finite, got nan"),
        (
            lambda: lnn.adapt(network(), "lokr", factor=0),
            ValueError,
            "factor must be a positive int, or -1 for the most square split, got 0",
        ),
        (lambda: lnn.adapt(network(), "dora"), ValueError, "kind must be one of 'lora', 'lokr', got 'dora'"),
        (
            lambda: lnn.adapt(network(), "lora", "conv"),
            ValueError,
            "target must pick at least one of the layers that 'lora' adapts (Linear, Conv2d), got none in "
            "Sequential with target='conv'",
        ),
        (lambda: lnn.LoRALinear(nn.Linear(2, 2), rank=0), ValueError, "rank must be at least 1, got 0"),
        (
            lambda: lnn.LoKrConv2d(nn.Conv2d(2, 2, 3, padding="same")),
            ValueError,
            "base must pad with zeros by a number, got padding_mode='zeros', padding='same'",
        ),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error) as caught:
        bad()
    assert str(caught.value) == message
