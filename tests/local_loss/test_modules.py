"""Blocks with local losses: the protocol of the block-wise trainer, and the modules' own choices."""

import copy
import weakref

import pytest
import torch
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.training import BlockwiseTrainer
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_relative


def conv():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


BLOCKS = {
    "classifier": lambda: lnn.LocalClassifier(conv(), 8, 5),
    "predsim": lambda: lnn.PredSimHead(conv(), (8, 5, 5), 5),
    "predsim-identity": lambda: lnn.PredSimHead(conv(), (8, 5, 5), 5, sim_head="identity", decoder_dim=40),
    "nt_xent": lambda: lnn.ContrastiveHead(conv(), 8, hidden=6, dim=4),
    "supcon": lambda: lnn.ContrastiveHead(conv(), 8, dim=4, loss="supcon"),
    "pooled": lambda: lnn.PooledClassifier(conv(), 5, pool_size=2, hidden=64),
    "aux": lambda: lnn.LocalClassifier(conv(), 6, 5, aux=nn.Conv2d(8, 6, 3)),
    "reconstruction": lambda: lnn.ReconstructionHead(conv(), 8, 3, hidden=4),
    "barlow": lambda: lnn.BarlowTwinsHead(conv(), 8, hidden=6, dim=4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_protocol(name):
    block, x, y = BLOCKS[name](), randn(6, 3, 7, 7), targets(6, 5)
    leaf = x.clone().requires_grad_()
    out, loss = block(leaf, y)
    assert not out.requires_grad and out.shape == (6, 8, 5, 5) and loss.shape == ()
    loss.backward()
    assert leaf.grad is None and all(p.grad is not None for p in block.parameters())
    plain = block(leaf)
    assert plain.requires_grad and torch.equal(plain.detach(), out)
    block.eval()
    assert isinstance(block(x, y), torch.Tensor)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_trainer_takes_it(name):
    torch.manual_seed(0)
    blocks = [BLOCKS[name](), nn.Flatten(), lnn.ClassifierBlock(nn.Linear(200, 5))]
    trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01))
    x, y = randn(10, 3, 7, 7), torch.arange(10) % 5
    first = trainer.step(x, y)
    for _ in range(20):
        losses = trainer.step(x, y)
    assert losses.shape == (2,) and (losses < first).all()


def test_forward_forward_layers_learn_to_tell_apart():
    """Samples of four clusters with the right and with a wrong label: every layer's loss falls, and a right label has
    the larger goodness."""
    torch.manual_seed(0)
    y = torch.arange(40) % 4
    x = randn(4, 20, seed=1)[y] + 0.1 * randn(40, 20)
    layers = [
        lnn.ForwardForwardLayer(nn.Sequential(nn.Linear(n, 64), nn.ReLU()), normalize=how)
        for n, how in ((20, "l2"), (64, "rms"))
    ]
    optimizers = [torch.optim.Adam(layer.parameters(), 0.03) for layer in layers]
    positive, history = torch.arange(80) < 40, []
    for _ in range(200):
        h = torch.cat([LF.overlay_label(x, y, num_classes=4), LF.overlay_label(x, (y + 1) % 4, num_classes=4)])
        history.append([])
        for layer, optimizer in zip(layers, optimizers):
            optimizer.zero_grad()
            h, loss = layer(h, positive)
            assert not h.requires_grad
            loss.backward()
            optimizer.step()
            history[-1].append(loss.item())
    assert all(last < 0.6 * first for first, last in zip(history[0], history[-1])), (history[0], history[-1])
    goodness = []
    for label in (y, (y + 1) % 4):
        h, total = LF.overlay_label(x, label, num_classes=4), 0
        for layer in layers:
            layer.eval()
            total = total + layer.goodness_of(h)
            h = layer(h)
        goodness.append(total)
    assert (goodness[0] > goodness[1]).float().mean() > 0.9


def test_normalisations_of_forward_forward():
    x = randn(3, 16)
    l2, rms, none = (lnn.ForwardForwardLayer(nn.Identity(), normalize=n).normalized(x) for n in ("l2", "rms", "none"))
    assert torch.allclose(l2, x / (x.norm(dim=1, keepdim=True) + 1e-4))
    assert torch.allclose(rms, x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8))
    assert none is x


def test_normalisation_in_half_precision():
    """Neither a norm above float16's range nor an eps below it."""
    x = torch.stack([torch.full((50000,), 300.0), torch.zeros(50000)]).half()
    for how, expected in (("l2", 50000**-0.5), ("rms", 1.0)):
        for kind in (dict(normalize=how), dict(normalize="none", normalize_output=how)):
            layer = lnn.ForwardForwardLayer(nn.Identity(), **kind)
            for out in (layer.eval()(x), layer.train()(x, torch.tensor([True, False]))[0]):
                assert out.dtype == torch.float16 and not out[1].any()
                assert_relative("row", out[0].float(), torch.full((50000,), expected), 1e-3)


@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_a_layer_normalises_its_output_for_the_next(kind):
    """By the loss's own sums of squares; as if the next layer had."""
    module, x, positive = nn.Conv2d(3, 4, 3), randn(4, 3, 6, 6), torch.arange(4) < 2
    own = lnn.ForwardForwardLayer(module, normalize_output=kind)
    plain, after = lnn.ForwardForwardLayer(module), lnn.ForwardForwardLayer(nn.Identity(), normalize=kind)
    for arguments in ((x, positive), (x,)):
        got, expected = own(*arguments), plain(*arguments)
        if len(arguments) == 2:
            assert torch.equal(got[1], expected[1]) and not got[0].requires_grad
            got, expected = got[0], expected[0]
        torch.testing.assert_close(got, after.normalized(expected))


@pytest.mark.parametrize(
    "shape, dim, pool, padding",
    [
        ((8, 32, 32), 4096, [2, 1], [0, 0]),
        ((128, 32, 32), 4096, [8, 4], [0, 0]),
        ((8, 7, 7), 150, [2, 2], [1, 1]),
        ((8, 7, 7), 4096, [1, 1], [0, 0]),
        ((9000, 2, 2), 4096, [2, 2], [0, 0]),
    ],
)
def test_decoder_pool_of_predsim(shape, dim, pool, padding):
    block = lnn.PredSimHead(nn.Identity(), shape, 5, decoder_dim=dim, sim_head="identity")
    assert block.pool == pool and list(block.padding) == padding
    assert not block.decoder.weight.any()
    out, loss = block(randn(2, *shape), targets(2, 5))
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            lambda: lnn.InfoProUnit(nn.Identity(), 4, 3, 3, weights=(0, 0)),
            "weights must not all be 0: nothing would be learnt, got (0, 0)",
        ),
        (
            lambda: lnn.ForwardForwardLayer(nn.Linear(4, 4), threshold=float("nan"))(
                torch.ones(1, 4), torch.tensor([True])
            ),
            "threshold must be finite, got nan",
        ),
        (
            lambda: lnn.ForwardForwardLayer(nn.Identity(), normalize="max"),
            "normalize must be one of 'l2', 'rms', 'none', got 'max'",
        ),
        (
            lambda: lnn.PredSimHead(nn.Identity(), (8,), 5, sim_head="conv"),
            "sim_head must be one of 'layer', 'identity', got 'conv'",
        ),
        (
            lambda: lnn.ContrastiveHead(nn.Identity(), 8, loss="triplet"),
            "loss must be one of 'nt_xent', 'supcon', got 'triplet'",
        ),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError) as caught:
        bad()
    assert str(caught.value) == message


def test_infopro():
    """Two units in a trainer; the loss against the formula, written out; weights of 0 leave their head out."""
    torch.manual_seed(0)
    assert lnn.infopro_weights(2, (5.0, 0.5), (0.0, 1.0)) == [(5.0, 0.5)]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    first = lnn.InfoProUnit(conv(), 8, 5, 3, weights=(5.0, 0.5), mean=mean, std=std)
    second = lnn.InfoProUnit(
        nn.Conv2d(8, 6, 3), 6, 5, 3, weights=(0.25, 1.0), loss="cross_entropy", first=first, mean=mean, std=std
    )
    image, y = torch.rand(6, 3, 9, 9), targets(6, 5)
    x = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    out, _ = first(x, y)
    h, loss = second(out, y)
    decoded = second.decoder(nn.functional.interpolate(h, (9, 9), mode="bilinear", align_corners=True)).sigmoid()
    expected = 0.25 * nn.functional.binary_cross_entropy(decoded, image) + nn.functional.cross_entropy(second.aux(h), y)
    assert_relative("loss", loss, expected, 1e-5)
    assert not any(name.startswith("_first") for name, _ in second.named_parameters())
    trainer = BlockwiseTrainer(
        [first, second, nn.Flatten(), lnn.ClassifierBlock(nn.Linear(150, 5))], lambda p: torch.optim.Adam(p, 0.01)
    )
    losses = [trainer.step(x, y) for _ in range(15)]
    assert bool((losses[-1] < losses[0]).all())
    assert lnn.InfoProUnit(conv(), 8, 5, 3, weights=(0.0, 1.0)).decoder is None
    with pytest.raises(RuntimeError, match="first InfoProUnit has not seen an image"):
        lnn.InfoProUnit(conv(), 8, 5, 3, first=lnn.InfoProUnit(conv(), 8, 5, 3))(x, y)


@pytest.mark.parametrize("widen", [1, 1.5])
@pytest.mark.parametrize("channels, out, stride", [(16, 32, 2), (32, 64, 2), (64, 64, 1)])
def test_infopro_heads_of_its_code(channels, out, stride, widen):
    """The three widths that its code knows; any other C is treated as its nearest."""
    unit = lnn.InfoProUnit(nn.Identity(), channels, 10, 3, widen=widen)
    wide, hidden, decoder = int(out * widen), int(128 * widen), int(12 * widen)
    first = unit.aux[0]
    assert (first.in_channels, first.out_channels, first.stride, first.bias) == (channels, wide, (stride,) * 2, None)
    assert [tuple(p.shape) for p in unit.aux.parameters()] == [
        (wide, channels, 3, 3),
        (wide,),
        (wide,),
        (hidden, wide),
        (hidden,),
        (128, hidden),
        (128,),
    ]
    assert [tuple(p.shape) for p in unit.decoder.parameters()] == [
        (decoder, channels, 3, 3),
        (decoder,),
        (decoder,),
        (decoder,),
        (3, decoder, 3, 3),
        (3,),
    ]
    assert abs(float(first.weight.detach().std()) / (2 / (9 * wide)) ** 0.5 - 1) < 0.1
    assert lnn.InfoProUnit(nn.Identity(), channels, 10, 3, loss="cross_entropy").aux[-1].out_features == 10


@pytest.mark.parametrize("channels, out, stride", [(6, 12, 2), (100, 100, 1)])
def test_infopro_heads_of_other_widths(channels, out, stride):
    first = lnn.InfoProUnit(nn.Identity(), channels, 10, 3).aux[0]
    assert (first.out_channels, first.stride) == (out, (stride,) * 2)


def test_infopro_keeps_no_batch():
    """It goes with the last unit that reads it, in evaluation, and into no copy; a step may still be run in parts."""
    torch.manual_seed(0)
    first = lnn.InfoProUnit(conv(), 8, 5, 3)
    second = lnn.InfoProUnit(nn.Conv2d(8, 6, 3), 6, 5, 3, first=first)
    image, y = torch.rand(4, 3, 9, 9), targets(4, 5)
    gone = weakref.ref(image)
    out, _ = first(image, y)
    assert copy.deepcopy(nn.ModuleList([first, second]))[0]._image is None and first._image is not None
    before = second(out, y)[1]
    assert first._image is None
    assert torch.isfinite(second(out, y)[1]) and torch.isfinite(before)  # while the caller has the batch
    del image
    assert gone() is None
    with pytest.raises(RuntimeError, match="has not seen an image yet"):
        second(out, y)
    first(torch.rand(4, 3, 9, 9), y)
    assert first.eval()._image is None
    alone = lnn.InfoProUnit(conv(), 8, 5, 3)
    alone(torch.rand(4, 3, 9, 9), y)
    assert alone._image is None


def test_infopro_refuses_heads_without_channels():
    with pytest.raises(ValueError, match="widen must leave at least 1 of 12 channels, got 0.01"):
        lnn.InfoProUnit(conv(), 8, 5, 3, widen=0.01)


@pytest.mark.parametrize("std", [0.0, (0.5, 0.0, 0.5), -1.0])
def test_infopro_refuses_a_std_that_is_not_positive(std):
    with pytest.raises(ValueError, match="std must be greater than 0 in every channel, got"):
        lnn.InfoProUnit(conv(), 8, 5, 3, std=std)


@pytest.mark.parametrize(
    "make",
    [
        lambda b: lnn.LLSHead(b, num_classes=5, pool_size=8),
        lambda b: lnn.LocalClassifier(b, 8, 5),
        lambda b: lnn.PredSimHead(b, (8,), 5),
        lambda b: lnn.ContrastiveHead(b, 8, loss="supcon"),
        lambda b: lnn.ForwardForwardLayer(b),
    ],
    ids=["LLSHead", "LocalClassifier", "PredSimHead", "ContrastiveHead", "ForwardForwardLayer"],
)
def test_a_bad_target_leaves_the_running_statistics(make):
    norm = nn.BatchNorm1d(8)
    block, before = make(norm), norm.running_mean.clone()
    bad = torch.tensor([0.5, 1, 2, 7]) if "supcon" in str(vars(block)) else torch.tensor([0, 1, 2, 7])
    with pytest.raises((ValueError, TypeError)):
        block(torch.randn(4, 8), bad)
    assert torch.equal(norm.running_mean, before)
