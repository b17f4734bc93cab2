"""States of 8 bits: the values that the codes stand for, rounding, and every backend's step against the reference."""

import pytest
import torch

from lgkernels.ops.fused_update import blocks, reference
from lgkernels.ops.fused_update import op as _op  # noqa: F401  registers the op
from lgkernels.ops.fused_update.blocks import blocks_of, decoded, encoded
from tests.conftest import backend_module
from tests.fused_update.common import STEPS, states
from tests.fused_update.test_kernels import check as check_plain
from tests.support.problems import place, randn
from tests.support.tolerances import assert_accurate, assert_bit_equal

pytestmark = pytest.mark.op("fused_update_")
INF, NAN = float("inf"), float("nan")
WITH_STATES = [name for name in STEPS if states(name)]


@pytest.fixture
def module(backend):
    return backend_module("fused_update", backend)


# -- the definition ---------------------------------------------------------------------------------------------------


def test_values():
    """Those of bitsandbytes' `create_dynamic_map`, by hand."""
    signed, unsigned = blocks.values(True), blocks.values(False)
    for values in (signed, unsigned):
        assert len(set(values)) == 256 and values == sorted(values) and values[-1] == 1.0
    assert signed[127] == unsigned[0] == 0.0
    assert signed[:127] == [-v for v in signed[254:127:-1]]
    near = dict(rel=1e-12)
    assert signed[128:131] == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6], **near)
    assert unsigned[1:7] == pytest.approx([3.25e-7, 7.75e-7, 2.125e-6, 4.375e-6, 6.625e-6, 8.875e-6], **near)
    assert (signed[254], signed[0], unsigned[254]) == pytest.approx((0.99296875, -0.99296875, 0.996484375), **near)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding(signed):
    """Each value is its own code; what lies between two goes to the nearer one, by search over all of them."""
    values = torch.tensor(blocks.values(signed), dtype=torch.float64)
    codes, absmax = encoded(values[None].float() * 3.0, signed)
    assert torch.equal(codes[0], torch.arange(256, dtype=torch.uint8)) and absmax.tolist() == [[3.0]]
    torch.testing.assert_close(decoded(codes, absmax, signed)[0], 3 * values.float())
    x = randn(2, 700, dtype=torch.float64) ** 7  # many decades; a last block of 188
    x = x if signed else x.abs()
    codes, absmax = encoded(x, signed)
    assert absmax.shape == (2, 3)
    for row in range(2):
        for block, part in enumerate(x[row].split(256)):
            largest = part.abs().max()
            torch.testing.assert_close(absmax[row, block].double(), largest, rtol=1e-7, atol=0)
            distance = (part[:, None] / absmax[row, block].double() - values).abs()
            if not signed:
                distance[part > 0, 0] = INF  # never 0
            found = codes[row, 256 * block :][: len(part)].long()
            torch.testing.assert_close(distance.gather(1, found[:, None])[:, 0], distance.amin(1), rtol=0, atol=1e-7)


def test_rows_that_are_special():
    x = torch.zeros(5, 300)
    x[1, 7], x[2, 290], x[3, :2], x[4, :3] = INF, NAN, torch.tensor([1e-42, 1e-43]), torch.tensor([1.0, 1e-12, 0.0])
    codes, absmax = encoded(x, False)
    got = decoded(codes, absmax, False)
    assert (got[0] == 0).all() and got[1].isnan().tolist() == [True] * 256 + [False] * 44
    assert got[2].isnan().tolist() == [False] * 256 + [True] * 44
    assert got[3, 0] == x[3, 0] and abs(got[3, 1] - x[3, 1]) < 0.1 * x[3, 1]  # denormal
    assert got[4, 0] == 1 and 0 < got[4, 1] < 1e-6 and got[4, 2] == 0


# -- every backend ----------------------------------------------------------------------------------------------------


def made(n, k, seed, dtype=torch.float32):
    """A weight, and codes of states of many decades."""
    first, second = (randn(n, k, seed=seed + i) ** 3 for i in (1, 2))
    return randn(n, k, seed=seed, dtype=dtype), *encoded(first, True), *encoded(second.abs(), False)


def assert_like(got, same, truth, length):
    """Weights and absmax by the bound; codes may be one off, where rounding decides."""
    assert_accurate("weight", got[0], same[0], truth[0], length)
    for i in (1, 3)[: (len(got) - 1) // 2]:
        off = (got[i].int() - same[i].int()).abs()
        assert off.max() <= 1 and off.sum() <= 1 + off.numel() // 500, f"{off.sum()} of {off.numel()} codes, {i}"
        assert_accurate("absmax", got[i + 1], same[i + 1], truth[i + 1].float(), length)


def check(module, m, n, k, name, dtype=torch.float32, factors=None, gradient=True, **changes):
    rule, used = STEPS[name]._replace(**changes), 1 + 2 * states(name)
    own = made(n, k, 11, dtype)
    inputs = [randn(n, k, seed=21, dtype=dtype) if gradient else None]
    inputs += [randn(m, size, seed=31, dtype=factors or dtype) for size in (n, k)]
    if rule.rule == "manhattan":
        inputs = [t if t is None else t.round() for t in inputs]

    def run(source, convert, put=lambda t: t):
        mine = [put(convert(t.clone())) for t in own[:used]]
        given = [None if t is None else put(convert(t)) for t in inputs]
        source.update_8bit_(*mine, *[None] * (5 - used), *given, rule)
        return [t.cpu() for t in mine]

    truth = run(reference, lambda t: t.double() if t.is_floating_point() else t)
    assert_like(run(module, lambda t: t, place), run(reference, lambda t: t), truth, max(m, 1))


@pytest.mark.parametrize("name", WITH_STATES)
def test_steps(module, name):
    """Over a whole block and a ragged one, rows that no tile divides; with and without factors."""
    check(module, 6, 13, 300, name, grad_scale=0.125)
    check(module, 0, 3, 256, name, clip_value=0.7)


def test_boundaries(module):
    """Just below and just above every boundary between two codes; beside 1 or -1, so that absmax is 1."""
    for signed, name in ((True, "momentum"), (False, "adamw")):
        values = torch.tensor(blocks.values(signed), dtype=torch.float64)
        boundaries = (values[1:] + values[:-1]) / 2
        x = torch.ones(2, 256, dtype=torch.float64)
        for row, factor in enumerate((1 - 1e-5, 1 + 1e-5)):
            x[row, :255] = boundaries * factor
        x[1, 255] = -1.0 if signed else 1.0
        zero = torch.zeros(2, 256)
        own = [zero.clone(), *encoded(zero, True), *(encoded(zero, False) if not signed else (None, None))]
        own = [t if t is None else place(t) for t in own]
        gradient = (x if signed else x.sqrt()).float()
        factors = torch.zeros(0, 2), torch.zeros(0, 256)
        module.update_8bit_(*own, place(gradient), *map(place, factors), STEPS[name])
        assert torch.equal(own[1 if signed else 3].cpu(), encoded(x, signed)[0]), name


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 4, 33), (70, 9, 257), (20, 35, 513), (3, 33, 1025)])
def test_sizes(module, m, n, k):
    check(module, m, n, k, "adamw", gradient=False)
    check(module, m, n, k, "momentum", gradient=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(module, dtype):
    check(module, 6, 5, 300, "adamw", dtype)
    check(module, 6, 5, 300, "nesterov", torch.float32, dtype)


def test_special_blocks(module):
    """Zeros, denormals, inf and nan end in the reference's blocks; every code on the way there, and back, is met."""
    own = [t.clone() for t in made(7, 512, 3)]
    ramp = torch.arange(256, dtype=torch.uint8)
    own[1][0, :256], own[3][0, :256] = ramp, ramp.flip(0)
    gradient = torch.zeros(7, 512)
    own[2][1], own[4][1] = 0.0, 0.0
    gradient[2, 5], gradient[3, 400], gradient[4] = INF, NAN, 1e-22
    own[2][4], own[4][4] = 0.0, 0.0
    rule, none = STEPS["adamw"]._replace(momentum=1.0, beta2=1.0 - 2.0**-20), torch.zeros
    results = []
    for source, put in ((reference, lambda t: t), (module, place)):
        mine = [put(t.clone()) for t in own]
        source.update_8bit_(*mine, put(gradient), put(none(0, 7)), put(none(0, 512)), rule)
        results.append([t.cpu() for t in mine])
    same, got = results
    for i, signed in ((1, True), (3, False)):
        torch.testing.assert_close(got[i + 1], same[i + 1], rtol=1e-6, atol=1e-45, equal_nan=True)
        values = [decoded(r[i], r[i + 1], signed) for r in results]
        assert torch.equal(values[0].isnan(), values[1].isnan())
        assert values[0].isnan().sum() == 512
        off = (got[i].int() - same[i].int()).abs()[[0, 1, 5, 6]]
        assert off.max() <= 1 and off.sum() <= 4
    assert_bit_equal("codes", got[1][0, :256], ramp)
    torch.testing.assert_close(got[0], same[0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.only(where=lambda backend, threads: threads == 1 or backend in ("reference", "cpu", "cuda-simt"))
def test_repeatable_bit_for_bit(module, threads):
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            mine = [place(t.clone()) for t in made(70, 600, 5)]
            module.update_8bit_(*mine, None, place(randn(9, 70)), place(randn(9, 600)), STEPS["adamw"])
            results.append(mine)
    finally:
        torch.set_num_threads(before)
    for i, (a, b) in enumerate(zip(*results)):
        assert_bit_equal(f"result {i}", a, b)


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_by_the_librarys_product(module, monkeypatch):
    """As where vectors are short: parts of the gradient, here of 16 rows."""
    monkeypatch.setattr(module, "_LIBRARY_FROM", 64)
    monkeypatch.setattr(module, "_PART_BYTES", 1)
    for gradient in (False, True):
        check(module, 70, 37, 300, "adamw", gradient=gradient)
        check_plain(module, dict(M=70, N=37, K=300), "adamw", gradient=gradient)


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_opcheck(backend):
    own = [t.clone() for t in made(6, 300, 2)]
    arguments = *own, None, randn(3, 6), randn(3, 300), *STEPS["adamw"], backend
    torch.library.opcheck(torch.ops.lgkernels.fused_update_8bit_.default, arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(first_max=torch.ones(6, 1)), r"first_max must have shape \(6, 2\)"),
        (dict(second=None), "second and second_max must both be given, or both be None"),
        (dict(second=None, second_max=None), "rule='adam' needs first and second"),
        (dict(first=torch.zeros(300, 6, dtype=torch.uint8).t()), "first must be contiguous"),
    ],
)
def test_bad_arguments(changes, message):
    names = ("weight", "first", "first_max", "second", "second_max")
    given = dict(zip(names, made(6, 300, 2)), gradient=None, grad=randn(3, 6), x=randn(3, 300))
    given |= STEPS["adamw"]._asdict() | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.lgkernels.fused_update_8bit_(*given.values(), "auto")
    assert blocks_of(300) == 2
