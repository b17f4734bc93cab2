"""What holds of every net, without the authors' vectors."""

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.ops.equilibrium import reference
from lgkernels.ops.equilibrium import torch as lean
from lgkernels.ops.equilibrium.field import Net
from lgkernels.ops.equilibrium.options import Phases, Settling, circle
from lgkernels.random import RandomFeedback
from tests.conftest import backend_module
from tests.equilibrium.calls import STATE, TARGET, WEIGHTS, X
from tests.equilibrium.common import CONV, close, golden
from tests.support.problems import randn
from tests.support.tolerances import assert_accurate

DOUBLE = {k: w.double() for k, w in WEIGHTS.items()}
ACTIVATIONS = ("sigmoid", "dsilu", "hard_sigmoid", "clipped_relu")


def largest(e):
    return max(v.abs().max().item() for v in e.values())


def distance(e, f):
    return sum((e[k] - f[k]).square().sum() for k in e).sqrt() / sum(v.square().sum() for v in f.values()).sqrt()


@pytest.mark.parametrize("name", ["mlp_a30_f64", "loop_f64"])
def test_each_further_point_cuts_the_error(name):
    data = golden(name)
    free = LF.ep_settle(data.weights, data.x, steps=200)
    own = dict(beta=0.05, steps=100)
    exact = LF.holomorphic_ep_error(data.weights, data.x, data.y, free, points=0, **own)
    errors = []
    for points in range(1, 7):
        e = LF.holomorphic_ep_error(data.weights, data.x, data.y, free, points=points, **own)
        errors.append(distance(e, exact).item())
    assert all(8 * after <= before for before, after in zip(errors, errors[1:])), errors


def test_errors_of_symmetric_weights_are_those_of_recurrent_backprop():
    data = golden("mlp_dsilu_a0_f64")
    own = dict(activation="dsilu")
    free = LF.ep_settle(data.weights, data.x, steps=400, **own)
    e = LF.holomorphic_ep_error(data.weights, data.x, data.y, free, beta=0.1, points=0, steps=300, **own)
    delta = LF.recurrent_backprop_error(data.weights, data.x, data.y, free, steps=300, **own)
    close("delta", e, delta, 1e-9)
    assert abs(LF.homeostatic_loss(data.weights, free, estimator="exact")) < 1e-25
    assert LF.weight_angle(data.weights) < 1e-4
    torch.testing.assert_close(LF.jacobian_symmetry(data.weights, free), torch.ones(4).double())


@pytest.mark.parametrize("name", ["mlp_a30_f64", "loop_f64"])
def test_the_error_is_the_true_one_through_the_jacobian(name):
    """e = J^-1 J^T delta in the activities' coordinates, where J = W - diag(1 / phi')."""
    data = golden(name)
    free = LF.ep_settle(data.weights, data.x, steps=400)
    e = LF.holomorphic_ep_error(data.weights, data.x, data.y, free, beta=0.1, points=0, steps=300)
    delta = LF.recurrent_backprop_error(data.weights, data.x, data.y, free, steps=300)
    e, delta, u = (torch.cat([v[k] for k in data.meta["shapes"]], 1) for v in (e, delta, free))
    s = torch.sigmoid(4 * u - 2)
    jacobian = data["J_activity"] + torch.eye(u.shape[1]).double() - torch.diag_embed(1 / (4 * s * (1 - s)))
    through = torch.linalg.solve(jacobian, (jacobian.mT @ delta.unsqueeze(-1))).squeeze(-1)
    close("e", {"e": e}, {"e": through}, 1e-9)


def written_out_loss(w, x, target, state, steps, schedule, loss):
    """Of the net in calls.py after some steps, by hand: one hidden layer, sigmoid units."""
    h, out = state["h"], state["out"]
    for _ in range(steps):
        r = torch.sigmoid(4 * out - 2)
        new = x @ w["in-h/kernel"] + w["in-h/bias"] + r @ w["out-h/kernel"]
        below = new if schedule == "asynchronous" else h
        out = torch.sigmoid(4 * below - 2) @ w["h-out/kernel"] + w["h-out/bias"]
        h = new
    r = torch.sigmoid(4 * out - 2)
    if loss == "mse":
        return (r - target).square().sum(1).mean() / 2
    z = r @ w["readout/Dense_0/kernel"] + w["readout/Dense_0/bias"]
    return torch.nn.functional.cross_entropy(z, target)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_back_propagation_through_time_is_autograd_of_the_loop(schedule, loss):
    """From any state, settled or not; nothing flows into the state itself."""
    x, state = X.double(), {k: u.double() for k, u in STATE.items()}
    target = TARGET if loss == "cross_entropy" else torch.tensor([0, 2, 1])
    leaves = {k: w.clone().requires_grad_() for k, w in DOUBLE.items()}
    goal = target if loss == "cross_entropy" else torch.eye(3).double()[target]
    for steps in (0, 1, 5):
        expected_loss = written_out_loss(leaves, x, goal, state, steps, schedule, loss)
        if expected_loss.requires_grad:  # without a step a squared error has met no weight
            expected_loss.backward()
        got = LF.bptt_gradients(DOUBLE, x, target, state, steps=steps, schedule=schedule, loss=loss)
        expected = {k: torch.zeros_like(w) if w.grad is None else w.grad for k, w in leaves.items()}
        close("bptt", got, expected, 1e-12)
        leaves = {k: w.clone().requires_grad_() for k, w in DOUBLE.items()}


@pytest.mark.parametrize("name", ["mlp_a30_f64", "loop_f64", CONV])
def test_at_a_fixed_point_steps_are_terms_of_the_neumann_series(name):
    data = golden(name)
    own = dict(activation=data.activation)
    free = LF.ep_settle(data.weights, data.x, steps=600, tolerance=1e-14, **own)
    for steps in (1, 4):
        delta = LF.recurrent_backprop_error(data.weights, data.x, data.y, free, steps=steps, method="neumann", **own)
        expected = LF.ep_gradients(data.weights, data.x, data.y, free, delta, **own)
        got = LF.bptt_gradients(data.weights, data.x, data.y, free, steps=steps, **own)
        largest_ = max(v.abs().max().item() for v in expected.values())
        close("bptt", got, expected, 1e-9, dict.fromkeys(expected, largest_))


def packed_case(net, activation, loss, schedule="synchronous", dtype=torch.float64):
    torch.manual_seed(1)
    samples, phases = 3, circle(0.3, 5)
    if net == "dense":
        sizes = (7, 5, 4)
        weights = [torch.randn(a, b) / 3 for a, b in ((7, 5), (5, 7), (5, 4), (4, 5))]
        states = [torch.randn(samples * phases.rows, n) / 2 for n in sizes]
        drive, biases = [torch.randn(samples, n) / 2 for n in sizes], []
    else:
        weights = [torch.randn(c, b, 3, 3) / 6 for b, c in ((2, 3), (2, 3), (3, 4), (3, 4))]
        states = [torch.randn(samples * phases.rows, c, n, n) / 2 for c, n in ((2, 8), (3, 4), (4, 1))]
        drive, biases = [torch.randn(samples, 2, 8, 8)], [torch.randn(3), torch.randn(4)]
    readout = (None, None) if loss == "mse" else (torch.randn(4, 6).to(dtype), torch.randn(6).to(dtype))
    edges = [0, 1, 1, 0, 1, 2, 2, 1]
    cast = [[v.to(dtype) for v in part] for part in (states, drive, weights, biases)]
    target = torch.randn(samples, 4 if loss == "mse" else 6).to(dtype)
    options = Settling(activation, loss, schedule, 6, None)
    return cast[0], cast[1], Net(*cast[2:], *readout, edges, 3), target, phases, options


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("net", ["dense", "conv"])
def test_packed_rows_are_complex_numbers(net, loss, schedule):
    """All phases in one batch of real rows, against one after the other in complex numbers."""
    case = packed_case(net, "dsilu", loss, schedule)
    for got, expected in zip(lean.settle(*case), reference.settle(*case)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    tolerant = *case[:-1], case[-1]._replace(tolerance=0.3, steps=12)
    for got, expected in zip(lean.settle(*case), reference.settle(*case)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert lean.settle(*tolerant)[1].max() <= 12


@pytest.mark.parametrize("activation", ["sigmoid", "dsilu"])
@pytest.mark.parametrize("points", [0, 1, 2, 3, 4])
def test_backends(backend, activation, points):
    module = backend_module("equilibrium", backend)
    (states, drive, net, target, _, options), single = (
        packed_case("dense", activation, "cross_entropy", dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    truth = reference.error(drive, drive, net, target, 0.3, points, options)
    ours = (single[1], single[1], *single[2:4], 0.3, points, options)
    for got, plain, expected in zip(module.error(*ours)[0], reference.error(*ours)[0], truth[0]):
        assert_accurate("e", got, plain, expected, 64, magnitude=torch.full_like(expected, 10.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_nudges_of_all_activations(activation):
    """Against the written-out loop."""

    def phi(u):
        if activation == "sigmoid":
            return torch.sigmoid(4 * u - 2)
        if activation == "dsilu":
            return u / 2 * torch.sigmoid(u) + (1 - u / 2) * torch.sigmoid(u - 2)
        return (u / 2).clamp(0, 1) if activation == "hard_sigmoid" else u.clamp(0, 1)

    w, x, h, out = DOUBLE, X.double(), STATE["h"].double(), STATE["out"].double()
    hot = torch.nn.functional.one_hot(TARGET, 6)
    for _ in range(4):
        r, s = phi(h), phi(out)
        g = torch.softmax(s @ w["readout/Dense_0/kernel"] + w["readout/Dense_0/bias"], 1) - hot
        h = x @ w["in-h/kernel"] + w["in-h/bias"] + s @ w["out-h/kernel"]
        out = r @ w["h-out/kernel"] + w["h-out/bias"] - 0.2 * g @ w["readout/Dense_0/kernel"].t()
    state = {k: v.double() for k, v in STATE.items()}
    got = LF.ep_settle(w, x, state, steps=4, beta=-0.2, target=TARGET, activation=activation)
    close("u", got, {"h": h, "out": out}, 1e-13)
    if activation in ("hard_sigmoid", "clipped_relu"):
        with pytest.raises(ValueError, match="activation must be 'sigmoid' or 'dsilu' where beta is complex"):
            LF.ep_settle(w, x, steps=1, beta=1j, target=TARGET, activation=activation)
        with pytest.raises(ValueError, match="activation must be .* where points=3"):
            LF.holomorphic_ep_error(w, x, TARGET, state, beta=1, points=3, steps=1, activation=activation)


def test_asynchronous_steps_move_even_layers_first():
    w, x, out = DOUBLE, X.double(), STATE["out"].double()
    for _ in range(3):
        h = x @ w["in-h/kernel"] + w["in-h/bias"] + torch.sigmoid(4 * out - 2) @ w["out-h/kernel"]
        out = torch.sigmoid(4 * h - 2) @ w["h-out/kernel"] + w["h-out/bias"]
    state = {k: v.double() for k, v in STATE.items()}
    close("u", LF.ep_settle(w, x, state, steps=3, schedule="asynchronous"), {"h": h, "out": out}, 1e-13)


def test_the_tangent_is_the_derivative_for_clipped_activations_and_mse():
    state, x = {k: v.double() for k, v in STATE.items()}, X.double()
    for activation in ACTIVATIONS:
        own = dict(steps=4, activation=activation, loss="mse")
        target = torch.randn(3, 3).double()
        e = LF.holomorphic_ep_error(DOUBLE, x, target, state, beta=1e-5, points=0, **own)
        twice = LF.holomorphic_ep_error(DOUBLE, x, target, state, beta=1e-5, points=2, **own)
        close(activation, twice, e, 1e-6)


@pytest.mark.parametrize("name", ["mlp_a30_f64", CONV])
def test_schedules_reach_one_fixed_point(name):
    data = golden(name)
    own = dict(steps=300, activation=data.activation, tolerance=1e-11)
    synchronous, many, *_ = LF.ep_settle_report(data.weights, data.x, **own)
    asynchronous, few, residual, _ = LF.ep_settle_report(data.weights, data.x, schedule="asynchronous", **own)
    close("fixed point", asynchronous, synchronous, 1e-9)
    assert (few < many).all() and many.max() < 300 and (residual <= 1e-11).all()
    fixed = LF.ep_settle(data.weights, data.x, steps=300, activation=data.activation)
    close("early exit", synchronous, fixed, 1e-9)
    assert (LF.ep_residual(data.weights, data.x, fixed, activation=data.activation) < 1e-9).all()


def test_orbits_of_two_steps_are_seen():
    """Strong weights of opposite layers: the synchronous net oscillates for ever, and says so."""
    w = {"in-h/kernel": torch.zeros(1, 1), "h-out/kernel": torch.ones(1, 1) * 6, "out-h/kernel": torch.ones(1, 1) * 6}
    w |= {"in-h/bias": torch.full((1,), -2.5), "h-out/bias": torch.full((1,), -2.5)}
    start = {"h": torch.full((1, 1), 2.0), "out": torch.full((1, 1), -2.0)}
    state, steps, residual, orbit = LF.ep_settle_report(w, torch.zeros(1, 1), start, steps=100, tolerance=1e-4)
    assert residual > 1 and orbit <= 1e-4 and steps < 50
    _, steps, residual, _ = LF.ep_settle_report(
        w, torch.zeros(1, 1), start, steps=100, tolerance=1e-4, schedule="asynchronous"
    )
    assert residual <= 1e-4 and steps < 50


def test_a_warm_start_goes_on():
    whole = LF.ep_settle(WEIGHTS, X, STATE, steps=7)
    parts = LF.ep_settle(WEIGHTS, X, LF.ep_settle(WEIGHTS, X, STATE, steps=3), steps=4)
    close("u", parts, whole, 1e-6)
    start = LF.ep_settle(DOUBLE, X.double(), steps=3, beta=0.1 + 0.2j, target=TARGET)
    whole = LF.ep_settle(DOUBLE, X.double(), steps=5, beta=0.1 + 0.2j, target=TARGET)
    close("complex", LF.ep_settle(DOUBLE, X.double(), start, steps=2, beta=0.1 + 0.2j, target=TARGET), whole, 1e-14)


# -- the homeostatic loss ---------------------------------------------------------------------------------------------


def grads_of(weights, activities, **options):
    leaves = {k: w.clone().requires_grad_() for k, w in weights.items()}
    loss = LF.homeostatic_loss(leaves, activities, **options)
    loss.backward()
    return loss.item(), {k: w.grad for k, w in leaves.items() if w.grad is not None}


def dense_case():
    return DOUBLE, {k: v.double() for k, v in STATE.items()}


@pytest.mark.parametrize("estimator", ["paper", "symmetric"])
def test_estimators_have_the_exact_mean(estimator):
    weights, r = dense_case()
    exact, grads = grads_of(weights, r, estimator="exact")
    noise = RandomFeedback(3, law="sign")
    loss, mean = grads_of(weights, r, estimator=estimator, probes=6000, noise=noise)
    assert abs(loss - exact) < 0.02 * exact
    close("gradient", mean, grads, 0.05)


def test_conv_estimators():
    """Exact: against the Jacobian itself, by one unit vector after the other."""
    torch.manual_seed(0)
    edges = ("in-a", "a-b", "b-a", "b-out", "out-b")
    weights = {f"{edge}/kernel": torch.randn(1, 1, 3, 3).double() / 2 for edge in edges}
    weights |= {f"{edge}/bias": torch.randn(1).double() for edge in ("a-b", "b-out")}
    shapes = {"a": (1, 9, 8), "b": (1, 4, 4), "out": (1, 1, 1)}  # one edge with a border of zeros, one without
    r = {layer: torch.rand(1, *shape).double() for layer, shape in shapes.items()}
    units = [torch.Size(shape).numel() for shape in shapes.values()]
    n = sum(units)
    parts = torch.eye(n).double().split(units, 1)
    eps = {layer: part.reshape(n, 1, *shapes[layer]) for layer, part in zip(shapes, parts)}
    exact, grads = grads_of(weights, r, estimator="exact")
    for estimator in ("paper", "symmetric"):  # the mean over unit vectors is 1/n of the trace
        loss, by_trace = grads_of(weights, r, estimator=estimator, eps=eps)
        assert abs(loss * n - exact) < 1e-10 * exact, estimator
        close(estimator, {k: g * n for k, g in by_trace.items()}, grads, 1e-9, dict.fromkeys(grads, largest(grads)))
    feedback = RandomFeedback(1, law="normal")
    rows = feedback.materialize((3, n)).double().split(units, 1)
    explicit = {layer: part.reshape(3, 1, *shapes[layer]) for layer, part in zip(shapes, rows)}
    by_formula = grads_of(weights, r, probes=3, noise=feedback)[0]
    assert abs(by_formula - grads_of(weights, r, eps=explicit)[0]) < 1e-6


@pytest.mark.parametrize("estimator", ["paper", "symmetric", "exact"])
def test_homeostatic_gradients_of_backends(backend, estimator):
    """The gradient in closed form, against autograd of the loss's value."""
    module = backend_module("equilibrium", backend)
    sizes, edges = [7, 5, 4], [0, 1, 1, 0, 1, 2, 2, 0]
    weights = [randn(a, b) / 3 for a, b in ((7, 5), (5, 7), (5, 4), (4, 7))]
    eps = [] if estimator == "exact" else [randn(12, n) for n in sizes]
    leaves = [w.double().requires_grad_() for w in weights]
    loss, _ = reference.homeostasis(leaves, [e.double() for e in eps], edges, sizes, estimator)
    loss.backward()
    plain = reference.homeostasis(weights, eps, edges, sizes, estimator)
    value, grads = module.homeostasis(weights, eps, edges, sizes, estimator)
    assert_accurate("loss", value, plain[0], loss.detach(), 64, magnitude=torch.tensor(10.0))
    for g, p, leaf in zip(grads, plain[1], leaves):
        assert_accurate("gradient", g, p, leaf.grad, 64)


def test_noise_by_formula_is_the_explicit_one():
    weights, r = dense_case()
    feedback = RandomFeedback(5, law="uniform", scale=4.0)
    units = feedback.materialize((4 * 3, 7)).double() / 4 * 3**0.5
    eps = {"h": units[:, :4].reshape(4, 3, 4), "out": units[:, 4:].reshape(4, 3, 3)}
    given, explicit = grads_of(weights, r, probes=4, noise=feedback), grads_of(weights, r, eps=eps)
    assert abs(given[0] - explicit[0]) < 1e-6
    close("gradient", given[1], explicit[1], 1e-6)
    torch.manual_seed(3)
    first = grads_of(weights, r)[0]
    assert first != grads_of(weights, r)[0]
    torch.manual_seed(3)
    assert first == grads_of(weights, r)[0]


def test_no_second_derivative_in_silence():
    weights, r = dense_case()
    leaves = {k: w.clone().requires_grad_() for k, w in weights.items()}
    loss = LF.homeostatic_loss(leaves, r, estimator="exact")
    (grad,) = torch.autograd.grad(loss, leaves["h-out/kernel"], create_graph=True)
    with pytest.raises(NotImplementedError, match="homeostatic_loss has no second derivative"):
        grad.sum().backward()


# -- the softmax pool -------------------------------------------------------------------------------------------------


def test_softmax_pool_derivatives():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    pool = lambda x: LF.softmax_pool2d(x, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(pool, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, x)
    z = torch.randn(1, 2, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(pool, z) and torch.autograd.gradgradcheck(pool, z)
    assert LF.softmax_pool2d(torch.full((1, 2, 2), 1e4)).isfinite().all()
    half = torch.randn(2, 3, 4, 4).bfloat16()
    assert LF.softmax_pool2d(half).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    weights, x = {k: w.to(dtype) for k, w in WEIGHTS.items()}, X.to(dtype)
    state = LF.ep_settle(weights, x, steps=20)
    wide = LF.ep_settle({k: w.float() for k, w in weights.items()}, x.float(), steps=20)
    close("u", state, wide, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        close("under autocast", LF.ep_settle(weights, x, steps=20), wide, 1e-6)
    e = LF.holomorphic_ep_error(weights, x, TARGET, state, beta=0.1, points=2, steps=5)
    grads = LF.ep_gradients(weights, x, TARGET, state, e)
    assert {g.dtype for g in grads.values()} == {dtype}


def test_a_real_number_of_complex_type_gives_complex_states():
    got = LF.ep_settle(DOUBLE, X.double(), steps=4, beta=complex(0.2), target=TARGET)
    real = LF.ep_settle(DOUBLE, X.double(), steps=4, beta=0.2, target=TARGET)
    close("u", {k: v.real for k, v in got.items()}, real, 1e-14)
    assert all(v.is_complex() and not v.imag.any() for v in got.values())


def test_phases_of_a_circle():
    assert Phases([0.5], [0.0], 1) == circle(0.5, 1)
    assert [circle(1.0, n).rows for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    for n in range(1, 7):
        phases = circle(0.5, n)
        values = torch.tensor(phases.betas)
        torch.testing.assert_close(values.abs(), torch.full((len(values),), 0.5, dtype=values.real.dtype))
        assert (values.imag[phases.real_phases :] > 0).all()


def test_empty_batches():
    state, steps, residual, _ = LF.ep_settle_report(WEIGHTS, X[:0], steps=3, tolerance=0.1)
    assert state["out"].shape == (0, 3) and steps.shape == residual.shape == (0,)
    e = LF.holomorphic_ep_error(WEIGHTS, X[:0], TARGET[:0], state, beta=0.1, points=4, steps=2)
    assert all(not g.any() for g in LF.ep_gradients(WEIGHTS, X[:0], TARGET[:0], state, e).values())
