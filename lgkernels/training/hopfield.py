"""What a training step of an energy net is made of: a free phase, two nudged phases, and the gradients between."""

import copy

import torch
from torch import Tensor

from ..core.ops import class_indices
from ..nn.hopfield import HopfieldNet
from ..ops.equilibrium import energy_entry as _entry
from ..ops.equilibrium.energy import nudges
from ..ops.equilibrium.options import EnergyPhases


class Phases:
    """Of one batch. states: of each layer the rows of both phases; residual: (2, B), of their last steps."""

    @torch.no_grad()
    def __init__(self, model: HopfieldNet, x: Tensor, target: Tensor, variant: str, beta: float, steps: int) -> None:
        self.model, self.x = model, model.input_of(x)
        self.target = one_hot(model, target, self.x)
        self.betas = nudges(variant, beta)
        start = [self.x.new_zeros(len(x), *shape) for shape in model.net.shapes[1:]]
        own = model.net, model.tensors(), self.x, start, self.target
        phases = EnergyPhases(model.schedule, model.steps, steps, list(self.betas))
        free, residual, self.states, self.residual = _entry.phases(*own, phases, model.impl)
        self.free, self.free_residual = dict(zip(model.layers, free)), residual

    def error(self) -> dict[str, Tensor]:
        """Layer -> how its states answer to the nudge, ds / d beta."""
        parts = ((s[: len(self.x)], s[len(self.x) :]) for s in self.states)
        width = self.betas[1] - self.betas[0]
        return {layer: (second - first) / width for layer, (first, second) in zip(self.model.layers, parts)}

    def of(self, samples: list[int]) -> "Phases":
        """Those of a part of the batch."""
        part, rows = copy.copy(self), [*samples, *(sample + len(self.x) for sample in samples)]
        part.x, part.target, part.states = self.x[samples], self.target[samples], [s[rows] for s in self.states]
        part.free = {layer: s[samples] for layer, s in self.free.items()}
        part.free_residual, part.residual = self.free_residual[samples], self.residual[:, samples]
        return part

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Of the mean loss, by key of the weights; the readout's at the free state."""
        model, weights = self.model, self.model.tensors()
        kernels, biases = _entry.gradients(model.net, weights, self.x, self.states, self.betas, model.impl)
        out = self.free[model.layers[-1]]
        return model.by_key(kernels, biases, _entry.readout_gradients(model.net, weights, out, self.target))


def one_hot(model: HopfieldNet, target: Tensor, x: Tensor) -> Tensor:
    """(B, C)."""
    index = class_indices("target", target, model.num_classes)
    return torch.nn.functional.one_hot(index, model.num_classes).to(x.dtype)


def gradients_through_time(
    model: HopfieldNet, x: Tensor, target: Tensor, free: dict[str, Tensor], steps: int
) -> dict[str, Tensor]:
    """What back-propagation through `steps` more steps from the free state gives, by key of the weights."""
    x = model.input_of(x)
    own = model.net, model.tensors(), x, one_hot(model, target, x), list(free.values())
    return model.by_key(*_entry.through_time(*own, steps, model.schedule, model.impl))
