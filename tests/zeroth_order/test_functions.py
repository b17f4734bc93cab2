"""The functions and their backends against the definition, and what they must not need: memory for noise."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from lgkernels.ops.zeroth_order import reference
from lgkernels.ops.zeroth_order.options import Noise
from lgkernels.optim import ZerothOrder
from lgkernels.random import RandomFeedback
from lgkernels.recipes import measure
from tests.conftest import backend_module
from tests.support.cases import DTYPES, label, sweep
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import randn
from tests.support.tolerances import assert_accurate, assert_bit_equal

LAWS = {"normal": {}, "sign": {"scale": 0.7}, "uniform8": {"scale": 0.9}, "uniform": {"scale": 1.2, "low": -0.3}}
EXACT = ("sign", "uniform8", "uniform")
BASE = dict(M=2, rows=3, out=20, inputs=130, law="sign", own=False, dtype=torch.float32)
CASES = list(
    sweep(
        BASE,
        M=(0, 1, 5),
        rows=(0, 1, 17, 50),
        out=(0, 1, 3, 65),
        inputs=(0, 1, 17, 513, 1030),
        law=LAWS,
        own=(True,),
        dtype=DTYPES,
    )
)
CASES += [dict(BASE, law="normal", own=True, rows=50, dtype=torch.bfloat16), dict(BASE, M=6, rows=50, own=True)]


def formulas(law, count, seed=5):
    return [RandomFeedback(seed + i, 3, law, **LAWS[law]) for i in range(count)]


def problem(case):
    """`(x, weight, bias, coefficients, noises)`"""
    m, rows, out, inputs, dtype = (case[k] for k in ("M", "rows", "out", "inputs", "dtype"))
    x, weight = randn(m, rows, inputs).to(dtype), randn(out, inputs, seed=1).to(dtype)
    bias = randn(out, seed=2).to(dtype)
    coefficients = torch.tensor([0.3, -0.3, 0.1, 2.0, -0.05, 1.0][:m])
    return x, weight, bias, coefficients, formulas(case["law"], m if case["own"] else 1)


def materialised(x, weight, bias, coefficients, noises):
    """The product with each member's perturbed weight, written out."""
    made = [noise.materialize(weight.shape).to(weight.dtype) for noise in noises]
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for m, c in enumerate(coefficients):
        z = made[m if len(made) > 1 else 0]
        out[m] = F.linear(x[m], weight + c.to(weight.dtype) * z, bias)
    return out


@pytest.mark.parametrize("case", CASES, ids=label)
def test_perturbed_linear_is_the_materialised_product(case, impl):
    x, weight, bias, coefficients, noises = problem(case)
    if case["own"] and not case["M"]:
        return
    noise = noises if case["own"] else noises[0]
    before = weight.clone()
    y = LF.perturbed_linear(x, weight, bias, noise=noise, coefficients=coefficients, impl=impl)
    truth = materialised(x.double(), weight.double(), bias.double(), coefficients.double(), noises)
    rival = materialised(x, weight, bias, coefficients, noises)
    assert_accurate("y", y, rival, truth, max(case["inputs"], 1))
    assert_bit_equal("the weight", weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_as_they_lie(layout, impl):
    x, weight, _, coefficients, noises = problem(BASE)
    x, weight = arrange(x, layout), arrange(weight, layout)
    given = dict(noise=noises[0], coefficients=coefficients, impl=impl)
    expected = LF.perturbed_linear(x.contiguous(), weight.contiguous(), **given)
    torch.testing.assert_close(LF.perturbed_linear(x, weight, **given), expected, rtol=1e-5, atol=1e-5)
    if layout != "expanded":
        plain = LF.formula_update_(weight.contiguous().clone(), noises[0], 0.5, impl=impl)
        assert torch.equal(LF.formula_update_(weight, noises[0], 0.5, impl=impl), plain)


def test_more_dimensions_and_noise_in_a_tensor(impl):
    x, weight, bias, z = randn(2, 3, 4, 9), randn(5, 9, seed=1), randn(5, seed=2), randn(5, 9, seed=3)
    y = LF.perturbed_linear(x, weight, bias, noise=z, coefficients=[0.5, -2.0], impl=impl)
    for m, c in enumerate((0.5, -2.0)):
        torch.testing.assert_close(y[m], F.linear(x[m], weight + c * z, bias), rtol=1e-5, atol=1e-5)


def test_a_perturbation_below_a_half_weights_rounding_counts(impl):
    """W + c Z in bfloat16 would be W itself, whose products with x add up to 0 here."""
    x = torch.tensor([1.0, -1.0] * 128, dtype=torch.bfloat16).expand(1, 2, -1)
    weight, noise = torch.ones(8, 256, dtype=torch.bfloat16), RandomFeedback(0, law="sign")
    y = LF.perturbed_linear(x, weight, noise=noise, coefficients=1e-3, impl=impl)
    expected = 1e-3 * (noise.materialize((8, 256)) * x[0, :1]).sum(1)
    torch.testing.assert_close(y[0, 1].float(), expected, rtol=1e-2, atol=1e-5)


# -- the step ---------------------------------------------------------------------------------------------------------

STEPS = dict(shape=(20, 130), members=1, law="sign", decay=0.0, dtype=torch.float32)
UPDATES = list(
    sweep(
        STEPS,
        shape=((0, 3), (1, 1), (7,), (3, 1030), (4, 3, 3, 2), (5, 0)),
        members=(2, 5),
        law=LAWS,
        decay=(0.125, 1.0),
        dtype=DTYPES,
    )
) + [dict(STEPS, members=3, law=law, decay=0.1, dtype=torch.bfloat16) for law in EXACT]


@pytest.mark.parametrize("case", UPDATES, ids=label)
def test_every_backend_steps_to_the_same_bits(case, impl):
    weight, noises = randn(*case["shape"]).to(case["dtype"]), formulas(case["law"], case["members"])
    coefficients = [0.3, -0.7, 1.1, 0.01, -0.2][: case["members"]]
    given = dict(noise=noises, coefficients=coefficients, weight_decay=case["decay"])
    expected = LF.formula_update_(weight.clone(), **given, impl="reference")
    got = LF.formula_update_(weight, **given, impl=impl)
    assert got is weight
    if case["law"] in EXACT:
        assert_bit_equal("weight", got, expected)
        return
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(case["dtype"]).eps, atol=1e-6)


def test_the_step_is_the_formula(impl):
    """Written out with the materialised noise."""
    weight, noises, c = randn(6, 50).double(), formulas("uniform8", 3), [0.3, -0.7, 1.1]
    wanted = 0.75 * weight + sum(k * n.materialize((6, 50)).double() for k, n in zip(c, noises))
    own = LF.formula_update_(weight.float(), noises, c, weight_decay=0.25, impl=impl)
    torch.testing.assert_close(own.double(), wanted, rtol=1e-6, atol=1e-6)


def test_products_are_not_fused_into_sums(impl):
    """Each product is rounded by itself. Seeded: with c = w = 1 + 2^-12 a fused c z + ... has other bits."""
    law = dict(law="uniform8", scale=1.0 + 2.0**-12)
    weight = torch.full((16, 1024), 1.0 + 2.0**-12)
    got = LF.formula_update_(
        weight.clone(),
        [RandomFeedback(i, **law) for i in (1, 2)],
        [1.0 + 2.0**-11, 1.0 - 2.0**-11],
        weight_decay=0.3,
        impl=impl,
    )
    z = [RandomFeedback(i, **law).materialize((16, 1024)) for i in (1, 2)]
    step = z[0] * (1.0 + 2.0**-11) + z[1] * (1.0 - 2.0**-11)
    expected = weight * float(torch.tensor(1 - 0.3, dtype=torch.float32)) + step
    assert_bit_equal("weight", got, expected)


@pytest.mark.unpoisoned
def test_the_whole_functions_compile():
    noise, x, weight = RandomFeedback(1, law="sign"), randn(2, 3, 8), randn(4, 8)

    def function(x, weight, c):
        LF.formula_update_(weight, noise, c)
        return LF.perturbed_linear(x, weight, noise=noise, coefficients=c)

    compiled, own = torch.compile(function, fullgraph=True, backend="aot_eager"), weight.clone()
    y, expected = compiled(x, own, 0.5), function(x, weight, 0.5)
    assert torch.equal(y, expected) and torch.equal(own, weight)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 50])
@pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
def test_no_memory_for_noise(rows, backend, impl):
    """Beyond the result: what does not grow with the weight (32 MiB), four megabytes of perturbed rows at most."""
    x, weight, noise = randn(2, rows, 2048), randn(4096, 2048), RandomFeedback(0, law="sign")
    result = 2 * rows * 4096 * 4

    def product():
        return LF.perturbed_linear(x, weight, noise=noise, coefficients=[1e-3, -1e-3], impl=impl)

    def step():
        LF.formula_update_(weight, noise, 1e-6, impl=impl)

    spare = 3 * 2**20 if impl == "torch" else 2**22 + 4096 if rows > 32 else 4096
    assert measure.peak_memory(product, weight.device) <= result + spare
    assert measure.peak_memory(step, weight.device) <= (3 * 2**20 if impl == "torch" else 4096)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=randn(9)), r"x must be \(M, \.\.\., 9\), members first"),
        (dict(coefficients=[1.0, 2.0, 3.0]), r"coefficients must be a number, or 2 of them, got"),
        (dict(noise=[RandomFeedback(0)] * 3), "noise must be one RandomFeedback for each of the 2 members, got 3"),
        (dict(noise=[RandomFeedback(0), RandomFeedback(0, law="sign")]), "noise must have one law, scale and low, got"),
        (dict(noise=[]), "noise must be a tensor like weight, a lgkernels.random.RandomFeedback"),
        (dict(noise=randn(4, 9)), r"noise must have shape \(5, 9\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LF.perturbed_linear(
            **{**dict(x=randn(2, 3, 9), weight=randn(5, 9), noise=RandomFeedback(0), coefficients=0.5), **change}
        )


def test_a_tensor_is_no_formula():
    with pytest.raises(TypeError, match="noise must be .* add a tensor with weight.add_"):
        LF.formula_update_(randn(2, 3), randn(2, 3), 0.5)


def test_autocast_gives_its_dtype():
    x, weight, noise = randn(2, 3, 9), randn(5, 9), RandomFeedback(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = LF.perturbed_linear(x, weight, noise=noise, coefficients=0.5)
    assert y.dtype == torch.bfloat16
    full = LF.perturbed_linear(x, weight, noise=noise, coefficients=0.5)
    torch.testing.assert_close(y.float(), full, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads):
    x, weight, noise = randn(2, 8, 300), randn(200, 300), RandomFeedback(0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = LF.perturbed_linear(x, weight, noise=noise, coefficients=0.5, impl="cpu")
        torch.set_num_threads(3 - threads)
        assert torch.equal(y, LF.perturbed_linear(x, weight, noise=noise, coefficients=0.5, impl="cpu"))
    finally:
        torch.set_num_threads(before)


def test_opcheck(impl):
    states = torch.tensor([[1, 2, 3]])
    arguments = randn(2, 3, 40), randn(6, 40), randn(6), randn(2), None, states, "sign", 1.0, None
    torch.library.opcheck(torch.ops.lgkernels.perturbed_linear.default, (*arguments, impl))
    torch.library.opcheck(
        torch.ops.lgkernels.formula_update_.default, (randn(6, 40), randn(1), *arguments[4:], 0.5, impl)
    )


def test_the_reference_takes_float64():
    weight, noise = randn(6, 40).double(), Noise(None, torch.tensor([[1, 2, 3]]))
    own = copy.deepcopy(weight)
    reference.formula_update_(own, torch.tensor([0.5]).double(), noise, 1.0)
    assert own.dtype == torch.float64 and not torch.equal(own, weight)
    assert backend_module("zeroth_order", "reference") is reference


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 3, 2)])
def test_a_step_needs_a_place_for_each_element(shape):
    """As torch's operations in place."""
    weight = torch.zeros(()).expand(shape)
    with pytest.raises(ValueError, match="weight must have memory of its own for each element"):
        LF.formula_update_(weight, RandomFeedback(0), 0.5)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match="model's parameter weight must have memory of its own for each element"):
        ZerothOrder(model, 0.1)
