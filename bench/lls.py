"""LLS: the loss, the fused block, its two passes over memory, a whole training step, and the cost of a call."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.training import BlockwiseTrainer

from . import common
from .common import Contestant
from .rivals import lls as rivals
from .rivals.lls import SLOPE, TEMPERATURE
from .training_step import TrainingStep, small


@dataclass(frozen=True)
class Case(common.Case):
    pool: int = 1
    classes: int = 10
    modulation: str | None = None
    max_pool: bool = False

    def words(self):
        more = [self.modulation] * bool(self.modulation) + ["maxpool"] * self.max_pool
        return [f"pool{self.pool}", f"{self.classes}classes", *more]

    def notes(self):
        sizes = [] if issubclass(self.problem, VGG8Step) else [f"P={self.pool}", f"{self.classes} classes"]
        return sizes + [self.modulation] * bool(self.modulation) + ["max-pool"] * self.max_pool


class Problem(common.Problem):
    """With a head: `dim` latents."""

    @cached_property
    def phi(self):
        return LF.lls_basis(self.case.classes, self.dim, device=self.device)

    def eager_contestants(self):
        found = [Contestant("eager, basis cached", "eager", lambda: self.eager(lambda: self.phi))]
        if self.device.type == "cpu":  # other devices' linspace and sine give other signs, so other gradients
            sizes = self.case.classes, self.dim, self.device
            basis = lambda: rivals.official_basis(*sizes)  # noqa: E731
            found.append(Contestant("eager, official", "eager", lambda: self.eager(basis)))
        return found


class Loss(Problem):
    op = registered_op = "lls_loss"
    title = "`lls_loss`, forward and backward"
    baseline = "floor"
    differentiable = True

    def __init__(self, case, device):
        super().__init__(case, device)
        self.dim = case.channels * case.pool**2 if case.size else case.pool
        self.bytes = 2 * self.input_bytes if case.size else 0
        self.flops = 0 if case.size else 4 * case.batch * self.dim * case.classes

    @cached_property
    def modulation(self):
        if self.case.modulation != "matrix":
            return None
        matrix = torch.randn(self.case.classes, self.case.classes, generator=torch.Generator().manual_seed(2))
        return (0.1 * matrix).to(self.device).requires_grad_()

    def contestants(self):
        return [
            *self.ours(self.library),
            *self.eager_contestants(),
            Contestant("lean torch", "lean", lambda: self.lean(rivals.lean_loss)),
            Contestant("lean torch.compile", "compiled", lambda: self.lean(self.compiled(rivals.lean_loss))),
            Contestant("floor", "floor", self.floor),
        ]

    @staticmethod
    def gradients(loss, activation, modulation):
        inputs = [activation] if modulation is None else [activation, modulation]
        return dict(zip(("loss", "grad", "grad_modulation"), (loss.detach(), *torch.autograd.grad(loss, inputs))))

    def loss(self, activation, modulation, impl):
        case = self.case
        sizes = dict(num_classes=case.classes, pool_size=case.pool, temperature=TEMPERATURE)
        loss = LF.lls_loss(activation, self.target, modulation, **sizes, impl=impl)
        return self.gradients(loss, activation, modulation)

    def library(self, impl):
        return lambda: self.loss(self.input, self.modulation, impl)

    def plain(self, function, basis):
        target, pool, modulation = self.target, self.case.pool, self.modulation

        def run():
            x = self.input
            return self.gradients(function(x, target, basis(), pool, modulation), x, modulation)

        return run

    def eager(self, basis):
        return self.plain(rivals.official_loss, basis)

    def lean(self, function):
        return self.plain(function, lambda: self.phi)

    def floor(self):
        if self.case.size:  # it has to read the activation and to write a gradient of its size
            return lambda: {"": torch.empty_like(self.input).copy_(self.input.detach())}
        g = torch.randn(self.case.batch, self.case.classes, device=self.device, dtype=self.case.torch_dtype)
        phi = self.phi.to(self.case.torch_dtype)
        return lambda: {"": (self.input.detach() @ phi.t(), g @ phi)}

    def truth(self):
        wide = self.input.detach().double().requires_grad_()
        modulation = None if self.modulation is None else self.modulation.detach().double().requires_grad_()
        return self.loss(wide, modulation, "auto")


class LossCall(Loss):
    """Tiny inputs: what is timed is the way to the kernel and back."""

    op = "lls_loss_call"
    title = "Cost of a call of `lls_loss`, forward and backward"
    baseline = "eager"

    def contestants(self):
        return [
            Contestant("lgkernels", "ours", lambda: self.library("auto")),
            Contestant("eager", "eager", lambda: self.eager(lambda: self.phi)),
        ]


class Block(Problem):
    op = registered_op = "lls_block"
    title = "Fused block: forward, local loss and all gradients"
    baseline = "floor"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.dim = case.out_channels * case.pool**2
        self.flops = 4 * case.batch * case.size**2 * case.channels * case.out_channels * 9

    def module(self, impl="auto"):
        case = self.case
        torch.manual_seed(3)
        sizes = dict(num_classes=case.classes, pool_size=case.pool, temperature=TEMPERATURE, max_pool=case.max_pool)
        block = lnn.LLSConvBlock(case.channels, case.out_channels, 3, padding=1, **sizes, impl=impl)
        with torch.no_grad():
            block.norm.weight.uniform_(0.5, 1.5)
            block.norm.bias.uniform_(-0.5, 0.5)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        return block.to(self.device, memory_format=layout)

    def contestants(self):
        ours = self.ours(self.library)
        found = [
            *ours,
            *self.eager_contestants(),
            Contestant("lean torch", "lean", lambda: self.lean(rivals.lean_block)),
            Contestant("lean torch.compile", "compiled", lambda: self.lean(self.compiled(rivals.lean_block))),
            Contestant("bp layer", "bp", self.backpropagation),
            Contestant("floor", "floor", lambda: self.floor(self.input)),
        ]
        if not self.case.channels_last:
            last = lambda: self.input.contiguous(memory_format=torch.channels_last)  # noqa: E731
            library, floor = lambda: self.library("cpu", last()), lambda: self.floor(last())
            if "cpu" in [c.backend for c in ours]:
                found.append(Contestant("lgkernels cpu, channels_last", "ours", library, variant=True))
            found.append(Contestant("floor, channels_last", "floor", floor, variant=True))
        return found

    @staticmethod
    def gradients(block, loss, out):
        weights = (block.layer.weight, block.norm.weight, block.norm.bias)
        results = {"out": out.detach(), "loss": loss.detach()}
        return {**results, **{name: w.grad for name, w in zip(("grad_weight", "grad_gamma", "grad_beta"), weights)}}

    def library(self, impl, x=None):
        block, x = self.module(impl), self.input if x is None else x

        def run():
            block.zero_grad(set_to_none=True)
            with self.autocast():
                out, loss = block(x, self.target)
            loss.backward()
            return self.gradients(block, loss, out)

        return run

    def eager(self, basis):
        block = self.module()

        def run():
            block.zero_grad(set_to_none=True)
            with self.autocast():
                a = rivals.plain_block(block, self.input)
            loss = rivals.official_loss(a, self.target, basis(), self.case.pool)
            loss.backward()
            return self.gradients(block, loss, F.max_pool2d(a.detach(), 2) if self.case.max_pool else a)

        return run

    def lean(self, function):
        block = self.module()
        arguments = [p.detach() for p in (block.layer.weight, block.norm.weight, block.norm.bias)]
        names = "out", "loss", "grad_weight", "grad_gamma", "grad_beta"
        options = self.phi, self.case.pool, self.case.max_pool
        return lambda: dict(zip(names, function(self.input, self.target, *arguments, *options)))

    def backpropagation(self):
        block, x = self.module(), self.input.clone().requires_grad_()
        grad = torch.randn_like(block(x).detach()).to(self.case.torch_dtype)

        def run():
            block.zero_grad(set_to_none=True)
            with self.autocast():
                out = block(x)
            out.backward(grad)
            x.grad = None

        return run

    def floor(self, x):
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        weight = self.module().layer.weight.detach().to(self.case.torch_dtype).contiguous(memory_format=layout)

        def run():
            z = F.conv2d(x, weight, None, 1, 1)
            rivals.weight_gradient(z, x, weight)

        return run

    def truth(self):
        wide = self.module("reference").to(self.case.torch_dtype).double()
        out, loss = wide(self.input.double(), self.target)
        loss.backward()
        return self.gradients(wide, loss, out)


class Pass(common.Problem):
    """One of the block's two passes over memory: a function of its backends."""

    registered_op = "lls_block"
    baseline = "floor"

    @cached_property
    def reference(self):
        return dispatch.backend("lls_block", "reference", self.device, torch.float64)

    @cached_property
    def channel(self):
        """mean, rstd, gamma, beta."""
        mean, rstd = self.reference.batch_stats(self.input, None, None, None, 0.1, 1e-5)
        generator = torch.Generator().manual_seed(4)
        gamma, beta = torch.rand(2, self.case.channels, generator=generator).to(self.device)
        return mean, rstd, gamma + 0.5, beta - 0.5

    def backends(self):
        """Those whose block consists of passes."""
        modules = {b: dispatch.backend("lls_block", b, self.device, self.case.torch_dtype) for b in super().backends()}
        return [b for b, module in modules.items() if hasattr(module, self.op)]

    def contestants(self):
        def compiled():
            return self.run(self.compiled(getattr(self.reference, self.op)))

        return [
            *self.ours(self.library),
            Contestant("torch.compile", "compiled", compiled),
            Contestant("floor", "floor", self.floor),
        ]

    def library(self, impl):
        return self.run(getattr(dispatch.backend("lls_block", impl, self.device, self.case.torch_dtype), self.op))

    def floor(self):
        """A copy of as many bytes."""
        source, out = (torch.ones(self.bytes // 8, device=self.device) for _ in range(2))
        return lambda: {"": out.copy_(source)}


class NormActPool(Pass):
    op = "norm_act_pool"
    title = "`norm_act_pool`: one pass over memory"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.arguments = SLOPE, case.pool, case.max_pool, True
        latents = 12 * case.batch * case.channels * case.pool**2
        self.bytes = self.input_bytes + self.input_bytes // (4 if case.max_pool else 1) + latents

    @staticmethod
    def named(results):
        return dict(zip(("out", "latents", "s1", "s2"), results))

    def run(self, function):
        return lambda: self.named(function(self.input, *self.channel, *self.arguments))

    def truth(self):
        wide = [t.double() for t in (self.input, *self.channel)]
        return self.named(self.reference.norm_act_pool(*wide, *self.arguments))


class GradPreactivation(Pass):
    op = "grad_preactivation_"
    title = "`grad_preactivation_`: one pass over memory, in place"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.bytes = 2 * self.input_bytes + 4 * case.batch * case.channels * case.pool**2

    @cached_property
    def arguments(self):
        case, device = self.case, self.device
        shape = case.batch, case.channels * case.pool**2
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device) / case.batch
        *_, s1, s2 = self.reference.norm_act_pool(self.input, *self.channel, SLOPE, case.pool, False, True)
        area = torch.full((case.pool**2,), (case.size // case.pool) ** 2, device=device, dtype=torch.float32)
        gradients = self.reference.norm_grads(latents, s1, s2, case.channels, area)[:2]
        return SLOPE, latents, *gradients, case.pool, 1.0

    def run(self, function):
        mine = self.input.clone()  # overwritten: the first call is the one that is compared
        return lambda: {"z": function(mine, *self.channel, *self.arguments)}

    def truth(self):
        own = self.input, *self.channel, *self.arguments
        return {"z": self.reference.grad_preactivation_(*(t.double() if torch.is_tensor(t) else t for t in own))}


class VGG8Step(TrainingStep):
    op = "vgg8_step"
    registered_op = "lls_block"
    title = "VGG8 training step"

    def contestants(self):
        return [
            *self.ours(lambda impl: self.local(impl=impl), reference=False),
            Contestant("eager LLS, basis cached", "eager", lambda: self.local(rivals.EagerBlock)),
            self.backpropagation(),
            self.backpropagation("bp, LeakyReLU in place", wrap=rivals.InPlaceBlock),
            self.backpropagation("bp, accumulation in 2", parts=2),
            self.backpropagation("bp, checkpointing", wrap=rivals.CheckpointedBlock),
        ]

    def local(self, wrap=None, **options):
        return self.step(BlockwiseTrainer(self.layers("lls", wrap, **options), self.optimizer))

    def truth(self):
        if self.case.dtype != "float32":
            return {}
        layers = [layer.double() for layer in self.layers("lls", impl="reference")]
        return self.step(BlockwiseTrainer(layers, self.optimizer), x=self.input.double())()


def block(batch, channels, out_channels, size, pool, classes, **more):
    return Case(Block, batch, channels, out_channels, size, pool=pool, classes=classes, **more)


HALF = dict(dtype="bfloat16", channels_last=True)
CALL = Case(LossCall, 4, 8, pool=8, classes=3)
CASES = {
    "smoke": [
        Case(Loss, 8, 40, pool=40, classes=12),
        Case(Loss, 4, 6, size=8, pool=2, modulation="matrix"),
        block(4, 3, 8, 8, 4, 10),
        Case(NormActPool, 4, 8, size=8, pool=2, max_pool=True),
        Case(GradPreactivation, 4, 8, size=8, pool=2),
        Case(small(VGG8Step), 4, 3, size=16),
        CALL,
    ],
    "cpu": [
        Case(Loss, 128, 1024, pool=1024, classes=100),
        Case(Loss, 128, 1024, pool=1024, classes=100, modulation="matrix"),
        Case(Loss, 32, 128, size=32, pool=4),
        block(16, 64, 128, 32, 4, 10),
        block(16, 128, 256, 32, 2, 10),
        block(32, 256, 512, 8, 2, 100),
        block(32, 512, 512, 4, 2, 100),
        Case(NormActPool, 64, 256, size=32, pool=2),
        Case(GradPreactivation, 64, 256, size=32, pool=2),
        Case(VGG8Step, 32, 3, size=32),
        Case(VGG8Step, 32, 3, size=32, channels_last=True),
        CALL,
    ],
    "gpu": [
        Case(NormActPool, 128, 256, size=32, pool=2, **HALF),
        Case(NormActPool, 128, 256, size=32, pool=2, max_pool=True, **HALF),
        Case(GradPreactivation, 128, 256, size=32, pool=2, **HALF),
        Case(Loss, 128, 1024, pool=1024, classes=100),
        Case(Loss, 128, 128, size=32, pool=4, dtype="bfloat16", channels_last=True),
        block(128, 128, 256, 32, 2, 10, max_pool=True, **HALF),
        block(128, 256, 512, 8, 2, 100, **HALF),
        Case(VGG8Step, 128, 3, size=32, **HALF),
    ],
}
