"""The replicated losses with their tangents, and whole steps of LG-FG-A, beside back-propagation of the same losses."""

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.ops.forward_gradient import layers, reference
from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from lgkernels.training import ForwardGradientTrainer

from . import common
from .common import Contestant, Problem


@dataclass(frozen=True)
class Case(common.Case):
    """`channels`: D of all groups."""

    patches: int = 1
    groups: int = 1
    classes: int = 10
    layer_norm: bool = False

    def words(self):
        return [
            f"{self.patches}patches",
            f"{self.groups}groups",
            f"{self.classes}classes",
            *(["norm"] if self.layer_norm else []),
        ]

    def notes(self):
        texts = [f"{self.patches} patches", f"{self.groups} groups", f"{self.classes} classes"]
        return texts + ["layer norm in front"] * self.layer_norm


class Losses(Problem):
    op = "replicated_cross_entropy_dual"
    registered_op = "replicated_cross_entropy"
    title = "Replicated cross entropy and its tangents: all P G losses of a sample along a tangent of x"
    baseline = "floor"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, case.patches, case.groups, case.channels // case.groups
        self.input_bytes = math.prod(self.shape) * torch.finfo(case.torch_dtype).bits // 8
        self.bytes = 2 * self.input_bytes

    @property
    def footprint(self):
        return 2 * self.input_bytes

    @cached_property
    def arguments(self):
        """(x, tangent, weight, bias)."""
        generator = torch.Generator().manual_seed(2)
        tangent = torch.randn(self.shape, generator=generator).to(self.device, self.case.torch_dtype)
        weight = 0.1 * torch.randn(self.case.channels, self.case.classes, generator=generator)
        bias = torch.randn(self.case.classes, generator=generator)
        return self.input, tangent, weight.to(self.device), bias.to(self.device)

    def contestants(self):
        found = [
            *self.ours(self.library),
            Contestant("smart eager", "lean", lambda: self.of_tensors(self.smart)),
            Contestant("smart eager, torch.compile", "compiled", lambda: self.of_tensors(self.compiled(self.smart))),
            Contestant("floor", "floor", self.floor),
        ]
        replicas = 4 * math.prod((*self.shape[:3], self.case.channels + self.case.classes)) * 4
        if replicas < 6 * 2**30:
            found.insert(-1, Contestant("naive replication", "eager", lambda: self.of_tensors(self.naive)))
        return found

    def library(self, impl):
        x, tangent, weight, bias = self.arguments

        def run():
            loss, derivatives = LF.replicated_cross_entropy_dual(
                x, tangent, weight, bias, self.target, layer_norm=self.case.layer_norm, impl=impl
            )
            return {"loss": loss, "derivatives": derivatives}

        return run

    def of_tensors(self, function):
        return lambda: dict(zip(("loss", "derivatives"), function(*self.arguments)))

    def smart(self, x, tangent, weight, bias):
        """One pooled row a sample, one product for what it teaches, one for the derivatives."""
        if self.case.layer_norm:
            x, tangent = torch.func.jvp(lambda x: F.layer_norm(x, x.shape[-1:]), (x,), (tangent,))
        n, patches, groups, channels = x.shape
        log_p = F.log_softmax(torch.addmm(bias, x.mean(1).flatten(1).float(), weight), 1)
        loss = F.nll_loss(log_p, self.target, reduction="none")
        delta = log_p.exp().scatter_add(1, self.target.unsqueeze(1), -torch.ones_like(loss).unsqueeze(1))
        teach = (delta @ weight.t()).view(n, 1, groups, channels) / patches
        return loss, (tangent * teach).sum(-1)

    def naive(self, x, tangent, weight, bias):
        """Every replica by itself, its own patch and group with a tangent, by forward-mode differentiation."""

        def losses(x):
            n, patches, groups, channels = x.shape
            x = F.layer_norm(x, x.shape[-1:]) if self.case.layer_norm else x
            still = x.detach()
            own = torch.eye(groups, dtype=torch.bool, device=x.device).view(groups, groups, 1)
            rows = torch.where(own, x.unsqueeze(2), still.unsqueeze(2))  # (N, P, G, G, C)
            others = (still.sum(1, keepdim=True) - still).unsqueeze(2)
            pooled = ((rows + others) / patches).flatten(3)
            logits = pooled @ weight + bias
            target = self.target.view(n, 1, 1).expand(logits.shape[:3])
            return F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(n, patches, groups)

        loss, derivatives = torch.func.jvp(losses, (x,), (tangent,))
        return loss[:, 0, 0], derivatives

    def floor(self):
        """One read of x and of its tangent."""
        both = torch.stack(self.arguments[:2])
        return lambda: {"": both.sum()}

    def truth(self):
        x, tangent, weight, bias = (t.double() for t in self.arguments)
        loss, derivatives = LF.replicated_cross_entropy_dual(
            x, tangent, weight, bias, self.target, layer_norm=self.case.layer_norm, impl="reference"
        )
        return {"loss": loss, "derivatives": derivatives}


def _block_losses(block, x, target, layer_norm, *added):
    """The losses of a block with something added in front of each ReLU, and what the gradients need."""
    y, kept = x, []
    for i, (kind, module) in enumerate(block.stages()):
        y = block.grouped(y) if kind == "group" else y
        a = F.layer_norm(y, y.shape[-1:]) if block.has_norm(i) else y
        z = torch.matmul(module.weight, a) + module.bias.unsqueeze(1) if kind == "token" else module(a)
        u = F.layer_norm(z, z.shape[-1:]) + added[i]
        if kind == "group" and block.token is not None:
            u = u + block.grouped(x)
        y = F.relu(u)
        kept.append((a, z, y))
    head = block.head.weight.t(), block.head.bias
    return LF.replicated_cross_entropy(y, *head, target, layer_norm=layer_norm, impl="reference"), kept


def jvp_step(model, x, target, noise):
    """A step of LG-FG-A by torch.func.jvp over the reference: gradients by parameter."""
    x, gradients = model.patches(x), {}
    for block, added in zip(model.blocks, noise):
        losses = partial(_block_losses, block, x, target, model.head_norm)
        zeros = tuple(torch.zeros_like(u) for u in added)
        _, derivatives, kept = torch.func.jvp(losses, zeros, tuple(added), has_aux=True)
        y = kept[-1][2]
        derivatives = derivatives / len(x)
        for (kind, module), u, (a, z, y) in zip(block.stages(), added, kept):
            q = derivatives.sum(2, keepdim=True) if kind == "token" else derivatives
            q = q.unsqueeze(3) if kind == "group" else q
            g = reference.activity_grad(z, y, q, Noise(u), NormOptions(z.dim() - 1, 1e-5, True))
            if kind == "token":
                gradients[module.weight], gradients[module.bias] = (g @ a.mT).sum(0), g.sum((0, 2))
            else:
                gradients[module.weight], gradients[module.bias] = layers.sum_of_products(g, a, kind == "group")
        rows = (F.layer_norm(y, y.shape[-1:]) if model.head_norm else y).mean(1).flatten(1)
        with torch.enable_grad():
            grads = torch.autograd.grad(F.cross_entropy(block.head(rows), target), tuple(block.head.parameters()))
        gradients.update(zip(block.head.parameters(), grads))
        x = y.flatten(-2)
    with torch.enable_grad():
        loss = F.cross_entropy(model.readout(model.summary(y)), target)
        gradients.update(zip(model.readout.parameters(), torch.autograd.grad(loss, tuple(model.readout.parameters()))))
    return gradients


class Step(Problem):
    """`rule`: LocalMixer's configuration."""

    op = "forward_gradient_step"
    registered_op = "dual_norm"
    title = "A step of LG-FG-A: noise, forward pass with tangents, all gradients, and SGD"
    baseline = "LG-BP"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shape = case.batch, case.channels, case.size, case.size

    @property
    def footprint(self):
        return common.CACHE_BYTES

    def model(self):
        torch.manual_seed(5)
        sizes = dict(image_size=self.case.size, in_channels=self.case.channels, num_classes=self.case.classes)
        return lnn.LocalMixer(self.case.rule, **sizes).to(self.device)

    @staticmethod
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    def contestants(self):
        return [
            *self.ours(self.library),
            Contestant("torch.func.jvp", "eager", self.written_out),
            Contestant("LG-BP", "bp", partial(self.library, "auto", estimator="LG-BP")),
            Contestant("BP", "bp", partial(self.library, "auto", estimator="BP")),
        ]

    def library(self, impl, estimator="LG-FG-A"):
        trainer = ForwardGradientTrainer(self.model(), self.optimizer, estimator=estimator, impl=impl)
        x, target = self.input, self.target
        name = "losses" if estimator == "LG-FG-A" else estimator
        return lambda: {name: trainer.step(x, target)}

    def written_out(self):
        model, x, target = self.model(), self.input, self.target
        trainer = ForwardGradientTrainer(model, self.optimizer)
        optimizer = self.optimizer(model.parameters())
        sizes = []
        with torch.no_grad():
            y = model.patches(x)
            for block in model.blocks:
                width = block.channel.out_features
                shapes = {"group": (*y.shape[:2], block.groups, width // block.groups)}
                sizes.append([shapes.get(kind, (*y.shape[:2], width)) for kind, _ in block.stages()])

        def run():
            with torch.no_grad():
                noise = [[torch.randn(size, device=x.device) for size in block] for block in sizes]
                for parameter, gradient in jvp_step(model, x, target, noise).items():
                    parameter.grad = gradient
            optimizer.step()
            trainer.noise.advance()
            return {}

        return run

    def truth(self):
        model = self.model().double()
        trainer = ForwardGradientTrainer(model, self.optimizer, estimator="LG-BP")
        return {"losses": trainer.step(self.input.double(), self.target)}


def _losses(batch, patches, groups, classes, channels=512, **more):
    return Case(Losses, batch, channels, patches=patches, groups=groups, classes=classes, **more)


SIZES = [(128, 16, g, 10) for g in (1, 4, 16, 64)] + [(32, 16, g, 1000) for g in (1, 4, 16, 64)]
CASES = {
    "smoke": [
        _losses(3, 4, 2, 5, channels=16),
        _losses(3, 4, 2, 5, channels=16, layer_norm=True),
        Case(Step, 3, 1, size=8, rule="S/2/16", patches=4, groups=16),
    ],
    "cpu": [
        _losses(128, 64, 16, 10),
        _losses(128, 64, 16, 10, layer_norm=True),
        *(_losses(*sizes) for sizes in SIZES),
        Case(Step, 32, 3, size=32, rule="M/8/16", patches=64, groups=16),
        Case(Step, 128, 1, size=28, rule="M/1/16", patches=1, groups=16),
    ],
    "gpu": [
        _losses(512, 64, 16, 10, dtype="float32"),
        _losses(512, 64, 16, 10, layer_norm=True),
        _losses(64, 1024, 64, 1000, channels=2048),
        Case(Step, 128, 3, size=32, rule="M/8/16", patches=64, groups=16),
        Case(Step, 16, 3, size=224, rule="L/32/64", patches=1024, groups=64, classes=1000),
    ],
}
