"""Registered ops of nets with an energy: the phases of a batch, and the gradients between them."""

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import define
from .energy import EnergyNet, Weights
from .options import ENERGY_ACTIVATIONS, LOSSES, POOLS, SCHEDULES, EnergyForm, EnergyPhases

_define = partial(
    define,
    backends_of="equilibrium_energy",
    package=__package__,
    backends=("reference", "torch", "cpu"),
    where=lambda states, x, *_: (x.device, x.dtype),
)


def _with_autograd() -> AbstractContextManager:
    """The definition differentiates, also where a compiled graph runs it, which takes autograd off the way of its
    ops."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        keys = keys.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys)


def _check_net(states, x, weights, form, samples):
    """Sizes, of states of so many rows a sample."""
    checks.choice("activation", form.activation, ENERGY_ACTIVATIONS)
    checks.choice("loss", form.loss, LOSSES)
    if not form.ceiling > 0 or not all(c > 0 for c in form.scales):
        raise ValueError(f"ceiling and scales must be greater than 0, got {form.ceiling} and {form.scales}")
    if not states or len(form.scales) != len(states):
        raise ValueError(f"scales must be one number for each layer, got {len(form.scales)} for {len(states)}")
    shapes = [tuple(v.shape[1:]) for v in (x, *states)]
    for name, tensors in (("x", [x]), ("states", states)):
        for tensor in tensors:
            checks.dims(name, tensor, (2, 4), "(rows, n) or (rows, C, H, W)")
            if 0 in tensor.shape[1:]:
                raise ValueError(f"{name} must have no empty layer, got shape {checks.shape_of(tensor)}")
    for state in states:
        checks.shape("states", state, (samples * len(x), *state.shape[1:]), "rows of x's samples in every layer")
    edges = [form.edges[i : i + 5] for i in range(0, len(form.edges), 5)]
    if len(form.edges) != 5 * len(weights.kernels):
        raise ValueError(f"edges must be five numbers for each of {len(weights.kernels)} kernels, got {form.edges}")
    for edge, kernel in zip(edges, weights.kernels):
        _check_edge(*edge, kernel, shapes)
    if len(weights.biases) != len(states):
        raise ValueError(f"biases must hold one for each of {len(states)} layers, got {len(weights.biases)}")
    for bias, shape in zip(weights.biases, shapes[1:]):
        checks.shape("biases", bias, shape[:1], "one for each unit or channel of the layer")
    _check_dtypes(x, states=states, kernels=weights.kernels, biases=weights.biases)


def _check_edge(source, target, stride, padding, pool, kernel, shapes):
    if not 0 <= source < target < len(shapes):
        raise ValueError(f"edges must go upwards between {len(shapes)} layers, got {source} to {target}")
    before, after = shapes[source], shapes[target]
    if not stride:
        if len(after) != 1:
            raise ValueError(f"edges must be convolutions to a layer of images, got a dense one to {after}")
        if padding or pool:
            raise ValueError(f"edges must have padding 0 and pool 0 where stride is 0, got {padding} and {pool}")
        checks.shape("kernels", kernel, (torch.Size(before).numel(), *after), "units of both layers")
        return
    size = kernel.shape[2] if kernel.dim() == 4 else 0
    fits = stride > 0 and 0 <= pool < len(POOLS) and 0 <= padding < max(size, 1)
    if len(before) != 3 or len(after) != 3 or not fits:
        got = f"stride {stride}, padding {padding}, pool {pool} from {before} to {after}"
        raise ValueError(f"edges must be convolutions of images, with a padding below the kernel's size, got {got}")
    checks.shape("kernels", kernel, (after[0], before[0], size, size), "channels of both layers, and a square")
    half = 2 if pool else 1
    if any(m != ((n + 2 * padding - size) // stride + 1) // half for n, m in zip(before[1:], after[1:])):
        raise ValueError(f"edges must lead to as many pixels as a convolution of {before} leaves, got {after}")


def _check_dtypes(x, **lists):
    for name, tensors in lists.items():
        for tensor in tensors:
            if tensor is not None and tensor.dtype != x.dtype:
                expected = checks.dtype_of(x)
                raise TypeError(f"{name} must be {expected} like x, got {checks.dtype_of(tensor)}")


def _check_phases(states, x, weights, target, form, phases):
    _check_net(states, x, weights, form, 1)
    checks.choice("schedule", phases.schedule, SCHEDULES)
    if phases.free_steps < 0 or phases.nudge_steps < 0:
        raise ValueError(f"steps must be at least 0, got {phases.free_steps} and {phases.nudge_steps}")
    classes = states[-1].shape[1:].numel()
    if (weights.readout is None) != (weights.readout_bias is None):
        raise ValueError("readout and readout_bias must both be given or be None, got one of them")
    if weights.readout is not None:
        if form.loss == "mse":
            raise ValueError("readout must be None where loss='mse', got a tensor")
        checks.dims("readout", weights.readout, (2,), "(n, C)")
        checks.shape("readout", weights.readout, (classes, weights.readout.shape[1]), "the last layer's units, classes")
        classes = weights.readout.shape[1]
        checks.shape("readout_bias", weights.readout_bias, (classes,), "one a class")
    if target is not None:
        checks.shape("target", target, (len(x), classes), "a number for each output of each sample")
    elif any(phases.betas):
        raise ValueError("target must be given where a beta is not 0, got None")
    _check_dtypes(x, readout=[weights.readout], readout_bias=[weights.readout_bias], target=[target])


def _rows(states, many):
    return [s.new_empty((many * s.shape[0], *s.shape[1:])) for s in states]


def _phases_fake(states, x, weights, target, form, phases):
    many, samples = len(phases.betas), x.shape[0]
    return _rows(states, 1), x.new_empty(samples), _rows(states, many), x.new_empty((many, samples))


def _copies(tensors):
    """Results of their own, contiguous: none shares memory with an input."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in tensors]


@_define(fake=_phases_fake, check=_check_phases)
@torch.no_grad()
def equilibrium_energy_phases(
    kernels,
    states: list[Tensor],
    x: Tensor,
    weights: Weights,
    target: Tensor | None,
    form: EnergyForm,
    phases: EnergyPhases,
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """`(free states, residual (B,), nudged states, residual (P, B))`: see energy.phases."""
    net = EnergyNet.of(form, x, states)
    with _with_autograd():
        free, settled, nudged, residual = kernels.energy_phases(net, weights, x, states, target, phases)
    return _copies(free), settled.clone(), _copies(nudged), residual.clone()


def _check_gradients(states, x, weights, biases, form, betas):
    _check_net(states, x, Weights(weights, biases), form, 2)
    if len(betas) != 2 or betas[0] == betas[1]:
        raise ValueError(f"betas must be two different numbers, got {betas}")


@_define(
    fake=lambda states, x, weights, biases, form, betas: tuple(
        [w.new_empty(w.shape) for w in part] for part in (weights, biases)
    ),
    check=_check_gradients,
)
@torch.no_grad()
def equilibrium_energy_gradients(
    kernels,
    states: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    form: EnergyForm,
    betas: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """`(kernels, biases)`: the gradients that the rows of two phases give; see energy.gradients."""
    net = EnergyNet.of(form, x, states)
    with _with_autograd():
        made = kernels.energy_gradients(net, Weights(weights, biases), x, states, tuple(betas))
    return _copies(made[0]), _copies(made[1])
