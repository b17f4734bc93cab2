"""Every function of every forward_gradient backend against the reference, within the bound of
tests/support/tolerances.py."""

import numpy as np
import pytest
import torch

from lgkernels.ops.forward_gradient import reference
from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from lgkernels.random import VALUES_PER_CALL, random_matrix
from tests.conftest import backend_module
from tests.support import problems
from tests.support.cases import DTYPES, label, random_cases, sweep
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import place, randn, targets
from tests.support.tolerances import assert_bit_equal

STATE = torch.tensor([0x0123456789ABCDEF, 7, 3])


class Flat:
    """A backend whose functions take the noise as its fields, so that tensors are arguments of their own."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def dual_norm(self, z, z_tangent, residual, values, state, law, options):
        return self.module.dual_norm(z, z_tangent, residual, Noise(values, state, *law), options)

    def activity_grad(self, z, y, coefficient, values, state, law, options):
        return self.module.activity_grad(z, y, coefficient, Noise(values, state, *law), options)


@pytest.fixture
def module(backend):
    return Flat(backend_module("forward_gradient", backend))


def check(module, name, arguments, **options):
    return problems.check(module, name, arguments, reference=Flat(reference), **options)


# -- the replicated losses --------------------------------------------------------------------------------------------

BASE = dict(N=3, P=5, G=4, C=8)
SWEEP = list(sweep(BASE, N=(0, 1, 17), P=(0, 1, 64, 131), G=(1, 3, 16, 65), C=(1, 7, 17, 32, 33, 130, 1029)))


def features(case, seed=1, dtype=torch.float32, layout="dense", mean=0.0):
    return arrange(randn(*(case[n] for n in "NPGC"), seed=seed, dtype=dtype) + mean, layout)


def check_losses(module, case, layer_norm, dtypes=(torch.float32,) * 3, layout="dense", mean=0.0, head=True):
    """`pooled`, `tangent` and `cotangent`; dtypes: of x, of its tangent, of the gradient."""
    n, patches, groups, channels = (case[name] for name in "NPGC")
    x = features(case, 1, dtypes[0], layout, mean)
    if n and patches:
        check(module, "pooled", (x, layer_norm), length=patches + channels)
    x = x if layer_norm else None
    x_tangent = features(case, 2, dtypes[1], layout)
    teach = arrange(randn(n, groups * channels, seed=3), layout)
    head = arrange(randn(n, seed=4), layout) if head else None
    grad = arrange(randn(n, patches, groups, seed=5), layout)

    def magnitudes(*results):
        """|v| |teach| is added up: the result may be their cancellation, as where a norm has one channel alone."""
        v = x_tangent.double().abs() * teach.double().abs().view(n, 1, groups, channels)
        return [v.sum(-1) * (316 if layer_norm else 1) / max(patches, 1)] * len(results)

    out = torch.full((n, patches, groups), float("nan"))
    check(
        module,
        "tangent",
        (x, x_tangent, teach, head, out),
        inplace=(4,),
        length=channels,
        magnitudes=magnitudes if channels < 3 else None,
    )
    out = torch.full((n, patches, groups, channels), float("nan"), dtype=dtypes[2])
    check(module, "cotangent", (x, grad, teach, out), inplace=(3,), length=channels)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("case", SWEEP, ids=label)
@pytest.mark.op("replicated_cross_entropy", "replicated_nt_xent", "replicated_tangent")
def test_losses(module, case, layer_norm):
    check_losses(module, case, layer_norm)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.op("replicated_cross_entropy", "replicated_tangent")
def test_several_rows_share_a_vector(module, channels):
    check_losses(module, dict(BASE, G=32, C=channels), False)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.op("replicated_cross_entropy", "replicated_tangent")
def test_losses_of_any_layout(module, layout, layer_norm):
    check_losses(module, BASE, layer_norm, layout=layout, head=False)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.op("replicated_cross_entropy", "replicated_tangent")
def test_losses_dtypes(module, first, second, layer_norm):
    check_losses(module, dict(BASE, C=33), layer_norm, (first, second, first))


@pytest.mark.op("replicated_cross_entropy", "replicated_tangent")
def test_a_mean_far_from_zero_leaves_the_norm_its_digits(module):
    check_losses(module, dict(BASE, C=32), True, mean=30.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "case", list(sweep(dict(N=5, D=24, K=7), N=(0, 1, 65), D=(1, 129), K=(1, 2, 10, 1000))), ids=label
)
@pytest.mark.op("replicated_cross_entropy")
def test_classify(module, case, bias):
    n, width, classes = (case[name] for name in "NDK")
    for dtype in DTYPES:
        weight = randn(width, classes, seed=2, dtype=dtype)
        arguments = randn(n, width, seed=1), weight, randn(classes, seed=3, dtype=dtype) if bias else None

        def magnitudes(loss, delta, teach):
            """delta is p - q, 0 for one class."""
            return None, delta.abs() + 1, (delta.abs() + 1) @ weight.double().abs().t()

        check(module, "classify", (*arguments, targets(n, classes)), length=width + classes, magnitudes=magnitudes)


@pytest.mark.op("replicated_cross_entropy")
def test_logits_far_apart(module):
    """exp would overflow without the shift by the row's largest logit."""
    logits = torch.tensor([[300.0, -300.0, 0.0], [88.0, 89.0, 90.0]])
    check(module, "classify", (logits, torch.eye(3), None, torch.tensor([1, 2])), length=3)


@pytest.mark.parametrize("case", list(sweep(dict(N=5, D=24), N=(1, 2, 33), D=(1, 3, 130))), ids=label)
@pytest.mark.op("replicated_nt_xent")
def test_contrast(module, case):
    n, width = case["N"], case["D"]
    projected = randn(2 * n, width, seed=1)
    projected[0] *= 1e-7  # under the floor

    def magnitudes(loss, gradient):
        return None, torch.full_like(gradient, 4.0 / projected.norm(dim=1).clamp_min(1e-6).min())

    check(module, "contrast", (projected, 0.5), length=width + 2 * n, magnitudes=magnitudes)


# -- layers with a tangent ----------------------------------------------------------------------------------------

NORMAL = ("normal", 0.7, None)
LAWS = [NORMAL, ("uniform", 0.7, None), ("uniform", 0.7, -0.2), ("uniform8", 0.7, None), ("sign", 0.5, None)]
SHAPES = [  # with the norm's dimension
    ((3, 5, 4, 32), 3),
    ((0, 5, 4), 2),
    ((3, 0, 4), 1),
    ((1, 1), 1),
    ((7,), 0),
    ((9, 33), 0),
    ((9, 33), 1),
    ((5, 3, 7), 2),
    ((3, 1100), 1),
    ((2, 3, 2049), 2),
    ((3, 33, 5), 1),
    ((2, 64, 20), 1),
    ((2, 5, 131), 1),
    ((2, 520, 17), 1),
    ((2, 17, 300), 1),
    ((3, 4, 5, 6), 2),
    ((3, 40, 1), 1),
]


def run_sizes(length):
    """Some divisors of the norm's size."""
    return sorted({1, max(length, 1), *(d for d in (2, 4, 11) if length % d == 0)})


def check_dual(module, shape, dim, *, law=None, values=False, tangent=True, residual=True, relu=True, **more):
    """`dual_norm` and, where there is noise, `activity_grad`."""
    dtypes, layout = more.get("dtypes", (torch.float32,) * 4), more.get("layout", "dense")
    z, v, added, noise = (
        arrange(randn(*shape, seed=i, dtype=dtype) + more.get("mean", 0.0) * (i == 1), layout)
        for i, dtype in enumerate(dtypes, 1)
    )
    noise = noise if values else None
    state = None if law is None else STATE
    options = NormOptions(dim, more.get("eps", 1e-5), relu)
    rest = noise, state, law or NORMAL, options
    length = shape[dim] + 16  # and what a law's normal may be off
    out = check(module, "dual_norm", (z, v if tangent else None, added if residual else None, *rest), length=length)[0]
    assert out.is_contiguous()
    if noise is None and state is None:
        return
    y = arrange(randn(*shape, seed=6, dtype=dtypes[0]), layout)
    for runs in run_sizes(shape[dim]):
        coefficient = arrange(randn(*shape[:dim], runs, *shape[dim + 1 :], seed=7), layout)
        assert check(module, "activity_grad", (z, y, coefficient, *rest), length=length)[0].is_contiguous()


@pytest.mark.parametrize("shape, dim", SHAPES, ids=str)
@pytest.mark.op("dual_norm")
def test_dual_norm(module, shape, dim):
    check_dual(module, shape, dim)
    check_dual(module, shape, dim, law=NORMAL)
    check_dual(module, shape, dim, values=True, tangent=False)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("noise", ["none", "values", "law"])
@pytest.mark.parametrize("shape, dim", [((3, 5, 33), 2), ((3, 33, 5), 1)], ids=str)
@pytest.mark.op("dual_norm")
def test_parts_of_dual_norm(module, shape, dim, noise, tangent, residual, relu):
    parts = dict(tangent=tangent, residual=residual, relu=relu)
    check_dual(module, shape, dim, law=NORMAL if noise == "law" else None, values=noise == "values", **parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, dim", [((3, 5, 4, 7), 3), ((3, 5, 4, 7), 1)], ids=str)
@pytest.mark.op("dual_norm")
def test_dual_norm_of_any_layout(module, shape, dim, layout):
    check_dual(module, shape, dim, values=True, layout=layout)
    check_dual(module, shape, dim, law=NORMAL, layout=layout)


@pytest.mark.parametrize("shape, dim", [((3, 5, 33), 2), ((3, 33, 5), 1), ((2, 9, 150), 1)], ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.op("dual_norm")
def test_dual_norm_dtypes(module, first, second, shape, dim):
    """z's, and that of the other tensors."""
    check_dual(module, shape, dim, values=True, dtypes=(first, second, second, second))
    check_dual(module, shape, dim, law=NORMAL, dtypes=(first, second, second, second))


@pytest.mark.parametrize("shape, dim", [((3, 5, 32), 2), ((3, 32, 5), 1)], ids=str)
@pytest.mark.op("dual_norm")
def test_variance_of_a_mean_far_from_zero(module, shape, dim):
    check_dual(module, shape, dim, values=True, mean=30.0)
    check_dual(module, shape, dim, values=True, eps=0.5)


@pytest.mark.parametrize("shape, dim", [((3, 5, 32), 2), ((3, 32, 5), 1)], ids=str)
@pytest.mark.op("dual_norm")
def test_rows_of_zeros_are_dead(module, shape, dim):
    """As a ReLU leaves them: the norm of zeros is zero, and nothing passes."""
    z = torch.zeros(shape)
    out = check(
        module, "dual_norm", (z, randn(*shape, seed=2), None, None, STATE, NORMAL, NormOptions(dim, 1e-5, True))
    )
    assert not out[0].any()


@pytest.mark.op("dual_norm")
def test_nan_is_not_hidden_by_the_relu(module):
    z = randn(3, 40, seed=1)
    z[1, 7] = float("nan")
    for dim in (0, 1):
        got = module.dual_norm(place(z), place(z), None, None, None, NORMAL, NormOptions(dim, 1e-5, True)).cpu()
        expected = reference.dual_norm(z, z, None, Noise(), NormOptions(dim, 1e-5, True))
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any() and not got.isnan().all()


# -- noise by formula -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("shape, dim", [SHAPES[i] for i in (0, 3, 5, 9, 10, 13)], ids=str)
@pytest.mark.op("dual_norm")
def test_noise_is_the_random_matrix(module, shape, dim, law):
    """Row n of the matrix is sample n's noise, in the order of a contiguous tensor; normal within 4 ulp."""
    z = arrange(randn(*shape, seed=1), "transposed")
    for seed in (-1, 0x0123456789ABCDEF):
        state = torch.tensor([seed, 0xFFFFFFFF, 5])
        got = module.dual_norm(place(z), None, None, None, place(state), law, NormOptions(dim, 1e-5, False))[1].cpu()
        expected = random_matrix(state, shape[0], z[0].numel(), *law).view(shape)
        if law[0] == "normal":
            np.testing.assert_array_max_ulp(got.numpy(), expected.numpy(), maxulp=4)
        else:
            assert_bit_equal("noise", got, expected)


@pytest.mark.parametrize("law", VALUES_PER_CALL)
@pytest.mark.parametrize("shape, dim", [((4, 3, 50), 2), ((4, 50, 3), 1)], ids=str)
@pytest.mark.op("dual_norm")
def test_noise_by_formula_is_noise_as_a_tensor(module, shape, dim, law):
    """In both functions, with the same bits."""
    z, y, options = randn(*shape, seed=1), randn(*shape, seed=2), NormOptions(dim, 1e-5, True)
    law = (law, 0.5, None)
    q = randn(*shape[:dim], 1, *shape[dim + 1 :], seed=3)
    plain = options._replace(relu=False)
    noise = module.dual_norm(place(z), None, None, None, place(STATE), law, plain)[1].cpu()
    for name, arguments in (("dual_norm", (z, y, q.expand(shape))), ("activity_grad", (z, y, q))):
        placed = [place(t.contiguous()) for t in arguments]
        made = getattr(module, name)(*placed, None, place(STATE), law, options)
        given = getattr(module, name)(*placed, place(noise), None, law, options)
        assert_bit_equal(name, made, given)


# -- repeatability, random cases ----------------------------------------------------------------------------------


def _everything(module):
    """What no library product enters."""
    case, results = dict(N=3, P=150, G=7, C=37), []
    x, v, teach, grad = features(case, 1), features(case, 2), randn(3, 7 * 37, seed=3), randn(3, 150, 7, seed=4)
    for layer_norm in (False, True):
        normed = x if layer_norm else None
        results += [
            module.pooled(x, layer_norm),
            module.tangent(normed, v, teach, None, torch.empty(3, 150, 7)),
            module.cotangent(normed, grad, teach, torch.empty_like(x)),
        ]
    for shape, dim in (((5, 60, 7, 37), 3), ((5, 300, 200), 1)):
        z, t = randn(*shape, seed=1), randn(*shape, seed=2)
        q, options = randn(*shape[:dim], 1, *shape[dim + 1 :], seed=3), NormOptions(dim, 1e-5, True)
        results.append(module.dual_norm(z, t, t, None, STATE, NORMAL, options))
        results.append(module.activity_grad(z, t, q, None, STATE, NORMAL, options))
    return results


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_threads_do_not_change_a_bit(module):
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


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_outputs_that_bypass_the_caches(module):
    """Large ones, of rows that are whole vectors; at an address between vectors they are written as all others."""
    shape = (9, 64, 64, 32)
    assert 4 * torch.Size(shape).numel() >= 1 << 22
    z, options = randn(*shape[:2], 1, 32, seed=1).expand(shape).contiguous(), NormOptions(3, 1e-5, True)
    few = slice(3, 5)
    got = module.dual_norm(z, z, None, z, None, NORMAL, options)
    assert_bit_equal("dual_norm", got[:, few], module.dual_norm(z[few], z[few], None, z[few], None, NORMAL, options))
    q = randn(*shape[:3], 1, seed=2)
    got = module.activity_grad(z, z, q, z, None, NORMAL, options)
    alone = module.activity_grad(z[few], z[few], q[few], z[few], None, NORMAL, options)
    assert_bit_equal("activity_grad", got[few], alone)
    teach, grad = randn(9, 64 * 32, seed=3), q[..., 0]
    alone = module.cotangent(None, grad[few], teach[few], torch.empty_like(z[few]))
    for offset in (0, 1):
        out = torch.empty(z.numel() + offset)[offset:].view(shape)
        assert_bit_equal("cotangent", module.cotangent(None, grad, teach, out)[few], alone)


FUZZ = random_cases(
    16,
    2032,
    N=[1, 2, 5],
    P=[1, 2, 5, 9, 40],
    G=[1, 2, 3, 8],
    C=list(range(3, 80)),
    first=list(DTYPES),
    second=list(DTYPES),
    layout=list(LAYOUTS),
    dim=[1, 2, 3],
)


@pytest.mark.parametrize("case", FUZZ, ids=label)
def test_random_cases(module, case):
    first, second = case["first"], case["second"]
    check_losses(module, case, case["dim"] == 3, (first, second, second), case["layout"])
    shape = tuple(case[n] for n in "NPGC")
    if shape[case["dim"]] != 2:  # two entries of a row leave nothing but rounding of LN'
        dtypes = (first, second, second, second)
        check_dual(module, shape, case["dim"], law=NORMAL, dtypes=dtypes, layout=case["layout"])
