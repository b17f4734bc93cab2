"""Nets with an energy: the closed forms against autograd of the energy, and centred nudges against back-propagation."""

import itertools

import pytest
import torch

import lgkernels.nn as lnn
from lgkernels.ops.equilibrium import energy, energy_torch
from lgkernels.ops.equilibrium.options import ENERGY_ACTIVATIONS
from lgkernels.training import EquilibriumTrainer
from lgkernels.training.equilibrium import UnsettledError
from lgkernels.training.hopfield import Phases, gradients_through_time

POOLS = ("none", "avg", "max", "softmax")


def net(layers=(7, 6, 4), shape=(5,), seed=0, **options):
    torch.manual_seed(seed)
    return lnn.HopfieldNet(shape, list(layers), dtype=torch.float64, **{"steps": 30, **options})


def pooled(pool, **options):
    layers = [dict(channels=3, padding=1, pool=pool, gain=1.0), dict(channels=4, kernel_size=2, pool=pool, gain=1.0), 3]
    return net(layers, (2, 10, 9), **options)


def skipping(**options):
    layers = [
        dict(channels=4, padding=1, pool="avg"),
        dict(channels=4, kernel_size=3, padding=1),
        dict(
            channels=3,
            kernel_size=2,
            stride=2,
            padding=0,
            skip={"l1": dict(kernel_size=1, stride=2), "in": dict(kernel_size=1, stride=2, pool="max")},
        ),
        dict(units=4, gain=0.7),
    ]
    return net(layers, (2, 8, 8), **options)


NETS = {
    **{pool: lambda pool=pool: pooled(pool) for pool in POOLS},
    "dense": net,
    "dense skip": lambda: net([6, 5, dict(units=4, skip={"l1": {}, "in": {}}), 3], feedback=0.5),
    "one layer": lambda: net([4]),
    "skips": lambda: skipping(feedback={"l1-l2": 0.5, "l1-l3": 0.4, "l2-l3": 0.8}),
    "hard sigmoid": lambda: net(activation="hard_sigmoid", linear_output=False),
    "sigmoid, readout": lambda: net(activation="sigmoid", loss="cross_entropy", num_classes=3, linear_output=False),
    "conv, readout": lambda: net(
        [dict(channels=3, padding=1, pool="max"), dict(channels=2)], (1, 8, 8), loss="cross_entropy", num_classes=5
    ),
    "ceiling": lambda: net(ceiling=0.3, gain=2.0),
}


def batch(model, samples=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, *model.net.shapes[0], generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % model.num_classes


def one_hot(model, target):
    return torch.nn.functional.one_hot(target, model.num_classes).double()


def states_of(model, rows, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, *shape, generator=generator, dtype=torch.float64) for shape in model.net.shapes[1:]]


def same(got, expected, tolerance=1e-11):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), (a - b).abs().max()


# -- the energy -------------------------------------------------------------------------------------------------------


def written_out(x, s1, s2, s3, w, c):
    """Of conv (padding 1), a max over 2x2 windows, a skip of 1x1, and two dense layers: by loops."""
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1))
    total = x.new_zeros(len(x))
    for b, o, i, j in itertools.product(range(len(x)), range(2), range(2), range(2)):
        entries = [
            (w["in-l1/kernel"][o] * wide[b, :, 2 * i + y : 2 * i + y + 3, 2 * j + z : 2 * j + z + 3]).sum()
            for y in (0, 1)
            for z in (0, 1)
        ]
        total[b] -= c[0] * s1[b, o, i, j] * (max(entries) + w["in-l1/bias"][o])
    flat = s1.reshape(len(x), -1)
    total -= c[1] * (s2 * (flat @ w["l1-l2/kernel"] + w["l1-l2/bias"])).sum(1)
    total -= c[2] * (s3 * (s2 @ w["l2-out/kernel"] + flat @ w["l1-out/kernel"] + w["l2-out/bias"])).sum(1)
    return total + sum(k * s.square().flatten(1).sum(1) / 2 for k, s in zip(c, (s1, s2, s3)))


def test_the_energy_is_the_written_one():
    layers = [dict(channels=2, padding=1, pool="max"), 5, dict(units=3, skip={"l1": {}})]
    model = net(layers, (2, 4, 4), feedback={"l1-l2": 0.5, "l2-out": 0.25})
    x, _ = batch(model)
    states = states_of(model, 3)
    c = (8.0, 4.0, 1.0)  # the feedback of l1-out follows: 1/8
    expected = written_out(x, *states, model.named_weights(), c)
    torch.testing.assert_close(model.energy(x, dict(zip(model.layers, states))), expected.detach())
    leaves = [s.clone().requires_grad_() for s in states]
    slopes = torch.autograd.grad(written_out(x, *leaves, model.named_weights(), c).sum(), leaves)
    u = [s - g / k for s, g, k in zip(states, slopes, c)]
    for module in (energy, energy_torch):  # one synchronous step is phi(u)
        after, _ = module.settle(model.net, model.tensors(), x, states, None, (0.0,), 1, "synchronous")
        same(after, [u[0].clamp(0, 1), u[1].clamp(0, 1), u[2]])


@pytest.mark.parametrize("activation", ENERGY_ACTIVATIONS)
def test_states_are_where_the_energy_is_stationary(activation):
    """E's own part has the activation's inverse for its slope: at a settled state inside of the range dE/ds = 0."""
    model = net(activation=activation, steps=400, gain=0.3, linear_output=False)
    x, _ = batch(model)
    weights, tensors = model.tensors(), [s.requires_grad_() for s in model.settle(x).values()]
    slopes = torch.autograd.grad(energy.energy(model.net, weights, x, tensors).sum(), tensors)
    inside = [(s > 0) & (s < 1) for s in tensors]
    assert sum(i.sum() for i in inside) > 10
    assert all(g[i].abs().max() < 1e-12 for g, i in zip(slopes, inside) if i.any())
    assert any(g[~i].abs().max() > 1e-3 for g, i in zip(slopes, inside) if (~i).any()) or activation == "sigmoid"


def test_the_first_and_third_layer_move_first():
    model = net([6, 5, 4, 3], gain=1.0)
    x, _ = batch(model)
    before = states_of(model, 3)

    def step(states):
        return energy.settle(model.net, model.tensors(), x, states, None, (0.0,), 1, "synchronous")[0]

    first = [b if k % 2 else a for k, (a, b) in enumerate(zip(step(before), before))]
    expected = [b if k % 2 else a for k, (a, b) in enumerate(zip(first, step(first)))]
    for module in (energy, energy_torch):
        got, _ = module.settle(model.net, model.tensors(), x, before, None, (0.0,), 1, "asynchronous")
        same(got, expected)


def test_asynchronous_steps_never_raise_the_energy():
    model = net([30, 30, 30, 10], gain=3.0)
    x, _ = batch(model, 8)
    state = dict(zip(model.layers, states_of(model, 8)))
    model.steps, values = 1, []
    for _ in range(12):
        values.append(model.energy(x, state))
        state = model.settle(x, state)
    falls = torch.stack(values).diff(dim=0)
    assert falls.max() <= 1e-12 and falls[0].max() < -1


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("name", NETS)
def test_closed_forms(name, schedule):
    model = NETS[name]()
    x, target = batch(model)
    betas, goal = (-0.3, 0.2), one_hot(model, target)
    own = model.net, model.tensors(), x
    start = states_of(model, 6)
    kept = [s.clone() for s in start]
    expected, moved = energy.settle(*own, start, goal, betas, 4, schedule)
    got, residual = energy_torch.settle(*own, start, goal, betas, 4, schedule)
    same(got, expected)
    same([residual], [moved])
    assert residual.shape == (2, 3) and all(torch.equal(a, b) for a, b in zip(start, kept))
    same(sum(energy_torch.gradients(*own, expected, betas), []), sum(energy.gradients(*own, expected, betas), []))
    time = [
        sum(energy.through_time(*own, goal, [s[:3] for s in start], 3, schedule, module.settle), [])
        for module in (energy_torch, energy)
    ]
    same(*time)


def test_no_step_and_no_sample():
    model = NETS["skips"]()
    x, _ = batch(model)
    start = states_of(model, 3)
    for module in (energy, energy_torch):
        states, residual = module.settle(model.net, model.tensors(), x, start, None, (0.0,), 0, "asynchronous")
        assert all(torch.equal(a, b) for a, b in zip(states, start)) and residual.isinf().all()
    gradients = gradients_through_time(model, x, torch.arange(3), model.settle(x), 0)
    assert sorted(gradients) == sorted(model.named_weights()) and not any(g.any() for g in gradients.values())
    assert model(x[:0]).shape == (0, 4)


# -- nudges against back-propagation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "dense skip", "skips", "sigmoid, readout", "conv, readout", *POOLS])
def test_centred_nudges_give_the_gradient_of_back_propagation(name):
    model = NETS[name]()
    model.steps = 300
    x, target = batch(model)
    free, residual = model.settle_report(x)
    assert residual.max() < 1e-12
    exact = gradients_through_time(model, x, target, free, 300)

    def distance(variant):
        made = Phases(model, x, target, variant, 3e-4, 300).gradients()
        assert sorted(made) == sorted(exact)
        return max(((made[k] - exact[k]).norm() / exact[k].norm().clamp(min=1e-12)).item() for k in exact)

    assert min(g.norm().item() for g in exact.values()) > 1e-6
    assert distance("centered") < 1e-5
    if name == "sigmoid, readout":  # elsewhere the equilibrium is linear in a small nudge of a squared error
        assert distance("positive") > 10 * distance("centered") and distance("negative") > 10 * distance("centered")


@pytest.mark.parametrize("variant", energy.VARIANTS)
def test_every_variant_reaches_the_optimizer(variant):
    model = net()
    x, target = batch(model)
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 1.0), variant=variant, beta=1e-5, nudge_steps=100)
    exact = gradients_through_time(model, x, target, model.settle(x), 100)
    before = {k: w.detach().clone() for k, w in model.named_weights().items()}
    loss = trainer.step(x, target)
    out = model.readout({"out": trainer.output})
    torch.testing.assert_close(loss[0], (out - one_hot(model, target)).square().sum() / 2 / len(x))
    for key, w in model.named_weights().items():
        torch.testing.assert_close(before[key] - w.detach(), exact[key], rtol=1e-3, atol=1e-6)
    state, e, report = trainer.error(x, target)
    assert not report and list(e) == list(state) == ["l1", "l2", "out"]
    betas = {"positive": (0, 0.2), "negative": (-0.2, 0), "centered": (-0.2, 0.2)}[variant]
    assert Phases(model, x, target, variant, 0.2, 1).betas == betas


def test_back_propagation_through_time_is_a_method():
    model, x, target = net(), *batch(net())
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 1.0), method="recurrent_backprop", nudge_steps=9)
    gradients = trainer.gradients(x, target)[1]
    exact = gradients_through_time(model, x, target, model.settle(x), 9)
    assert all(torch.equal(gradients[k], exact[k]) for k in exact)


def test_the_definition_is_an_implementation():
    x, target = batch(net())
    losses = []
    for impl in ("reference", "auto"):
        model = net(impl=impl)
        trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 0.5))
        for _ in range(3):
            loss = trainer.step(x, target)
        losses.append(loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("unsettled", ["skip", "leave_out", "raise"])
def test_unsettled_nudges_are_reported(unsettled):
    model = net([20, 20, 3], gain=0.5, schedule="synchronous")
    x, target = batch(model, 6)
    x[1:] = 0
    with torch.no_grad():
        model.weights["in-l1/kernel"].abs_().mul_(400)  # one sample saturates; the others are shaken
        model.weights["in-l1/bias"].fill_(0.3)
        model.weights["l1-l2/kernel"].abs_().neg_().mul_(6)
        model.weights["l1-l2/bias"].fill_(0.9)
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 0.1), unsettled=unsettled, limit=1e-2)
    before = {k: w.detach().clone() for k, w in model.named_weights().items()}
    if unsettled == "raise":
        with pytest.raises(UnsettledError, match="nudges did not settle: beta=-0.5"):
            trainer.step(x, target)
    else:
        with pytest.warns(UserWarning, match="beta=-0.5: 5 samples"):
            trainer.step(x, target)
    assert [part.samples for part in trainer.report] == [[1, 2, 3, 4, 5]] * 2
    kept = all(torch.equal(w.detach(), before[k]) for k, w in model.named_weights().items())
    assert kept == (unsettled != "leave_out")
    if unsettled == "leave_out":
        alone = trainer.gradients(x[:1], target[:1])[1]
        for key, gradient in trainer.gradients(x, target)[1].items():
            torch.testing.assert_close(gradient * 6, alone[key])


# -- the module -------------------------------------------------------------------------------------------------------


def test_shapes_and_the_usual_nets():
    with torch.device("meta"):
        conv = lnn.HopfieldNet((3, 32, 32), lnn.HopfieldNet.conv32(10))
        deep = lnn.HopfieldNet((3, 32, 32), lnn.HopfieldNet.resnet13(10), ceiling=6.0)
    assert conv.net.shapes[1:] == ((128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2), (10,))
    assert len(deep.net.edges) == 13 and deep.net.shapes[-2:] == ((512, 2, 2), (10,))
    assert [k for k in deep.weights if "l2-l4" in k] == ["l2-l4/kernel"]
    torch.manual_seed(0)
    wide = lnn.HopfieldNet((400,), [300, dict(units=300, gain=2.0), 10])
    for key, reach in (("in-l1", 0.5 / 20), ("l1-l2", 2 / 300**0.5)):
        kernel = wide.weights[f"{key}/kernel"]
        assert abs(kernel.abs().max() / reach - 1) < 0.01 and abs(kernel.std() / (reach / 3**0.5) - 1) < 0.02
    half = lnn.HopfieldNet((4,), [3], dtype=torch.bfloat16)
    assert half(torch.rand(2, 4).bfloat16()).dtype == torch.float32


def test_what_comes_down_is_scaled():
    plain, scaled = net([6, 3]), net([6, 3], feedback=0.25)
    x, _ = batch(plain)
    state = dict(zip(plain.layers, states_of(plain, 3)))
    alone = dict(state, out=torch.zeros_like(state["out"]))
    drives = []
    for model in (plain, scaled):
        model.schedule, model.steps = "synchronous", 1
        with torch.no_grad():
            model.weights["in-l1/bias"].fill_(0.5)
        drives.append(model.settle(x, state)["l1"] - model.settle(x, alone)["l1"])
    torch.testing.assert_close(drives[0] * 0.25, drives[1])
    assert drives[0].abs().max() > 0.01


@pytest.mark.parametrize(
    "layers, message",
    [
        ([dict(units=3, kernel=2)], "layers must have dicts with gain and units or channels, got .*kernel"),
        ([dict(kernel_size=2)], "layers must have units or channels in each dict, got .*kernel_size"),
        ([dict(channels=2, pool="mean"), 3], r"layers\[0\]\['pool'\] must be one of .*, got 'mean'"),
        ([dict(channels=2, padding=3), 3], r"layers\[0\]\['padding'\] must be an integer in \[0, 3\), got 3"),
        ([4, 0], r"layers\[1\] must be at least 1, got 0"),
        ([dict(units=0)], r"layers\[0\]\['units'\] must be at least 1, got 0"),
        ([4, dict(units=3, gain=-1.0)], r"layers\[1\]\['gain'\] must be greater than 0, got -1"),
        (
            [dict(units=3, channels=3)],
            r"layers must have units or channels in each dict, got both in list, at layers\[0\]",
        ),
        (
            [dict(channels=2), dict(channels=2, skip={"in": dict(stride=0)}), 3],
            r"layers\[1\]\['skip'\]\['in'\]\['stride'\] must be at least 1, got 0",
        ),
        ([dict(channels=2, kernel_size=9), 3], r"layers must leave a pixel, got \(2, 0, 0\) for l1"),
        ([4, dict(channels=2), 3], r"layers must have convolutions of images alone, got one of \(4,\)"),
        ([dict(channels=2)], "layers must end with a dense one where loss='mse', got one of"),
        ([4, dict(units=3, skip={"l1": {}})], "layers must have skips from in, got 'l1'"),
        ([dict(channels=2), dict(channels=2, skip={"in": {}}), 3], "layers must have skips of the layer's shape"),
    ],
)
def test_layers_that_make_no_net(layers, message):
    with pytest.raises(ValueError, match=message):
        lnn.HopfieldNet((1, 8, 8), layers)


def test_feedback_without_an_energy():
    layers = [6, 5, dict(units=3, skip={"l1": {}})]
    with pytest.raises(ValueError, match="feedback must be 0.25 for l1-out, as of the edges it passes, got 0.5"):
        net(layers, feedback={"l1-l2": 0.5, "l2-out": 0.5, "l1-out": 0.5})
    with pytest.raises(ValueError, match="feedback must name edges between layers .*, got a dict with 'in-l1'"):
        net(layers, feedback={"in-l1": 0.5})


def test_what_the_trainer_refuses():
    model = net()
    with pytest.raises(ValueError, match="homeostasis must be 0 for a HopfieldNet, .* got 1"):
        EquilibriumTrainer(model, torch.optim.Adam, homeostasis=1.0)
    with pytest.raises(ValueError, match="method must be 'holomorphic' or 'recurrent_backprop' .* got 'continuous'"):
        EquilibriumTrainer(model, torch.optim.Adam, method="continuous")
    x, _ = batch(model)
    with pytest.raises(ValueError, match=r"x must be \(B, 5\), got shape"):
        model(x[:, :4])
    with pytest.raises(ValueError, match="state must have the layers l1, l2, out, got"):
        model.settle(x, {"l1": x})
    for other in (model, lnn.EquilibriumMLP(5, (4,), 3)):
        with pytest.raises(ValueError, match=r"state must have the key 'out', got a dict with \['l1'\]"):
            other.readout({"l1": x})


# -- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_backend_without_kernels_is_refused(impl):
    with pytest.raises(ValueError, match=f"impl must be .*, got '{impl}'"):
        lnn.HopfieldNet((6,), [5, 4], impl=impl)
