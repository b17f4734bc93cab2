"""Every function of every local_loss backend against the reference, within the bound of tests/support/tolerances.py."""

import pytest
import torch

from lgkernels.ops.local_loss import reference
from tests.conftest import backend_module
from tests.support import problems
from tests.support.cases import DTYPES, label, random_cases, sweep
from tests.support.layouts import arrange
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal

LAYOUTS = ("dense", "transposed", "sliced", "expanded", "offset", "channels_last")


@pytest.fixture
def module(backend):
    return backend_module("local_loss", backend)


def check(module, name, arguments, **options):
    return problems.check(module, name, arguments, reference=reference, **options)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def feature_map(case, form, dtype=torch.float32, layout="dense", mean=0.0):
    batch, channels, height, width = (case[n] for n in "BCHW")
    shape = {
        "map": (batch, channels, height, width),
        "tokens": (batch, height * width, channels),
        "vector": (batch, channels),
    }[form]
    return arrange(randn(*shape, seed=1, dtype=dtype) + mean, layout)


def check_cross_entropy(
    module, case, h, smoothing=0.1, reduction="mean", compute_grad=True, bias=True, weight_dtype=torch.float32
):
    classes, length = case["K"], case["C"] + case["H"] * case["W"] + case["K"]
    weight = randn(classes, case["C"], seed=2, dtype=weight_dtype)
    bias = randn(classes, seed=3, dtype=weight_dtype) if bias else None
    loss, *kept = check(
        module,
        "local_cross_entropy",
        (h, weight, bias, targets(len(h), classes), smoothing, reduction, compute_grad),
        length=length,
    )
    if not compute_grad:
        return
    scale = randn(len(h), seed=4) if reduction == "none" else torch.tensor(-1.5)
    check(
        module,
        "local_cross_entropy_grads",
        (scale, *(t.cpu() for t in kept), h.dtype, True, True, True),
        length=len(h) + classes,
    )


BASE = dict(B=3, C=20, H=3, W=5, K=7)
SWEEP = list(sweep(BASE, B=(0, 1, 17, 65), C=(1, 17, 64, 129, 513), H=(1, 13), W=(1, 16, 31), K=(1, 2, 33, 129)))


@pytest.mark.parametrize("form", ["map", "map channels_last", "tokens"])
@pytest.mark.parametrize("case", SWEEP, ids=label)
@pytest.mark.op("local_cross_entropy")
def test_cross_entropy(module, case, form):
    name, _, layout = form.partition(" ")
    check_cross_entropy(module, case, feature_map(case, name, layout=layout or "dense"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["map", "tokens", "vector"])
@pytest.mark.op("local_cross_entropy")
def test_cross_entropy_of_any_layout(module, form, layout):
    check_cross_entropy(module, BASE, feature_map(BASE, form, layout=layout))


@pytest.mark.op("local_cross_entropy")
def test_cross_entropy_of_tokens_between_others(module):
    """Samples that do not follow one another: tokens without the class token, a slice of the channels."""
    case = dict(B=3, C=20, H=7, W=1, K=5)
    check_cross_entropy(module, case, randn(3, 9, 20, seed=1)[:, 1:8])
    check_cross_entropy(module, case, randn(3, 26, 7, 1, seed=1)[:, 3:23])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["map", "map channels_last", "vector"])
@pytest.mark.op("local_cross_entropy")
def test_cross_entropy_dtypes(module, form, dtype):
    name, _, layout = form.partition(" ")
    check_cross_entropy(module, BASE, feature_map(BASE, name, dtype, layout or "dense"), weight_dtype=dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["map", "tokens", "vector"])
@pytest.mark.op("local_cross_entropy")
def test_cross_entropy_with_the_librarys_products(module, form, reduction, monkeypatch):
    if not hasattr(module, "_SMALL"):
        pytest.skip("a choice of the CPU's kernels")
    monkeypatch.setattr(module, "_SMALL", 0)
    for compute_grad in (True, False):
        check_cross_entropy(module, BASE, feature_map(BASE, form), 0.1, reduction, compute_grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.op("local_cross_entropy")
def test_cross_entropy_reductions(module, reduction, smoothing):
    for compute_grad in (True, False):
        check_cross_entropy(module, BASE, feature_map(BASE, "map"), smoothing, reduction, compute_grad, bias=False)


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("local_cross_entropy")
def test_long_sums_keep_their_digits(module, layout):
    """Many positions of a map whose mean is far from 0."""
    case = dict(B=2, C=3, H=70, W=64, K=2)
    check_cross_entropy(module, case, feature_map(case, "map", layout=layout, mean=100.0))


@pytest.mark.op("local_cross_entropy")
def test_logits_far_apart(module):
    """exp would overflow without the shift by the row's largest logit."""
    h, eye = torch.tensor([[300.0, -300.0, 0.0], [88.0, 89.0, 90.0]]), torch.eye(3)
    check(module, "local_cross_entropy", (h, eye, None, torch.tensor([1, 2]), 0.0, "none", True), length=3)


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def check_goodness(module, h, threshold=2.0, mean=True):
    positive = torch.arange(len(h)) % 3 == 0
    _, kappa, _ = check(module, "goodness", (h, positive, threshold, mean, True), length=max(h[:1].numel(), 1))
    got = check(module, "goodness_grad", (h, kappa.cpu(), torch.tensor(-1.3)))[0]
    assert h.numel() == 0 or h.dim() != 4 or got.stride() == torch.empty_like(h).stride()


@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (3, 7), (65, 40), (5, 4, 3, 2), (2, 16385), (1, 3, 64, 129), (2, 70001)], ids=str
)
@pytest.mark.op("goodness")
def test_goodness(module, shape):
    check_goodness(module, randn(*shape, seed=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.op("goodness")
def test_goodness_of_any_layout(module, layout):
    check_goodness(module, arrange(randn(5, 4, 3, 6, seed=1), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.op("goodness")
def test_goodness_dtypes(module, dtype):
    check_goodness(module, randn(5, 37, seed=1, dtype=dtype), threshold=30.0, mean=False)


@pytest.mark.op("goodness")
def test_goodness_far_from_the_threshold(module):
    """log(1 + exp(.)) would be inf; the factor of a satisfied row underflows to 0."""
    h = torch.tensor([[1e4, 0.0], [1e4, 0.0], [0.0, 0.0], [3.0, 4.0]])
    loss, kappa, _ = check(module, "goodness", (h, torch.tensor([True, False, True, True]), 9.0, False, True))
    assert torch.isfinite(loss).all() and torch.isfinite(kappa).all()
    assert not check(module, "goodness", (h, torch.ones(4, dtype=torch.bool), 9.0, False, False))[1].numel()


# -- similarity matching ------------------------------------------------------------------------------------------


def check_similarity(module, x, classes=5, use_std=True):
    target = targets(len(x), classes)
    _, grad, mean = check(
        module, "similarity", (x, target, classes, use_std, True), length=max(x[:1].numel() + len(x), 1)
    )
    return check(module, "similarity_grad", (x, grad.cpu(), mean.cpu(), torch.tensor(-1.3)))[0]


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 8, 4, 3), (9, 4, 5, 1), (3, 17, 2, 2), (2, 70, 13, 9), (2, 5, 3, 3)], ids=str)
@pytest.mark.op("similarity")
def test_similarity_of_deviations(module, shape, layout):
    check_similarity(module, arrange(randn(*shape, seed=1) * (1 + torch.arange(shape[1])[:, None, None]), layout))


@pytest.mark.parametrize("shape", [(0, 8, 4, 3), (0, 6), (6, 9), (12, 5), (6, 3, 4, 4), (1, 7)], ids=str)
@pytest.mark.op("similarity")
def test_similarity_of_values(module, shape):
    check_similarity(module, randn(*shape, seed=1))
    if len(shape) == 4 and shape[0]:
        check_similarity(module, randn(*shape, seed=1), use_std=False)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])  # equal rows: below
@pytest.mark.op("similarity")
def test_similarity_of_any_layout(module, layout):
    x = arrange(randn(6, 8, 4, 3, seed=1), layout)
    assert check_similarity(module, x).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.op("similarity")
def test_similarity_dtypes(module, dtype):
    check_similarity(module, randn(6, 8, 4, 3, seed=1, dtype=dtype))
    check_similarity(module, randn(6, 9, seed=1, dtype=dtype))


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("similarity")
def test_deviations_of_a_map_far_from_zero(module, layout):
    """The variance must not be a difference of two large numbers."""
    slope = torch.arange(13 * 9, dtype=torch.float32).view(13, 9) / 50  # and the first positions are not typical
    check_similarity(module, arrange(randn(4, 8, 13, 9, seed=1) + 300 + slope, layout))


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("similarity")
def test_deviations_of_more_positions_than_a_tile(module, layout):
    spread = 0.3 + randn(3, 4, 1, 1, seed=2).abs()  # rows of alike deviations would only measure their cancellation
    check_similarity(module, arrange(2 + spread * randn(3, 4, 66, 63, seed=1), layout))


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("similarity")
def test_constant_channels_and_rows_have_gradient_zero(module, layout):
    x = randn(5, 6, 10, 9, seed=1)
    x[0] = 0.0
    x[1] = 0.1  # a dead sample, though not of zeros
    x[2, 3] = 0.3  # a dead channel
    got = check_similarity(module, arrange(x, layout)).cpu()
    assert not got[:2].any() and not got[2, 3].any() and got[2, 4].any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7])
@pytest.mark.parametrize("length", [7, 100, 1000])
@pytest.mark.op("similarity")
def test_rows_that_rounding_alone_varies_have_gradient_zero(module, length, value):
    x = randn(5, length, seed=1)
    x[2] = value
    x[4] = value
    x[4, 3] += 2 * torch.finfo(torch.float32).eps * abs(value)
    got = check_similarity(module, x).cpu()
    assert not got[2].any() and not got[4].any() and got[0].any()


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("similarity")
def test_channels_that_rounding_alone_varies_have_gradient_zero(module, layout):
    x = randn(4, 5, 6, 7, seed=1)
    x[1, 2] = 1000.0
    x[1, 2, 3, 4] += 2**-13
    got = check_similarity(module, arrange(x, layout)).cpu()
    assert not got[1, 2].any() and got[1, 3].any()


# -- repeatability, random cases ------------------------------------------------------------------------------------


def _everything(module):
    """What no library product enters."""
    h, y, one = randn(6, 40, 17, 19, seed=1), targets(6, 5), torch.tensor(0.7)
    results = []
    for layout in ("dense", "channels_last"):
        x = arrange(h, layout)
        results.append(module.local_cross_entropy(x, randn(5, 40, seed=2), None, y, 0.1, "mean", True)[1])
        loss, kappa, squares = module.goodness(x, y > 2, 1.0, True, True)
        mean = module.similarity(x, y, 5, True, True)[2]
        results += [
            loss,
            kappa,
            squares,
            module.goodness_grad(x, kappa, one),
            mean,
            module.similarity_grad(x, randn(6, 40, seed=3), mean, one),
        ]
    return results


def test_threads_do_not_change_a_bit(module):
    if not module.__name__.endswith("cpu"):
        pytest.skip("threads of the host do not matter here")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(_everything(module))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other)):
            assert_bit_equal(f"result {i}", a, b)


FUZZ = random_cases(
    12,
    2031,
    B=[1, 2, 5, 9],
    C=list(range(1, 80)),
    H=[1, 2, 5, 9],
    W=[1, 3, 8, 17],
    K=[2, 3, 10, 40],
    dtype=list(DTYPES),
    layout=list(LAYOUTS),
    form=["map", "tokens"],
)


@pytest.mark.parametrize("case", FUZZ, ids=lambda c: f"{c['B']}x{c['C']}x{c['H']}x{c['W']}-{c['form']}-{c['layout']}")
def test_random_cases(module, case):
    h = feature_map(case, case["form"], case["dtype"], case["layout"])
    check_cross_entropy(module, case, h, weight_dtype=case["dtype"])
    check_goodness(module, h)
