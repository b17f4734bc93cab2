"""Every function of every LLS backend against the reference, within the bound of tests/support/tolerances.py."""

import pytest
import torch

from lgkernels.ops.lls import reference
from tests.conftest import backend_module
from tests.lls.problems import areas, check, check_head, head_arguments, modulation, norm_arguments, table
from tests.support.cases import DTYPES, SIZES, label, random_cases, sweep
from tests.support.problems import place, preactivation, randn, targets
from tests.support.tolerances import assert_bit_equal

BASE = dict(B=3, C=5, H=8, W=8, P=2)
SHAPES = [
    *sweep(BASE, B=(0, 1, 17), C=(1, 17, 65), P=(1, 4, 8)),
    dict(B=2, C=3, H=7, W=7, P=2),  # overlapping bins
    dict(B=2, C=3, H=3, W=5, P=2),
    dict(B=2, C=4, H=9, W=6, P=4),
    dict(B=2, C=3, H=1, W=1, P=2),  # up-sampling
    dict(B=1, C=1, H=1, W=1, P=1),
    dict(B=2, C=3, H=17, W=63, P=2),
    dict(B=1, C=2, H=64, W=65, P=4),
    dict(B=1, C=2, H=16, W=127, P=4),
    dict(B=1, C=2, H=2, W=4099, P=2),  # rows wider than a block's shared memory
]
LINEAR = [dict(B=3, N=n, P=p) for n, p in ((1, 1), (7, 7), (17, 5), (64, 128), (63, 64), (129, 129), (40, 16), (1, 4))]
LINEAR += [dict(B=b, N=24, P=24) for b in (0, 1, 17, 65)]

IN_PIECES = pytest.mark.only(where=lambda backend: backend != "torch")  # whose block is whole


@pytest.fixture
def module(backend):
    return backend_module("lls", backend)


def shape_of(case):
    return (case["B"], case["N"]) if "N" in case else (case["B"], case["C"], case["H"], case["W"])


@pytest.mark.parametrize("case", SHAPES + LINEAR, ids=label)
def test_latents(module, case):
    check(module, "latents", (randn(*shape_of(case)), case["P"]), length=positions(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced", "expanded", "offset", "channels_last"])
@pytest.mark.parametrize("case", [BASE, dict(B=2, C=3, H=7, W=7, P=2), dict(B=3, N=17, P=5)], ids=label)
def test_latents_of_any_layout_and_dtype(module, case, layout, dtype):
    check(module, "latents", (preactivation(shape_of(case), dtype, layout), case["P"]), length=16)


HEADS = list(
    sweep(
        dict(B=3, classes=10, d=32, kind="matrix", waveform="square"),
        B=(0, 1, 17, 65),
        d=SIZES[1:],
        classes=(1, 2, 7, 17, 100, 300),
        kind=("none", "vector"),
        waveform=("cosine", "user"),
    )
)
# more products than Triton takes in one launch
HEADS += [dict(B=20, classes=100, d=1029, kind=k, waveform="square") for k in ("none", "vector", "matrix")]


@pytest.mark.parametrize("case", HEADS, ids=label)
def test_head(module, case):
    batch, classes, dim = case["B"], case["classes"], case["d"]
    phi = randn(classes, dim, seed=9) if case["waveform"] == "user" else None
    check_head(
        module,
        randn(batch, dim),
        targets(batch, classes),
        modulation(case["kind"], classes, classes),
        case["waveform"],
        classes,
        phi=phi,
    )


@pytest.mark.parametrize("rows, classes", [(20, 10), (7, 17), (1, 3), (33, 2), (64, 65), (70, 9), (5, 300), (300, 70)])
@pytest.mark.parametrize("waveform", ["square", "cosine"])
def test_reduced_head(module, rows, classes, waveform):
    check_head(
        module, randn(4, 33), targets(4, classes), modulation("matrix", rows, classes), waveform, classes, rows=rows
    )


OPTIONS = [
    dict(temperature=2.0),
    dict(label_smoothing=0.1),
    dict(normalize=False),
    dict(normalize=False, basis_scale=1 / 33),
    dict(basis_scale=0.25),
    dict(loss="hard_sigmoid_mse"),
    dict(loss="hard_sigmoid_mse", normalize=False, temperature=1.0),
    dict(reduction="sum"),
    dict(reduction="none"),
    dict(reduction="none", loss="hard_sigmoid_mse"),
    dict(ignore_index=1),
    dict(ignore_index=1, reduction="none", label_smoothing=0.1),
    dict(ignore_index=1, reduction="sum"),
    dict(eps=4.0),
    dict(eps=6.0),  # above the norm of some rows
    dict(eps=6.0, zero_gradient_below_eps=True),
    dict(compute_grad=False),
    dict(temperature=0.05),
]


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_head_options(module, options, kind):
    target = targets(7, 5)
    target[0], target[3] = 1, 1
    check_head(module, randn(7, 33), target, modulation(kind, 5, 5), "square", 5, **options)


# Options that do not hide each other go together. The rows have |x| = 6.8, 7.5 and 6.0: eps lies between.
COMBINED = [
    dict(basis_scale=0.25, ignore_index=1, label_smoothing=0.1),
    dict(basis_scale=0.25, eps=6.5, zero_gradient_below_eps=True, reduction="none", loss="hard_sigmoid_mse"),
    dict(basis_scale=0.25, normalize=False, ignore_index=1, temperature=2.0),
    dict(ignore_index=1, label_smoothing=0.1, compute_grad=False),
]


@pytest.mark.parametrize("rows, classes", [(40, 40), (50, 40), (300, 300), (60, 300)])
@pytest.mark.parametrize("options", COMBINED, ids=label)
def test_head_options_of_many_classes(module, options, rows, classes):
    """As above, where a backend may have other kernels; with as many rows as classes m is a vector."""
    target = targets(3, classes)
    target[1] = 1
    kind = "vector" if rows == classes else "matrix"
    check_head(module, randn(3, 45), target, modulation(kind, rows, classes), "square", classes, rows=rows, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head_with_every_row_ignored(module, reduction):
    loss, grad, _, grad_logits = check_head(
        module, randn(3, 9), torch.full((3,), -100), None, "cosine", 4, reduction=reduction
    )
    assert torch.isnan(loss) if reduction == "mean" else (loss == 0).all()
    assert (grad == 0).all() and (grad_logits == 0).all()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_zero_norm_row(module, zero, reduction):
    x = randn(4, 33)
    x[1] = 0
    x[2] = 1e-20
    grad = check_head(
        module, x, targets(4, 10), None, "square", 10, zero_gradient_below_eps=zero, per_row=True, reduction=reduction
    )[1]
    assert (grad[1] == 0).all() if zero else grad[1].abs().max() > 1e9


@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e18])
def test_head_range_of_latents(module, scale):
    """A norm by plain sum of squares over- or underflows float32 at 1e+-20; those are not asked for."""
    check_head(module, randn(3, 40) * scale, targets(3, 10), None, "cosine", 10)


def test_head_large_logits(module):
    check_head(module, 300 * randn(5, 65), targets(5, 10), None, "square", 10, normalize=False)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_head_modulation_layout(module, layout, kind):
    from tests.support.layouts import arrange

    check_head(
        module,
        randn(3, 17),
        targets(3, 7),
        arrange(modulation(kind, 9, 7), layout),
        "square",
        7,
        rows=7 if kind == "vector" else 9,
    )


@pytest.mark.only(where=lambda backend: backend in ("cpu", "triton"))
def test_packed_and_plain_square_basis_agree(module):
    """A backend that takes packed signs takes the float table too, and both mean the same."""
    x, target = randn(5, 45), targets(5, 10)
    if not module.CAPABILITIES.packed_basis:
        pytest.skip("packed signs need other instructions than this processor's")
    packed = check_head(module, x, target, None, "square", 10)
    plain = check_head(module, x, target, None, "square", 10, phi=table(reference, "square", 10, 45))
    for a, b in zip(packed, plain):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("batch, rows, classes", [(0, 3, 4), (1, 1, 1), (7, 20, 10), (65, 17, 17), (129, 7, 100)])
def test_modulation_grad(module, batch, rows, classes, vector, per_row):
    rows = classes if vector else rows
    scale = randn(batch, seed=5) if per_row else torch.tensor(-1.7)
    check(module, "modulation_grad", (randn(batch, rows), randn(batch, classes, seed=1), vector, scale), length=batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("case", SHAPES + LINEAR, ids=label)
@pytest.mark.only(where=lambda case, dtype: dtype == torch.float32 or (case["B"] <= 3 and max(shape_of(case)) <= 64))
@pytest.mark.op("lls_loss")
def test_expand_grad(module, case, per_row, dtype):
    shape, pool = shape_of(case), case["P"]
    dim = pool if "N" in case else case["C"] * pool * pool
    layout = "channels_last" if per_row else "dense"
    scale = randn(shape[0], seed=5) if per_row else torch.tensor(0.7)
    out = preactivation(shape, dtype, layout).fill_(float("nan"))
    result = check(module, "expand_grad", (randn(shape[0], dim), scale, out, pool), inplace=(2,), length=4)
    assert result[0].stride() == out.stride()


def positions(case):
    """Of one channel: no bin has more."""
    return case["N"] if "N" in case else case["H"] * case["W"]


# -- the pieces of the fused block -----------------------------------------------------------------------------

BLOCKS = [c for c in SHAPES if c["B"] > 0]


def norm_act_pool(module, case, dtype=torch.float32, layout="dense", slope=0.01, max_pool=False, compute_grad=True):
    z = preactivation(shape_of(case), dtype, layout)
    return check(
        module,
        "norm_act_pool",
        (z, *norm_arguments(z.shape[1]), slope, case["P"], max_pool, compute_grad),
        length=positions(case),
    ), z


@pytest.mark.parametrize("case", SHAPES + LINEAR, ids=label)
@pytest.mark.op("lls_block")
@IN_PIECES
def test_norm_act_pool(module, case):
    norm_act_pool(module, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last", "offset", "transposed"])
@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.op("lls_block")
@IN_PIECES
def test_norm_act_pool_variants(module, dtype, layout, max_pool, slope):
    result, z = norm_act_pool(module, dict(B=2, C=5, H=9, W=8, P=2), dtype, layout, slope, max_pool)
    if layout in ("dense", "channels_last"):
        assert result[0].is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )


@pytest.mark.parametrize("case", [BASE, dict(B=3, C=4, H=7, W=7, P=2), dict(B=3, N=17, P=5)], ids=label)
@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.only(where=lambda case, max_pool: not ("N" in case and max_pool))
@pytest.mark.op("lls_block")
@IN_PIECES
def test_norm_act_pool_without_gradient(module, case, max_pool):
    norm_act_pool(module, case, max_pool=max_pool, compute_grad=False)


@pytest.mark.parametrize("size, column", [((5, 7), 3), ((8, 8), 2), ((8, 8), 3)])
@pytest.mark.op("lls_block")
@IN_PIECES
def test_max_pool_of_nan_and_odd_sizes(module, size, column):
    """floor(H/2) x floor(W/2) windows; the last odd row and column still reach the latents; nan wins a window."""
    z = preactivation((2, 3, *size))
    z[0, 1, 2, column] = float("nan")
    mean, rstd, gamma, beta = norm_arguments(3)
    out = module.norm_act_pool(*map(place, (z, mean, rstd, gamma, beta)), 0.01, 2, True, True)[0]
    assert out.shape == (2, 3, size[0] // 2, size[1] // 2)
    assert out[0, 1, 1, 1].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 8, 8),
        (2, 1, 1, 1),
        (1, 17, 9, 7),
        (2, 65, 4, 4),
        (129, 3, 1, 1),
        (2, 3, 64, 65),
        (5, 17),
        (129, 65),
        (2, 1),
    ],
    ids=str,
)
@pytest.mark.op("lls_block")
@IN_PIECES
def test_batch_stats(module, shape, layout, dtype):
    z = preactivation(shape, dtype, layout)
    channels = shape[1]
    running = randn(channels, seed=11), 1 + randn(channels, seed=12).abs()
    arguments = (z, randn(channels, seed=13), *running, 0.1, 1e-5)
    check(module, "batch_stats", arguments, inplace=(2, 3), length=z.numel() // channels)


@pytest.mark.op("lls_block")
@IN_PIECES
def test_batch_stats_options(module):
    z = preactivation((3, 5, 4, 4))
    check(module, "batch_stats", (z, None, None, None, 0.1, 1e-5), length=48)
    check(module, "batch_stats", (z, None, torch.zeros(5), torch.ones(5), 0.3, 0.5), inplace=(2, 3), length=48)
    check(module, "batch_stats", (z, randn(5), torch.zeros(5), torch.ones(5), 1.0, 1e-3), inplace=(2, 3), length=48)


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.op("lls_block")
@IN_PIECES
def test_batch_stats_far_from_zero(module, layout):
    """A variance from sum(z^2) - n*mean^2 in float32 loses every digit here."""
    z = preactivation((4, 6, 9, 9), layout=layout)
    z += 1000 * (1 + torch.arange(6.0).reshape(1, -1, 1, 1))
    check(module, "batch_stats", (z, None, None, None, 0.1, 1e-5), length=324)


@pytest.mark.parametrize("case", SHAPES, ids=label)
@pytest.mark.op("lls_block")
@IN_PIECES
def test_norm_grads(module, case):
    dim = case["C"] * case["P"] ** 2
    g, s1, s2 = (randn(case["B"], dim, seed=i) for i in range(3))
    check(
        module,
        "norm_grads",
        (g, s1, s2, case["C"], areas(case["H"], case["W"], case["P"])),
        length=case["B"] * case["P"] ** 2,
    )


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize(
    "batch, dim, rows, classes", [(7, 33, 10, 10), (3, 40, 40, 40), (5, 20, 20, 7), (3, 20, 20, 300)]
)
@pytest.mark.only(where=lambda backend: backend == "triton")
@pytest.mark.op("lls_block")
def test_head_finished_by_the_norm_gradients(module, batch, dim, rows, classes, kind):
    """A backend may leave the mean of the losses and the modulation's gradient to the norm gradients' launch."""
    rows = rows if kind == "matrix" else classes
    target, m = targets(batch, classes), modulation(kind, rows, classes)
    target[1] = -100
    head = [place(t) for t in (randn(batch, dim), target, m, table(module, "square", rows, dim))]
    whole = module.head(*head, *head_arguments(classes))
    losses, *parts = module.head(*head, *head_arguments(classes), reduce=False)
    for i, (a, b) in enumerate(zip(parts, whole[1:])):
        assert_bit_equal(f"head[{i + 1}]", a, b)
    latents, z = place(randn(batch, 12)), place(randn(batch, 17))
    norms = (latents, latents, latents, 3, place(areas(4, 4, 2)))
    linear = (*map(place, norm_arguments(17)), 0.01, place(randn(batch, 17)), 17, 1.0)
    finish = losses, head[1], *parts[1:], head[2], -100
    expected = [] if m is None else [module.modulation_grad(*parts[1:], kind == "vector", place(torch.tensor(1.0)))]
    for plain, result in (
        (module.norm_grads(*norms), module.norm_grads(*norms, finish)),
        (
            module.linear_grad_preactivation_(z.clone(), *linear),
            module.linear_grad_preactivation_(z.clone(), *linear, finish),
        ),
    ):
        *grads, loss, grad_m = result
        for i, (a, b) in enumerate(zip(grads, plain)):
            assert_bit_equal(f"norm gradient {i}", a, b)
        assert torch.allclose(loss, whole[0], rtol=1e-6) and grad_m.numel() == (0 if m is None else m.numel())
        for want in expected:
            assert torch.allclose(grad_m, want, rtol=1e-5, atol=1e-7)


def grad_preactivation(module, case, dtype, layout, slope=0.01, scale=1.0):
    z = preactivation(shape_of(case), dtype, layout)
    channels = z.shape[1]
    common = (z, *norm_arguments(channels), slope)
    if z.dim() == 2:
        g = randn(z.shape[0], case["P"], seed=8)
        result = check(
            module,
            "linear_grad_preactivation_",
            (*common, g, case["P"], scale),
            inplace=(0,),
            length=max(z.shape[0], 4),
        )
        return result
    g = randn(z.shape[0], channels * case["P"] ** 2, seed=8)
    norm_gradients = randn(channels, seed=6), randn(channels, seed=7)
    return check(
        module, "grad_preactivation_", (*common, g, *norm_gradients, case["P"], scale), inplace=(0,), length=16
    )


@pytest.mark.parametrize("case", BLOCKS + [c for c in LINEAR if c["B"]], ids=label)
@pytest.mark.op("lls_block")
@IN_PIECES
def test_grad_preactivation(module, case):
    grad_preactivation(module, case, torch.float32, "dense")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last", "offset"])
@pytest.mark.parametrize("scale, slope", [(1.0, 0.0), (256.0, 0.01)])
@pytest.mark.parametrize("case", [BASE, dict(B=2, C=3, H=7, W=5, P=2), dict(B=5, N=17, P=17)], ids=label)
@pytest.mark.op("lls_block")
@IN_PIECES
def test_grad_preactivation_variants(module, case, dtype, layout, scale, slope):
    grad_preactivation(module, case, dtype, layout, slope, scale)


@pytest.mark.op("lls_block")
@IN_PIECES
def test_grad_preactivation_returns_its_argument(module):
    z, *rest = map(place, (preactivation((2, 3, 4, 4)), *norm_arguments(3)))
    result = module.grad_preactivation_(z, *rest, 0.01, place(randn(2, 12)), place(randn(3)), place(randn(3)), 2, 1.0)
    assert result.data_ptr() == z.data_ptr()


# -- repeatability ---------------------------------------------------------------------------------------------


def _everything(module):
    z = place(preactivation((5, 9, 8, 8), seed=21))
    mean, rstd = module.batch_stats(z, None, None, None, 0.1, 1e-5)
    gamma, beta = map(place, norm_arguments(9)[2:])
    out, x, s1, s2 = module.norm_act_pool(z, mean, rstd, gamma, beta, 0.01, 4, True, True)
    loss, g, s, grad_logits = module.head(
        x,
        place(targets(5, 10)),
        place(modulation("matrix", 10, 10)),
        place(table(module, "square", 10, 144)),
        *head_arguments(10),
    )
    grads = module.norm_grads(g, s1, s2, 9, place(areas(8, 8, 4)))
    m = module.modulation_grad(s, grad_logits, False, place(torch.tensor(1.0)))
    dz = module.grad_preactivation_(z, mean, rstd, gamma, beta, 0.01, g, *grads[:2], 4, 1.0)
    h, gamma, beta, g = (place(randn(*shape, seed=i)) for i, shape in enumerate(((5, 33), (33,), (33,), (5, 33))))
    stats = module.batch_stats(h, None, None, None, 0.1, 1e-5)
    linear = module.linear_grad_preactivation_(h, *stats, gamma, beta, 0.01, g, 33, 1.0)
    return [mean, rstd, out, x, s1, s2, loss, g, s, grad_logits, *grads, m, dz, *linear, h]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.only(where=lambda backend, threads: threads == 1 or backend in ("reference", "cpu", "cuda-simt"))
@IN_PIECES
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


# -- seeded random cases ---------------------------------------------------------------------------------------

FUZZ = random_cases(
    40,
    2026,
    B=[1, 2, 3, 7, 17],
    C=[1, 2, 3, 5, 8, 17],
    H=list(range(1, 18)),
    W=list(range(1, 18)),
    P=[1, 2, 3, 4],
    dtype=list(DTYPES),
    layout=["dense", "channels_last"],
    slope=[0.0, 0.01, 0.3],
    max_pool=[False, True],
    classes=[1, 2, 10, 33],
    kind=["none", "vector", "matrix"],
    waveform=["square", "cosine"],
    smoothing=[0.0, 0.1],
    reduction=["mean", "sum", "none"],
)


@pytest.mark.parametrize("case", FUZZ, ids=lambda c: f"{c['B']}x{c['C']}x{c['H']}x{c['W']}-P{c['P']}")
@pytest.mark.op("lls_block")
@IN_PIECES
def test_random_blocks(module, case):
    """All functions along one block. (ReLU makes rows of zeros: their huge gradients would overflow float16.)"""
    max_pool = case["max_pool"] and min(case["H"], case["W"]) > 1
    shape, dtype, layout = shape_of(case), case["dtype"], case["layout"]
    seed = case["B"] * 100 + case["H"]
    z = preactivation(shape, dtype, layout, seed=seed)
    check(module, "batch_stats", (z, None, None, None, 0.1, 1e-5), length=z.numel() // shape[1])
    norm = norm_arguments(shape[1], seed=seed)
    x = check(module, "norm_act_pool", (z, *norm, case["slope"], case["P"], max_pool, True), length=300)[1]
    g = check_head(
        module,
        x,
        targets(shape[0], case["classes"]),
        modulation(case["kind"], case["classes"], case["classes"]),
        case["waveform"],
        case["classes"],
        label_smoothing=case["smoothing"],
        reduction=case["reduction"],
        zero_gradient_below_eps=True,
    )[1]
    check(
        module,
        "grad_preactivation_",
        (z, *norm, case["slope"], g, randn(shape[1]), randn(shape[1], seed=1), case["P"], 1.0),
        inplace=(0,),
        length=16,
    )
    scale = randn(shape[0], seed=5) if case["reduction"] == "none" else torch.tensor(1.3)
    check(module, "expand_grad", (g, scale, preactivation(shape, dtype, layout), case["P"]), inplace=(2,), length=16)
