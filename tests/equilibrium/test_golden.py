"""The authors' states, errors and gradients (tests/golden/holo_ep), float64 to 1e-10, float32 as their README says."""

import math

import pytest
import torch

import lgkernels.functional as LF
from tests.conftest import backend_module
from tests.equilibrium.common import CONV, DENSE, FOLDER, TOLERANCE, close, golden

NETS = (*DENSE, CONV)
PARTS = ("kernel", "bias")


@pytest.fixture(params=NETS)
def data(request):
    return golden(request.param)


def points_of(data):
    return [n for n in range(7) if data.has(f"du_dbeta_N{n}")]


def test_every_file_is_here():
    assert sorted(p.stem for p in FOLDER.glob("*.npz")) == sorted(NETS)


def test_states(data):
    for steps in (1, 2, 5):
        state = LF.ep_settle(data.weights, data.x, steps=steps, activation=data.activation)
        close(f"u_T{steps}", state, data.group(f"u_T{steps}"))
    after = LF.ep_settle(data.weights, data.x, state, steps=data.meta["T1"] - 5, activation=data.activation)
    close("u_free", after, data.group("u_free"))
    residual = LF.ep_residual(data.weights, data.x, data.group("u_free"), activation=data.activation)
    torch.testing.assert_close(torch.log10(residual + 1e-8), data["log10_residual"], rtol=0, atol=1e-6)


def test_nudged_states(data):
    free = data.group("u_free")
    betas = {"u_nudged_p": data.meta["beta"], "u_nudged_m": -data.meta["beta"]}
    for key in {key.split("/")[0] for key in data.data if key.startswith("u_nudged_N")}:
        n, t = key.removeprefix("u_nudged_N").split("_t")
        betas[key] = data.meta["beta"] * complex(
            math.cos(2 * math.pi * int(t) / int(n)), math.sin(2 * math.pi * int(t) / int(n))
        )
    for key, beta in betas.items():
        if not data.has(key):
            continue
        expected = data.group(key)
        if not isinstance(beta, complex) and next(iter(expected.values())).is_complex():
            beta = complex(beta)
        got = LF.ep_settle(
            data.weights, data.x, free, steps=data.meta["T2"], beta=beta, target=data.y, activation=data.activation
        )
        if not next(iter(expected.values())).is_complex() and isinstance(beta, complex):
            got = {k: v.real for k, v in got.items()}
        close(key, got, expected)


def test_errors_and_gradients(data):
    free, args = data.group("u_free"), dict(activation=data.activation)
    for points in points_of(data):
        own = dict(beta=data.meta["beta"], points=points, steps=data.meta["T2"], **args)
        e = LF.holomorphic_ep_error(data.weights, data.x, data.y, free, **own)
        close(f"du_dbeta_N{points}", e, data.group(f"du_dbeta_N{points}"))
        grads = LF.ep_gradients(data.weights, data.x, data.y, free, e, **args)
        close(f"hep_grad_N{points}", grads, data.group(f"hep_grad_N{points}"))


def test_class_indices_are_one_hot_targets(data):
    own = dict(beta=0.2, points=2, steps=3, activation=data.activation)
    state = data.group("u_free")
    e = LF.holomorphic_ep_error(data.weights, data.x, data.y.argmax(1).to(torch.int32), state, **own)
    close("e", e, LF.holomorphic_ep_error(data.weights, data.x, data.y, state, **own), 1e-14)


def test_recurrent_backprop(data):
    free, own = data.group("u_free"), dict(activation=data.activation)
    for method in ("iteration", "neumann"):
        steps = data.meta["T2"]
        delta = LF.recurrent_backprop_error(data.weights, data.x, data.y, free, steps=steps, method=method, **own)
        close("rbp_delta", delta, data.group("rbp_delta"))
    grads = LF.ep_gradients(data.weights, data.x, data.y, free, delta, **own)
    close("rbp_grad", grads, data.group("rbp_grad"))
    if data.has("rbp_delta_converged"):
        delta = LF.recurrent_backprop_error(data.weights, data.x, data.y, free, steps=300, **own)
        close("rbp_delta_converged", delta, data.group("rbp_delta_converged"))


def test_back_propagation_through_time(data):
    if data.has("bptt_grad_T2"):
        own = dict(steps=data.meta["T2"], activation=data.activation)
        grads = LF.bptt_gradients(data.weights, data.x, data.y, data.group("u_free"), **own)
        close("bptt_grad_T2", grads, data.group("bptt_grad_T2"))
    else:
        assert data.conv


@pytest.mark.parametrize("name", DENSE)
def test_continuous_time(name):
    data = golden(name)
    own = dict(activation=data.activation)
    meta = data.meta
    plateaus = dict(points=meta["online_N"], plateaus=meta["online_q"], steps=meta["T2"])
    u, e = LF.continuous_ep_error(data.weights, data.x, data.y, beta=meta["beta"], **plateaus, **own)
    close("online_avg_u", u, data.group("online_avg_u"))
    close("online_amp", e, data.group("online_amp"))
    close("online_grad", LF.ep_gradients(data.weights, data.x, data.y, u, e, **own), data.group("online_grad"))


def homeostasis(data, **options):
    weights = {k: v.clone().requires_grad_() for k, v in data.weights.items()}
    loss = LF.homeostatic_loss(weights, activities(data), **options)
    loss.backward()
    return loss.detach(), {k: w.grad for k, w in weights.items()}


def activities(data):
    if data.has("r_free"):
        return data.group("r_free")
    return {k: u * 0.5 * torch.sigmoid(u) + (1 - u / 2) * torch.sigmoid(u - 2) for k, u in data.group("u_free").items()}


def test_homeostatic_loss(data):
    loss, grads = homeostasis(data, eps=data.group("homeo_eps"))
    assert abs(loss - data["homeo_loss"]) <= TOLERANCE * max(abs(data["homeo_loss"]), 1e-3)
    largest = {f"{k.rpartition('/')[0]}/{part}": v.abs().max().item() for k, v in grads.items() for part in PARTS}
    close("homeo_grad", grads, data.group("homeo_grad"), scale={k: max(v, 1e-3) for k, v in largest.items()})


@pytest.mark.parametrize("name", DENSE)
def test_exact_homeostatic_loss(name):
    data = golden(name)
    loss, _ = homeostasis(data, estimator="exact")
    assert abs(loss - data["homeo_expected"]) <= TOLERANCE * max(data["homeo_expected"].item(), 1e-3)


@pytest.mark.parametrize("name", DENSE)
def test_symmetry(name):
    data = golden(name)
    symmetry = LF.jacobian_symmetry(data.weights, data.group("r_free"))
    torch.testing.assert_close(symmetry, data["jac_sym_metric"], rtol=1e-10, atol=0)
    angle = LF.weight_angle(data.weights)
    if name.startswith("loop"):
        assert angle.isnan()
    else:
        torch.testing.assert_close(angle, data["angle_deg"], rtol=1e-6, atol=1e-4)


def test_softmax_pool():
    data = golden(CONV)
    got = {"pool": LF.softmax_pool2d(data["pool_in_complex"])}
    close("pool", got, {"pool": data["pool_out_complex"]}, 1e-12)
    close("angle", {"": LF.weight_angle(data.weights)}, {"": data["angle_deg"]}, 1e-6)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("name", NETS)
def test_float32(name, impl):
    backend_module("equilibrium", impl)
    data, single = golden(name), golden(name, torch.float32)
    own = dict(activation=data.activation, impl=impl)
    free = LF.ep_settle(single.weights, single.x, steps=data.meta["T1"], **own)
    for key, u in data.group("u_free").items():
        assert (free[key] - u).abs().max() <= 1e-5
    for points in points_of(data):
        nudged = dict(beta=data.meta["beta"], points=points, steps=data.meta["T2"], **own)
        e = LF.holomorphic_ep_error(single.weights, single.x, single.y, single.group("u_free"), **nudged)
        expected = data.group(f"du_dbeta_N{points}")
        largest = max(v.abs().max().item() for v in expected.values())  # 1/beta enlarges the rounding of all layers
        close(f"du_dbeta_N{points}", e, expected, 1e-4, dict.fromkeys(expected, largest))
