"""The authors' losses (tests/golden/local_fg): values, JVPs by every way there is, and exact VJPs."""

import pytest
import torch
from torch.autograd import forward_ad

import lgkernels.functional as LF
from tests.forward_gradient.common import FOLDER, load

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
CROSS_ENTROPY = ("ce_A", "ce_B_S11", "ce_C", "ce_E_K1000", "ce_F_extreme")
NT_XENT = ("nce_A", "nce_B")


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


def close(name, got, expected):
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}"
    error, scale = (got.double() - expected).abs().max(), expected.abs().max()
    assert error <= TOLERANCE[got.dtype] * scale, f"{name}: {error:.2e} of {scale:.2e}"


def by_dual_level(function, primals, tangents):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents)))
        return forward_ad.unpack_dual(out)


WAYS = {"torch.func.jvp": torch.func.jvp, "dual level": by_dual_level}


def test_every_file_is_here():
    assert sorted(p.stem for p in FOLDER.glob("*.npz")) == sorted(
        (*CROSS_ENTROPY, *NT_XENT, "step_lgfga_bias1", "step_lgfga_mnistlike_bias1")
    )


def tensors(data, dtype, *names):
    return tuple(data[name].to(dtype) for name in names)


def cross_entropy(data, dtype):
    """`(function of x, weight, bias; those; their tangents)`."""
    return (
        lambda *primals: LF.replicated_cross_entropy(*primals, data["labels"]),
        tensors(data, dtype, "x", "w", "b"),
        tensors(data, dtype, "dx", "dw", "db"),
    )


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_cross_entropy(name, dtype):
    data = load(name)
    function, (x, weight, bias), tangents = cross_entropy(data, dtype)
    for way in WAYS.values():
        loss, derivative = way(lambda x: function(x, weight, bias), (x,), tangents[:1])
        close("loss", loss, data["loss"])
        close("jvp_x", derivative, data["jvp_x"])
        close("jvp_all", way(function, (x, weight, bias), tangents)[1], data["jvp_all"])
    explicit = dict(weight_tangent=tangents[1], bias_tangent=tangents[2])
    for given, key in (({}, "jvp_x"), (explicit, "jvp_all")):
        loss, derivative = LF.replicated_cross_entropy_dual(x, tangents[0], weight, bias, data["labels"], **given)
        close("loss", loss, data["loss"][:, 0, 0])
        close(key, derivative, data[key])


@pytest.mark.parametrize("name", CROSS_ENTROPY)
@pytest.mark.parametrize("kind", ["const", "ct"])
def test_cross_entropy_backward(name, kind, dtype):
    data = load(name)
    function, primals, _ = cross_entropy(data, dtype)
    grad = data["ct"].to(dtype) if kind == "ct" else torch.full(data["ct"].shape, 1 / len(data["x"]), dtype=dtype)
    leaves = [p.clone().requires_grad_() for p in primals]
    function(*leaves).backward(grad)
    by_transform = torch.func.vjp(function, *primals)[1](grad)
    for key, leaf, other in zip(("gx", "gw", "gb"), leaves, by_transform):
        close(key, leaf.grad, data[f"vjp_{kind}_{key}"])
        close(key, other, data[f"vjp_{kind}_{key}"])


def nt_xent(data, dtype):
    return (
        lambda *primals: LF.replicated_nt_xent(*primals, temperature=float(data["temp"])),
        tensors(data, dtype, "x", "y", "w", "b"),
        tensors(data, dtype, "dx", "dy", "dw", "db"),
    )


@pytest.mark.parametrize("name", NT_XENT)
def test_nt_xent(name, dtype):
    data = load(name)
    function, primals, tangents = nt_xent(data, dtype)
    for way in WAYS.values():
        loss, derivative = way(lambda x, y: function(x, y, *primals[2:]), primals[:2], tangents[:2])
        close("loss", loss, data["loss"])
        close("jvp_xy", derivative, data["jvp_xy"])
        close("jvp_all", way(function, primals, tangents)[1], data["jvp_all"])
    loss, derivative = LF.replicated_nt_xent_dual(
        *primals[:2],
        *tangents[:2],
        *primals[2:],
        temperature=float(data["temp"]),
        weight_tangent=tangents[2],
        bias_tangent=tangents[3],
    )
    close("loss", loss, data["loss"][:, 0, 0])
    close("jvp_all", derivative, data["jvp_all"])


@pytest.mark.parametrize("name", NT_XENT)
@pytest.mark.parametrize("kind", ["const", "ct"])
def test_nt_xent_backward(name, kind, dtype):
    data = load(name)
    function, primals, _ = nt_xent(data, dtype)
    grad = data["ct"].to(dtype) if kind == "ct" else torch.full(data["ct"].shape, 1 / len(data["x"]), dtype=dtype)
    leaves = [p.clone().requires_grad_() for p in primals]
    function(*leaves).backward(grad)
    for key, leaf in zip(("gx", "gy", "gw", "gb"), leaves):
        close(key, leaf.grad, data[f"vjp_{kind}_{key}"])
