"""LoRA and LoKr modules: adapt, merge, sizes and starting point."""
import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.nn.adapter import factorization
from tests.ops.lls_problems import randn
from tests.tolerances import assert_relative


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2),
                         nn.Flatten(), nn.Linear(12 * 9, 24), nn.Linear(24, 5))


def shake(model):
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data.copy_(randn(*p.shape, seed=i) * 0.3)


@pytest.mark.parametrize("dim, expected", [(64, (8, 8)), (128, (8, 16)), (256, (16, 16)), (512, (16, 32)), (768, (24, 32)),
                                           (1024, (32, 32)), (2048, (32, 64)), (2304, (48, 48)), (3072, (48, 64)),
                                           (7, (1, 7)), (1, (1, 1))])
def test_factorization(dim, expected):
    assert factorization(dim) == expected


@pytest.mark.parametrize("dim, factor, expected", [(8, 2, (2, 4)), (6, 2, (2, 3)), (6, 3, (2, 3)), (12, 5, (3, 4)),
                                                   (360, 7, (6, 60))])
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
        "1.weight", "1.bias", "6.weight", "6.bias"}
    assert type(model[6]) is nn.Linear
    model(randn(2, 6, 7, 7)).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in names)


@pytest.mark.parametrize("target, expected", [("5", ["5"]), (["0", "3"], ["0", "3"]),
                                              (lambda name, m: isinstance(m, nn.Linear), ["5", "6"])])
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


@pytest.mark.parametrize("bad, error, message", [
    (lambda: lnn.adapt(network(), "dora"), ValueError, "kind must be one of 'lora', 'lokr', got 'dora'"),
    (lambda: lnn.adapt(network(), "lora", "conv"), ValueError,
     "target must pick at least one of the layers that 'lora' adapts (Linear), got none in Sequential"),
    (lambda: lnn.LoRALinear(nn.Linear(2, 2), rank=0), ValueError, "rank must be at least 1, got 0"),
    (lambda: lnn.LoKrConv2d(nn.Conv2d(2, 2, 3, padding="same")), ValueError,
     "base must pad with zeros by a number, got padding_mode='zeros', padding='same'"),
])
def test_bad_input(bad, error, message):
    with pytest.raises(error) as caught:
        bad()
    assert str(caught.value) == message
