"""Nets that settle: the free phase beside the products alone, to a residual, errors, and the homeostatic loss."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.recipes.data import load

from . import common
from .common import Contestant, Problem
from .equilibrium_step import Case as DenseStepCase
from .equilibrium_step import DenseStep
from .hopfield_step import Case as StepCase
from .hopfield_step import HopfieldStep


@dataclass(frozen=True)
class Case(common.Case):
    """in_features, two hidden layers of `channels`, out_features and classes. angle: of the weights; residual: stop
    there; points: of the error, None for the free phase."""

    features: int = 784
    classes: int = 10
    steps: int = 150
    schedule: str = "synchronous"
    angle: int = 90
    residual: float | None = None
    points: int = 2

    def words(self):
        words = [*super().words(), f"{self.steps}steps", self.schedule, f"{self.angle}degrees"]
        return words + ([f"to{self.residual:g}"] if self.residual else [])

    def notes(self):
        weights = {0: "symmetric weights", 90: "independent feedback"}[self.angle]
        stop = f"to a residual of {self.residual:g}" if self.residual else f"{self.steps} steps"
        layers = (1, 2, 4, 4) if self.size else (1, 1)
        sizes = "-".join(str(n) for n in (self.features, *(n * self.channels for n in layers)))
        return [*super().words(), sizes if self.size else f"{sizes}-10", weights, self.schedule, stop]


class Net(Problem):
    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, case.features

    @property
    def footprint(self):
        return common.CACHE_BYTES

    @cached_property
    def weights(self):
        return self.first_weights(3)

    def first_weights(self, seed):
        torch.manual_seed(seed)
        sizes = self.case.features, (self.case.channels,) * 2, 10
        net = lnn.EquilibriumMLP(*sizes, num_classes=self.case.classes, angle=self.case.angle)
        return {k: w.detach().to(self.device) for k, w in net.named_weights().items()}

    @cached_property
    def input(self):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.shape, generator=generator).to(self.device)

    def double(self, tensors):
        return {k: v.double() for k, v in tensors.items()}


def _loop(w, drive, steps, states):
    """The plain loop, with the input's part computed once."""
    u1, u2, uo = states
    for _ in range(steps):
        r1, r2, ro = (torch.sigmoid(4 * u - 2) for u in (u1, u2, uo))
        u1 = torch.addmm(drive, r2, w["l2-l1/kernel"])
        u2 = torch.addmm(w["l1-l2/bias"], r1, w["l1-l2/kernel"]).addmm_(ro, w["out-l2/kernel"])
        uo = torch.addmm(w["l2-out/bias"], r2, w["l2-out/kernel"])
    return u1, u2, uo


class FreePhase(Net):
    op = "ep_settle"
    registered_op = "equilibrium_settle"
    title = "The free phase of a dense net"
    baseline = "products alone"

    def contestants(self):
        rest = [
            Contestant("loop, input hoisted", "lean", self.lean),
            Contestant("loop, torch.compile", "compiled", lambda: self.lean(self.compiled(_loop))),
            Contestant("loop as published", "eager", self.naive),
            Contestant("products alone", "floor", self.floor),
        ]
        return [*self.ours(self.library), *rest]

    def library(self, impl):
        x, w, case = self.input, self.weights, self.case
        return lambda: LF.ep_settle(w, x, steps=case.steps, schedule=case.schedule, impl=impl)

    def zeros(self):
        return [self.input.new_zeros(self.case.batch, n) for n in (self.case.channels, self.case.channels, 10)]

    def lean(self, loop=_loop):
        x, w, steps = self.input, self.weights, self.case.steps

        def run():
            drive = torch.addmm(w["in-l1/bias"], x, w["in-l1/kernel"])
            return dict(zip(("l1", "l2", "out"), loop(w, drive, steps, self.zeros())))

        return run

    def naive(self):
        """With the leak, and the input's product at every step."""
        x, w, steps = self.input, self.weights, self.case.steps

        def run():
            u1, u2, uo = self.zeros()
            for _ in range(steps):
                r1, r2, ro = (1 / (1 + torch.exp(-4 * u + 2)) for u in (u1, u2, uo))
                f1 = -u1 + x @ w["in-l1/kernel"] + w["in-l1/bias"] + r2 @ w["l2-l1/kernel"]
                f2 = -u2 + r1 @ w["l1-l2/kernel"] + w["l1-l2/bias"] + ro @ w["out-l2/kernel"]
                fo = -uo + r2 @ w["l2-out/kernel"] + w["l2-out/bias"]
                u1, u2, uo = u1 + f1, u2 + f2, uo + fo
            return {"l1": u1, "l2": u2, "out": uo}

        return run

    def floor(self):
        """The products of all steps, recurrent and (once) of the input, into memory that is there."""
        x, w, steps = self.input, self.weights, self.case.steps
        r1, r2, ro = (torch.rand_like(u) for u in self.zeros())
        o1, o2, oo = self.zeros()

        def run():
            torch.mm(x, w["in-l1/kernel"], out=o1)
            for _ in range(steps):
                torch.mm(r2, w["l2-l1/kernel"], out=o1)
                torch.mm(r1, w["l1-l2/kernel"], out=o2)
                torch.mm(ro, w["out-l2/kernel"], out=o2)
                torch.mm(r2, w["l2-out/kernel"], out=oo)
            return {}

        return run

    def truth(self):
        case = self.case
        return LF.ep_settle(self.double(self.weights), self.input.double(), steps=case.steps, schedule=case.schedule)


class ToResidual(Net):
    op = "ep_settle_report"
    registered_op = "equilibrium_settle"
    title = "The free phase to a residual |F(u)|, layers all at once or even and odd ones in turn"
    baseline = "synchronous"

    @cached_property
    def input(self):
        """Images of the embedded Fashion-MNIST, pixels in [0, 1], or their middle."""
        images = load("fashion-mnist").train[0].flatten(1)
        start = (images.shape[1] - self.case.features) // 2
        pixels = images[: self.case.batch, start : start + self.case.features]
        return pixels.float().div(255).to(self.device)

    @cached_property
    def weights(self):
        """By a seed whose synchronous net settles, from symmetric weights too: some swing on for 1500 steps."""
        return self.first_weights(2)

    def sweeps(self, schedule):
        """Steps after which no sample is further from a fixed point; of a run by a tolerance a period-two orbit is the
        end as well, which is none."""
        state, own = None, dict(schedule=schedule)
        for step in range(1, self.case.steps + 1):
            state = LF.ep_settle(self.weights, self.input, state, steps=1, **own)
            if LF.ep_residual(self.weights, self.input, state).max() <= self.case.residual:
                return step
        raise ValueError(f"{schedule} steps must reach {self.case.residual} within {self.case.steps}")

    def contestants(self):
        best = self.backends()[-1] if self.device.type == "cpu" else "auto"
        found = [Contestant(s, "ours", partial(self.library, best, s)) for s in ("synchronous", "asynchronous")]
        return found

    def library(self, impl, schedule):
        x, w = self.input, self.weights
        options = dict(steps=self.sweeps(schedule), schedule=schedule, impl=impl)
        return lambda: LF.ep_settle(w, x, **options)

    @property
    def tolerance(self):
        return 0.05  # both stop on the way to the same state

    def truth(self):
        options = dict(steps=20 * self.case.steps, tolerance=1e-8, schedule="asynchronous")
        return LF.ep_settle(self.double(self.weights), self.input.double(), **options)


class Errors(Net):
    op = "holomorphic_ep_error"
    registered_op = "equilibrium_settle"
    title = "The error from a circle of nudges, 20 steps each, all phases at once"
    baseline = "phase after phase, complex"

    def contestants(self):
        return [
            *self.ours(self.library, reference=False),
            Contestant("phase after phase, complex", "eager", partial(self.library, "reference")),
        ]

    @cached_property
    def state(self):
        return LF.ep_settle(self.weights, self.input, steps=150, schedule="asynchronous")

    def library(self, impl):
        x, w, state, target = self.input, self.weights, self.state, self.target
        own = dict(beta=0.5, points=self.case.points, steps=self.case.steps, impl=impl)
        return lambda: LF.holomorphic_ep_error(w, x, target, state, **own)

    def truth(self):
        own = dict(beta=0.5, points=self.case.points, steps=self.case.steps)
        x, state = self.input.double(), self.double(self.state)
        return LF.holomorphic_ep_error(self.double(self.weights), x, self.target, state, **own)


class Homeostasis(Net):
    op = "homeostatic_loss"
    registered_op = "equilibrium_homeostasis"
    title = "The homeostatic loss of 5 probes and its gradient"
    baseline = "torch.func"

    def contestants(self):
        exact = [
            Contestant("lgkernels exact", "ours", partial(self.library, "auto", "exact"), variant=True),
            Contestant("lgkernels symmetric", "ours", partial(self.library, "auto", "symmetric"), variant=True),
        ]
        return [*self.ours(self.library), *exact, Contestant("torch.func", "eager", self.by_torch_func)]

    @cached_property
    def activities(self):
        state = LF.ep_settle(self.weights, self.input, steps=20)
        return {k: torch.sigmoid(4 * u - 2) for k, u in state.items()}

    @cached_property
    def eps(self):
        generator = torch.Generator().manual_seed(7)
        return {k: torch.randn(5, *r.shape, generator=generator).to(r) for k, r in self.activities.items()}

    def learning(self):
        edges = ("l1-l2", "l2-l1", "l2-out", "out-l2")
        return [f"{edge}/kernel" for edge in edges]

    def result(self, loss, leaves, name="loss"):
        keys = self.learning()
        grads = torch.autograd.grad(loss, [leaves[k] for k in keys])
        return {name: loss.detach(), **(dict(zip(keys, grads)) if name == "loss" else {})}

    def library(self, impl, estimator="paper"):
        leaves = {k: w.clone().requires_grad_() for k, w in self.weights.items()}
        r, eps = self.activities, self.eps if estimator != "exact" else None
        name = "loss" if estimator == "paper" else estimator
        return lambda: self.result(
            LF.homeostatic_loss(leaves, r, estimator=estimator, eps=eps, impl=impl), leaves, name
        )

    def by_torch_func(self):
        """Two Jacobian-vector products a probe, and their gradient by autograd."""
        leaves = {k: w.clone().requires_grad_() for k, w in self.weights.items()}
        r, eps = tuple(self.activities.values()), self.eps

        def field(r1, r2, ro):
            w = leaves
            drive = self.input @ w["in-l1/kernel"] + w["in-l1/bias"]
            return (
                drive + r2 @ w["l2-l1/kernel"] - r1,
                r1 @ w["l1-l2/kernel"] + w["l1-l2/bias"] + ro @ w["out-l2/kernel"] - r2,
                r2 @ w["l2-out/kernel"] + w["l2-out/bias"] - ro,
            )

        def run():
            total = 0.0
            for probe in range(5):
                e = tuple(v[probe] for v in eps.values())
                _, v = torch.func.jvp(field, r, e)
                _, again = torch.func.jvp(field, r, v)
                total = total + sum(a.square().sum() - (b * c).sum() for a, b, c in zip(v, e, again))
            units = sum(v.shape[1] for v in r)
            return self.result(total / (5 * len(r[0]) * units), leaves)

        return run

    def truth(self):
        leaves = {k: w.double().requires_grad_() for k, w in self.weights.items()}
        r, eps = self.double(self.activities), self.double(self.eps)
        others = {
            name: LF.homeostatic_loss(leaves, r, estimator=name, eps=None if name == "exact" else eps).detach()
            for name in ("exact", "symmetric")
        }
        return {**self.result(LF.homeostatic_loss(leaves, r, eps=eps), leaves), **others}


class ConvSteps(Net):
    """channels: of the first of three layers; features: of the input's images."""

    op = "ep_settle_conv"
    registered_op = "equilibrium_settle"
    title = "Settling steps of a convolutional net"
    baseline = "convolutions alone"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, case.features, case.size, case.size

    @cached_property
    def weights(self):
        torch.manual_seed(3)
        c = self.case.channels
        net = lnn.EquilibriumConvNet(self.case.features, (c, 2 * c, 4 * c, 4 * c), num_classes=self.case.classes)
        return {k: w.detach().to(self.device) for k, w in net.named_weights().items()}

    def contestants(self):
        return [*self.ours(self.library, reference=False), Contestant("convolutions alone", "floor", self.floor)]

    def library(self, impl):
        x, w, steps = self.input, self.weights, self.case.steps
        return lambda: LF.ep_settle(w, x, steps=steps, activation="dsilu", impl=impl)

    def floor(self):
        """Those of all steps: forward and feedback kernels at once, and back through the feedback's."""
        x, w, steps, half = self.input, self.weights, self.case.steps, self.case.size // 2
        names = ["conv1", "conv2", "conv3", "out"]
        layers = []
        for i, (a, b) in enumerate(zip(names, names[1:])):
            up, down = w[f"{a}-{b}/kernel"], w[f"{b}-{a}/kernel"]
            r = x.new_zeros(len(x), down.shape[1], half >> i, half >> i)
            layers.append((r, torch.cat((up, down)), down, 0 if b == "out" else 1))

        def run():
            F.conv2d(x, w["in-conv1/kernel"], padding=1)
            for _ in range(steps):
                for r, both, down, padding in layers:
                    z = F.conv2d(r, both, padding=padding)[:, : down.shape[0]]
                    F.conv_transpose2d(z, down, padding=padding)
            return {}

        return run

    def truth(self):
        own = dict(steps=self.case.steps, activation="dsilu")
        return LF.ep_settle(self.double(self.weights), self.input.double(), **own)


def _free(**more):
    return Case(FreePhase, 50, 256, **more)


SMALL = dict(features=12, steps=4)
RESIDUAL = dict(residual=1e-3, steps=2000)
CASES = {
    "smoke": [
        Case(FreePhase, 3, 16, **SMALL),
        Case(ToResidual, 3, 16, features=12, steps=400, residual=1e-3),
        Case(Errors, 3, 16, **SMALL, rule="3points", points=3),
        Case(Homeostasis, 3, 16, **SMALL),
        StepCase(HopfieldStep, 2, 16, steps=4, nudge_steps=2),
        DenseStepCase(DenseStep, 3, 16, features=12, steps=4, nudge_steps=3),
        Case(ConvSteps, 2, 2, size=32, features=3, steps=1),
    ],
    "cpu": [
        _free(),
        Case(ToResidual, 50, 256, **RESIDUAL),
        Case(ToResidual, 50, 256, angle=0, **RESIDUAL),
        *(Case(Errors, 50, 256, steps=20, rule=f"{n}points", points=n) for n in (0, 2, 6)),
        Case(Homeostasis, 50, 256),
        Case(ConvSteps, 4, 64, size=32, features=3, steps=5),
        DenseStepCase(DenseStep, 50, 256),
        StepCase(HopfieldStep, 4, 128),
        StepCase(HopfieldStep, 4, 128, steps=20, nudge_steps=5, schedule="synchronous"),
    ],
    "gpu": [
        _free(),
        Case(FreePhase, 1024, 256),
        Case(ToResidual, 50, 256, **RESIDUAL),
        Case(Errors, 50, 256, steps=20, rule="6points", points=6),
        Case(Homeostasis, 50, 256),
        StepCase(HopfieldStep, 128, 128),
        Case(ConvSteps, 256, 128, size=32, features=3, steps=2),
    ],
}
