"""A whole training step of the 32x32 net with a Hopfield energy, beside its authors' code: cases of equilibrium.py."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

import lgkernels.nn as lnn
from lgkernels.training import EquilibriumTrainer

from . import common
from .common import Contestant, Problem
from .rivals.energy import conv32_step, energy_based_learning

PEER = "energy-based-learning"
NEEDS = "a CPU and a clone of github.com/rain-neuromorphics/energy-based-learning on PYTHONPATH"


def results(gradients):
    """All gradients in one, and those of the layer in the middle: below it the nudges are as small as float32's
    roundings of the states."""
    keys = sorted(gradients)
    return {"gradient": torch.cat([gradients[k].flatten() for k in keys]), "l2-l3": gradients["l2-l3/kernel"]}


@dataclass(frozen=True)
class Case(common.Case):
    """channels: of the first layer; the others have 2, 4 and 4 times as many. steps of the free phase, of a nudge."""

    steps: int = 60
    nudge_steps: int = 15
    schedule: str = "asynchronous"
    classes: int = 10

    def words(self):
        return [*super().words(), f"{self.steps}+2x{self.nudge_steps}steps", self.schedule]


class HopfieldStep(Problem):
    op = "hopfield_step"
    title = "A training step of the 32x32 energy net: free phase, centred nudges, gradients, SGD"
    baseline = "through time"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, 3, 32, 32
        self.channels = [case.channels * k for k in (1, 2, 4, 4)]

    def contestants(self):
        peer = Contestant(PEER, "peer", partial(self.peer, self.library))
        return [
            Contestant("lgkernels", "ours", self.ours_step),
            Contestant("through time", "bp", partial(self.ours_step, "recurrent_backprop")),
            *([peer] if self.library else []),
        ]

    @cached_property
    def library(self):
        return energy_based_learning() if self.device.type == "cpu" else None

    def absent(self):
        return {} if self.library else {PEER: NEEDS}

    def net(self):
        torch.manual_seed(4)
        layers = lnn.HopfieldNet.conv32(10, self.channels)
        for layer, gain in zip(layers, (0.4, 0.7, 0.6, 0.3)):
            layer["gain"] = gain
        return lnn.HopfieldNet((3, 32, 32), layers, steps=self.case.steps, schedule=self.case.schedule)

    def ours_step(self, method="holomorphic"):
        net, x, target = self.net().to(self.device), self.input, self.target
        names, kept = {w: k for k, w in net.named_weights().items()}, {}

        def sgd(parameters):  # at rate 0: any step can be compared with the first
            optimizer = torch.optim.SGD(parameters, lr=0.0)
            optimizer.register_step_pre_hook(lambda *_: kept.update({names[p]: p.grad for p in parameters}))
            return optimizer

        options = dict(beta=0.25, nudge_steps=self.case.nudge_steps, method=method, limit=1e9)
        trainer = EquilibriumTrainer(net, sgd, **options)

        def run():
            trainer.step(x, target)
            return results(kept) if method == "holomorphic" else {}

        return run

    def peer(self, library):
        case = self.case
        rest = case.steps, case.nudge_steps, 0.25
        run = conv32_step(library, self.net(), self.channels, self.input, self.target, *rest)
        return lambda: results(run())

    @cached_property
    def input(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(self.device)

    @property
    def tolerance(self):
        """Where float32 clips a state, or pools another entry of a window, than float64 does, a slope is another."""
        return 2e-2

    def truth(self):
        net = self.net().double().to(self.device)
        own = dict(beta=0.25, nudge_steps=self.case.nudge_steps)
        trainer = EquilibriumTrainer(net, lambda p: torch.optim.SGD(p, lr=0.0), **own, limit=1e9)
        return results(trainer.gradients(self.input.double(), self.target)[1])
