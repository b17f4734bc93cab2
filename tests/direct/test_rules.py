"""DFA, sDFA, DRTP as rules: the vectors of the original code, the rule written out, conventions and targets."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels import functional as LF
from lgkernels.training import CONVENTIONS, BackpropTrainer, DirectTrainer
from tests.direct.common import RULES, Kept, gradients, images, kept, network, sgd
from tests.support.tolerances import assert_relative

GOLDEN = Path(__file__).parents[1] / "golden" / "feedback"
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "none": nn.Identity}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# -- the original code's vectors ---------------------------------------------------------------------------------------


class Golden:
    def __init__(self, name, dtype):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            self.data = {key: file[key] for key in file}
        self.dtype = dtype
        self.layers = sorted(int(key.split("/")[1]) for key in self.data if key.startswith("kind/"))

    def __getitem__(self, key):
        tensor = torch.from_numpy(np.array(self.data[key]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def text(self, key):
        return str(self.data[key])

    def layer(self, i):
        weight, conv = self[f"W/{i}"], self.text(f"kind/{i}").lower() == "conv"
        layer = (
            nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                weight.shape[2],
                int(self.data[f"stride/{i}"]),
                int(self.data[f"padding/{i}"]),
            )
            if conv
            else nn.Linear(*weight.shape[::-1])
        )
        layer.to(self.dtype).load_state_dict({"weight": weight, "bias": self[f"b/{i}"]})
        return layer, conv

    def blocks(self, places):
        """Modules in order; a DirectFeedback with the stored B after each hidden activation (before the pool)."""
        blocks, flat = [], False
        for i in self.layers:
            layer, conv = self.layer(i)
            if not conv and not flat:
                blocks.append(nn.Flatten())
                flat = True
            if i == self.layers[-1]:
                blocks.append(nn.Sequential(layer, ACTIVATIONS[self.text("output_act")]()))
                continue
            act = ACTIVATIONS[self.text("conv_act" if conv else "hidden_act")]()
            blocks.append(nn.Sequential(layer, act))
            if places:
                blocks.append(lnn.DirectFeedback(feedback=self[f"B_direct/{i}"]))
            if conv:
                blocks.append(nn.MaxPool2d(2))
        return blocks

    def loss(self, output, target):
        if self.text("loss_fn") == "CE":
            return F.cross_entropy(output, target)
        return {"BCE": F.binary_cross_entropy, "MSE": F.mse_loss}[self.text("loss_fn")](
            output, F.one_hot(target, output.shape[1]).to(output.dtype)
        )

    @property
    def error(self):
        return "probs_minus_onehot" if self.text("loss_fn") == "CE" else "output_minus_target"


def feedback_alignment(golden):
    """The network with its layers under FA: B_fa(l) carries the error below layer l, the output layer's too."""
    blocks = golden.blocks(places=False)
    feedback = iter(golden.layers)

    class Linear(nn.Linear):
        def forward(self, x):
            return LF.feedback_linear(x, self.weight, self.bias, feedback=self.feedback)

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return LF.feedback_conv2d(x, self.weight, self.bias, self.stride, self.padding, feedback=self.feedback)

    for block in blocks:
        for module in block.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.feedback = golden[f"B_fa/{next(feedback)}"]
                module.__class__ = Linear if isinstance(module, nn.Linear) else Conv2d
    return blocks


@pytest.mark.parametrize("rule", ["BP", "FA", "DFA", "sDFA", "DRTP", "shallow"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["conv2_fc_ce", "conv_fc_bce", "conv_k5s1_fc_bce", "fc3_mse"])
def test_golden(name, dtype, rule, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    golden = Golden(name, dtype)
    if rule in ("BP", "FA"):
        blocks = golden.blocks(places=False) if rule == "BP" else feedback_alignment(golden)
        trainer = BackpropTrainer(blocks, lambda p: Kept(p, lr=1.0), loss=golden.loss)
    else:
        trainer = DirectTrainer(
            golden.blocks(places=True),
            lambda p: Kept(p, lr=1.0),
            rule=rule.lower(),
            loss=golden.loss,
            error=golden.error,
            reduce="none",
        )
    loss = trainer.step(golden["x"], golden["labels"])
    assert_relative("output", trainer.output, golden["output"], TOLERANCE[dtype])
    assert abs(loss.item() - float(golden["loss"])) < (1e-12 if dtype == torch.float64 else 2e-6)
    found = iter(gradients(trainer))
    for i in golden.layers:
        for part in ("W", "b"):
            expected = golden[f"{rule}/grad_{part}/{i}"]
            got = next(found)
            if rule == "shallow" and i != golden.layers[-1]:
                assert torch.equal(got, torch.zeros_like(got)) and not expected.any()
            else:
                assert_relative(f"{rule} grad_{part}/{i}", got, expected, TOLERANCE[dtype])
    assert next(found, None) is None


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "drtp"])
def test_float_targets_are_the_same(rule):
    golden = Golden("fc3_mse", torch.float32)
    trainers = [
        DirectTrainer(
            golden.blocks(places=True),
            lambda p: Kept(p, lr=1.0),
            rule=rule,
            loss=loss,
            error=golden.error,
            reduce="none",
        )
        for loss in (golden.loss, F.mse_loss)
    ]
    trainers[0].step(golden["x"], golden["labels"])
    trainers[1].step(golden["x"], golden["targets"])
    for one, two in zip(*map(gradients, trainers)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# -- the rule written out --------------------------------------------------------------------------------------------


def written_out(blocks, places, x, target, rule, error, factor):
    """Gradients by hooks on the ordinary graph of the whole network."""
    classes, signal, entered = 3, None, []
    h = x
    for block in blocks:
        if isinstance(block, lnn.DirectFeedback):
            entered.append(h)
            h = h.detach().requires_grad_()
        else:
            h = block(h)
    h.retain_grad()
    loss = F.cross_entropy(h, target)
    loss.backward()
    onehot = F.one_hot(target, classes).float()
    e = {"probs_minus_onehot": h.softmax(1) - onehot, "output_minus_target": h - onehot, "loss_grad": h.grad}[error]
    signal = {"dfa": e, "sdfa": e.sign(), "drtp": onehot, "shallow": 0 * e}[rule].detach() * factor
    for place, activation in zip(places, entered):
        activation.backward((signal @ place.matrix(classes, activation.shape[1:]).flatten(1)).view(activation.shape))
    return [p.grad for block in blocks for p in block.parameters()]


CASES = [
    ("probs_minus_onehot", None, 1 / 8, "nokland", "uniform", True),
    ("probs_minus_onehot", "none", 1, "kaiming", "normal", False),
    ("output_minus_target", "mean", 1 / 8, "kaiming", "uniform", False),
    ("loss_grad", None, 1, "lighton", "uniform", False),
    ("loss_grad", "mean", 1 / 8, 0.3, "sign", False),
    ("probs_minus_onehot", "mean", 1 / 8, "lls", "uniform8", False),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("error, reduce, factor, init, law, norm", CASES)
def test_step_is_the_rule(rule, error, reduce, factor, init, law, norm):
    x, target = images()
    trainer = DirectTrainer(
        network(norm),
        kept,
        rule=rule,
        error=error,
        reduce=reduce,
        init=init,
        law=law,
        seed=7,
        shared_slice=init == "lighton" and rule != "drtp",
    )
    expected = copy.deepcopy(trainer.blocks)
    trainer.step(x, target)
    places = [b for b in trainer.blocks if isinstance(b, lnn.DirectFeedback)]
    assert len(places) == 3
    for got, wanted in zip(gradients(trainer), written_out(expected, places, x, target, rule, error, factor)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * max(wanted.abs().max().item(), 1e-4))


def test_conventions():
    """Laws of the published codes, and where the signal enters: N = 256 before the first pool, 24 after the second."""
    places = {}
    for name, convention in CONVENTIONS.items():
        trainer = DirectTrainer(network(), sgd, **convention)
        trainer.step(*images())
        places[name] = [b for b in trainer.blocks if isinstance(b, lnn.DirectFeedback)]
    shapes = (4, 8, 8), (6, 2, 2), (12,)
    for name, bound in (
        ("nokland", lambda n: n**-0.5),
        ("kaiming", lambda n: (6 / n) ** 0.5),
        ("lighton", lambda n: 1 / 16),
    ):
        for place, shape in zip(places["chfrenkel" if name == "kaiming" else name], shapes):
            b, limit = place.matrix(40, shape), bound(np.prod(shape))
            assert 0.9 * limit < b.max() <= limit and -limit <= b.min() < -0.9 * limit
    lls = places["lls"][0].matrix(40, shapes[0])
    assert lls.min() >= 0 and 0.9e-4 < lls.max() <= 1e-4
    first, second = (place.matrix(3, shape).flatten(1) for place, shape in zip(places["lighton"][:2], shapes))
    assert torch.equal(first[:, :24], second)
    assert not torch.equal(*(p.matrix(3, (24,)) for p in places["nokland"][:2]))


@pytest.mark.parametrize("law", ["normal", "sign", "uniform8", "uniform"])
def test_laws_have_the_variance_of_the_init(law):
    b = lnn.DirectFeedback("kaiming", law=law).matrix(200, (150,))
    assert b.std().item() == pytest.approx((2 / 150) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "rule, error",
    [("dfa", "probs_minus_onehot"), ("dfa", "loss_grad"), ("drtp", "loss_grad"), ("sdfa", "probs_minus_onehot")],
)
@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_ignored_targets_and_small_integers(rule, error, reduce):
    """Rows of target -100 have no part in a step, whatever the rule; targets may be of any integer dtype."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, -100, 2, 1, -100, 2])
    found = []
    for data, labels in ((x, target.to(torch.int8)), (x[target >= 0], target[target >= 0])):
        torch.manual_seed(1)
        blocks = [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
        trainer = DirectTrainer(blocks, lambda p: Kept(p, lr=1.0), rule=rule, error=error, reduce=reduce)
        found.append((trainer.step(data, labels), *gradients(trainer)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
