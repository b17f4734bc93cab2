"""The 13 defects of BioTorch 0.0.16 under a current torch, each as the test that it fails.

Numbers and wording follow section 3.4 of the specification of sign-symmetry and feedback alignment."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.training import DirectTrainer
from tests.feedback.common import randn
from tests.support.tolerances import assert_relative

RULES = ("fa", "usf", "frsf", "brsf", "signed_init")
EACH = pytest.mark.parametrize("rule", RULES)


def convert(model, rule, **options):
    signs = {"signs": "weight"} if rule == "signed_init" else {}
    return lnn.convert(model, rule, verbose=False, **signs, **options)


def network(rule=None, **options):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    return model if rule is None else convert(model, rule, last_layer="convert", **options)


DATA, TARGET = randn(6, 2, 8, 8), torch.arange(6) % 3


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_01_amp(rule, dtype):
    """Under autocast every Linear backward raised a dtype mismatch, Conv2d failed too."""
    exact, model = network(rule), network(rule)
    F.cross_entropy(exact(DATA), TARGET).backward()
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(DATA), TARGET)
    loss.backward()
    for p, q in zip(model.parameters(), exact.parameters()):
        assert p.grad.dtype == torch.float32
        assert_relative("gradient", p.grad, q.grad, 0.15)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_02_half_modules(rule, dtype):
    """brSF in a bf16 or half module raised: it drew float32."""
    model = network(rule).to(dtype)
    y = model(DATA.to(dtype))
    y.float().square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@EACH
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 3, 4, 6)], ids=str)
def test_03_any_leading_dimensions(rule, shape):
    """Linear took 2-D inputs only, so converting a TransformerEncoderLayer failed."""
    layer = convert(nn.Linear(6, 4), rule)
    x = randn(*shape).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 4)
    assert_relative("dX", x.grad, layer.feedback_weight().sum(0).expand(shape), 1e-5)
    encoder = convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), rule)
    encoder(randn(2, 5, 8)).sum().backward()
    assert encoder.linear1.weight.grad.isfinite().all()


@EACH
@pytest.mark.parametrize("scale", ["kaiming", "xavier", "he_fan_out", "inv_sqrt_fan_in", "he_fan_in", 0.1], ids=str)
def test_04_every_rule_with_every_init(rule, scale):
    """brSF with any init but xavier was a NameError."""
    model = network(rule, **{"feedback_init" if rule == "fa" else "scale": scale})
    model(DATA).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@EACH
def test_05_no_option_is_required(rule):
    """Options without the key `init` were a KeyError; DFA layers without options a TypeError."""
    network(rule)(DATA).sum().backward()
    if rule == "fa":
        lnn.FeedbackAlignmentLinear(3, 2), lnn.FeedbackAlignmentConv2d(3, 2, 1)
    else:
        lnn.SignSymmetricLinear(3, 2, rule=rule), lnn.SignSymmetricConv2d(3, 2, 1, rule=rule)
    lnn.DirectFeedback()


@EACH
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)], ids=str)
def test_06_padding(rule, mode, padding):
    """padding_mode was ignored; the backward of padding="same" raised."""
    plain = nn.Conv2d(2, 4, 3, padding=padding, padding_mode=mode)
    layer = convert(copy.deepcopy(plain), rule)
    mine, theirs = DATA.clone().requires_grad_(), DATA.clone().requires_grad_()
    assert_relative("y", layer(mine), plain(theirs), 1e-6)
    layer(mine).square().sum().backward()
    with torch.no_grad():
        grad = 2 * plain(theirs)
        plain.weight.copy_(layer.feedback_weight())
    plain(theirs).backward(grad)
    assert_relative("dX", mine.grad, theirs.grad, 1e-5)


def test_07_alignment_knows_the_signs():
    """frSF's angle was taken with |M| instead of |M| * sign(W): 87.9 degrees where it is 34.1."""
    layer = convert(nn.Linear(400, 300), "frsf", scale="xavier")
    angle = lnn.alignment(layer)[""]
    weight, feedback = layer.weight.double(), layer.feedback_weight().double()
    cosine = (weight * feedback).sum() / (weight.norm() * feedback.norm())
    assert abs(angle - math.degrees(math.acos(cosine))) < 1e-3
    assert abs(angle - math.degrees(math.acos(0.75))) < 1  # two independent uniform magnitudes: cos = 1/4 / (1/3)


@EACH
def test_08_the_optimizer_keeps_its_weights(rule):
    """constrain_weights=True put a new Parameter in place at each forward: the optimizer then updated nothing."""
    model = network(rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        F.cross_entropy(model(DATA), TARGET).backward()
        optimizer.step()
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        assert all(not torch.equal(p, old) for p, old in zip(parameters, before))


@EACH
@pytest.mark.unpoisoned
def test_09_feedback_is_no_parameter(rule):
    """F was a Parameter, replaced every forward: doubled parameters(), foreign keys in the state_dict, stale objects in
    optimizers and DDP, no fullgraph compile, and alignment failed in replicas."""
    model, plain = network(rule), network()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    buffers = {name: id(b) for name, b in model.named_buffers()}
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(DATA).square().sum().backward()
    model(DATA).square().sum().backward()
    torch._dynamo.reset()
    for p, q in zip(compiled.parameters(), model.parameters()):
        assert_relative("gradient", p.grad, q.grad, 1e-5)
    assert buffers == {name: id(b) for name, b in model.named_buffers()}
    assert len(lnn.alignment(model)) == 4


@EACH
def test_10_gradients_as_they_are(rule):
    """gradient_clip clamped dX, dW and db to +-1 through deprecated hooks. Here nothing clips, hooks or warns."""
    layer = convert(nn.Linear(6, 4), rule)
    x = randn(5, 6).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).backward(100 * randn(5, 4, seed=1))
    assert layer.weight.grad.abs().max() > 1 and x.grad.abs().max() > 1
    assert not layer._backward_hooks and not layer._backward_pre_hooks and not layer._forward_hooks
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)  # torch's own clipping applies


@EACH
def test_11_convert(rule):
    """A bare root was not converted; a module used twice became two; tensors were made on the CPU in float32; the
    options' dict was changed."""
    bare = nn.Linear(6, 4, dtype=torch.bfloat16)
    weight, bits = bare.weight, bare.weight.detach().clone()
    options = {"feedback_init" if rule == "fa" else "scale": "xavier"}
    kept = dict(options)
    assert convert(bare, rule, **options) is bare and options == kept
    assert type(bare) is not nn.Linear and bare.weight is weight and torch.equal(weight, bits)
    shared = nn.Linear(6, 6)
    model = convert(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 2)), rule)
    assert model[0] is model[2]
    on_meta = convert(nn.Linear(6, 4, device="meta"), rule)
    assert {t.device.type for t in itertools.chain(on_meta.parameters(), on_meta.buffers())} == {"meta"}


def test_12_brsf_redraws_with_the_weight_update():
    """It redrew at every forward, evaluation too, from the global generator: two forwards in a step saw two F."""
    model = network("brsf")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lnn.redraw_after(optimizer, model)
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    first = model[4].feedback_weight().abs()
    for _ in range(2):
        model(DATA).sum().backward()
        model.eval()(DATA)
        model.train()
    assert torch.equal(model[4].feedback_weight().abs(), first)
    optimizer.step()
    assert not torch.equal(model[4].feedback_weight().abs(), first)
    assert torch.equal(torch.get_rng_state(), generator)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.body(x)


def test_13_dfa_replaces_the_gradient_of_a_residual_block():
    """The injected gradient was added to the skip path's exact one. Here the signal is the whole gradient of the
    block's output, and no exact gradient goes past it."""
    torch.manual_seed(0)
    block, places = [Residual(), Residual()], [lnn.DirectFeedback(seed=1, stream=i) for i in range(2)]
    head = nn.Linear(8, 3)
    x = randn(6, 8)
    hidden = [block[0](x)]
    hidden.append(block[1](hidden[0].detach()))
    error = (head(hidden[1]).softmax(1) - F.one_hot(TARGET, 3)).detach()
    expected = []
    for output, place, module in zip(hidden, places, block):
        signal = LF.feedback_projection(error, place.matrix(3, (8,)), (8,))
        expected += torch.autograd.grad(output, list(module.parameters()), signal)
    parameters = [p for module in block for p in module.parameters()]
    before = [p.detach().clone() for p in parameters]
    trainer = DirectTrainer(
        [block[0], places[0], block[1], places[1], head],
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        reduce="none",
    )
    trainer.step(x, TARGET)
    for old, p, grad in zip(before, parameters, expected, strict=True):
        assert_relative("gradient", old - p, grad, 1e-5)
