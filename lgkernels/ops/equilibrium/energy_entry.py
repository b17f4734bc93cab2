"""Entries of nets with an energy: the ops, and what plain torch computes of such a net, without a graph."""

import torch
from torch import Tensor

from ...core import dispatch
from ...core.ops import without_autocast
from . import energy as definition
from . import energy_torch as lean
from . import op  # noqa: F401  registers the ops
from .energy import EnergyNet, Weights
from .options import EnergyPhases

_ops = torch.ops.lgkernels


def phases(
    net: EnergyNet,
    weights: Weights,
    x: Tensor,
    states: list[Tensor],
    target: Tensor | None,
    options: EnergyPhases,
    impl: str,
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """As energy.phases."""
    return _ops.equilibrium_energy_phases(states, x, *weights, target, *net.form(), *options, impl)


def gradients(
    net: EnergyNet, weights: Weights, x: Tensor, states: list[Tensor], betas: tuple[float, float], impl: str
) -> tuple[list[Tensor], list[Tensor]]:
    """As energy.gradients."""
    return _ops.equilibrium_energy_gradients(states, x, *weights[:2], *net.form(), list(betas), impl)


@torch.no_grad()
def energy(net: EnergyNet, weights: Weights, x: Tensor, states: list[Tensor]) -> Tensor:
    """As energy.energy."""
    with without_autocast(x.device):
        return definition.energy(net, weights, x, states)


def through_time(
    net: EnergyNet,
    weights: Weights,
    x: Tensor,
    target: Tensor,
    states: list[Tensor],
    steps: int,
    schedule: str,
    impl: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As energy.through_time. Back through kernels of ours there is no way: their part is plain torch's."""
    chosen = dispatch.choose("equilibrium_energy", impl, x.device, x.dtype)
    own = chosen == "reference" and not dispatch.is_auto(impl)
    with without_autocast(x.device):
        settle = definition.settle if own else lean.settle
        return definition.through_time(net, weights, x, target, states, steps, schedule, settle)


@torch.no_grad()
def readout_gradients(net: EnergyNet, weights: Weights, out: Tensor, target: Tensor) -> list[Tensor]:
    """As energy.readout_gradients."""
    with without_autocast(out.device):
        return definition.readout_gradients(net, weights, out, target)
