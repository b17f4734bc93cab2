"""Registered ops of the family equilibrium: shapes, checks, and the call of the chosen backend."""

from functools import partial

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import define
from . import (
    energy_op,  # noqa: F401  registers those of nets with an energy
    graphs,
)
from .field import Net
from .options import ACTIVATIONS, ESTIMATORS, HOLOMORPHIC, LOSSES, SCHEDULES, Phases, Settling, circle

_define = partial(define, package=__package__, where=lambda first, *_: (first[0].device, first[0].dtype))


def _check_rows(name, tensors, expected):
    if len(tensors) != len(expected):
        raise ValueError(f"{name} must hold {len(expected)} tensors, got {len(tensors)}")
    for tensor, shape in zip(tensors, expected):
        checks.shape(name, tensor, shape, "by the other arguments")


def _check_words(options):
    checks.choice("activation", options.activation, ACTIVATIONS)
    checks.choice("loss", options.loss, LOSSES)
    checks.choice("schedule", options.schedule, SCHEDULES)
    if options.steps < 0:
        raise ValueError(f"steps must be at least 0, got {options.steps}")


def _check_net(state, drive, net, target, rows, options):
    """state has `rows` rows a sample."""
    _check_words(options)
    if not state or not drive or len(drive) > len(state) or net.layers != len(state):
        raise ValueError(f"state must hold {net.layers} layers, and drive one to all of them, got {len(state)}")
    dims = state[0].dim()
    if dims not in (2, 4):
        raise ValueError(f"state must be (rows, n) or (rows, C, H, W), got shape {checks.shape_of(state[0])}")
    samples = drive[0].shape[0] if drive[0].dim() else 0
    shapes = [tuple(v.shape[1:]) for v in state]
    if any(len(s) + 1 != dims for s in shapes):
        raise ValueError(f"state must have {dims} dimensions in every layer, got {shapes}")
    _check_rows("state", state, [(rows * samples, *s) for s in shapes])
    _check_rows("drive", drive, [(samples, *s) for s in shapes[: len(drive)]])
    pairs = list(zip(net.edges[::2], net.edges[1::2]))
    if len(net.edges) != 2 * len(net.weights) or any(not 0 <= layer < len(state) for layer in net.edges):
        raise ValueError(f"edges must be two layers of {len(state)} for each weight, got {list(net.edges)}")
    if dims == 2:
        _check_rows("weights", net.weights, [(shapes[a][0], shapes[b][0]) for a, b in pairs])
        _check_rows("biases", net.biases, [])
    else:
        _check_conv(net, pairs, shapes)
    last = state[-1].shape[1:].numel()
    classes = last
    if net.readout is not None:
        checks.dims("readout", net.readout, (2,), "(n, C)")
        classes = net.readout.shape[1]
        checks.shape("readout", net.readout, (last, classes), "the last layer's units, and classes")
    if net.readout_bias is not None:
        checks.shape("readout_bias", net.readout_bias, (classes,), "one a class")
    if target is not None:
        wanted = last if options.loss == "mse" else classes
        checks.shape("target", target, (samples, wanted), "a number for each output of each sample")


def _check_conv(net, pairs, shapes):
    ups = [(a, b) for a, b in pairs if a < b]
    if any(abs(a - b) != 1 for a, b in pairs):
        raise ValueError(f"edges must connect neighbours, got {list(net.edges)}")
    channels = [(shapes[max(p)][0], shapes[min(p)][0], 3, 3) for p in pairs]
    _check_rows("weights", net.weights, channels)
    _check_rows("biases", net.biases, [(shapes[b][0],) for _, b in ups] if net.biases else [])
    for a, b in pairs:
        less = 2 * (max(a, b) == len(shapes) - 1)
        if shapes[max(a, b)][1:] != tuple((n - less) // 2 for n in shapes[min(a, b)][1:]):
            raise ValueError(f"state must have layers of half the size each, got {shapes}")


def _report(like, phases, samples):
    return like.new_empty((phases, samples))


def _samples(drive):
    return drive[0].shape[0]


def _check_settle(state, drive, net, target, phases, options):
    if len(phases.beta_imag) != phases.many or not 0 <= phases.real_phases <= phases.many or not phases.many:
        raise ValueError(f"beta_imag must have a number for each of beta_real, got {len(phases.beta_imag)}")
    _check_net(state, drive, net, target, phases.rows, options)
    if phases.real_phases < phases.many:
        checks.choice("activation", options.activation, HOLOMORPHIC)
    if target is None and any(beta for beta in phases.betas):
        raise ValueError("target must be given where beta is not 0, got None")


def _settle_fake(state, drive, net, target, phases, options):
    report = _report(state[0], phases.many, _samples(drive))
    return [torch.empty_like(v) for v in state], report.long(), report, report.clone()


@_define(backends_of="equilibrium_settle", fake=_settle_fake, check=_check_settle)
def equilibrium_settle(
    kernels,
    state: list[Tensor],
    drive: list[Tensor],
    net: Net,
    target: Tensor | None,
    phases: Phases,
    options: Settling,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`(states, steps (P, B), residual (P, B), orbit (P, B))`."""
    return graphs.run(kernels.settle, state, drive, net, target, (phases,), options)


def _check_error(state, drive, net, target, beta, points, options):
    _check_net(state, drive, net, target, 1, options)
    if points < 0 or beta == 0:
        raise ValueError(f"points must be at least 0, and beta not 0, got {points} and {beta}")
    if points > 2:
        checks.choice("activation", options.activation, HOLOMORPHIC)


def _error_fake(state, drive, net, target, beta, points, options):
    phases = circle(beta, points).many if points else 1
    return [torch.empty_like(v) for v in state], _report(state[0], phases, _samples(drive))


@_define(backends_of="equilibrium_settle", fake=_error_fake, check=_check_error)
def equilibrium_error(
    kernels,
    state: list[Tensor],
    drive: list[Tensor],
    net: Net,
    target: Tensor,
    beta: float,
    points: int,
    options: Settling,
) -> tuple[list[Tensor], Tensor]:
    """`(e, residual (P, B))` of the phases that ran."""
    return graphs.run(kernels.error, state, drive, net, target, (beta, points), options)


def _check_homeostasis(weights, eps, edges, sizes, estimator):
    checks.choice("estimator", estimator, ESTIMATORS)
    if not weights or len(edges) != 2 * len(weights) or any(not 0 <= layer < len(sizes) for layer in edges):
        raise ValueError(f"edges must be two layers of {len(sizes)} for each weight, got {list(edges)}")
    _check_rows("weights", weights, [(sizes[a], sizes[b]) for a, b in zip(edges[::2], edges[1::2])])
    if estimator != "exact" or eps:
        many = eps[0].shape[0] if eps and eps[0].dim() else 0
        _check_rows("eps", eps, [(many, n) for n in sizes])


@_define(
    backends_of="equilibrium_homeostasis",
    fake=lambda weights, *_: (weights[0].new_empty(()), [torch.empty_like(w) for w in weights]),
    check=_check_homeostasis,
)
def equilibrium_homeostasis(
    kernels, weights: list[Tensor], eps: list[Tensor], edges: list[int], sizes: list[int], estimator: str
) -> tuple[Tensor, list[Tensor]]:
    """`(loss, gradients of the weights)`."""
    return kernels.homeostasis(weights, eps, edges, sizes, estimator)
