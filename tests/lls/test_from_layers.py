"""Blocks of a user's own layers, and what they take beside the kernels' usual options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels import convert
from lgkernels.core import optional
from lgkernels.training import BlockwiseTrainer
from tests.support.problems import randn
from tests.support.tolerances import assert_relative

HEAD = dict(num_classes=5, pool_size=2)
TARGET = torch.tensor([0, 4, 2, 1])


def grads(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


def same(block, twin, x, target, expected):
    """Loss, output and gradients of the block, and of the definition `expected(twin, x)` -> (out, loss)."""
    out, loss = block(x, target)
    loss.backward()
    other, reference = expected(twin, x)
    reference.backward()
    assert_relative("", loss, reference, 1e-5)
    assert_relative("", out, other, 1e-5)
    assert not out.requires_grad
    for mine, theirs in zip(grads(block), grads(twin), strict=True):
        assert_relative("", mine, theirs, 1e-4) if theirs.abs().max() > 1e-6 else assert_small(mine)


def assert_small(value):
    assert value.abs().max() < 1e-5  # a bias before batch normalisation


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2)])
def test_a_block_of_ones_own_layers_is_fused(act):
    conv, norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
    plain = copy.deepcopy(nn.Sequential(conv, norm, copy.deepcopy(act)))
    block = lnn.LLSConvBlock.from_layers(conv, norm, activation=act, max_pool=True, **HEAD)
    assert block.layer is conv and block.norm is norm and block.unfused() is None

    def expected(twin, x):
        a = twin(x)
        return F.max_pool2d(a, 2), LF.lls_loss(a, TARGET, **HEAD)

    same(block, plain, randn(4, 3, 8, 8), TARGET, expected)
    assert_relative("", norm.running_mean, plain[1].running_mean, 1e-5)


MODES = {
    "basis": dict(basis=randn(5, 24, seed=3)),
    "normalize": dict(normalize=False),
    "basis_scale": dict(basis_scale=0.25),
    "loss": dict(loss="hard_sigmoid_mse"),
    "eps": dict(eps=5.0),
    "tess": dict(normalize=False, basis_scale=1 / 24, loss="hard_sigmoid_mse"),
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_options_of_the_loss(mode, soft):
    """Of both blocks and the head, with classes and with probabilities."""
    given = dict(HEAD, temperature=0.7, **MODES[mode])
    torch.manual_seed(0)
    block = lnn.LLSConvBlock(3, 6, 3, padding=1, **given)
    twin = copy.deepcopy(block)
    target = F.one_hot(TARGET, 5).float() if soft else TARGET
    name = "a basis of its own" if mode == "basis" else next(iter(MODES[mode]))
    assert name in block.unfused() and "unfused: " in repr(block)

    def expected(twin, x):
        a = F.leaky_relu(twin.norm(twin.layer(x)), 0.01)
        return a, LF.lls_loss(a, TARGET, **given)

    same(block, twin, randn(4, 3, 8, 8), target, expected)
    wide = given | dict(pool_size=24)
    head = lnn.LLSHead(nn.Linear(7, 24), **wide)
    linear = lnn.LLSLinearBlock.from_layers(nn.Linear(7, 24), activation="identity", **wide)
    linear.layer.load_state_dict(head.block.state_dict())
    x = randn(4, 7)
    one, two, three = head(x, target)[1], linear(x, target)[1], LF.lls_loss(head.block(x), TARGET, **wide)
    assert_relative("", one, three, 1e-5)
    assert_relative("", two, three, 1e-5)


@pytest.mark.parametrize("modulation", [None, "vector", "matrix", "reduced"])
def test_probabilities(modulation):
    """They are the mixture of the classes' losses; label smoothing is a mixture with the uniform ones."""
    torch.manual_seed(0)
    head = lnn.LLSHead(nn.Linear(7, 8), num_classes=5, pool_size=8, modulation=modulation, label_smoothing=0.1)
    x, p = randn(4, 7), torch.softmax(randn(4, 5, seed=2), 1)
    rows = torch.stack([head(x[:1].expand(5, -1)[i : i + 1], torch.tensor([i]))[1] for i in range(5)])
    assert_relative("", head(x[:1], p[:1])[1], (p[0] * rows).sum(), 1e-5)
    loss = head(x, p)[1]
    assert_relative("", loss, torch.stack([head(x[i : i + 1], p[i : i + 1])[1] for i in range(4)]).mean(), 1e-5)


@pytest.mark.parametrize("act", ["gelu", "silu", "tanh", nn.GELU("tanh"), nn.Hardswish()])
def test_other_activations(act):
    torch.manual_seed(0)
    block = lnn.LLSConvBlock.from_layers(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation=act, **HEAD)
    function = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}.get(act, act)
    assert block.unfused().startswith("activation=") and "unfused: activation=" in repr(block)

    def expected(twin, x):
        a = function(twin.norm(twin.layer(x)))
        return a, LF.lls_loss(a, TARGET, **HEAD)

    same(block, copy.deepcopy(block), randn(4, 3, 8, 8), TARGET, expected)


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(dilation=2), "dilation=(2, 2)"),
        (dict(groups=3), "groups=3"),
        (dict(padding_mode="circular", padding=1), "padding_mode='circular'"),
        (dict(padding="same", kernel_size=(4, 3)), "padding='same' with kernel_size=(4, 3)"),
        (dict(padding_mode="reflect", padding=(1, 2)), "padding_mode='reflect'"),
    ],
)
def test_other_convolutions(options, why):
    torch.manual_seed(0)
    options = dict(kernel_size=3) | options
    block = lnn.LLSConvBlock(3, 6, **options, **HEAD)
    assert block.unfused() == why
    assert all(getattr(block.layer, k) == getattr(nn.Conv2d(3, 6, **options), k) for k in options)

    def expected(twin, x):
        a = F.leaky_relu(twin.norm(twin.layer(x)), 0.01)
        return a, LF.lls_loss(a, TARGET, **HEAD)

    same(block, copy.deepcopy(block), randn(4, 3, 8, 8), TARGET, expected)


@pytest.mark.parametrize("norm", [None, nn.GroupNorm(2, 6), nn.BatchNorm2d(6, affine=False)])
def test_other_norms(norm):
    block = lnn.LLSConvBlock.from_layers(nn.Conv2d(3, 6, 3), norm, activation="relu", **HEAD)
    assert block.unfused() == f"norm is {type(norm or nn.Identity()).__name__}"

    def expected(twin, x):
        a = twin.norm(twin.layer(x)).relu()
        return a, LF.lls_loss(a, TARGET, **HEAD)

    same(block, copy.deepcopy(block), randn(4, 3, 8, 8), TARGET, expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6)])
def test_tokens(norm):
    """(B, T, C): d = C * pool_size of T pooled; batch normalisation is over B and T."""
    block = lnn.LLSLinearBlock.from_layers(nn.Linear(3, 6), norm, activation="gelu", **HEAD)

    def expected(twin, x):
        z = twin.layer(x)
        z = twin.norm(z.flatten(0, 1)).view(z.shape) if isinstance(norm, nn.BatchNorm1d) else twin.norm(z)
        a = F.gelu(z)
        return a, LF.lls_loss(
            F.adaptive_avg_pool1d(a.transpose(1, 2), 2).flatten(1), TARGET, num_classes=5, pool_size=12
        )

    x = randn(4, 7, 3)
    same(block, copy.deepcopy(block), x, TARGET, expected)
    head = lnn.LLSHead(nn.Linear(3, 6), **HEAD)
    other = lnn.LLSHead(nn.Linear(3, 6), layout="sequence", **HEAD)
    other.block.load_state_dict(head.block.state_dict())
    assert head(x, TARGET)[1] != other(x, TARGET)[1]
    block = lnn.LLSLinearBlock(3, 6, **HEAD)
    assert block.unfused(x) == "tokens or a sequence" and block.unfused(x[0]) is None
    assert block(x, TARGET)[0].shape == block(x).shape == (4, 7, 6)


def test_sequences():
    """(B, C, L) of nn.Conv1d."""
    block = lnn.LLSConvBlock.from_layers(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), activation="relu", max_pool=True, **HEAD
    )

    def expected(twin, x):
        a = twin.norm(twin.layer(x)).relu()
        loss = LF.lls_loss(F.adaptive_avg_pool1d(a, 2).flatten(1), TARGET, num_classes=5, pool_size=12)
        return F.max_pool1d(a, 2), loss

    same(block, copy.deepcopy(block), randn(4, 3, 9), TARGET, expected)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, L\)"):
        block(randn(4, 3, 9, 9))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: lnn.LLSConvBlock.from_layers(nn.Linear(2, 2), **HEAD), TypeError, "conv must be an nn.Conv2d or nn."),
        (lambda: lnn.LLSLinearBlock.from_layers(nn.Conv2d(2, 2, 1), **HEAD), TypeError, "linear must be an nn.Linear"),
        (lambda: lnn.LLSConvBlock.from_layers(nn.Conv2d(2, 2, 1), 3, **HEAD), TypeError, "norm must be a torch.nn."),
        *(
            (
                lambda kind=kind, layer=layer, norm=norm: getattr(lnn, kind).from_layers(layer, norm, **HEAD),
                error,
                message,
            )
            for kind, layer, norm, error, message in [
                ("LLSConvBlock", nn.Conv2d(2, 8, 1), nn.BatchNorm2d(9), ValueError, "norm must be of the 8 channels"),
                ("LLSConvBlock", nn.Conv2d(2, 8, 1), nn.GroupNorm(3, 9), ValueError, "norm must be of the 8 channels"),
                ("LLSConvBlock", nn.Conv2d(2, 8, 1), nn.BatchNorm1d(8), TypeError, "norm must be of what an nn.Conv2d"),
                ("LLSConvBlock", nn.Conv1d(2, 8, 1), nn.BatchNorm2d(8), TypeError, "norm must be of what an nn.Conv1d"),
                ("LLSLinearBlock", nn.Linear(2, 8), nn.BatchNorm1d(9), ValueError, "norm must be of the 8 channels"),
                ("LLSLinearBlock", nn.Linear(2, 8), nn.LayerNorm(9), ValueError, "norm must be of the 8 channels"),
                ("LLSLinearBlock", nn.Linear(2, 8), nn.BatchNorm2d(8), TypeError, "norm must be of what an nn.Linear"),
            ]
        ),
        (
            lambda: lnn.LLSConvBlock.from_layers(nn.Conv2d(2, 2, 1), activation="swish", **HEAD),
            ValueError,
            "activation must be one of 'leaky_relu', 'relu', 'gelu'",
        ),
        (
            lambda: lnn.LLSConvBlock.from_layers(nn.Conv2d(2, 2, 1), stride=2, **HEAD),
            TypeError,
            "options must be among modulation, ",
        ),
        (lambda: lnn.LLSHead(nn.Linear(2, 2), basis=randn(4, 2), **HEAD), ValueError, "basis must have 5 rows"),
        (
            lambda: lnn.LLSHead(nn.Linear(2, 2), loss="hard_sigmoid_mse", label_smoothing=0.1, **HEAD),
            ValueError,
            "label_smoothing must be 0 with loss='hard_sigmoid_mse', got 0.1",
        ),
        (
            lambda: lnn.LLSHead(nn.Linear(2, 2), **HEAD)(randn(4, 2), randn(4, 3)),
            ValueError,
            "target must have shape (4, 5) (one row of probabilities per row of x), got (4, 3)",
        ),
        (
            lambda: lnn.LLSHead(nn.Linear(2, 2), basis=randn(5, 3), **HEAD)(randn(4, 2), torch.ones(4, 5)),
            ValueError,
            "basis must have shape (5, 2)",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message), str(caught.value)


# -- whole models -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block(8, 8)

    def forward(self, x):
        return x + self.inner(x)


class Network(nn.Module):
    """As users write them: blocks of their own, functions between the modules."""

    def __init__(self, residual=False):
        super().__init__()
        self.features = nn.Sequential(Block(3, 8), nn.MaxPool2d(2), Residual() if residual else Block(8, 8))
        self.hidden, self.norm, self.fc = nn.Linear(8 * 4 * 4, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(self.features(x), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.norm(self.hidden(x))), 0.1, self.training)
        return self.fc(x)


@pytest.mark.parametrize("residual", [False, True])
def test_convert(residual, capsys):
    torch.manual_seed(0)
    model, x = Network(residual), randn(4, 3, 16, 16)
    before = model.eval()(x)
    blocks = convert(model, "lls", num_classes=5)
    assert {id(p) for p in model.parameters()} == {id(p) for p in blocks.parameters()}
    assert torch.equal(blocks.eval()(x), before)
    kinds = [type(b).__name__ for b in blocks]
    second = "LLSHead" if residual else "LLSConvBlock"
    assert [k for k in kinds if k[:3] in ("LLS", "Cla")] == [
        "LLSConvBlock",
        second,
        "LLSLinearBlock",
        "ClassifierBlock",
    ]
    assert [b.pool_size for b in blocks if hasattr(b, "pool_size")] == [16, 16, 16]
    assert blocks[0].max_pool and blocks[0].unfused() is None or not blocks[0].norm.training
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "lls: 3 blocks" and text[1].startswith("  0  LLSConvBlock of Conv2d, P = 16, ")
    trainer = BlockwiseTrainer(blocks.train(), lambda parameters: torch.optim.Adam(parameters, 0.01))
    first = trainer.step(x, TARGET)
    for _ in range(30):
        last = trainer.step(x, TARGET)
    assert len(first) == 4 and bool((last < first).all())
    assert F.cross_entropy(model.eval()(x), TARGET) < F.cross_entropy(before, TARGET)


def test_pools_are_those_of_the_authors_tables():
    convs = [nn.Sequential(nn.Conv2d(3, c, 1), nn.ReLU()) for c in (32, 64, 128, 256, 512, 1024)]
    model = nn.Sequential(nn.Sequential(*convs), nn.Flatten(), nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 9))
    blocks = convert(model, "lls", num_classes=9, verbose=False)
    assert [b.pool_size for b in blocks if hasattr(b, "pool_size")] == [8, 4, 4, 2, 2, 1, 2048]
    blocks = convert(model, "lls", num_classes=9, pool_size=3, temperature=2.0, modulation="vector", verbose=False)
    assert {(b.pool_size, b.temperature) for b in blocks if hasattr(b, "pool_size")} == {(3, 2.0)}


def test_torchvisions_resnet():
    """Its residual blocks are whole, each with a head."""
    try:
        models = optional.torchvision().models
    except ImportError as error:
        pytest.skip(f"torchvision is not installed ({error})")
    model, x = models.resnet18(num_classes=5).eval(), randn(2, 3, 64, 64)
    before = model(x)
    blocks = convert(model, "lls", num_classes=5, verbose=False)
    assert torch.equal(blocks.eval()(x), before)
    losses = BlockwiseTrainer(blocks.train(), lambda p: torch.optim.SGD(p, 0.01)).step(x, TARGET[:2])
    assert losses.isfinite().all() and len(losses) == 10


@pytest.mark.parametrize(
    "model, given, error, message",
    [
        (Network(), {}, TypeError, "num_classes must be given with rule='lls', got None"),
        (Residual(), dict(num_classes=5), TypeError, "model must apply its modules one after the other, got Residual"),
        (nn.Sequential(nn.ReLU()), dict(num_classes=5), TypeError, "model must end in an nn.Linear or a convolution"),
        (Network(), dict(num_classes=5, units=2), TypeError, "options of rule='lls' must be among num_classes, pool_"),
        (Network(), dict(num_classes=5, include="fc"), ValueError, "include, exclude and last_layer must be left out"),
        (Network(), dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_what_convert_refuses(model, given, error, message):
    with pytest.raises(error) as caught:
        convert(model, "lls", **given)
    assert str(caught.value).startswith(message), str(caught.value)
