"""The four layers: torch's arguments and state_dict, the rules and their scales, random state, instruments."""

import copy
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.nn.feedback import scale_of
from lgkernels.random import RandomFeedback
from lgkernels.recipes.measure import peak_memory
from tests.feedback.common import randn, weights
from tests.support.tolerances import assert_relative

RULES = ("usf", "frsf", "brsf", "signed_init", "fa")


def linear(rule, *shape, impl="auto", **options):
    if rule == "fa":
        return lnn.FeedbackAlignmentLinear(*shape, impl=impl, **options)
    return lnn.SignSymmetricLinear(*shape, rule=rule, impl=impl, **options)


def conv(rule, *arguments, impl="auto", **options):
    if rule == "fa":
        return lnn.FeedbackAlignmentConv2d(*arguments, impl=impl, **options)
    return lnn.SignSymmetricConv2d(*arguments, rule=rule, impl=impl, **options)


def twin(layer):
    """torch's own layer with the same parameters."""
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
        )
    plain.load_state_dict(layer.state_dict())
    return plain.to(layer.weight.dtype)


def backward(layer, x):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(randn(*y.shape, seed=7, dtype=y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def check(layer, x, tolerance=1e-5):
    """Output, dW, db are those of torch's layer; dX is that of torch's layer with F for its weight."""
    plain = twin(layer)
    expected = backward(plain, x)
    with torch.no_grad():
        plain.weight.copy_(layer.feedback_weight())
    expected[1] = backward(plain, x)[1]
    for name, got, exact in zip(("y", "dX", "dW", "db"), backward(layer, x), expected, strict=False):
        assert_relative(name, got, exact, tolerance)


# -- torch's arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(impl, rule, shape, bias):
    check(linear(rule, 6, 4, bias, impl=impl), randn(*shape))


CONVS = [
    dict(),
    dict(stride=2, padding=1),
    dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    dict(groups=2),
    dict(groups=4),
    dict(bias=False),
    dict(padding="same"),
    dict(padding="same", dilation=3),
    dict(padding="valid"),
    *(dict(padding=2, padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
    dict(padding="same", padding_mode="circular"),
    dict(padding="same", padding_mode="reflect", dilation=2),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("kernel", [3, (1, 4)], ids=str)
def test_conv(impl, rule, options, kernel):
    layer = conv(rule, 4, 8, kernel, impl=impl, **options)
    check(layer, randn(2, 4, 10, 9))
    check(layer, randn(4, 10, 9))


@pytest.mark.parametrize("rule", RULES)
def test_channels_last(impl, rule):
    layer = conv(rule, 4, 8, 3, impl=impl).to(memory_format=torch.channels_last)
    check(layer, randn(2, 4, 10, 9).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("rule", RULES)
def test_torchs_constructor(rule):
    """Positional arguments, device and dtype as torch's; initial values too (signed_init: their absolute values)."""
    torch.manual_seed(1)
    ours = (
        linear(rule, 5, 3, True, "cpu", torch.float64),
        conv(rule, 4, 6, 3, 2, 1, 2, 2, False, "circular", None, torch.bfloat16),
    )
    torch.manual_seed(1)
    torchs = (
        nn.Linear(5, 3, True, "cpu", torch.float64),
        nn.Conv2d(4, 6, 3, 2, 1, 2, 2, False, "circular", None, torch.bfloat16),
    )
    for layer, plain in zip(ours, torchs):
        assert layer.extra_repr().startswith(plain.extra_repr())
        assert isinstance(layer, type(plain)) and list(layer.state_dict()) == list(plain.state_dict())
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            assert p.dtype == q.dtype and torch.equal(*((p.abs(), q.abs()) if rule == "signed_init" else (p, q)))
        plain.load_state_dict(layer.state_dict(), strict=True)
        layer.load_state_dict(plain.state_dict(), strict=True)


# -- rules and scales ---------------------------------------------------------------------------------------------

NUMBERS = {
    "kaiming": 1 / math.sqrt(3 * 36),
    "xavier": math.sqrt(2 / (36 + 72)),
    "inv_sqrt_fan_in": 1 / 6,
    "he_fan_out": math.sqrt(2 / 72),
    "he_fan_in": math.sqrt(2 / 36),
    0.125: 0.125,
}


@pytest.mark.parametrize("scale", NUMBERS, ids=str)
def test_scales(scale):
    """(8, 4, 3, 3): fan_in 36, fan_out 72. uSF is exact; frSF and FA by the law of the scale's source."""
    number = NUMBERS[scale]
    assert abs(scale_of(scale, (8, 4, 3, 3)) - number) < 1e-15
    usf = conv("usf", 4, 8, 3, scale=scale)
    assert_relative("usf", usf.feedback_weight(), number * usf.weight.sign(), 1e-7)
    feedback = conv("frsf", 4, 8, 3, scale=scale).feedback
    signed = conv("fa", 4, 8, 3, feedback_init=scale).feedback
    if scale == "he_fan_out":
        expected = ("normal", number, None), ("normal", number, None)
    elif scale == "inv_sqrt_fan_in":
        expected = ("uniform8", number, 0.0), ("uniform8", number, None)
    else:
        expected = ("uniform8", math.sqrt(3) * number, 0.0), ("uniform8", math.sqrt(3) * number, None)
    for got, (law, bound, low) in zip((feedback, signed), expected):
        assert (got.law, got.low) == (law, low) and abs(got.scale - bound) < 1e-15


@pytest.mark.parametrize("law", ["uniform", "uniform8", "normal", "sign"])
def test_magnitudes_have_the_root_mean_square_of_the_scale(law):
    layer = linear("frsf", 300, 400, law=law, scale=0.5)
    assert abs(layer.feedback_weight().square().mean().sqrt().item() - 0.5) < 0.005
    mean = linear("frsf", 300, 400, law=law, scale="mean_abs")
    assert abs(mean.feedback_weight().abs().mean().item() / mean.weight.abs().mean().item() - 1) < 0.01


def test_mean_abs_follows_the_weight(impl):
    layer = linear("usf", 6, 4, scale="mean_abs", impl=impl)
    check(layer, randn(5, 6))
    with torch.no_grad():
        layer.weight.mul_(3)
    assert_relative("F", layer.feedback_weight(), layer.weight.abs().mean() * layer.weight.sign(), 1e-6)
    check(layer, randn(5, 6))


@pytest.mark.parametrize("rule", RULES)
def test_what_the_feedback_follows(rule):
    """Signs follow the weight at once, but for signed_init and FA; magnitudes stay until `advance`."""
    layer = linear(rule, 30, 20)
    before = layer.feedback_weight()
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.neg_()
    after = layer.feedback_weight()
    assert torch.equal(after, before if rule in ("fa", "signed_init") else -before)
    if rule != "fa":
        assert torch.equal(before.sign(), start.sign())


@pytest.mark.parametrize("sign_zero, packed", [("zero", False), ("plus", False), ("plus", True)])
@pytest.mark.parametrize("rule", ["usf", "frsf"])
def test_zero_weights(impl, rule, sign_zero, packed):
    layer = linear(rule, 33, 4, sign_zero=sign_zero, packed_signs=packed, impl=impl)
    with torch.no_grad():
        layer.weight.copy_(weights(4, 33))
    x = torch.zeros(4, 33, requires_grad=True)
    layer(x).backward(torch.eye(4))
    assert torch.equal(x.grad, layer.feedback_weight())
    assert bool((x.grad[layer.weight == 0] == 0).all()) == (sign_zero == "zero")


def test_packed_signs_outlive_the_weight(impl):
    """Their backward does not read the weight: it may change in between, as in a fused update."""
    layer = linear("usf", 40, 4, sign_zero="plus", packed_signs=True, impl=impl)
    expected = layer.feedback_weight()
    x = torch.zeros(4, 40, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    y.backward(torch.eye(4))
    assert torch.equal(x.grad, expected)


def test_the_feedback_of_a_seed_is_the_same_everywhere():
    """Not drawn from the global generator: neither touched nor depended on."""
    for rule in ("frsf", "fa"):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        nn.Linear(8, 4)
        plain = torch.get_rng_state()
        torch.set_rng_state(state)
        first = linear(rule, 8, 4, seed=3, stream=9)
        assert torch.equal(torch.get_rng_state(), plain)
        torch.manual_seed(2)
        for seed, stream, same in ((3, 9, True), (4, 9, False), (3, 8, False)):
            other = linear(rule, 8, 4, seed=seed, stream=stream)
            assert torch.equal(first.feedback_weight().abs(), other.feedback_weight().abs()) == same


# -- memory and work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "make", [lambda rule: linear(rule, 300, 200), lambda rule: conv(rule, 16, 32, 3)], ids=["linear", "conv"]
)
def test_at_most_64_bytes_a_layer(rule, make):
    """All tensors that the module, its children and its attributes hold, against torch's."""

    def held(module):
        tensors = [
            t
            for m in module.modules()
            for t in (
                *m.parameters(recurse=False),
                *m.buffers(recurse=False),
                *(v for v in vars(m).values() if isinstance(v, torch.Tensor)),
            )
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    layer = make(rule)
    extra = held(layer) - held(twin(layer))
    assert extra == (0 if rule == "usf" else 24)
    x = randn(*((5, 300) if isinstance(layer, nn.Linear) else (2, 16, 8, 8))).requires_grad_()
    layer(x).sum().backward()  # and nothing is kept behind
    assert held(layer) - held(twin(layer)) == extra
    assert len(pickle.dumps(layer)) - len(pickle.dumps(twin(layer))) < 4096


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_transient_memory(rule, kind):
    """A step beyond that of torch's layers: nothing where F is made in registers, else one layer's F at a time."""
    if kind == "linear" and dispatch.unavailable("feedback_product", "cpu", torch.device("cpu"), torch.float32):
        pytest.skip("the native CPU kernels are not built")
    make = (
        (lambda: linear(rule, 500, 500, impl="cpu")) if kind == "linear" else (lambda: conv(rule, 64, 64, 3, padding=1))
    )
    ours = nn.Sequential(make(), make(), make())
    x = randn(*((4, 500) if kind == "linear" else (1, 64, 4, 4))).requires_grad_()
    peaks = []
    for model in (ours, nn.Sequential(*map(twin, ours))):
        model(x).sum().backward()  # once before: what is allocated in a first call alone is no part of it
        for p in (x, *model.parameters()):
            p.grad = None
        peaks.append(peak_memory(lambda model=model: model(x).sum().backward(), x.device))
    assert peaks[0] - peaks[1] <= (1 if kind == "conv" else 0) * ours[0].weight.nbytes + 8192, peaks


def test_no_parameter_and_no_state():
    for rule in RULES:
        layer = linear(rule, 4, 3)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("rule", RULES)
def test_eval_is_torchs_layer(impl, rule):
    layer, x = linear(rule, 6, 4, impl=impl).eval(), randn(3, 6)
    with torch.no_grad():
        assert torch.equal(layer(x), twin(layer)(x)) and not layer(x).requires_grad


# -- life of a module ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_deepcopy_and_pickle(rule, tmp_path):
    layer = linear(rule, 6, 4, seed=2)
    if layer.feedback is not None:
        layer.feedback.advance()
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other.feedback_weight(), layer.feedback_weight()) and other.rule == rule
        if rule in ("frsf", "brsf", "fa"):
            other.feedback.advance()
            assert not torch.equal(other.feedback_weight(), layer.feedback_weight())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(rule, dtype):
    """A module in half precision draws the same numbers, and trains."""
    layer = linear(rule, 33, 17, scale=0.5) if rule != "fa" else linear(rule, 33, 17, feedback_init=0.5)
    moved = copy.deepcopy(layer).to(dtype)
    if moved.feedback is not None:
        assert moved.feedback.state.dtype == torch.int64
    half = twin(layer).to(dtype)
    layer.load_state_dict(half.state_dict())
    assert_relative("F", moved.feedback_weight(), layer.feedback_weight(), 0.005)
    got, exact = backward(moved, randn(5, 33, dtype=dtype)), backward(layer, randn(5, 33, dtype=dtype).float())
    for name, a, b in zip(("y", "dX", "dW", "db"), got, exact):
        assert a.dtype == dtype
        assert_relative(name, a, b, 0.02)


@pytest.mark.parametrize("rule", RULES)
def test_meta_and_to_empty(rule):
    """Constructed without memory, given some, then initialised, as FSDP does."""
    with torch.device("meta"):
        layer = linear(rule, 6, 4, seed=5, stream=2)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = linear(rule, 6, 4, seed=5, stream=2)
    if layer.feedback is not None:
        assert layer.feedback.state.tolist() == [5, 2, 0]
    with torch.no_grad():
        expected.weight.copy_(layer.weight)
    assert torch.equal(layer.feedback_weight(), expected.feedback_weight())
    check(layer, randn(3, 6))


def test_signed_init_gives_the_weight_its_signs():
    """In the constructor, in reset_parameters, and on demand after another initialisation; then they are for good."""
    layer = linear("signed_init", 30, 20)
    feedback = layer.feedback_weight()
    for again in (layer.reset_parameters, layer.sign_weight):
        assert torch.equal(layer.weight.sign(), feedback.sign())
        nn.init.normal_(layer.weight)
        assert torch.equal(layer.feedback_weight(), feedback) and not torch.equal(layer.weight.sign(), feedback.sign())
        size = layer.weight.detach().abs()
        again()
    assert torch.equal(layer.weight.sign(), feedback.sign()) and torch.equal(layer.weight.abs(), size)
    with pytest.raises(ValueError, match="sign_weight is for rule='signed_init' with signs by formula, got rule='usf'"):
        linear("usf", 3, 2).sign_weight()


@pytest.mark.parametrize("rule", RULES)
def test_data_parallel_replicas_agree(rule):
    """A replica's buffers are copies: F is made of 24 bytes, so there is nothing to write back."""
    layer = linear(rule, 6, 4)
    replica = layer._replicate_for_data_parallel()
    assert replica.rule == layer.rule and len(list(layer.buffers())) == (0 if rule == "usf" else 1)


# -- brSF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "frsf"])
def test_redraw_ends_where_another_rule_came(rule):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(lnn.convert(model, "brsf", verbose=False).parameters(), lr=0.1)
    lnn.redraw_after(optimizer, model)
    lnn.convert(model, rule, verbose=False)
    model(randn(3, 4)).sum().backward()
    optimizer.step()
    assert all(m.state[2] == 0 for m in model.modules() if hasattr(m, "state"))
    lnn.convert(model, "brsf", verbose=False)
    optimizer.step()
    assert model[0].feedback.state[2] == 1


def network(rule="brsf", **options):
    torch.manual_seed(4)
    return nn.Sequential(
        linear("usf", 8, 16), nn.ReLU(), linear(rule, 16, 16, seed=1, **options), nn.ReLU(), nn.Linear(16, 3)
    )


def test_redraw_after_each_optimizer_step():
    """Not after a forward, a re-forward or evaluation; once after every step, of every brSF layer."""
    model = network()
    layer = model[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = lnn.redraw_after(optimizer, model)
    drawn = [layer.feedback_weight().abs()]
    for _ in range(3):
        for _ in range(2):  # two micro-batches of one step see one F
            model(randn(4, 8)).square().sum().backward()
            model.eval()(randn(4, 8))
            model.train()
            assert torch.equal(layer.feedback_weight().abs(), drawn[-1])
        optimizer.step()
        drawn.append(layer.feedback_weight().abs())
        assert all(not torch.equal(drawn[-1], other) for other in drawn[:-1])
    assert layer.feedback.state.tolist() == [1, 0, 3]
    handle.remove()
    optimizer.step()
    assert torch.equal(layer.feedback_weight().abs(), drawn[-1])


def test_a_skipped_step_draws_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lnn.redraw_after(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, steps in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(model(randn(4, 8)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert model[2].feedback.state[2] == steps


@pytest.mark.parametrize("found, steps", [(1.0, 0), (0.0, 1)])
def test_a_step_skipped_by_the_optimizers_kernel_draws_nothing(found, steps):
    """SGD(fused=True) runs its step in any case, and its kernel does nothing where a GradScaler found an infinity."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    lnn.redraw_after(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(randn(4, 8)).sum() * (float("inf") if found else 1.0)).backward()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    assert model[2].feedback.state[2] == steps and torch.equal(before, model[0].weight) == (not steps)


def test_frsf_is_not_redrawn():
    model = network("frsf")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="model must have layers with rule 'brsf', got none"):
        lnn.redraw_after(optimizer, model)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        lnn.redraw_after([], network())


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_training_lowers_the_loss(rule):
    model = network(rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if rule == "brsf":
        lnn.redraw_after(optimizer, model)
    x = randn(64, 8)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.unpoisoned
def test_compiles_in_one_graph(rule):
    torch._dynamo.reset()
    model = nn.Sequential(
        linear(rule, 8, 16, seed=1, stream=1),
        nn.ReLU(),
        linear(rule, 16, 16, seed=1, stream=2),
        nn.Unflatten(1, (4, 2, 2)),
        conv(rule, 4, 3, 3, padding="same", padding_mode="circular"),
    )
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(backward(compiled, randn(4, 8)), backward(model, randn(4, 8)), strict=True):
            assert_relative("result", got, expected, 1e-6)
        for m in (model, compiled):
            for layer in m.modules():
                if isinstance(layer, RandomFeedback):
                    layer.advance()  # no recompilation, another F
    torch._dynamo.reset()


@pytest.mark.parametrize("rule", RULES)
def test_checkpointing_and_accumulation(rule):
    from torch.utils.checkpoint import checkpoint

    model = network(rule)
    x = randn(4, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for p, grad in zip(model.parameters(), expected):
        assert_relative("gradient", p.grad, grad, 1e-6)


# -- instruments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_alignment_and_weight_ratio(impl, rule):
    model = nn.Sequential(
        linear(rule, 90, 70, impl=impl),
        nn.ReLU(),
        nn.Linear(70, 49),
        nn.Unflatten(1, (1, 7, 7)),
        conv(rule, 1, 5, 3, impl=impl),
    )
    assert list(lnn.alignment(model)) == list(lnn.weight_ratio(model)) == ["0", "4"]
    for name in ("0", "4"):
        weight, feedback = (
            t.detach().double().flatten() for t in (model[int(name)].weight, model[int(name)].feedback_weight())
        )
        angle = math.degrees(math.acos(torch.dot(weight, feedback) / (weight.norm() * feedback.norm())))
        assert abs(lnn.alignment(model)[name] - angle) < 1e-4
        assert abs(lnn.weight_ratio(model)[name] - feedback.norm() / weight.norm()) < 1e-6


def test_instruments_hold_a_block_of_rows_only(monkeypatch):
    monkeypatch.setattr(sys.modules["lgkernels.nn.alignment"], "_ELEMENTS_AT_ONCE", 1000)
    for options in (dict(), dict(scale="mean_abs"), dict(sign_zero="plus", packed_signs=True)):
        layer, sizes = linear("frsf", 90, 70, **options), []
        make = layer.feedback_rows
        monkeypatch.setattr(layer, "feedback_rows", lambda a, b: sizes.append(b - a) or make(a, b), raising=False)
        angle, ratio = lnn.alignment(layer)[""], lnn.weight_ratio(layer)[""]
        assert max(sizes) == 11 and sum(sizes) == 140
        weight, feedback = layer.weight.detach().double(), make(0, 70).double()
        cosine = (weight * feedback).sum() / (weight.norm() * feedback.norm())
        assert abs(math.cos(math.radians(angle)) - cosine) < 1e-6
        assert abs(ratio - feedback.norm() / weight.norm()) < 1e-6


def test_instruments_of_degenerate_layers():
    layer = linear("usf", 3, 2)
    nn.init.zeros_(layer.weight)
    assert math.isnan(lnn.alignment(layer)[""]) and math.isnan(lnn.weight_ratio(layer)[""])
    assert lnn.alignment(nn.Linear(3, 2)) == {}
    layer = linear("usf", 9, 5, scale=2.0)
    with torch.no_grad():
        layer.weight.copy_(2.0 * torch.sign(layer.weight))
    assert lnn.alignment(layer)[""] == pytest.approx(0, abs=1e-5) and lnn.weight_ratio(layer)[""] == pytest.approx(1)


def test_functional_and_module_agree(impl):
    layer, x = conv("frsf", 4, 6, 3, impl=impl, seed=3, stream=1), randn(2, 4, 8, 8).requires_grad_()
    y = LF.sign_symmetric_conv2d(x, layer.weight, layer.bias, magnitude=layer.feedback, impl=impl)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(got, expected)
