"""Convolutions, embeddings and normalisations at perturbed weights: each member equals torch's function with the weight
written out, and no more than a panel of that weight is ever there."""

import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from lgkernels.ops.zeroth_order.options import Noise
from lgkernels.random import RandomFeedback
from lgkernels.recipes import measure
from tests.conftest import backend_module
from tests.support.cases import DTYPES, label, sweep
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import randn
from tests.support.tolerances import assert_accurate, assert_bit_equal
from tests.zeroth_order.test_functions import LAWS, formulas

C = [0.3, -0.3, 0.1]


def written(weight, noises, m, dtype=None):
    """W + c_m Z_m."""
    z = noises[m if len(noises) > 1 else 0].materialize(weight.shape).to(weight.dtype)
    return weight + C[m] * z


# -- convolutions -----------------------------------------------------------------------------------------------------

CONV = dict(M=2, B=2, into=6, out=4, size=(7, 9), kernel=(3, 2), law="sign", own=False, options={}, dtype=torch.float32)
CONVS = list(
    sweep(
        CONV,
        M=(1, 3),
        B=(0, 1),
        out=(2, 20),
        law=LAWS,
        own=(True,),
        options=(
            dict(stride=2),
            dict(padding=(1, 0), dilation=(2, 1)),
            dict(groups=2, padding="same"),
            dict(padding="valid"),
        ),
        dtype=DTYPES,
    )
) + [dict(CONV, own=True, dtype=torch.bfloat16, options=dict(groups=2)), dict(CONV, out=6, options=dict(groups=6))]


def convolution(case):
    shape = (case["M"], case["B"], case["into"], *case["size"])
    x = randn(*shape).to(case["dtype"])
    kernel = (case["out"], case["into"] // case["options"].get("groups", 1), *case["kernel"])
    weight, bias = randn(*kernel, seed=1).to(case["dtype"]), randn(case["out"], seed=2).to(case["dtype"])
    return x, weight, bias, formulas(case["law"], case["M"] if case["own"] else 1)


def convolved(x, weight, bias, noises, options):
    return torch.stack([F.conv2d(x[m], written(weight, noises, m), bias, **options) for m in range(len(x))])


@pytest.mark.parametrize("case", CONVS, ids=label)
def test_perturbed_conv2d_is_the_materialised_convolution(case, impl):
    x, weight, bias, noises = convolution(case)
    before = weight.clone()
    noise = noises if case["own"] else noises[0]
    given = dict(noise=noise, coefficients=C[: len(x)], impl=impl)
    y = LF.perturbed_conv2d(x, weight, bias, **case["options"], **given)
    truth = convolved(x.double(), weight.double(), bias.double(), noises, case["options"])
    rival = convolved(x, weight, bias, noises, case["options"])
    assert_accurate("y", y, rival, truth, weight[0].numel())
    assert_bit_equal("the weight", weight, before)


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_weight_of_several_panels(groups, dtype, impl, monkeypatch):
    """A few outputs at a time: of several whole groups, of one, or of a part of one."""
    from lgkernels.ops.zeroth_order import cpu, triton
    from lgkernels.ops.zeroth_order import torch as lean

    for module, name in ((cpu, "_WRITTEN"), (lean, "_AT_ONCE"), (triton, "_WRITTEN")):
        monkeypatch.setattr(module, name, 300)
    x, weight = randn(2, 2, 32, 6, 6).to(dtype), randn(48, 32 // groups, 3, 3, seed=1).to(dtype)
    noises = formulas("uniform8", 2)
    y = LF.perturbed_conv2d(x, weight, None, groups=groups, noise=noises, coefficients=C[:2], impl=impl)
    options = dict(groups=groups)
    truth = convolved(x.double(), weight.double(), None, noises, options)
    assert_accurate("y", y, convolved(x, weight, None, noises, options), truth, weight[0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_as_tensors_lie(layout, impl):
    x, weight, _, noises = convolution(CONV)
    x, weight = arrange(x, layout), arrange(weight, layout)
    given = dict(noise=noises[0], coefficients=C[:2], impl=impl)
    expected = LF.perturbed_conv2d(x.contiguous(), weight.contiguous(), **given)
    torch.testing.assert_close(LF.perturbed_conv2d(x, weight, **given), expected, rtol=1e-5, atol=1e-5)
    one = LF.perturbed_conv2d(x[:, 0], weight, **given)
    torch.testing.assert_close(one, expected[:, 0], rtol=1e-5, atol=1e-5)


def test_convolution_with_noise_in_a_tensor(impl):
    x, weight, bias, _ = convolution(CONV)
    z = randn(*weight.shape, seed=5)
    y = LF.perturbed_conv2d(x, weight, bias, noise=z, coefficients=C[:2], impl=impl)
    for m in range(2):
        torch.testing.assert_close(y[m], F.conv2d(x[m], weight + C[m] * z, bias), rtol=1e-5, atol=1e-5)


def test_a_convolution_keeps_what_a_half_weight_could_not(impl):
    """W + c Z in bfloat16 would be W itself, whose products with x add up to 0 here."""
    x = torch.tensor([1.0, -1.0] * 32, dtype=torch.bfloat16).view(1, 1, 64, 1, 1).expand(1, 2, 64, 3, 3)
    weight, noise = torch.ones(8, 64, 1, 1, dtype=torch.bfloat16), RandomFeedback(0, law="sign")
    y = LF.perturbed_conv2d(x, weight, noise=noise, coefficients=1e-3, impl=impl)
    expected = 1e-3 * (noise.materialize((8, 64)) * x[0, 0, :, 0, 0]).sum(1)
    torch.testing.assert_close(y[0, 1, :, 2, 2].float(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
def test_a_convolution_holds_a_panel(backend, impl):
    """Of a weight of 36 MiB; the library's own convolution is measured beside it."""
    x, weight, noise = randn(1, 1, 1024, 4, 4), randn(1024, 1024, 3, 3, seed=1), RandomFeedback(0, law="sign")
    ours = measure.peak_memory(
        lambda: LF.perturbed_conv2d(x, weight, noise=noise, coefficients=1e-3, impl=impl), weight.device
    )
    plain = measure.peak_memory(lambda: F.conv2d(x[0], weight), weight.device)
    assert ours <= plain + (7 if impl == "torch" else 5) * 2**20


# -- rows -------------------------------------------------------------------------------------------------------------

ROWS = dict(M=2, x=(3, 4), table=(11, 70), law="sign", own=False, dtype=torch.float32, index=torch.int64)
PICKED = list(
    sweep(
        ROWS,
        M=(1, 3),
        x=((), (0,), (1,), (2, 3, 20)),
        table=((1, 1), (5, 3), (300, 1030)),
        law=LAWS,
        own=(True,),
        dtype=DTYPES,
        index=(torch.int32,),
    )
)


@pytest.mark.parametrize("case", PICKED, ids=label)
def test_perturbed_embedding_is_the_materialised_one(case, impl):
    rows = torch.arange(case["M"] * max(torch.Size(case["x"]).numel(), 0)) * 7 % case["table"][0]
    x = rows.view(case["M"], *case["x"]).to(case["index"])
    weight, noises = randn(*case["table"]).to(case["dtype"]), formulas(case["law"], case["M"] if case["own"] else 1)
    noise = noises if case["own"] else noises[0]
    y = LF.perturbed_embedding(x, weight, noise=noise, coefficients=C[: len(x)], impl=impl)
    assert y.dtype == weight.dtype
    for m in range(len(x)):
        expected = F.embedding(x[m], written(weight.double(), noises, m))
        assert_accurate("y", y[m], expected.to(weight.dtype), expected, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_as_tensors_lie(layout, impl):
    x, weight = torch.arange(12).view(3, 4).t(), arrange(randn(12, 40), layout)
    given = dict(noise=RandomFeedback(1, law="sign"), coefficients=0.5, impl=impl)
    expected = LF.perturbed_embedding(x.contiguous(), weight.contiguous(), **given)
    assert torch.equal(LF.perturbed_embedding(x, weight, **given), expected)
    z = randn(12, 40, seed=3)
    y = LF.perturbed_embedding(x, weight, noise=z, coefficients=0.5, impl=impl)
    torch.testing.assert_close(y, F.embedding(x, weight + 0.5 * z))


@pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
def test_an_embedding_makes_the_rows_that_are_looked_up(backend, impl):
    x, weight, noise = torch.arange(16).view(2, 8), randn(8192, 1024), RandomFeedback(0, law="sign")
    result = 16 * 1024 * 4

    def run():
        LF.perturbed_embedding(x, weight, noise=noise, coefficients=1e-3, impl=impl)

    assert measure.peak_memory(run, weight.device) <= (4 * result if impl == "torch" else result) + 4096


# -- normalisations ---------------------------------------------------------------------------------------------------

NORMS = {
    "layer": (LF.perturbed_layer_norm, F.layer_norm, (3, 8, 6), ((8, 6),), (8, 6)),
    "rms": (LF.perturbed_rms_norm, F.rms_norm, (3, 5, 8), ((8,),), (8,)),
    "group": (LF.perturbed_group_norm, F.group_norm, (3, 8, 5), (4,), (8,)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_perturbed_norms_are_the_materialised_ones(kind, own, dtype, impl):
    function, plain, shape, arguments, weights = NORMS[kind]
    x, weight, bias = randn(3, *shape).to(dtype), randn(*weights, seed=1).to(dtype), randn(*weights, seed=2).to(dtype)
    noises, more = formulas("uniform8", 3 if own else 1), {} if kind == "rms" else dict(bias=bias)
    noise = noises if own else noises[0]
    y = function(x, *arguments, weight, **more, eps=1e-3, noise=noise, coefficients=C, impl=impl)
    assert y.dtype == x.dtype
    for m in range(3):
        wide = {k: v.double() for k, v in more.items()}
        expected = plain(x[m].double(), *arguments, written(weight.double(), noises, m), **wide, eps=1e-3)
        rival = plain(x[m], *arguments, written(weight, noises, m), **more, eps=1e-3)
        assert_accurate("y", y[m], rival, expected, 48)


def test_double_precision():
    x, weight, noise = randn(2, 3, 8).double(), randn(8, seed=1).double(), RandomFeedback(1)
    y = LF.perturbed_layer_norm(x, (8,), weight, noise=noise, coefficients=C[:2])
    for m in range(2):
        expected = F.layer_norm(x[m], (8,), written(weight, [noise], m))
        torch.testing.assert_close(y[m], expected, rtol=1e-12, atol=1e-12)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g: LF.perturbed_conv2d(randn(3, 4, 4), randn(2, 3, 3, 3), **g), r"x must be \(M, B, C, H, W\)"),
        (
            lambda g: LF.perturbed_embedding(torch.tensor(1), randn(2, 3), **g),
            r"x must be \(M, \.\.\.\), members first",
        ),
        (lambda g: LF.perturbed_embedding(torch.tensor([4]), randn(4, 3), **g), r"x must hold row numbers of"),
        (lambda g: LF.perturbed_embedding(torch.tensor([-1]), randn(4, 3), **g), r"row numbers of weight in \[0, 3\]"),
        (lambda g: LF.perturbed_embedding(randn(2), randn(4, 3), **g), "x must hold integers"),
        (
            lambda g: LF.perturbed_layer_norm(randn(8), (8,), randn(8), **g),
            "normalized_shape must be the last sizes of x",
        ),
        (lambda g: LF.perturbed_layer_norm(randn(2, 8), (8,), randn(7), **g), "weight must have shape"),
        (lambda g: LF.perturbed_layer_norm(randn(2, 8), (8,), randn(8), eps=-1.0, **g), "eps must not be negative"),
        (lambda g: LF.perturbed_group_norm(randn(2, 1, 8), 3, randn(8), **g), "num_groups must divide the 8 channels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(dict(noise=RandomFeedback(0), coefficients=0.5))


def test_opcheck(impl):
    noise = None, torch.tensor([[1, 2, 3]]), "sign", 1.0, None
    x, weight = randn(2, 1, 4, 5, 5), randn(6, 2, 3, 3)
    geometry = [1, 1], [0, 1], [1, 1], 2
    torch.library.opcheck(
        torch.ops.lgkernels.perturbed_conv2d.default, (x, weight, randn(6), randn(2), *noise, *geometry, impl)
    )
    rows = torch.tensor([[1, 2, 0]])
    torch.library.opcheck(
        torch.ops.lgkernels.perturbed_rows.default, (randn(3, 40), rows, randn(1), *noise, False, impl)
    )


@pytest.mark.only(where=lambda backend: backend in ("triton", "cuda-simt"))
def test_rows_that_are_not_there_are_nan(backend):
    """The kernels of a GPU, where looking at numbers ahead would wait for it: nothing is read there."""
    module = backend_module("zeroth_order", backend)
    noise = Noise(None, torch.tensor([[1, 2, 3]]), "sign")
    y = module.perturbed_rows(randn(5, 40), torch.tensor([[0, 5, -1, 2**40]]), torch.ones(1), noise, torch.float32)
    assert y[0, 0].isfinite().all() and y[0, 1:].isnan().all()
