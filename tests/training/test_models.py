"""The networks of the recipes: parameters, shapes, control variants, and the count of the learning signal."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.recipes import models
from lgkernels.training import BackpropTrainer, BlockwiseTrainer


def count(model, rule, classes=10, channels=3):
    with torch.device("meta"):
        blocks = models.build(model, rule, in_channels=channels, num_classes=classes)
    return sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.parametrize("model, expected", [("smallconv", 362506), ("smallconvl", 3166090), ("vgg8", 7133194)])
@pytest.mark.parametrize("rule", ["lls", "bp", "lls-random"])
def test_published_parameter_counts(model, expected, rule):
    assert count(model, rule) == expected


@pytest.mark.parametrize("classes", [10, 100])
def test_modulation_adds_to_each_of_the_seven_layers_of_vgg8(classes):
    base = count("vgg8", "lls", classes)
    assert count("vgg8", "lls-m", classes) == base + 7 * classes
    assert count("vgg8", "lls-mxm", classes) == base + 7 * classes**2
    assert count("vgg8", "lls-mxm-reduced", 10) == count("vgg8", "lls", 10) + 7 * 100 * 10


@pytest.mark.parametrize("model, rule", [
    *((model, rule) for model in ("smallconv", "mobilenetv1") for rule in models.RULES),
    ("smallconvl", "lls"), ("vgg8", "lls"), ("vgg8", "lls-mxm-reduced")])
def test_one_step(model, rule):
    blocks = models.build(model, rule, in_channels=3, num_classes=10)
    kind = BackpropTrainer if rule == "bp" else BlockwiseTrainer
    trainer = kind(blocks, lambda p: torch.optim.SGD(p, lr=0.1))
    before = [p.detach().clone() for block in blocks for p in block.parameters() if p.dim() > 1]
    losses = trainer.step(torch.randn(4, 3, 32, 32), torch.arange(4))
    learning = [block for block in blocks if list(block.parameters())]
    assert losses.shape == (1 if rule == "bp" else len(learning),)
    assert torch.isfinite(losses).all()
    assert trainer.eval().predict(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    after = [p for block in blocks for p in block.parameters() if p.dim() > 1]
    assert all(not torch.equal(a, b) for a, b in zip(before, after)), "a weight did not move"


def test_heads_see_the_published_latents():
    def heads(model):
        return [(getattr(b, "layer", None) is not None and b.layer.weight.shape[0], b.pool_size)
                for b in models.build(model, "lls", in_channels=1, num_classes=10) if hasattr(b, "pool_size")]

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
@pytest.mark.parametrize("shape, latents", [((4, 6, 8, 8), 24), ((4, 24), 16)])
def test_control_heads_are_the_written_out_loss(rule, shape, latents):
    pool = 2 if len(shape) == 4 else 16
    kind = {"lls-random": models.RandomBasisHead, "local-classifier": models.LocalClassifierHead}[rule]
    head = kind(nn.Tanh(), num_classes=5, pool_size=pool, latents=latents, hidden=48, temperature=0.5)
    x, target = torch.randn(shape), torch.tensor([0, 4, 2, 2])
    out, loss = head(x, target)
    matrix = head.basis if rule == "lls-random" else F.adaptive_avg_pool1d(head.weight, latents)
    pooled = (F.adaptive_avg_pool2d(x.tanh(), pool) if len(shape) == 4 else
              F.adaptive_avg_pool1d(x.tanh(), pool)).flatten(1)
    torch.testing.assert_close(loss, F.cross_entropy(pooled @ matrix.t() / 0.5, target))
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


@pytest.mark.parametrize("arguments, message", [
    (("resnet", "lls"), "unknown model 'resnet'; expected one of: smallconv"),
    (("vgg8", "dfa"), "unknown rule 'dfa'; expected one of: lls")])
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments, in_channels=3, num_classes=10)
