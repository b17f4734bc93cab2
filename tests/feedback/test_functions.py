"""`feedback_linear`, `feedback_conv2d`, `sign_symmetric_linear`, `sign_symmetric_conv2d` as a user calls them: every
backend against the definition written out in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lgkernels.functional as LF
from lgkernels.ops.feedback import autograd as feedback_autograd
from lgkernels.ops.feedback import cpu as feedback_cpu
from lgkernels.random import RandomFeedback
from tests.feedback.common import LAWS, compare, linear, randn, random_feedback, run, sign, weights
from tests.support.cases import DTYPES, label, subsets, sweep
from tests.support.layouts import LAYOUTS, arrange
from tests.support.tolerances import assert_relative

# -- linear -------------------------------------------------------------------------------------------------------

BASE = dict(M=5, N=17, K=40)
SIZES = list(sweep(BASE, M=(0, 1, 17, 65), N=(0, 1, 7, 64, 129), K=(0, 1, 7, 65, 127)))


def operands(case, dtype=torch.float32, leading=None):
    leading = (case["M"],) if leading is None else leading
    return (
        randn(*leading, case["K"], seed=1, dtype=dtype),
        weights(case["N"], case["K"], dtype=dtype),
        randn(case["N"], seed=3, dtype=dtype),
    )


@pytest.mark.parametrize("case", SIZES, ids=label)
@pytest.mark.parametrize("kind", ["usf", "frsf", "frsf formula", "fa", "fa formula"])
def test_linear(impl, case, kind):
    x, weight, bias = operands(case)
    tensor, random = randn(case["N"], case["K"], seed=4), random_feedback()
    values = random.materialize((case["N"], case["K"]))
    function, feedback, arguments = {
        "usf": (LF.sign_symmetric_linear, 0.5 * weight.sign(), dict(scale=0.5)),
        "frsf": (LF.sign_symmetric_linear, tensor.abs() * weight.sign(), dict(magnitude=tensor)),
        "frsf formula": (LF.sign_symmetric_linear, values.abs() * weight.sign(), dict(magnitude=random)),
        "fa": (LF.feedback_linear, tensor, dict(feedback=tensor)),
        "fa formula": (LF.feedback_linear, values, dict(feedback=random)),
    }[kind]
    compare(function, linear, x, weight, bias, feedback, impl=impl, **arguments)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0, 2), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_any_leading_dimensions(impl, leading, with_bias):
    x, weight, bias = operands(BASE, leading=leading)
    compare(LF.sign_symmetric_linear, linear, x, weight, bias if with_bias else None, weight.sign(), impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_dtypes_and_laws(impl, dtype, law):
    x, weight, bias = operands(dict(M=33, N=24, K=130), dtype)
    random = random_feedback(law)
    values = random.materialize(weight.shape)
    compare(LF.feedback_linear, linear, x, weight, bias, values, feedback=random, impl=impl)
    compare(
        LF.sign_symmetric_linear,
        linear,
        x,
        weight,
        bias,
        0.75 * values.abs() * weight.sign().float(),
        magnitude=random,
        scale=0.75,
        impl=impl,
    )


@pytest.mark.parametrize("sign_zero, packed", [("zero", False), ("plus", False), ("plus", True)])
@pytest.mark.parametrize("formula", [False, True])
def test_zeros(impl, sign_zero, packed, formula):
    """sign(+-0) is 0, or +1: exact, since an identity as the gradient shows F itself."""
    weight = weights(9, 70)
    magnitude = random_feedback() if formula else None
    value = magnitude.materialize(weight.shape) if formula else torch.ones(weight.shape)
    arguments = dict(scale=0.25, magnitude=magnitude, sign_zero=sign_zero, packed_signs=packed, impl=impl)
    got = run(LF.sign_symmetric_linear, torch.zeros(9, 70), weight, None, torch.eye(9), **arguments)[1]
    assert (weight == 0).any() and (torch.signbit(weight) & (weight == 0)).any()
    assert torch.equal(got, 0.25 * value * sign(weight, sign_zero))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "bias", "grad", "magnitude"])
def test_layouts(impl, layout, which):
    x, weight, bias = operands(BASE, leading=(2, 3))
    tensors = dict(x=x, weight=weight, bias=bias, grad=randn(2, 3, BASE["N"], seed=6), magnitude=randn(17, 40, seed=7))
    tensors[which] = arrange(tensors[which], layout)
    grad, magnitude = tensors.pop("grad"), tensors.pop("magnitude")
    feedback = magnitude.abs() * tensors["weight"].sign()
    compare(LF.sign_symmetric_linear, linear, *tensors.values(), feedback, grad, magnitude=magnitude, impl=impl)


@pytest.mark.parametrize("scale", [1.0, "mean_abs"])
@pytest.mark.parametrize("formula", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scale(impl, scale, formula, packed):
    x, weight, bias = operands(BASE)
    magnitude = random_feedback() if formula else None
    value = magnitude.materialize(weight.shape) if formula else 1.0
    factor = weight.abs().mean() if scale == "mean_abs" else scale
    signs = sign(weight, "plus" if packed else "zero")
    compare(
        LF.sign_symmetric_linear,
        linear,
        x,
        weight,
        bias,
        value * signs * factor,
        scale=scale,
        magnitude=magnitude,
        packed_signs=packed,
        sign_zero="plus" if packed else "zero",
        impl=impl,
    )


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 2, 3, 40)], ids=str)
def test_an_activation_in_place(impl, shape):
    x, weight, bias = randn(*shape, seed=1).requires_grad_(), weights(17, 40), randn(17, seed=3)
    y = LF.sign_symmetric_linear(x, weight, bias, impl=impl).relu_()
    assert_relative("y", y, F.linear(x, weight, bias).relu(), 1e-6)
    y.sum().backward()
    assert_relative("grad_x", x.grad, (y > 0).float() @ weight.sign(), 1e-6)


def test_the_mean_of_many_weights():
    """A float32 sum of so many, one after the other, stops growing at 2^24."""
    weight = torch.rand(5000, 5000, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 5000, requires_grad=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        LF.sign_symmetric_linear(x, weight, scale="mean_abs", sign_zero="plus")[:, 0].sum().backward()
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(x.grad, weight.double().mean().float().expand(1, 5000), rtol=1e-6, atol=0)


def test_a_weight_of_another_dtype_than_the_magnitude(impl):
    x, weight, bias = operands(BASE, torch.bfloat16)
    magnitude = randn(17, 40, seed=8)
    compare(
        LF.sign_symmetric_linear,
        linear,
        x,
        weight,
        bias,
        magnitude.abs() * weight.sign().float(),
        magnitude=magnitude,
        impl=impl,
    )


# -- convolution --------------------------------------------------------------------------------------------------

CONV = dict(x=(2, 6, 9, 8), weight=(4, 6, 3, 3), stride=1, padding=0, dilation=1, groups=1)
CONVS = [
    CONV,
    dict(CONV, stride=2, padding=1),
    dict(CONV, dilation=2, padding=2),
    dict(CONV, weight=(4, 3, 3, 3), groups=2),
    dict(CONV, weight=(6, 1, 3, 3), groups=6, padding=1),
    dict(CONV, weight=(5, 6, 1, 1)),
    dict(CONV, weight=(1, 6, 9, 8)),
    dict(CONV, padding="same"),
    dict(CONV, padding="same", weight=(4, 6, 2, 4)),
    dict(CONV, padding="valid"),
    dict(CONV, padding="same", weight=(4, 6, 2, 3), dilation=3),
    dict(CONV, x=(0, 6, 9, 8)),
    dict(CONV, x=(6, 9, 8)),
    dict(CONV, stride=(2, 1), padding=(0, 2), dilation=(1, 2), weight=(4, 6, 2, 3)),
    dict(CONV, x=(6, 9, 8), padding="same", weight=(6, 2, 3, 2), groups=3),
]


def conv_layer(case):
    geometry = {key: case[key] for key in ("stride", "padding", "dilation", "groups")}
    return geometry, lambda x, weight, bias: F.conv2d(x, weight, bias, **geometry)


@pytest.mark.parametrize("case", CONVS, ids=label)
@pytest.mark.parametrize("kind", ["usf", "packed", "frsf", "fa"])
@pytest.mark.parametrize("few", [False, True], ids=["library", "few positions"])
@pytest.mark.only(where=lambda backend, kind, few: not few or (backend == "cpu" and kind in ("usf", "packed")))
def test_conv(impl, case, kind, few, monkeypatch):
    """`few`: dX by the product with F in registers, which the CPU's kernels take for small maps of many channels."""
    monkeypatch.setattr(feedback_autograd, "_few_positions", lambda *_: few)
    monkeypatch.setattr(feedback_cpu, "SIGNS_BY_LOOK_UP", few)
    geometry, layer = conv_layer(case)
    x, weight, bias = randn(*case["x"], seed=1), weights(*case["weight"]), randn(case["weight"][0], seed=3)
    random = random_feedback()
    values = random.materialize(weight.shape)
    function, feedback, arguments = {
        "usf": (LF.sign_symmetric_conv2d, 0.5 * weight.sign(), dict(scale=0.5)),
        "packed": (LF.sign_symmetric_conv2d, sign(weight, "plus"), dict(packed_signs=True, sign_zero="plus")),
        "frsf": (LF.sign_symmetric_conv2d, values.abs() * weight.sign(), dict(magnitude=random)),
        "fa": (LF.feedback_conv2d, values, dict(feedback=random)),
    }[kind]
    compare(function, layer, x, weight, bias, feedback, impl=impl, **arguments, **geometry)


@pytest.mark.parametrize("kind", ["usf", "mean_abs", "tensor", "formula", "fa", "fa formula"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_channels_last(impl, kind, dtype):
    """A channels_last weight's feedback is channels_last, and every value stands where the formula says."""
    geometry, layer = conv_layer(dict(CONV, padding=1))
    x, weight, magnitude = (
        t.to(memory_format=torch.channels_last)
        for t in (
            randn(2, 6, 9, 8, seed=1, dtype=dtype),
            weights(4, 6, 3, 3, dtype=dtype),
            randn(4, 6, 3, 3, seed=4, dtype=dtype),
        )
    )
    random = random_feedback("uniform")
    values = random.materialize(weight.shape)
    if kind.startswith("fa"):
        given = magnitude if kind == "fa" else random
        compare(
            LF.feedback_conv2d,
            layer,
            x,
            weight,
            None,
            magnitude if kind == "fa" else values,
            feedback=given,
            impl=impl,
            **geometry,
        )
        return
    arguments, value = {
        "usf": ({}, 1.0),
        "mean_abs": (dict(scale="mean_abs"), weight.float().abs().mean()),
        "tensor": (dict(magnitude=magnitude), magnitude.float().abs()),
        "formula": (dict(magnitude=random), values.abs()),
    }[kind]
    got = compare(
        LF.sign_symmetric_conv2d,
        layer,
        x,
        weight,
        None,
        value * weight.sign().float(),
        impl=impl,
        **arguments,
        **geometry,
    )
    assert got[2].is_contiguous(memory_format=torch.channels_last)


def test_padding_same_is_torchs(impl):
    x, weight = randn(2, 3, 7, 6), randn(4, 3, 4, 2, seed=1)
    got = LF.sign_symmetric_conv2d(x, weight, padding="same", dilation=(1, 3), impl=impl)
    assert_relative("y", got, F.conv2d(x, weight, padding="same", dilation=(1, 3)), 1e-6)


# -- which gradients ------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operators called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def feedback(self):
        return [name for name in self.names if "lgkernels" in name]


FUNCTIONS = {
    "linear": (
        lambda x, w, b, **kw: LF.sign_symmetric_linear(x, w, b, magnitude=random_feedback(), **kw),
        (3, 8),
        (4, 8),
    ),
    "packed linear": (
        lambda x, w, b, **kw: LF.sign_symmetric_linear(x, w, b, packed_signs=True, sign_zero="plus", **kw),
        (3, 8),
        (4, 8),
    ),
    "mean_abs linear": (
        lambda x, w, b, **kw: LF.sign_symmetric_linear(x, w, b, scale="mean_abs", **kw),
        (3, 8),
        (4, 8),
    ),
    "fa linear": (lambda x, w, b, **kw: LF.feedback_linear(x, w, b, feedback=random_feedback(), **kw), (3, 8), (4, 8)),
    "conv": (
        lambda x, w, b, **kw: LF.sign_symmetric_conv2d(x, w, b, 2, 1, magnitude=random_feedback(), **kw),
        (2, 3, 5, 5),
        (4, 3, 3, 3),
    ),
    "packed conv": (
        lambda x, w, b, **kw: LF.sign_symmetric_conv2d(x, w, b, packed_signs=True, sign_zero="plus", **kw),
        (2, 3, 5, 5),
        (4, 3, 3, 3),
    ),
    "fa conv": (
        lambda x, w, b, **kw: LF.feedback_conv2d(x, w, b, feedback=random_feedback(), **kw),
        (2, 3, 5, 5),
        (4, 3, 3, 3),
    ),
}
EVERY = pytest.mark.parametrize("function, x_shape, weight_shape", FUNCTIONS.values(), ids=FUNCTIONS)


def leaves(x_shape, weight_shape, wanted=("x", "weight", "bias"), dtype=torch.float32):
    tensors = dict(
        x=randn(*x_shape, seed=1, dtype=dtype),
        weight=weights(*weight_shape, dtype=dtype),
        bias=randn(weight_shape[0], seed=3, dtype=dtype),
    )
    return {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}


@EVERY
def test_gradient_subsets(impl, function, x_shape, weight_shape):
    """Every subset gets the gradients of the full set, bit for bit; feedback is made where x asks for it alone."""
    full = leaves(x_shape, weight_shape)
    function(*full.values(), impl=impl).square().sum().backward()
    for wanted in subsets(("x", "weight", "bias")):
        tensors = leaves(x_shape, weight_shape, wanted)
        with Calls() as calls:
            y = function(*tensors.values(), impl=impl)
            assert y.requires_grad == bool(wanted)
            if wanted:
                y.square().sum().backward()
        assert bool(calls.feedback) == ("x" in wanted), (wanted, calls.names)
        for name, tensor in tensors.items():
            if name in wanted:
                assert torch.equal(tensor.grad, full[name].grad), (name, wanted)
            else:
                assert tensor.grad is None


@EVERY
def test_no_feedback_work_without_a_gradient(impl, function, x_shape, weight_shape):
    """Under no_grad and inference_mode the call is the plain layer."""
    tensors = leaves(x_shape, weight_shape)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, Calls() as calls:
            function(*tensors.values(), impl=impl)
        assert not calls.feedback and not any("norm" in name for name in calls.names)


@EVERY
def test_weight_and_bias_gradients_are_true_ones(function, x_shape, weight_shape):
    tensors = leaves(x_shape, weight_shape, ("weight", "bias"), torch.float64)
    with torch.no_grad():
        tensors["weight"] += 0.3  # away from the zeros
    assert torch.autograd.gradcheck(
        lambda w, b: function(tensors["x"], w, b, impl="reference"), (tensors["weight"], tensors["bias"])
    )


def test_feedback_equal_to_the_weight_is_back_propagation():
    x, weight, bias = (t.double().requires_grad_() for t in operands(BASE))
    assert torch.autograd.gradcheck(lambda x: LF.feedback_linear(x, weight, bias, feedback=weight), (x,))
    x, weight = randn(2, 4, 5, 6).double().requires_grad_(), randn(6, 2, 3, 2).double()
    assert torch.autograd.gradcheck(
        lambda x: LF.feedback_conv2d(x, weight, None, 2, 1, groups=2, feedback=weight), (x,)
    )


def test_a_given_feedback_gets_no_gradient(impl):
    tensors = leaves((3, 8), (4, 8))
    for argument, function in (("feedback", LF.feedback_linear), ("magnitude", LF.sign_symmetric_linear)):
        given = randn(4, 8, seed=7).requires_grad_()
        function(*tensors.values(), impl=impl, **{argument: given}).sum().backward()
        assert given.grad is None


@EVERY
def test_second_derivatives_raise_by_name(impl, function, x_shape, weight_shape):
    tensors = leaves(x_shape, weight_shape)
    y = function(*tensors.values(), impl=impl)
    grads = torch.autograd.grad(y.square().sum(), list(tensors.values()), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="feedback_(linear|conv2d) has no second derivative"):
            grad.sum().backward(retain_graph=True)


def test_create_graph_alone_is_fine(impl):
    tensors = leaves((3, 8), (4, 8))
    y = LF.sign_symmetric_linear(*tensors.values(), impl=impl).sum()
    once = torch.autograd.grad(y, tensors["x"], create_graph=True)[0]
    assert torch.equal(
        once, torch.autograd.grad(LF.sign_symmetric_linear(*tensors.values(), impl=impl).sum(), tensors["x"])[0]
    )


@EVERY
def test_results_repeat_bit_for_bit(impl, function, x_shape, weight_shape):
    def grads():
        tensors = leaves(x_shape, weight_shape)
        function(*tensors.values(), impl=impl).square().sum().backward()
        return [t.grad for t in tensors.values()]

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads()))


def test_gradients_accumulate(impl):
    tensors = leaves((3, 8), (4, 8))
    for _ in range(2):
        LF.sign_symmetric_linear(*tensors.values(), impl=impl).sum().backward()
    again = leaves((3, 8), (4, 8))
    LF.sign_symmetric_linear(*again.values(), impl=impl).sum().backward()
    for name in tensors:
        assert_relative(name, tensors[name].grad, 2 * again[name].grad, 1e-6)


# -- the random state ---------------------------------------------------------------------------------------------


def test_advancing_changes_the_next_feedback_and_no_pending_one(impl):
    random, weight = random_feedback(), weights(4, 8)

    def down(x):
        return LF.sign_symmetric_linear(x, weight, magnitude=random, impl=impl)

    x = torch.zeros(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad(down(x), x, torch.eye(4))
    (again,) = torch.autograd.grad(down(x), x, torch.eye(4))
    random.advance()
    (later,) = torch.autograd.grad(down(x), x, torch.eye(4))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert torch.equal(later, random.materialize((4, 8)).abs() * weight.sign())
    pending = down(x)
    random.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pending.sum().backward()


def test_a_slice_of_the_layer_has_the_slice_of_the_feedback(impl):
    """Sharding: rows [0, 3) and columns [0, 5) draw what the whole layer draws there."""
    random = random_feedback("uniform")
    whole = run(LF.feedback_linear, torch.zeros(6, 9), randn(6, 9), None, torch.eye(6), feedback=random, impl=impl)[1]
    part = run(LF.feedback_linear, torch.zeros(3, 5), randn(3, 5), None, torch.eye(3), feedback=random, impl=impl)[1]
    assert torch.equal(part, whole[:3, :5])


# -- autocast -----------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_torchs_layer(impl, function, x_shape, weight_shape, dtype):
    """Output and gradients have the dtypes of nn.Linear and nn.Conv2d, dW and db their very bits."""
    tensors, rival = leaves(x_shape, weight_shape), leaves(x_shape, weight_shape)
    layer = F.linear if len(weight_shape) == 2 else F.conv2d
    geometry = (2, 1) if function is FUNCTIONS["conv"][0] else ()
    with torch.autocast("cpu", dtype):
        y = function(*tensors.values(), impl=impl)
        same = layer(*rival.values(), *geometry)
    assert y.dtype == same.dtype == dtype and torch.equal(y, same)
    grad = randn(*y.shape, seed=5, dtype=dtype)
    y.backward(grad)
    same.backward(grad)
    assert tensors["x"].grad.dtype == tensors["weight"].grad.dtype == torch.float32
    assert_relative("dW", tensors["weight"].grad, rival["weight"].grad, 1e-6)
    assert torch.equal(tensors["bias"].grad, rival["bias"].grad)
    exact = leaves(x_shape, weight_shape)
    function(*exact.values(), impl=impl).backward(grad.float())
    assert_relative("dX", tensors["x"].grad, exact["x"].grad, 0.02 if dtype == torch.bfloat16 else 0.003)


def test_backward_inside_autocast_computes_in_the_forwards_dtype(impl):
    tensors, again = leaves((3, 8), (4, 8)), leaves((3, 8), (4, 8))
    LF.sign_symmetric_linear(*tensors.values(), impl=impl).sum().backward()
    y = LF.sign_symmetric_linear(*again.values(), impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(torch.equal(tensors[name].grad, again[name].grad) for name in tensors)


def test_float64_passes_autocast_untouched():
    tensors = leaves((3, 8), (4, 8), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert LF.sign_symmetric_linear(*tensors.values()).dtype == torch.float64


# -- torch.compile, opcheck ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EVERY
@pytest.mark.unpoisoned
def test_compiles_in_one_graph(impl, function, x_shape, weight_shape, fresh):
    def loss(x, weight, bias):
        return function(torch.tanh(x), weight, bias, impl=impl).square().sum()

    eager, compiled = leaves(x_shape, weight_shape), leaves(x_shape, weight_shape)
    loss(*eager.values()).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled.values()).backward()
    for name in eager:
        assert_relative(name, compiled[name].grad, eager[name].grad, 1e-6)


@pytest.mark.unpoisoned
def test_layers_of_other_seeds_compile_once(impl, fresh):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def layer(x, weight, feedback):
        return LF.feedback_linear(x, weight, feedback=feedback, impl=impl)

    weight = randn(4, 8)
    for seed in range(12):
        x, random = torch.zeros(4, 8, requires_grad=True), RandomFeedback(seed, stream=seed)
        layer(x, weight, random).backward(torch.eye(4))
        assert torch.equal(x.grad, random.materialize((4, 8)))
    assert len(graphs) == 1


STATE = torch.tensor([7, 2, 1])
FORMULAS = {
    "usf": (weights(6, 40), None, None, "uniform", 1.0, None, 0.5, False),
    "magnitude": (weights(6, 40), randn(6, 40), None, "uniform", 1.0, None, 0.5, True),
    "brsf": (weights(6, 40), None, STATE, "uniform8", 0.5, 0.0, 1.0, False),
    "fa": (None, None, STATE, "normal", 0.5, None, 1.0, False),
    "fa tensor": (None, randn(6, 40), None, "uniform", 1.0, None, 1.0, False),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_opcheck(impl, formula):
    ops = torch.ops.lgkernels
    torch.library.opcheck(ops.feedback_product.default, (randn(3, 6), 40, *formula, impl))
    if formula[0] is not None or formula[1] is None:  # a plain tensor needs no matrix
        torch.library.opcheck(ops.feedback_matrix.default, (6, 40, *formula, torch.bfloat16, torch.device("cpu"), impl))


@pytest.mark.unpoisoned
def test_opcheck_of_the_other_ops(impl):
    ops, index = torch.ops.lgkernels, torch.tensor([3, 0, 3])
    torch.library.opcheck(ops.feedback_rows.default, (index, 9, STATE, "uniform", 0.5, None, 1.0, torch.float32, impl))
    packed = ops.feedback_pack_signs(weights(6, 40), impl)
    torch.library.opcheck(ops.feedback_pack_signs.default, (weights(6, 40), impl))
    torch.library.opcheck(
        ops.feedback_product.default, (randn(3, 6), 40, packed, None, None, "uniform", 1.0, None, 0.5, True, impl)
    )
