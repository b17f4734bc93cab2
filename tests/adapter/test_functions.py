"""LoRA and LoKr: golden vectors (of LyCORIS' plain forward), autograd of the Kronecker product written out."""

import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from tests.local_loss.test_golden import FILES, check, load, precision, tensor  # noqa: F401
from tests.local_loss.test_losses import _Largest
from tests.support.cases import DTYPES, subsets
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import randn
from tests.support.tolerances import assert_accurate, assert_relative


@pytest.mark.parametrize("name", FILES["lokr"])
def test_golden(name, precision):  # noqa: F811
    data = load(name)
    x, weight, bias, grad = (tensor(data, key, precision) for key in ("x", "W0", "b0", "grad_y"))
    x.requires_grad_()
    factors = {key: tensor(data, key, precision).requires_grad_() for key in data if key.startswith(("w1", "w2"))}
    w1, w2 = (factors[w] if w in factors else (factors[f"{w}_a"], factors[f"{w}_b"]) for w in ("w1", "w2"))
    if data["kind"] == "linear":
        y = LF.lokr_linear(x, weight, bias, w1=w1, w2=w2, scale=data["scale"])
    else:
        y = LF.lokr_conv2d(x, weight, bias, data["stride"], data["padding"], w1=w1, w2=w2, scale=data["scale"])
    y.backward(grad)
    check("y", y, data["y"], precision)
    check("grad_x", x.grad, data["grad_x"], precision)
    for key, factor in factors.items():
        check(key, factor.grad, data[f"grad_{key}"], precision)


class Definition:
    """The weight's change built in full."""

    @staticmethod
    def matrix(w):
        return w[0] @ w[1] if isinstance(w, tuple) else w

    @staticmethod
    def lora_linear(x, weight, bias=None, *, a, b, scale):
        return F.linear(x, weight + scale * (b @ a), bias)

    @classmethod
    def lokr_linear(cls, x, weight, bias=None, *, w1, w2, scale):
        return F.linear(x, weight + scale * torch.kron(cls.matrix(w1).contiguous(), cls.matrix(w2).contiguous()), bias)

    @classmethod
    def lokr_conv2d(cls, x, weight, bias=None, *sizes, w1, w2, scale):
        w1 = cls.matrix(w1)
        w2 = cls.matrix(w2).reshape(weight.shape[0] // len(w1), -1, *weight.shape[2:])
        return F.conv2d(
            x, weight + scale * torch.kron(w1.contiguous()[:, :, None, None], w2.contiguous()), bias, *sizes
        )


# id -> (f(module, *tensors), shapes)
CASES = {
    "lora": (
        lambda m, x, w, b, a, c: m.lora_linear(x, w, b, a=a, b=c, scale=0.5),
        [(5, 6), (8, 6), (8,), (2, 6), (8, 2)],
    ),
    "lora-tokens": (lambda m, x, w, a, c: m.lora_linear(x, w, a=a, b=c, scale=4), [(2, 3, 6), (8, 6), (1, 6), (8, 1)]),
    "linear-r1": (
        lambda m, x, w, b, w1, c, d: m.lokr_linear(x, w, b, w1=w1, w2=(c, d), scale=4.0),
        [(5, 6), (8, 6), (8,), (2, 2), (4, 1), (1, 3)],
    ),
    "linear-r2": (
        lambda m, x, w, w1, c, d: m.lokr_linear(x, w, w1=w1, w2=(c, d), scale=0.5),
        [(2, 3, 6), (8, 6), (4, 3), (2, 2), (2, 2)],
    ),
    "linear-full": (
        lambda m, x, w, w1, w2: m.lokr_linear(x, w, w1=w1, w2=w2, scale=1),
        [(5, 6), (8, 6), (2, 2), (4, 3)],
    ),
    "linear-both": (
        lambda m, x, w, p, q, c, d: m.lokr_linear(x, w, w1=(p, q), w2=(c, d), scale=2.0),
        [(5, 6), (8, 6), (4, 1), (1, 3), (2, 1), (1, 2)],
    ),
    "conv-r1": (
        lambda m, x, w, b, w1, c, d: m.lokr_conv2d(x, w, b, 1, 1, w1=w1, w2=(c, d), scale=4.0),
        [(2, 6, 4, 5), (8, 6, 3, 3), (8,), (2, 2), (4, 1), (1, 27)],
    ),
    "conv-r2-stride": (
        lambda m, x, w, w1, c, d: m.lokr_conv2d(x, w, None, (2, 1), (1, 0), (1, 2), w1=w1, w2=(c, d), scale=0.5),
        [(2, 6, 7, 6), (8, 6, 3, 2), (4, 3), (2, 2), (2, 12)],
    ),
    "conv-full": (
        lambda m, x, w, w1, w2: m.lokr_conv2d(x, w, w1=w1, w2=w2, scale=1.0),
        [(2, 6, 4, 4), (8, 6, 1, 1), (2, 2), (4, 3, 1, 1)],
    ),
    "conv-full-window": (
        lambda m, x, w, b, w1, w2: m.lokr_conv2d(x, w, b, 1, 1, w1=w1, w2=w2, scale=0.5),
        [(2, 6, 4, 4), (8, 6, 3, 3), (8,), (2, 2), (4, 3, 3, 3)],
    ),
    "conv-groups": (
        lambda m, x, w, w1, c, d: m.lokr_conv2d(x, w, None, 1, 1, 1, 2, w1=w1, w2=(c, d), scale=2.0),
        [(2, 6, 4, 4), (8, 3, 3, 3), (4, 1), (2, 2), (2, 27)],
    ),
}
ALL = pytest.mark.parametrize("name", CASES)


def inputs(name, dtype=torch.float32):
    return [randn(*shape, seed=i + 1, dtype=dtype) for i, shape in enumerate(CASES[name][1])]


def run(module, name, tensors, grad_layout="dense"):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = CASES[name][0](module, *leaves)
    grad = arrange(randn(*y.shape, seed=99).to(y.dtype), grad_layout)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_form(name, layout):
    tensors = [arrange(t, layout) for t in inputs(name, torch.float64)]
    for i, (ours, exact) in enumerate(zip(run(LF, name, tensors), run(Definition, name, tensors))):
        assert_relative(f"result {i}", ours, exact, 1e-12)


@ALL
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_one_argument_in_another_layout(name, layout):
    """Among dense ones, what torch returns may take the strides of any argument; also the gradient from above."""
    count = len(CASES[name][1])
    for other in range(count + 1):
        tensors = inputs(name, torch.float64)
        if other < count:
            tensors[other] = arrange(tensors[other], layout)
        ours = run(LF, name, tensors, layout if other == count else "dense")
        exact = run(Definition, name, [t.contiguous() for t in tensors], layout if other == count else "dense")
        for i, (mine, right) in enumerate(zip(ours, exact)):
            assert_relative(f"result {i}, argument {other}", mine, right, 1e-12)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(name, dtype):
    tensors = inputs(name, dtype)
    truth = run(Definition, name, [t.double() for t in tensors])
    for i, (ours, same, exact) in enumerate(zip(run(LF, name, tensors), run(Definition, name, tensors), truth)):
        assert_accurate(f"result {i}", ours, same, exact, 100)


@ALL
def test_requires_grad_subsets(name):
    full = run(LF, name, inputs(name))
    for needed in subsets(range(len(CASES[name][1]))):
        tensors = [t.requires_grad_(i in needed) for i, t in enumerate(inputs(name))]
        y = CASES[name][0](LF, *tensors)
        assert y.requires_grad == bool(needed)
        if needed:
            y.backward(randn(*y.shape, seed=99))
        for i, t in enumerate(tensors):
            assert (t.grad is not None) == (i in needed)
            if i in needed:
                assert_relative("gradient", t.grad, full[i + 1], 1e-6)


@ALL
def test_second_derivative_raises_by_name(name):
    leaves = [t.requires_grad_() for t in inputs(name)]
    grads = torch.autograd.grad(CASES[name][0](LF, *leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        sum(g.square().sum() for g in grads).backward()


@ALL
def test_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = run(LF, name, inputs(name))
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    for ours, exact in zip([y, *grads], run(Definition, name, inputs(name))):
        assert_relative("result", ours, exact, 5e-2)


@pytest.mark.parametrize("name", ["lora", "linear-r2", "conv-r1"])
@pytest.mark.unpoisoned
def test_compiled(name):
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in inputs(name)]
    function = lambda *t: CASES[name][0](LF, *t).square().sum()  # noqa: E731
    eager = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, eager):
        assert_relative("gradient", a, b, 1e-6)


@pytest.mark.unpoisoned
def test_registered_ops():
    ops, tests, empty = torch.ops.lgkernels, ("test_schema", "test_faketensor"), torch.empty(0)
    x, w, b, a, c = inputs("lora")
    for op, arguments in [
        (ops.lora_linear, (x, w, b, a, c, 2.0, "auto")),
        (ops.lora_linear_backward, (x @ w.t(), x, w, a, c, x @ a.t(), 2.0, [True, False, True, True, True], "auto")),
        (ops.lokr_linear, (x, w, None, randn(2, 2), randn(4, 1), randn(1, 3), 2.0, "auto")),
        (
            ops.lokr_linear_backward,
            (
                x @ w.t(),
                x,
                w,
                randn(2, 2),
                None,
                randn(4, 3),
                randn(5, 2, 4),
                empty,
                2.0,
                [True, True, False, True, False, True],
                "auto",
            ),
        ),
        (
            ops.lokr_conv2d,
            (
                randn(2, 6, 7, 4),
                randn(8, 6, 3, 3),
                None,
                [2, 1],
                [1, 0],
                [1, 1],
                1,
                randn(2, 2),
                randn(4, 1),
                randn(1, 3, 3, 3),
                2.0,
                "auto",
            ),
        ),
        (
            ops.lokr_conv2d_backward,
            (
                randn(2, 8, 4, 4),
                randn(2, 6, 4, 4),
                randn(8, 6, 1, 1),
                [1, 1],
                [0, 0],
                [1, 1],
                1,
                randn(2, 2),
                randn(4, 1),
                randn(1, 3, 1, 1),
                randn(2, 1, 2, 16),
                randn(2, 1, 2, 16),
                2.0,
                [True] * 6,
                "auto",
            ),
        ),
    ]:
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_the_product_is_never_built():
    """No operation, forward or backward, returns anything larger than the output."""
    x, weight = randn(2, 64), randn(96, 64)
    factors = [t.requires_grad_() for t in (randn(8, 8), randn(12, 1), randn(1, 8))]
    with _Largest() as largest:
        y = LF.lokr_linear(x.requires_grad_(), weight, w1=factors[0], w2=factors[1:], scale=1.0)
        y.backward(torch.ones_like(y))
    assert 192 <= largest.elements < 96 * 64 and x.grad is not None


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (
            dict(w1=randn(2, 2), w2=randn(4, 4)),
            ValueError,
            "w1 and w2 must give a (8, 6) Kronecker product, got (2, 2) and (4, 4)",
        ),
        (
            dict(w1=randn(2, 2), w2=(randn(4, 1), randn(1, 3), randn(1, 1))),
            ValueError,
            "w2 must be a tensor or a pair, got 3 tensors: the Tucker form is not supported",
        ),
        (
            dict(w1=randn(2, 2), w2=(randn(4, 1), randn(2, 3))),
            ValueError,
            "w2[1] must have shape (1, 3) (the columns of the first), got (2, 3)",
        ),
        (dict(w1=randn(2), w2=randn(4, 3)), ValueError, "w1 must be (out1, in1), got shape (2,)"),
        (
            dict(w1=randn(2, 2).int(), w2=randn(4, 3)),
            TypeError,
            "w1 must be one of float32, bfloat16, float16, float64, got int32",
        ),
        (
            dict(w1=randn(2, 2), w2=randn(4, 3), x=randn(5, 7)),
            ValueError,
            "x must be (..., 6) (K of weight), got shape (5, 7)",
        ),
        (
            dict(w1=randn(2, 2), w2=randn(4, 3), bias=randn(6)),
            ValueError,
            "bias must have shape (8,) (one for each output of weight), got (6,)",
        ),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error) as caught:
        LF.lokr_linear(**{"x": randn(5, 6), "weight": randn(8, 6), "scale": 1.0, **bad})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(groups=3, x=randn(2, 18, 4, 4)), ValueError, "groups must divide weight's 8 outputs, got 3"),
        (
            dict(groups=4, x=randn(2, 24, 4, 4)),
            ValueError,
            "groups must divide the rows of w1, got 4 and w1 of shape (2, 2)",
        ),
        (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
        (dict(stride=True), TypeError, "stride must be an int or two of them, got True"),
        (dict(padding="full"), ValueError, "padding must be one of 'same', 'valid', got 'full'"),
        (dict(w2=(randn(4, 1), randn(1, 28))), ValueError, "w2[1] must be (r, in2 * 3 * 3), got shape (1, 28)"),
        (
            dict(x=randn(2, 7, 4, 4)),
            ValueError,
            "x must be (B, 6, H, W) (weight's channels times groups) or the same without B, got shape (2, 7, 4, 4)",
        ),
    ],
)
def test_bad_convolution(bad, error, message):
    arguments = {
        "x": randn(2, 6, 4, 4),
        "weight": randn(8, 6, 3, 3),
        "w1": randn(2, 2),
        "w2": (randn(4, 1), randn(1, 27)),
        "scale": 1.0,
        **bad,
    }
    with pytest.raises(error) as caught:
        LF.lokr_conv2d(**arguments)
    assert str(caught.value) == message


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("shape, dilation", [((3, 3), 1), ((2, 4), 1), ((4, 2), 3)])
def test_same_padding_and_no_batch_as_in_torch(shape, dilation):
    x, weight, w1, b = randn(3, 6, 7, 8), randn(8, 6, *shape), randn(2, 2), randn(4, 3, *shape)
    kernel = weight + 2 * torch.einsum("ij,klhw->ikjlhw", w1, b).reshape(weight.shape)
    expected = torch.conv2d(x, kernel, None, 1, "same", dilation)
    options = dict(padding="same", dilation=dilation, w1=w1, w2=b, scale=2)
    torch.testing.assert_close(LF.lokr_conv2d(x, weight, **options), expected)
    torch.testing.assert_close(LF.lokr_conv2d(x[0], weight, **options), expected[0])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_convolution_of_an_empty_batch(full, groups):
    x, weight, w1 = (torch.ones(*s, requires_grad=True) for s in ((0, 16, 9, 11), (8, 16 // groups, 3, 3), (2, 4)))
    d = 4 // groups
    w2 = torch.ones(4, d, 3, 3) if full else (torch.ones(4, 2), torch.ones(2, d * 9))
    y = LF.lokr_conv2d(x, weight, None, 2, 1, 1, groups, w1=w1, w2=w2, scale=2.0)
    y.sum().backward()
    assert y.shape == (0, 8, 5, 6) and x.grad.shape == x.shape and not weight.grad.any() and not w1.grad.any()
