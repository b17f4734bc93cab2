"""Nets with an energy as ops: the C++ kernels of their pooled convolutions, torch.compile, what the door refuses."""

import pytest
import torch
import torch.nn.functional as F

import lgkernels.nn as lnn
from lgkernels.ops.equilibrium import energy, energy_entry
from lgkernels.ops.equilibrium.options import EnergyPhases
from lgkernels.ops.equilibrium.pool import pooled, scattered
from lgkernels.training import EquilibriumTrainer
from lgkernels.training.hopfield import Phases
from tests.equilibrium.doors import DOORS
from tests.equilibrium.test_energy import NETS, batch, net, same


@pytest.fixture
def kernels():
    found = pytest.importorskip("lgkernels.ops.equilibrium.pooled_cpu")
    if found._C is None:
        pytest.skip("built without the native module")
    return found


def images(*shape, seed=3):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", ["max", "softmax", "avg"])
@pytest.mark.parametrize(
    "samples, size, channels, padding",
    [(1, (16, 16), (16, 32), 1), (3, (9, 7), (48, 16), 0), (13, (4, 4), (32, 80), 1), (2, (2, 5), (16, 16), 2)],
)
def test_pooled_convolutions(kernels, samples, size, channels, padding, pool):
    """Against float64, within what torch's own float32 convolution misses and a few roundings."""
    low, high = channels
    kernel = images(high, low, 3, 3, seed=4) / (9 * low) ** 0.5
    s = images(samples, low, *size).abs()
    made = kernels.panels(kernel, padding, pool)
    value, kept = kernels.up(made, s)
    exact = F.conv2d(s.double(), kernel.double(), padding=padding)
    cotangent = images(*value.shape, seed=5)
    if pool == "max":
        expected, index = F.max_pool2d(exact, 2, return_indices=True)
        width = exact.shape[3]
        agree = kept == (index // width % 2) * 2 + index % width % 2
        assert agree.double().mean() > 0.999
        spread = F.max_unpool2d(cotangent.double(), index, 2, output_size=exact.shape[2:])
    elif pool == "avg":
        expected, agree = F.avg_pool2d(exact, 2), torch.tensor(kept is None)
        spread = scattered(cotangent.double().unsqueeze(-1).expand(*cotangent.shape, 4) / 4, exact)
    else:
        expected, _, slopes = pooled(exact)
        agree = (kept.permute(0, 4, 1, 2, 3) - slopes).abs() < 1e-5
        assert agree.all()
        spread = scattered(slopes * cotangent.double().unsqueeze(-1), exact)
    assert value.shape == expected.shape and (value - expected).abs().max() < 6e-6
    back = kernels.down(made, kept, s, cotangent)
    down = F.conv_transpose2d(spread, kernel.double(), padding=padding)
    assert back.shape == s.shape and (not agree.all() or (back - down).abs().max() < 3e-5)
    assert agree.all() or samples == 13
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = kernels.up(made, s), kernels.down(made, kept, s, cotangent)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again[0][0], value) and torch.equal(again[1], back)
    assert kept is None or torch.equal(again[0][1], kept)


@pytest.mark.parametrize("pool", ["max", "softmax", "avg"])
def test_a_pool_keeps_nan(kernels, pool):
    s = torch.zeros(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    s[0, 3, 4, 4] = torch.nan
    value, _ = kernels.up(kernels.panels(torch.ones(16, 16, 3, 3), 1, pool), s)
    assert (
        value[0, :, 1:3, 1:3].isnan().all() and value[0, :, 0].isfinite().all() and value[0, :, 3, 0].isfinite().all()
    )


def test_large_entries_of_a_softmax_pool(kernels):
    """Exponentials that would overflow, and windows whose entries lie far apart."""
    kernel, s = images(16, 16, 3, 3, seed=4) * 300, images(2, 16, 6, 6)
    value, kept = kernels.up(kernels.panels(kernel, 1, "softmax"), s)
    expected, _, slopes = pooled(F.conv2d(s.double(), kernel.double(), padding=1))
    scale = expected.abs().max()
    assert (value - expected).abs().max() < 1e-5 * scale
    assert value.isfinite().all() and kept.isfinite().all()
    assert ((kept.permute(0, 4, 1, 2, 3) - slopes).abs() < 0.05).double().mean() > 0.97


@pytest.mark.parametrize("pool", ["max", "softmax", "avg"])
@pytest.mark.parametrize("schedule", ["synchronous", "asynchronous"])
def test_a_net_by_kernels(schedule, pool):
    """Float32 states of a net whose middle edges the kernels take, against float64 ones."""
    torch.manual_seed(0)
    layers = lnn.HopfieldNet.conv32(10, (16, 32, 16, 16), pool)
    model = lnn.HopfieldNet((3, 32, 32), layers, steps=12, schedule=schedule, gain=0.6)
    x, target = torch.randn(3, 3, 32, 32), torch.arange(3)
    phases = Phases(model, x, target, "centered", 0.25, 6)
    gradients, model.impl = phases.gradients(), "torch"
    plain, model.impl = Phases(model, x, target, "centered", 0.25, 6).gradients(), "auto"
    exact = Phases(model.double(), x.double(), target, "centered", 0.25, 6)
    for got, expected in zip(phases.states, exact.states):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for key, expected in exact.gradients().items():
        missed = [(g[key].double() - expected).norm() / expected.norm() for g in (gradients, plain)]
        assert missed[0] < 2 * missed[1] + 1e-4, (key, missed)  # the difference of states that are near each other


# -- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_a_compiled_net_is_one_op(impl):
    layers = [dict(channels=16, padding=1, pool="max"), dict(channels=16, padding=1, pool="softmax"), 4]
    model = lnn.HopfieldNet((3, 16, 16), layers, steps=3, impl=impl).requires_grad_(False)
    x = torch.rand(2, 3, 16, 16)
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), model(x))
    assert [c for c in calls if "lgkernels" in c] == ["lgkernels.equilibrium_energy_phases"]
    torch._dynamo.reset()
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("op", [op for op in DOORS if "energy" in op])
def test_the_ops_are_as_torch_wants_them(op):
    torch.library.opcheck(getattr(torch.ops.lgkernels, op).default, (*DOORS[op], "auto"))


@pytest.mark.parametrize("name", ["max", "skips", "sigmoid, readout"])
def test_the_definition_is_a_backend(name):
    model, (x, target) = NETS[name](), batch(NETS[name]())
    made = {}
    for impl in ("auto", "reference"):
        model.impl = impl
        phases = Phases(model, x, target, "centered", 0.3, 5)
        made[impl] = phases.states, list(phases.gradients().values())
    for got, expected in zip(made["auto"], made["reference"]):
        same(got, expected)


def test_phases_are_those_of_the_definition():
    model = net()
    x, _ = batch(model)
    own, start = (model.net, model.tensors(), x), [torch.rand(3, *s).double() for s in model.net.shapes[1:]]
    goal = torch.eye(4).double()[:3]
    free, settled, nudged, residual = energy_entry.phases(
        *own, start, goal, EnergyPhases("synchronous", 5, 4, [0.3, 0.0, -0.2]), "auto"
    )
    expected, moved = energy.settle(*own, start, None, (0.0,), 5, "synchronous")
    same([*free, settled], [*expected, moved[0]])
    rows = [s.repeat(3, 1) for s in expected]
    expected, moved = energy.settle(*own, rows, goal, (0.3, 0.0, -0.2), 4, "synchronous")
    same([*nudged, residual], [*expected, moved])


def test_no_step_gives_copies():
    model = lnn.HopfieldNet((5,), [7, 6, 4], steps=0, impl="torch")
    state = {layer: torch.rand(3, *s) for layer, s in zip(model.layers, model.net.shapes[1:])}
    after = model.settle(torch.rand(3, 5), state)
    assert all(torch.equal(after[k], state[k]) and after[k].data_ptr() != state[k].data_ptr() for k in state)


def test_a_trainer_takes_halves_and_autocast():
    torch.manual_seed(0)
    model = lnn.HopfieldNet((6,), [5, 4], steps=5, dtype=torch.bfloat16)
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 0.1), nudge_steps=3)
    x, target = torch.rand(3, 6), torch.arange(3)
    plain = trainer.gradients(x, target)[1]
    with torch.autocast("cpu", torch.bfloat16):
        under = trainer.gradients(x, target)[1]
    assert all(g.dtype == torch.bfloat16 and torch.equal(g, under[k]) for k, g in plain.items())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation="relu"), "activation must be one of"),
        (dict(loss="hinge"), "loss must be one of"),
        (dict(schedule="random"), "schedule must be one of"),
        (dict(free_steps=-1), "steps must be at least 0, got -1"),
        (dict(ceiling=0.0), "ceiling and scales must be greater than 0"),
        (dict(scales=[1.0]), "scales must be one number for each layer, got 1 for 2"),
        (dict(target=None), "target must be given where a beta is not 0"),
        (dict(loss="mse"), "readout must be None where loss='mse'"),
        (dict(readout_bias=None), "readout and readout_bias must both be given"),
        (dict(edges=[0, 1, 1, 1, 3]), "edges must be five numbers for each of 3 kernels"),
        (dict(edges=[1, 1, 1, 1, 3, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "edges must go upwards"),
        (dict(edges=[0, 1, 1, 1, 9, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "edges must be convolutions of images"),
        (dict(edges=[0, 1, 1, 3, 3, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "with a padding below the kernel's size"),
        (dict(edges=[0, 1, -1, 1, 3, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "edges must be convolutions of images"),
        (dict(edges=[0, 1, 2, 1, 3, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "edges must lead to as many pixels"),
        (dict(edges=[0, 1, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0, 0, 0]), "got a dense one"),
        (
            dict(edges=[0, 1, 1, 1, 3, 1, 2, 0, 0, 9, 0, 2, 0, 0, 0]),
            "padding 0 and pool 0 where stride is 0, got 0 and 9",
        ),
        (dict(x=torch.zeros(2, 2, 5, 5).double()), "states must be float64 like x, got float32"),
    ],
)
def test_what_the_door_refuses(change, message):
    op = torch.ops.lgkernels.equilibrium_energy_phases
    names = [a.name for a in op.default._schema.arguments]
    arguments = dict(zip(names, (*DOORS["equilibrium_energy_phases"], "auto")))
    op(**arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        op(**{**arguments, **change})
