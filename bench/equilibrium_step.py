"""A whole training step of the dense net of Laborieux & Zenke, beside their code: cases of equilibrium.py."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

import lgkernels.nn as lnn
from lgkernels.training import EquilibriumTrainer

from . import common
from .common import Contestant, Problem
from .rivals.holo_ep import dense_step, generalized_holo_ep

PEER = "generalized-holo-ep (JAX)"
NEEDS = "a CPU, JAX, Flax and a clone of github.com/Laborieux-Axel/generalized-holo-ep on PYTHONPATH"


@dataclass(frozen=True)
class Case(common.Case):
    """in_features, two hidden layers of `channels`, ten outputs and classes, from independent weights."""

    features: int = 784
    classes: int = 10
    steps: int = 150
    nudge_steps: int = 20
    points: int = 2

    def words(self):
        return [*super().words(), f"{self.steps}+{self.nudge_steps}steps", f"{self.points}points"]


class DenseStep(Problem):
    op = "equilibrium_step"
    title = "A training step of the dense net: free phase, a circle of nudges, gradients, SGD with momentum"
    baseline = "recurrent back-propagation"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, case.features

    @cached_property
    def input(self):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.shape, generator=generator).to(self.device)

    def net(self):
        torch.manual_seed(3)
        case = self.case
        sizes = case.features, (case.channels,) * 2, 10
        return lnn.EquilibriumMLP(*sizes, num_classes=case.classes, steps=case.steps, angle=90).to(self.device)

    def contestants(self):
        peer = Contestant(PEER, "peer", partial(self.peer, self.library), allocates_by_torch=False)
        return [
            Contestant("lgkernels", "ours", self.ours_step),
            Contestant("recurrent back-propagation", "bp", partial(self.ours_step, "recurrent_backprop")),
            *([peer] if self.library else []),
        ]

    @cached_property
    def library(self):
        return generalized_holo_ep() if self.device.type == "cpu" else None

    def absent(self):
        return {} if self.library else {PEER: NEEDS}

    def ours_step(self, method="holomorphic"):
        net, x, target = self.net(), self.input, self.target
        names, kept = {w: k for k, w in net.named_weights().items()}, {}

        def sgd(parameters):  # at rate 0: any step can be compared with the first
            optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
            optimizer.register_step_pre_hook(lambda *_: kept.update({names[p]: p.grad.clone() for p in parameters}))
            return optimizer

        options = dict(beta=0.5, points=self.case.points, nudge_steps=self.case.nudge_steps, method=method, limit=1e9)
        trainer = EquilibriumTrainer(net, sgd, **options)

        def run():
            trainer.step(x, target)
            return dict(kept) if method == "holomorphic" else {}

        return run

    def peer(self, library):
        return dense_step(library, self.net(), self.input, self.target, (0.5, self.case.points, self.case.nudge_steps))

    def truth(self):
        net, case = self.net().double(), self.case
        own = dict(beta=0.5, points=case.points, nudge_steps=case.nudge_steps, limit=1e9)
        trainer = EquilibriumTrainer(net, lambda p: torch.optim.SGD(p, lr=0.0), **own)
        return trainer.gradients(self.input.double(), self.target)[1]
