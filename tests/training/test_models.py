"""The networks of the recipes: parameters, shapes, control variants, and the count of the learning signal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels.recipes import models, networks, rules
from lgkernels.recipes.rules import lls

FEEDBACK = [rule.name for rule in rules.families()["feedback"].RULES]
FROM_RANDOM_WEIGHTS = [name for name, rule in rules.found().items() if rule.starts != "network" and not rule.models]


def make_trainer(rule, blocks, lr):
    record = rules.get(rule)
    return record.trainer(blocks, lambda p: torch.optim.SGD(p, lr=lr), rules.Task(record, record.options()))


def count(model, rule, classes=10, channels=3):
    with torch.device("meta"):
        blocks = models.build(model, rule, in_channels=channels, num_classes=classes)
    return sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.parametrize("model, expected", [("smallconv", 362506), ("smallconvl", 3166090), ("vgg8", 7133194)])
@pytest.mark.parametrize("rule", ["lls", "bp", "lls-random", "usf", "dfa"])
def test_published_parameter_counts(model, expected, rule):
    assert count(model, rule) == expected


@pytest.mark.parametrize("classes", [10, 100])
def test_modulation_adds_to_each_of_the_seven_layers_of_vgg8(classes):
    base = count("vgg8", "lls", classes)
    assert count("vgg8", "lls-m", classes) == base + 7 * classes
    assert count("vgg8", "lls-mxm", classes) == base + 7 * classes**2
    assert count("vgg8", "lls-mxm-reduced", 10) == count("vgg8", "lls", 10) + 7 * 100 * 10


@pytest.mark.parametrize(
    "model, rule",
    [
        *((model, rule) for model in ("smallconv", "mobilenetv1") for rule in FROM_RANDOM_WEIGHTS),
        ("smallconvl", "lls"),
        ("vgg8", "lls"),
        ("vgg8", "lls-mxm-reduced"),
    ],
)
def test_one_step(model, rule):
    blocks = models.build(model, rule, in_channels=3, num_classes=10)
    trainer = make_trainer(rule, blocks, 0.1)
    before = [p.detach().clone() for block in blocks for p in block.parameters() if p.dim() > 1]
    losses = trainer.step(torch.randn(4, 3, 32, 32), torch.arange(4))
    learning = [block for block in blocks if list(block.parameters())]
    assert losses.shape == (len(learning) if rules.get(rule).heads else 1,)
    assert torch.isfinite(losses).all()
    assert trainer.eval().predict(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    after = [p for block in blocks for p in block.parameters() if p.dim() > 1]
    assert all(not torch.equal(a, b) for a, b in zip(before, after)), "a weight did not move"


def test_heads_see_the_published_latents():
    def heads(model):
        return [
            (getattr(b, "layer", None) is not None and b.layer.weight.shape[0], b.pool_size)
            for b in models.build(model, "lls", in_channels=1, num_classes=10)
            if hasattr(b, "pool_size")
        ]

    assert heads("smallconv") == [(32, 4), (64, 2), (128, 2), (512, 512)]
    assert heads("smallconvl") == [(96, 4), (192, 2), (512, 2), (1024, 2048)]
    assert heads("vgg8") == [(128, 4), (256, 2), (256, 2), (256, 2), (512, 2), (512, 2), (1024, 1024)]
    with torch.device("meta"):
        assert [layer.pool for layer in models.MODELS["mobilenetv1"].layers[:-1]] == [8, 4, 4, 4] + [2] * 8 + [1, 1]


def test_mobilenets_depthwise_padding_is_its_stride():
    blocks = models.build("mobilenetv1", "lls", in_channels=3, num_classes=10)
    convolutions = [block.block[0] for block in blocks if hasattr(block, "block")]
    assert len(convolutions) == 13
    assert all(c.padding == c.stride and c.bias is None and c.groups == c.in_channels for c in convolutions)
    assert models.separable(8, 16, 2)(torch.randn(1, 8, 16, 16)).shape == (1, 16, 9, 9)


@pytest.mark.parametrize("rule", ["lls-random", "local-classifier"])
@pytest.mark.parametrize("shape, latents", [((4, 6, 8, 8), 24), ((4, 24), 16), ((4, 7, 6), 12)])
def test_control_heads_are_the_written_out_loss(rule, shape, latents):
    pool = 16 if len(shape) == 2 else 2
    kind = {"lls-random": lls.random_basis, "local-classifier": lls.classifier}[rule]
    head = kind(nn.Tanh(), num_classes=5, pool_size=pool, latents=latents, hidden=48, temperature=0.5)
    x, target = torch.randn(shape), torch.tensor([0, 4, 2, 2])
    out, loss = head(x, target)
    matrix = head.basis if rule == "lls-random" else F.adaptive_avg_pool1d(head.weight, latents)
    pooled = {
        2: lambda a: F.adaptive_avg_pool1d(a, pool),
        3: lambda a: F.adaptive_avg_pool1d(a.mT, pool),  # over the tokens
        4: lambda a: F.adaptive_avg_pool2d(a, pool),
    }[len(shape)](x.tanh()).flatten(1)
    torch.testing.assert_close(loss, F.cross_entropy(pooled @ matrix.t() / 0.5, target))
    soft = torch.rand(4, 5).softmax(1)
    torch.testing.assert_close(head(x, soft)[1], F.cross_entropy(pooled @ matrix.t() / 0.5, soft))
    assert not out.requires_grad and torch.equal(out, x.tanh())
    assert (len(list(head.parameters())) == 0) == (rule == "lls-random")
    head.eval()
    assert torch.equal(head(x, target), x.tanh())


def macs(model, rule, classes, size=32):
    return models.signal_macs(model, rule, in_channels=3, num_classes=classes, image_size=size)


def test_signal_macs_of_vgg8():
    assert macs("vgg8", "lls", 10) == 204_800
    assert round(macs("vgg8", "bp", 10) / 1e6) == 719
    assert round(macs("vgg8", "bp", 10) / macs("vgg8", "lls", 10)) == 3512
    assert round(macs("vgg8", "bp", 100) / macs("vgg8", "lls", 100)) == 351
    assert round(macs("vgg8", "bp", 200, 64) / 1e6) == 2871
    assert round(macs("vgg8", "lls", 200, 64) / 1e6, 1) == 4.1


def test_signal_macs_are_those_of_the_input_gradients():
    """BP's count against hooks on the layers of the real network."""
    found = []

    def hook(layer, inputs, output):
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        found.append(layer.weight.numel() * positions)

    for model, size in (("mobilenetv1", 32), ("smallconv", 28)):
        found.clear()
        network = nn.Sequential(*models.build(model, "bp", in_channels=3, num_classes=10)).eval()
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(hook)
        network(torch.randn(1, 3, size, size))
        assert sum(found[1:]) == macs(model, "bp", 10, size)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet", "lls"), "unknown model 'resnet'; expected one of: smallconv"),
        (("vgg8", "ff"), "unknown rule 'ff'; expected one of: lls"),
        (("alexnet", "lls"), "rule 'lls' needs a model with local heads .smallconv"),
        (("resnet18", "local-classifier"), "needs a model with local heads"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments, in_channels=3, num_classes=10)


# -- the sign-symmetry paper's networks, and the rules without heads ---------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "usf", "dfa"])
def test_parameter_counts_of_the_networks(rule):
    """torchvision's, but for AlexNet's: 5 convolutions and 2 linear layers with batch normalisation for their bias."""
    assert count("resnet18", rule, 1000) == 11_689_512
    assert count("alexnet", rule, 1000) == 61_100_840 + 64 + 192 + 384 + 256 + 256 + 2 * 4096


def test_residual_network_starts_as_published():
    torch.manual_seed(0)
    blocks = models.build("resnet18", "bp", in_channels=3, num_classes=10)
    convolutions = [m for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20 and all(c.bias is None for c in convolutions)
    for conv in convolutions:
        fan_out = conv.weight[0, 0].numel() * conv.weight.shape[0]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert sum(isinstance(block, networks.BasicBlock) for block in blocks) == 8


@pytest.mark.parametrize("rule", FEEDBACK)
@pytest.mark.parametrize("model, layers", [("smallconv", 5), ("mobilenetv1", 28), ("resnet18", 21), ("alexnet", 8)])
def test_all_layers_but_the_last_are_converted(model, layers, rule):
    with torch.device("meta"):
        blocks = models.build(model, rule, in_channels=3, num_classes=10)
    found = [m for block in blocks for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    kind = (
        (lnn.FeedbackAlignmentConv2d, lnn.FeedbackAlignmentLinear)
        if rule == "fa"
        else (lnn.SignSymmetricConv2d, lnn.SignSymmetricLinear)
    )
    assert len(found) == layers and type(found[-1]) is nn.Linear
    assert all(isinstance(m, kind) for m in found[:-1])


@pytest.mark.parametrize("rule", ["usf", "dfa", "drtp"])
def test_residual_network_takes_a_step(rule):
    blocks = models.build("resnet18", rule, in_channels=3, num_classes=10)
    trainer = make_trainer(rule, blocks, 0.01)
    before = [p.detach().clone() for block in blocks for p in block.parameters() if p.dim() > 1]
    assert torch.isfinite(trainer.step(torch.randn(4, 3, 32, 32), torch.arange(4))).all()
    assert all(
        not torch.equal(a, b)
        for a, b in zip(before, (p for block in blocks for p in block.parameters() if p.dim() > 1))
    )
    if rule != "usf":
        assert len(trainer.segments) == 10


def test_same_start_for_every_rule():
    starts = []
    for rule in ("bp", "lls", "usf", "fa", "dfa"):
        torch.manual_seed(4)
        blocks = models.build("smallconv", rule, in_channels=1, num_classes=10)
        starts.append([p for block in blocks for p in block.parameters()])
    assert all(torch.equal(p, q) for start in starts[1:] for p, q in zip(starts[0], start))


def test_seeds_draw_other_feedback():
    def first(seed):
        return models.build("smallconv", "fa", in_channels=1, num_classes=10, seed=seed)[1][0].feedback_weight()

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_signal_macs_of_feedback():
    assert macs("vgg8", "usf", 10) == macs("vgg8", "fa", 10) == macs("vgg8", "bp", 10)
    neurons = 128 * 1024 + 256 * 256 + 256 * 256 + 256 * 64 + 512 * 16 + 512 * 16 + 1024
    assert macs("vgg8", "dfa", 10) == macs("vgg8", "sdfa", 10) == 10 * neurons and macs("vgg8", "drtp", 10) == 0
    assert macs("resnet18", "bp", 10, 224) == pytest.approx(1.814e9 - 118e6, rel=0.01)
    within = macs("resnet18", "drtp", 10, 64)  # the second convolution of each residual block
    assert within == sum(
        9 * w * w * (size * size) for w, size in ((64, 16), (128, 8), (256, 4), (512, 2)) for _ in range(2)
    )
