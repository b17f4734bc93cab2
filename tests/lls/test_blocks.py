"""The fused blocks: what they compute, against the same blocks in plain torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import lgkernels.nn as lnn
from tests.lls.blocks import CONV, LINEAR, check, make, results, unfused
from tests.lls.definition import definition
from tests.support.cases import label, subsets, sweep
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_accurate, assert_bit_equal, assert_relative

CONV_CASES = [
    *sweep(
        CONV,
        B=(1, 17),
        cin=(1,),
        cout=(1, 17),
        kernel=(1, (3, 1)),
        padding=(0, "same", (1, 0)),
        bias=(False,),
        modulation=("vector", "matrix", "reduced"),
        max_pool=(True,),
        activation=("relu",),
        waveform=("cosine",),
        negative_slope=(0.3,),
        temperature=(2.0,),
        label_smoothing=(0.1,),
        num_classes=(1, 33),
        pool_size=(1, 4, 8),
        channels_last=(True,),
    ),
    dict(CONV, stride=2, H=11, W=9, kernel=3),
    dict(CONV, stride=(2, 1), kernel=(3, 2)),
    dict(CONV, kernel=5, padding=2, H=7, W=7, modulation="matrix"),  # overlapping bins
    dict(CONV, H=3, W=3, max_pool=True, modulation="vector"),
    dict(CONV, H=1, W=1, kernel=1, padding=0),  # up-sampling, no spatial sum
    dict(CONV, H=9, W=7, max_pool=True, channels_last=True, modulation="reduced", reduced_rows=5),
    dict(CONV, H=8, W=8, max_pool=True, activation="relu", pool_size=4, channels_last=True),
]
LINEAR_CASES = [
    *sweep(
        LINEAR,
        B=(2, 17),
        out=(7, 33),
        bias=(False,),
        modulation=("vector", "matrix", "reduced"),
        activation=("relu",),
        waveform=("cosine",),
        pool_size=(5, 32),
        num_classes=(1, 33),
        label_smoothing=(0.1,),
    ),
    dict(LINEAR, pool_size=1, features=1, out=1),
]


@pytest.mark.parametrize("case", CONV_CASES + LINEAR_CASES, ids=label)
def test_step(impl, case):
    check(case, impl)


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=["conv", "linear"])
def test_loss_factor(impl, case):
    """A weighted loss scales the local gradients, although they were taken in the forward."""
    check(dict(case, modulation="matrix"), impl, factor=-2.5)


@pytest.mark.parametrize("case", CONV_CASES + LINEAR_CASES, ids=label)
def test_reference_in_float64(case):
    block, x, target = make(case, "reference")
    block, x = block.double(), x.double()
    got, exact = results(copy.deepcopy(block), x, target), results(copy.deepcopy(block), x, target, unfused)
    for name, value in exact.items():
        assert got[name].dtype == torch.float64
        assert_relative(name, got[name], value, 1e-9)


@pytest.mark.parametrize(
    "case",
    [
        dict(CONV, modulation="matrix"),
        dict(CONV, H=7, W=7, modulation="vector"),
        dict(LINEAR, modulation="matrix"),
        dict(LINEAR, pool_size=5, modulation="vector"),
    ],
    ids=label,
)
def test_finite_differences_of_the_local_loss(case):
    """Spec 7.5: with respect to M, weight, gamma and beta. (The loss alone: nothing of autograd is in it.)"""
    block, x, target = make(case, "reference")
    block, x = block.double(), x.double()
    results(block, x, target)
    step = 1e-6
    for name, parameter in block.named_parameters():
        if name == "layer.bias":
            continue
        flat = parameter.detach().view(-1)
        for index in torch.randperm(flat.numel())[:12].tolist():
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                with torch.no_grad():
                    values.append(block(x, target)[1].item())
                flat[index] -= sign * step
            slope, gradient = (values[0] - values[1]) / (2 * step), parameter.grad.view(-1)[index].item()
            assert abs(slope - gradient) <= 1e-6 * max(1.0, parameter.grad.abs().max().item()), f"{name}[{index}]"


@pytest.mark.parametrize("case", [CONV, dict(CONV, max_pool=True, activation="relu"), LINEAR], ids=label)
@pytest.mark.parametrize("evaluating", [True, False])
def test_without_target_it_is_an_ordinary_block(impl, case, evaluating):
    block, x, target = make(case, impl)
    block.train(not evaluating)
    twin, x2 = copy.deepcopy(block), x.clone().requires_grad_()
    x = x.requires_grad_()
    out = block(x, target) if evaluating else block(x)
    expected = F.leaky_relu(twin.norm(twin.layer(x2)), twin.negative_slope)
    expected = F.max_pool2d(expected, 2) if twin.max_pool else expected
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, x2.grad) and torch.equal(block.layer.weight.grad, twin.layer.weight.grad)
    assert torch.equal(block.norm.running_mean, twin.norm.running_mean)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", [dict(CONV, max_pool=True), LINEAR], ids=label)
def test_without_gradients(impl, case, mode):
    """Nothing local is computed; output, loss and running statistics are the same."""
    block, x, target = make(case, impl)
    twin = copy.deepcopy(block)
    out, loss = block(x, target)
    with mode():
        out2, loss2 = twin(x, target)
    assert not loss2.requires_grad and not out2.requires_grad
    assert_relative("out", out2.clone(), out, 1e-6)
    assert_relative("loss", loss2.clone(), loss, 1e-6)
    assert_bit_equal("running_mean", twin.norm.running_mean, block.norm.running_mean)
    assert all(p.grad is None for p in twin.parameters())


NAMES = ("layer.weight", "norm.weight", "norm.bias", "modulation")


@pytest.mark.parametrize("trained", subsets(NAMES), ids=lambda names: "+".join(names) or "nothing")
@pytest.mark.parametrize(
    "case", [dict(CONV, modulation="vector"), dict(LINEAR, modulation="matrix")], ids=["conv", "linear"]
)
def test_frozen_parameters(impl, case, trained):
    block, x, target = make(case, impl)
    full = results(copy.deepcopy(block), x, target)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in trained)
    _, loss = block(x, target)
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    for name, parameter in block.named_parameters():
        if name in trained:
            assert_relative(name, parameter.grad, full[name], 1e-6)
        else:
            assert parameter.grad is None


def test_no_gradient_to_the_input(impl):
    block, x, target = make(CONV, impl)
    x.requires_grad_()
    block(x, target)[1].backward()
    assert x.grad is None
    below = torch.nn.Conv2d(3, 3, 1)
    out, loss = block(below(x), target)
    loss.backward()
    assert below.weight.grad is None and not out.requires_grad


@pytest.mark.parametrize(
    "case", [dict(CONV, modulation="matrix"), dict(CONV, modulation="reduced", bias=False), LINEAR], ids=label
)
def test_state_dict_keys(case):
    block = make(case)[0]
    expected = {
        "layer.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    expected |= {"layer.bias"} if case.get("bias", True) else set()
    expected |= {"modulation"} if case.get("modulation") else set()
    assert set(block.state_dict()) == expected
    assert all(name in repr(block) for name in ("num_classes=10", "pool_size="))


def test_modulation_shapes_and_scale():
    shapes = {"vector": (10,), "matrix": (10, 10), "reduced": (20, 10)}
    for kind, shape in shapes.items():
        torch.manual_seed(0)
        m = lnn.LLSConvBlock(3, 4, 3, num_classes=10, pool_size=2, modulation=kind).modulation
        assert m.shape == shape and m.abs().max() < 0.06 and m.std() > 0.004
    assert lnn.LLSConvBlock(3, 4, 3, num_classes=10, pool_size=2).modulation is None


def test_deepcopy_and_state_dict_are_independent(impl):
    block, x, target = make(dict(CONV, modulation="matrix"), impl)
    out, loss = block(x, target)
    twin = copy.deepcopy(block)  # with a step pending
    loss.backward()
    with torch.no_grad():
        block.layer.weight.zero_()
    assert twin.layer.weight.any() and twin.layer.weight.grad is None
    other = make(dict(CONV, modulation="matrix"), impl, seed=5)[0]
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other.eval()(x), twin.eval()(x))


def test_cumulative_and_absent_running_statistics(impl):
    """momentum=None is torch's cumulative average; track_running_stats=False keeps none."""
    block, x, target = make(CONV, impl)
    for change in (dict(momentum=None), dict(track_running_stats=False)):
        block.norm = torch.nn.BatchNorm2d(6, **change)
        plain = torch.nn.BatchNorm2d(6, **change)
        for i in range(3):
            out, _ = block(x + i, target)
            expected = F.leaky_relu(plain(block.layer(x + i)), 0.01)
            assert_relative("out", out, expected, 1e-5)
        if block.norm.running_mean is not None:
            assert_relative("running_mean", block.norm.running_mean, plain.running_mean, 1e-5)
            assert_relative("running_var", block.norm.running_var, plain.running_var, 1e-5)
            assert block.norm.num_batches_tracked == plain.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_that_counts_no_batches(impl, momentum):
    """`num_batches_tracked` is None in what others have converted; without momentum torch then keeps still."""
    block, x, target = make(CONV, impl)
    block.norm, plain = (torch.nn.BatchNorm2d(6, momentum=momentum) for _ in range(2))
    block.norm.num_batches_tracked = plain.num_batches_tracked = None
    for i in range(2):
        block(x + i, target)
        plain(block.layer(x + i))
    assert_relative("running_mean", block.norm.running_mean, plain.running_mean, 1e-5)
    assert_relative("running_var", block.norm.running_var, plain.running_var, 1e-5)
    assert (block.norm.running_mean == 0).all() == (momentum is None)


@pytest.mark.parametrize(
    "case", [dict(CONV, B=1, H=1, W=1, kernel=1, padding=0), dict(LINEAR, B=1)], ids=["conv", "linear"]
)
def test_one_value_per_channel_raises_as_torch(impl, case):
    block, x, target = make(case, impl)
    with pytest.raises(ValueError, match="[Ee]xpected more than 1 value per channel when training"):
        block(x, target)


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=["conv", "linear"])
def test_repeatable_bit_for_bit(impl, case):
    block, x, target = make(dict(case, modulation="matrix", B=17), impl)
    first = results(copy.deepcopy(block), x, target)
    for _ in range(3):
        for name, value in results(copy.deepcopy(block), x, target).items():
            assert_bit_equal(name, value, first[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [dict(CONV, modulation="matrix"), dict(CONV, max_pool=True, channels_last=True), LINEAR], ids=label
)
def test_half_block(impl, case, dtype):
    """A block cast whole, norm and all; the loss and its sums stay float32."""
    block, x, target = make(case, impl)
    block, x = block.to(dtype), x.to(dtype)
    exact = results(copy.deepcopy(block).double(), x.double(), target, unfused)
    plain = results(copy.deepcopy(block), x, target, unfused)
    got = results(block, x, target)
    assert got["out"].dtype == dtype and got["loss"].dtype == torch.float32
    # positions summed: a rounded pre-activation near 0 turns its sign
    length = got["out"].numel() // got["out"].shape[1]
    for name, value in exact.items():
        assert_accurate(name, got[name], plain[name], value, length, rounding=dtype)


def test_float16_gradient_does_not_underflow(impl):
    """dz of this block lies around float16's smallest number: unscaled, the weight gradient would be mostly zeros."""
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip("too large for the interpreter; the scale is chosen in code that all backends share")
    block, x, target = make(dict(CONV, B=64, H=32, W=32, cout=4, temperature=64.0), impl)
    exact = results(copy.deepcopy(block).double(), x.double(), target, unfused)["layer.weight"]
    half = copy.deepcopy(block).half()
    half.norm.float()
    half(x.half(), target)[1].backward()
    error = (half.layer.weight.grad.double() - exact).norm() / exact.norm()
    assert error < 0.08, f"relative error {error:.2e}"


@pytest.mark.parametrize("case", [dict(modulation=None), dict(modulation="matrix", waveform="cosine")], ids=label)
def test_head_around_any_block(impl, case):
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 5, 1))
    head = lnn.LLSHead(inner, num_classes=7, pool_size=2, impl=impl, **case)
    x, target = randn(4, 3, 6, 6).requires_grad_(), targets(4, 7)
    out, loss = head(x, target)
    loss.backward()
    exact = copy.deepcopy(inner).double()
    exact.zero_grad()
    m = None if head.modulation is None else head.modulation.detach().double().requires_grad_()
    definition(
        exact(x.detach().double()), target, m, num_classes=7, pool_size=2, waveform=case.get("waveform", "square")
    ).backward()
    assert x.grad is None and not out.requires_grad
    for (name, p), q in zip(inner.named_parameters(), exact.parameters()):
        assert_relative(name, p.grad, q.grad, 1e-5)
    if m is not None:
        assert_relative("modulation", head.modulation.grad, m.grad, 1e-5)
    assert torch.equal(head.eval()(x), inner(x)) and math.isfinite(loss.item())


def test_classifier_block():
    block = lnn.ClassifierBlock(torch.nn.Linear(5, 3), label_smoothing=0.1)
    x, target = randn(4, 5).requires_grad_(), targets(4, 3)
    logits, loss = block(x, target.to(torch.int32))
    loss.backward()
    twin = copy.deepcopy(block.module)
    twin.zero_grad()
    F.cross_entropy(twin(x.detach()), target, label_smoothing=0.1).backward()
    assert x.grad is None and not logits.requires_grad
    assert torch.equal(block.module.weight.grad, twin.weight.grad)
    assert torch.equal(block.eval()(x, target), block.module(x))


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=["conv", "linear"])
def test_frozen_norm(impl, case):
    """`block.norm.eval()`, as in fine-tuning: the running statistics normalise, and stay."""
    block, x, target = make(case, impl)
    block.norm.eval()
    running = block.norm.running_mean.clone()
    activation = F.leaky_relu(block.norm(block.layer(x)), block.negative_slope)
    expected = definition(activation, target, None, num_classes=block.num_classes, pool_size=block.pool_size)
    (expected_grad,) = torch.autograd.grad(expected, block.layer.weight)
    out, loss = block(x.requires_grad_(), target)
    loss.backward()
    assert torch.equal(out, activation) and not out.requires_grad and x.grad is None
    assert torch.equal(block.norm.running_mean, running)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(block.layer.weight.grad, expected_grad)


def test_hooks_of_the_layer_run():
    block, x, target = make(CONV)
    fused = block(x, target)
    seen = []
    block.layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    out, loss = block(x, target)
    assert len(seen) == 1
    torch.testing.assert_close((out, loss.detach()), (fused[0], fused[1].detach()))


def _replaced(kind):
    """A block with another module in the place of its layer or norm, and arguments; all were ignored, or failed."""
    if kind == "linear adapter":
        block, x, target = make(LINEAR)
        block.layer = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Linear(4, 16))
        return block, x, target
    block, x, target = make(CONV)
    if kind == "dilation":
        block.layer = torch.nn.Conv2d(3, 6, 3, padding=2, dilation=2)
    elif kind == "circular padding":
        block.layer = torch.nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
    else:
        block.norm = {
            "SyncBatchNorm": lambda: NoCollective(6),
            "GroupNorm": lambda: torch.nn.GroupNorm(2, 6),
            "InstanceNorm2d": lambda: torch.nn.InstanceNorm2d(6, affine=True),
            "no affine": lambda: torch.nn.BatchNorm2d(6, affine=False),
        }[kind]()
    return block, x, target


class NoCollective(torch.nn.SyncBatchNorm):
    """One process, no GPU: what would be exchanged is marked by a factor."""

    def forward(self, x):
        return 2 * F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


@pytest.mark.parametrize(
    "kind",
    ["SyncBatchNorm", "GroupNorm", "InstanceNorm2d", "no affine", "dilation", "circular padding", "linear adapter"],
)
def test_a_replaced_module_is_run_as_it_is(kind):
    block, x, target = _replaced(kind)
    activation = F.leaky_relu(block.norm(block.layer(x)), block.negative_slope)
    expected = definition(activation, target, None, num_classes=10, pool_size=block.pool_size)
    parameters = list(block.parameters())
    grads = torch.autograd.grad(expected, parameters)
    out, loss = block(x, target)
    loss.backward()
    torch.testing.assert_close((out, loss), (activation.detach(), expected))
    torch.testing.assert_close([p.grad for p in parameters], list(grads))


@pytest.mark.parametrize("training", [True, False])
def test_max_pool_needs_a_map(training):
    block, _, target = make(dict(CONV, max_pool=True))
    with pytest.raises((ValueError, RuntimeError), match="max_pool needs a feature map|too small"):
        block.train(training)(torch.zeros(4, 3, 1, 1), target)


def test_an_empty_batch_leaves_the_running_statistics(impl):
    block, x, target = make(CONV, impl)
    before = copy.deepcopy(block.norm.state_dict())
    block(x[:0], target[:0])
    assert torch.equal(block.norm.running_mean, before["running_mean"])
    assert torch.equal(block.norm.running_var, before["running_var"])


def test_meta_device():
    with torch.device("meta"):
        block = lnn.LLSConvBlock(3, 8, 3, num_classes=10, pool_size=2)
        out, loss = block(torch.empty(2, 3, 8, 8), torch.empty(2, dtype=torch.int64))
    assert out.shape == (2, 8, 6, 6) and out.is_meta and loss.shape == ()
