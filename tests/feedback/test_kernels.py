"""Every function of every feedback backend against the reference: bits where no sum is taken, else the bound of
tests/support/tolerances.py."""

import numpy as np
import pytest
import torch

from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.ops.feedback import reference
from tests.conftest import backend_module
from tests.feedback.common import made, randn, weights
from tests.support import problems
from tests.support.cases import DTYPES, SIZES, label, random_cases, sweep
from tests.support.layouts import arrange
from tests.support.problems import place
from tests.support.tolerances import assert_accurate, assert_bit_equal

LAYOUTS = ("dense", "transposed", "sliced", "expanded", "offset")
LAWS = {  # law, law_scale, low
    "uniform": ("uniform", 0.7, None),
    "uniform from 0": ("uniform", 0.7, 0.0),
    "uniform from": ("uniform", 0.7, 0.1),
    "uniform8": ("uniform8", 0.7, None),
    "uniform8 from 0": ("uniform8", 0.7, 0.0),
    "uniform8 from": ("uniform8", 0.7, -0.3),
    "sign": ("sign", 0.3, None),
    "normal": ("normal", 0.5, None),
}
VALUES = ("one", "tensor", *LAWS)
SIGNS = ("none", "zero", "plus", "packed")
RULES = [(value, signs) for value in VALUES for signs in SIGNS]
STATE = (123456789012345, 7, 3)


@pytest.fixture
def module(backend):
    return backend_module("feedback", backend)


def formula(case, value, signs, dtype=torch.float32, layout="dense", scale=0.75):
    """F (N, K); a fifth of the weights are zeros."""
    shape = case["N"], case["K"]
    weight = None if signs == "none" else arrange(weights(*shape, dtype=dtype), layout)
    weight = reference.pack_signs(weight) if signs == "packed" else weight
    magnitude = arrange(randn(*shape, seed=4, dtype=dtype), layout) if value == "tensor" else None
    random = (torch.tensor(STATE), *LAWS[value]) if value in LAWS else None
    return made(weight, magnitude, random, scale, signs in ("plus", "packed"))


def _place(argument):
    if isinstance(argument, FeedbackMatrix):
        return argument._make(map(_place, argument))
    return place(argument) if isinstance(argument, torch.Tensor) else argument


def _double(f):
    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return f._make(map(double, f))


def call(module, name, *arguments):
    """The function's result on the tests' device; no argument may change."""
    placed = [_place(a) for a in arguments]
    flat = [v for a in placed for v in (a if isinstance(a, FeedbackMatrix) else (a,))]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in flat]
    result = getattr(module, name)(*placed)
    for i, (argument, old) in enumerate(zip(flat, before)):
        if isinstance(argument, torch.Tensor):
            assert_bit_equal(f"{name}: argument {i} was written to", argument, old)
    return result.cpu()


def assert_same_matrix(module, name, got, expected, law):
    """Bit-equal; a normal law within 4 units in the last place, and one of the output's dtype beside."""
    if law != "normal":
        assert_bit_equal(name, got, expected)
        return
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype == torch.float32:
        np.testing.assert_array_max_ulp(got.numpy(), expected.numpy(), maxulp=5)
    else:
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)


def check_matrix(module, case, f, dtype=torch.float32):
    device = torch.device(problems.DEVICE)
    got = module.matrix((case["N"], case["K"]), _place(f), dtype, device)
    expected = reference.matrix((case["N"], case["K"]), f, dtype, torch.device("cpu"))
    assert got.device.type == device.type
    assert_same_matrix(module, "matrix", got.cpu(), expected, f.random and f.law)


def check_product(module, case, grad, f):
    got = call(module, "product", grad, case["K"], f)
    same = reference.product(grad, case["K"], f)
    truth = reference.product(grad.double(), case["K"], _double(f))
    assert_accurate("product", got, same, truth, max(case["N"], 1))
    return got


# -- the matrix written out ----------------------------------------------------------------------------------------

MATRIX = list(sweep(dict(N=5, K=40), N=SIZES, K=(*SIZES, 1025)))


@pytest.mark.parametrize("case", MATRIX, ids=label)
@pytest.mark.parametrize(
    "value, signs",
    [
        ("one", "zero"),
        ("uniform8 from 0", "packed"),
        ("sign", "none"),
        ("normal", "plus"),
        ("uniform", "zero"),
        ("tensor", "zero"),
    ],
)
@pytest.mark.op("feedback_matrix")
def test_matrix(module, case, value, signs):
    check_matrix(module, case, formula(case, value, signs))


@pytest.mark.parametrize("value, signs", RULES, ids=lambda v: v.replace(" ", "_"))
@pytest.mark.op("feedback_matrix")
def test_matrix_of_every_rule(module, value, signs):
    case = dict(N=9, K=300)
    check_matrix(module, case, formula(case, value, signs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["one", "tensor", "uniform8"])
@pytest.mark.op("feedback_matrix")
def test_matrix_dtypes(module, dtype, out, value):
    case = dict(N=7, K=65)
    check_matrix(module, case, formula(case, value, "zero", dtype), out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["one", "tensor", "uniform8 from 0"])
@pytest.mark.op("feedback_matrix")
def test_matrix_of_any_layout(module, layout, dtype, value):
    case = dict(N=7, K=65)
    check_matrix(module, case, formula(case, value, "zero", dtype, layout), dtype)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1040, 1041])  # whole vectors at any instruction set, and not
@pytest.mark.parametrize("value, signs", [("one", "zero"), ("uniform", "zero"), ("tensor", "packed"), ("sign", "none")])
@pytest.mark.only(where=lambda backend: backend == "cpu")
@pytest.mark.op("feedback_matrix")
def test_matrix_that_no_cache_holds(module, value, signs, columns, out):
    case = dict(N=1030, K=columns)
    check_matrix(module, case, formula(case, value, signs), out)


@pytest.mark.op("feedback_matrix")
def test_values_depend_on_row_and_column_alone(module):
    for law in LAWS:
        f = _place(made(random=(torch.tensor(STATE), *LAWS[law])))
        device = torch.device(problems.DEVICE)
        large, small = (module.matrix(shape, f, torch.float32, device).cpu() for shape in ((33, 700), (7, 129)))
        assert_bit_equal(law, small, large[:7, :129])


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
@pytest.mark.op("feedback_matrix")
def test_state(module, seed):
    """All 64 bits of the seed, the low 32 of stream and step."""
    for state in ((seed, 0, 0), (seed, 2**32 - 1, 5), (seed, 1, 2**32 - 1)):
        case = dict(N=2, K=40)
        check_matrix(module, case, made(random=(torch.tensor(state), *LAWS["uniform8"])))


@pytest.mark.op("feedback_matrix", "feedback_product")
def test_special_weights(module):
    """-0.0, denormals, infinities and nan have the reference's signs."""
    weight = torch.tensor([[0.0, -0.0, 1e-42, -1e-42, float("inf"), -float("inf"), float("nan"), -float("nan"), 3.0]])
    weight = weight.repeat(3, 9)
    case = dict(N=3, K=weight.shape[1])
    for plus in (False, True):
        check_matrix(module, case, made(weight, None, None, 1.0, plus))
        check_product(module, case, randn(2, 3, seed=1), made(weight, None, None, 1.0, plus))


# -- columns folded into maps ----------------------------------------------------------------------------------------

FOLDS = [  # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 3), (2, 1), (0, 2), (1, 2)),
    ((3, 2), (3, 3), (2, 0), (2, 1)),
    ((7, 8), (1, 1), (0, 0), (1, 1)),
    ((1, 2), (3, 2), (0, 1), (1, 1)),
]


@pytest.mark.parametrize("geometry", FOLDS, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.only(where=lambda backend: backend in ("reference", "cpu"))
@pytest.mark.op("feedback_fold")
def test_fold(module, geometry, channels, dtype):
    kernel, stride, padding, dilation = geometry
    size, shape = (7, 8), (3, channels, 7, 8)
    positions = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *geometry)]
    columns = randn(3 * positions[0] * positions[1], channels * kernel[0] * kernel[1], seed=5, dtype=dtype)
    arguments = shape, kernel, positions, stride, padding, dilation
    got = call(module, "fold", columns, *arguments)
    assert got.dtype == dtype
    assert_accurate(
        "fold",
        got,
        reference.fold(columns, *arguments),
        reference.fold(columns.double(), *arguments),
        kernel[0] * kernel[1],
    )


# -- the product ---------------------------------------------------------------------------------------------------

BASE = dict(M=5, N=17, K=40)
PRODUCTS = list(sweep(BASE, M=SIZES, N=SIZES, K=SIZES)) + [
    dict(M=8, N=64, K=128),
    dict(M=129, N=65, K=257),
    dict(M=8, N=70, K=1100),
    dict(M=130, N=7, K=3),
    dict(M=521, N=40, K=400),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=label)
@pytest.mark.parametrize(
    "value, signs", [("one", "zero"), ("one", "packed"), ("uniform8 from 0", "zero"), ("sign", "none")]
)
@pytest.mark.op("feedback_product")
def test_product(module, case, value, signs):
    check_product(module, case, randn(case["M"], case["N"], seed=1), formula(case, value, signs))


@pytest.mark.parametrize("value, signs", RULES, ids=lambda v: v.replace(" ", "_"))
@pytest.mark.op("feedback_product")
def test_product_of_every_rule(module, value, signs):
    case = dict(M=9, N=40, K=300)
    check_product(module, case, randn(9, 40, seed=1), formula(case, value, signs))


@pytest.mark.only(where=lambda backend: backend == "cpu")
@pytest.mark.op("feedback_product")
def test_product_of_more_gradients_than_are_packed_at_a_time(module):
    case = dict(M=514, N=9000, K=3)
    check_product(module, case, randn(514, 9000, seed=1), formula(case, "one", "packed"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["one", "tensor", "uniform8"])
@pytest.mark.op("feedback_product")
def test_product_dtypes(module, dtype, weight_dtype, value):
    """Under autocast the gradient is half and the weight is not."""
    case = dict(M=9, N=33, K=65)
    check_product(module, case, randn(9, 33, seed=1, dtype=dtype), formula(case, value, "zero", weight_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["grad", "formula"])
@pytest.mark.parametrize("value", ["one", "tensor"])
@pytest.mark.op("feedback_product")
def test_product_of_any_layout(module, layout, of, value):
    case = dict(M=9, N=33, K=65)
    grad = arrange(randn(9, 33, seed=1), layout if of == "grad" else "dense")
    check_product(module, case, grad, formula(case, value, "zero", layout=layout if of == "formula" else "dense"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", ["none", "one", "all"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.op("feedback_product")
def test_product_with_signs_of_weights_with_and_without_zeros(module, dtype, zeros, plus):
    """Weights that hold a zero may take another way than those that hold none."""
    case = dict(M=9, N=70, K=200)
    weight = randn(70, 200, seed=2, dtype=dtype)
    weight[weight == 0] = 1.0
    if zeros == "one":
        weight[41, 130] = -0.0
    elif zeros == "all":
        weight.zero_()
    check_product(module, case, randn(9, 70, seed=1, dtype=dtype), made(weight, None, None, 0.3, plus))


@pytest.mark.parametrize("shape", [(3, 1), (7, 31), (7, 32), (7, 33), (1, 129), (0, 5), (5, 0), (65, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced"])
@pytest.mark.op("feedback_pack_signs")
def test_pack_signs(module, shape, dtype, layout):
    weight = arrange(weights(*shape, dtype=dtype), layout)
    assert_bit_equal("pack_signs", call(module, "pack_signs", weight), reference.pack_signs(weight))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.op("feedback_rows")
def test_rows(module, law, dtype):
    index = torch.tensor([3, 0, 3, 2**31 + 5, 11, 2])
    f = made(random=(torch.tensor(STATE), *LAWS[law]), scale=0.5)
    for columns in (0, 1, 65, 700):
        got = call(module, "rows", index, columns, f, dtype)
        assert_same_matrix(module, "rows", got, reference.rows(index, columns, f, dtype), law)
    assert call(module, "rows", index[:0], 7, f, dtype).shape == (0, 7)


# -- repeatability -----------------------------------------------------------------------------------------------------


def _everything(module):
    case, results = dict(M=20, N=130, K=300), []
    grad = place(randn(20, 130, seed=1))
    for value, signs in (("one", "zero"), ("one", "packed"), ("uniform8 from 0", "zero"), ("normal", "none")):
        results.append(module.product(grad, 300, _place(formula(case, value, signs))))
    weight = place(torch.where(torch.arange(300) == 200, 0.0, randn(130, 300, seed=8)))  # zeros in some columns alone
    results.append(module.product(grad, 300, made(weight)))
    return results


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.only(where=lambda backend, threads: threads == 1 or backend in ("reference", "cpu", "cuda-simt"))
def test_repeatable_bit_for_bit(module, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = _everything(module)
        for _ in range(3):
            for i, (a, b) in enumerate(zip(first, _everything(module))):
                assert_bit_equal(f"result {i}", a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_threads_do_not_change_a_bit(module):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_everything(module))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other)):
            assert_bit_equal(f"result {i}", a, b)


# -- seeded random cases ----------------------------------------------------------------------------------------------

FUZZ = random_cases(
    40,
    2027,
    M=[1, 2, 3, 7, 9, 17],
    N=list(range(1, 80)),
    K=list(range(1, 200)),
    dtype=list(DTYPES),
    weight_dtype=list(DTYPES),
    layout=list(LAYOUTS),
    value=list(VALUES),
    signs=list(SIGNS),
    scale=[1.0, 0.3, -2.0],
)


@pytest.mark.parametrize("case", FUZZ, ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}-{c['value']}-{c['signs']}")
@pytest.mark.op("feedback_matrix", "feedback_product")
def test_random_cases(module, case):
    f = formula(case, case["value"], case["signs"], case["weight_dtype"], case["layout"], case["scale"])
    check_product(module, case, randn(case["M"], case["N"], seed=1, dtype=case["dtype"]), f)
    check_matrix(module, case, f, case["dtype"])
