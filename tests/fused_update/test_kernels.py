"""Every backend's fused step against the reference, by the bound of tests/support/tolerances.py."""

import pytest
import torch

from lgkernels.ops.fused_update import op as _op  # noqa: F401  registers the op
from lgkernels.ops.fused_update import reference
from lgkernels.ops.fused_update.options import UpdateRule
from tests.conftest import backend_module
from tests.fused_update.common import STEPS, states
from tests.support import problems
from tests.support.cases import DTYPES, SIZES, label, random_cases, sweep
from tests.support.layouts import arrange
from tests.support.problems import place, randn
from tests.support.tolerances import assert_accurate, assert_bit_equal, assert_relative

pytestmark = pytest.mark.op("fused_update_")
CASE = dict(M=6, N=11, K=90)


@pytest.fixture
def module(backend):
    return backend_module("fused_update", backend)


def whole(*shape, dtype):
    """Whole numbers, whose sums are exact, and so their signs."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def check(module, case, name="momentum", dtype=torch.float32, factors=None, layout="dense", gradient=False, **changes):
    """`factors`: their dtype, where it is another than the weight's."""
    rule, m, shape = STEPS[name]._replace(**changes), case["M"], (case["N"], case["K"])
    made = [randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    made[2] = made[2].abs() + 0.1
    own = [arrange(t, layout) for t in made[: 1 + states(name)]] + [None] * (2 - states(name))
    normal = (lambda *s, dtype: whole(*s, dtype=dtype)) if rule.rule == "manhattan" else randn
    inputs = [normal(*shape, dtype=dtype) if gradient else None]
    inputs += [normal(m, n, dtype=factors or dtype) for n in shape]
    inputs = [t if t is None else arrange(t, layout) for t in inputs]

    def run(source, convert, put=lambda t: t):
        mine = [None if t is None else put(convert(problems._copy(t))) for t in own]
        given = [None if t is None else put(convert(t)) for t in inputs]
        before = [None if t is None else t.clone() for t in given]
        assert source.update_(*mine, *given, rule) is None
        for t, old in zip(given, before):
            if t is not None:
                assert_bit_equal("update_: an input was written to", t, old)
        return [t.cpu() for t in mine if t is not None]

    got, same = run(module, lambda t: t, place), run(reference, lambda t: t)
    truth = run(reference, lambda t: t.double())
    for what, *tensors in zip(("weight", "first", "second"), got, same, truth):
        assert_accurate(what, *tensors, max(m, 1))


UPDATES = list(sweep(dict(M=5, N=9, K=70), M=SIZES, N=SIZES, K=SIZES)) + [dict(M=8, N=64, K=4200)]


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("case", UPDATES, ids=label)
def test_sizes(module, case, name):
    check(module, case, name)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("m", [0, 6, 70])
@pytest.mark.parametrize("name", STEPS)
def test_steps(module, name, m, gradient):
    check(module, dict(CASE, M=m), name, gradient=gradient, grad_scale=0.125)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("m", [6, 70])
def test_clipped_by_value(module, m, name):
    check(module, dict(CASE, M=m), name, gradient=m == 70, clip_value=0.7)


@pytest.mark.parametrize("m", [6, 70])
@pytest.mark.parametrize("clip_value", [0.7, float("inf")])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nan_stays(module, name, clip_value, m):
    weight, first, second = (randn(5, 9, seed=i).abs() for i in range(3))
    grad, x = randn(m, 5), randn(m, 9)
    grad[0, 2] = float("nan")
    own = [place(t) for t in (weight, first, second)]
    states_ = own[1:] if name == "adamw" else [None, None]
    module.update_(own[0], *states_, None, place(grad), place(x), STEPS[name]._replace(clip_value=clip_value))
    bad = own[0].cpu().isnan()
    assert bool(bad[2].all()) and not bool(bad[[0, 1, 3, 4]].any())


@pytest.mark.parametrize("layout", ["dense", "offset", "sliced", "transposed"])
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("m", [6, 70])
def test_layouts_and_dtypes_of_the_factors(module, layout, factors, m):
    check(module, dict(CASE, M=m), "adamw", layout=layout, factors=factors, gradient=True)


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_dtypes_of_the_weight(module, layout, dtype, name):
    check(module, CASE, name, dtype=dtype, layout=layout, gradient=True)


def test_it_is_torchs_adamw(module):
    parameter = torch.nn.Parameter(randn(13, 40, seed=1))
    own = [place(t) for t in (parameter.detach().clone(), torch.zeros(13, 40), torch.zeros(13, 40))]
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    for step in range(1, 4):
        grad, x = randn(6, 13, seed=20 + step), randn(6, 40, seed=30 + step)
        parameter.grad = grad.t() @ x
        optimizer.step()
        numbers = dict(keep=1 - 0.05 * 0.1, beta2=0.99, eps=1e-6, root=(1 - 0.99**step) ** 0.5)
        rule = UpdateRule("adam", 0.05 / (1 - 0.8**step), 0.8, 1 - 0.8, **numbers)
        module.update_(*own, None, place(grad), place(x), rule)
    state = optimizer.state[parameter]
    for tensor, expected in zip(own, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])):
        assert_relative("", tensor.cpu(), expected, 1e-5)


# -- repeatability ----------------------------------------------------------------------------------------------------


def _everything(module):
    made = [place(randn(130, 300, seed=seed)) for seed in (5, 6, 7)]
    made[2].abs_()
    grad, x = place(randn(20, 130, seed=1)), place(randn(20, 300, seed=7))
    for name in ("momentum", "adamw"):
        own = [*made[: 1 + states(name)], *[None] * (2 - states(name))]
        module.update_(*own, None, grad, x, STEPS[name])
    return made


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


FUZZ = random_cases(
    40,
    2027,
    M=[1, 2, 3, 7, 9, 17, 80],
    N=list(range(1, 80)),
    K=list(range(1, 200)),
    name=list(STEPS),
    dtype=list(DTYPES),
    factors=list(DTYPES),
    layout=["dense", "transposed", "sliced", "offset"],
    gradient=[False, True],
    clip_value=[float("inf"), 0.5],
)


@pytest.mark.parametrize("case", FUZZ, ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}-{c['name']}")
def test_random_cases(module, case):
    check(module, case, **{key: case[key] for key in case if key not in "MNK"})


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_opcheck(name, backend):
    own = [randn(6, 40, seed=i).abs() if i <= states(name) else None for i in range(3)]
    gradient = randn(6, 40, seed=5) if name == "adamw" else None
    arguments = *own, gradient, randn(3, 6), randn(3, 40), *STEPS[name], backend
    torch.library.opcheck(torch.ops.lgkernels.fused_update_.default, arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(first=randn(5, 40)), r"first must have shape \(6, 40\)"),
        (dict(second=None), "rule='adam' needs first and second"),
        (dict(gradient=randn(6, 39)), r"gradient must have shape \(6, 40\)"),
        (dict(grad=randn(3, 7)), r"grad must have shape \(3, 6\)"),
        (dict(x=randn(3, 41)), r"x must have shape \(3, 40\)"),
        (dict(rule="lion"), "rule must be one of 'sgd', 'manhattan', 'adam', got 'lion'"),
    ],
)
def test_bad_arguments(changes, message):
    given = dict(weight=randn(6, 40), first=randn(6, 40), second=randn(6, 40), gradient=randn(6, 40))
    given |= dict(grad=randn(3, 6), x=randn(3, 40)) | STEPS["adamw"]._asdict() | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.lgkernels.fused_update_(*given.values(), "auto")
