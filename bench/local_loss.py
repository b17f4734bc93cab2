"""Local losses of a feature map, and the cost of a call.

A map stands for a block's output: it is not a leaf, and what would consume its gradient costs nothing, so a gradient
that is one value a channel is not written out.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from lgkernels.ops.local_loss import reference

from . import common
from .common import Contestant


@dataclass(frozen=True)
class Case(common.Case):
    classes: int = 10

    def words(self):
        return ["pool1", f"{self.classes}classes"]  # results of before have them in their names

    def notes(self):
        return [f"{self.classes} classes"] if self.problem.has_classes else []


class Problem(common.Problem):
    """`ours(h, impl)` and `eager(h)` return a loss, `lean(h)` the loss and the gradients of h and of `shared`."""

    baseline = "floor"
    differentiable = has_classes = True
    shared = ()  # parameters

    def __init__(self, case, device):
        super().__init__(case, device)
        self.bytes = 3 * self.input_bytes

    @cached_property
    def inner(self):
        return self.input.view_as(self.input)

    def contestants(self):
        return [
            *self.ours(lambda impl: lambda: self.differentiated(self.library(self.inner, impl), self.inner)),
            Contestant("eager", "eager", self.published),
            Contestant("lean torch", "lean", lambda: self.closed_form(self.lean)),
            Contestant("lean torch.compile", "compiled", lambda: self.closed_form(self.compiled(self.lean))),
            Contestant("floor", "floor", self.floor),
        ]

    @staticmethod
    def named(values):
        return dict(zip(("loss", "grad_h", "grad_weight"), (v.detach() for v in values)))

    def differentiated(self, loss, h, shared=None):
        shared = self.shared if shared is None else shared
        return self.named((loss, *torch.autograd.grad(loss, [h, *shared])))

    def published(self):
        return lambda: self.differentiated(self.eager(self.inner), self.inner)

    def closed_form(self, function):
        h = self.input.detach()
        return lambda: self.named(function(h))

    def floor(self):
        """Reads the map to reduce it, then reads it and writes the gradient."""
        h = self.input.detach()

        def run():
            h.sum()
            return {"": torch.empty_like(h).copy_(h)}

        return run

    def truth(self):
        wide = self.input.detach().double().requires_grad_()
        shared = [t.detach().double().requires_grad_() for t in self.shared]
        return self.differentiated(self.eager(wide, *shared), wide, shared)


class CrossEntropy(Problem):
    op = registered_op = "local_cross_entropy"
    title = "Local classifier: pool, linear, cross entropy; forward and backward, h not a leaf"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.bytes = self.input_bytes

    @cached_property
    def weight(self):
        weight = torch.randn(self.case.classes, self.case.channels, generator=torch.Generator().manual_seed(2))
        return weight.to(self.device).requires_grad_()

    @property
    def shared(self):
        return (self.weight,)

    def library(self, h, impl):
        return LF.local_cross_entropy(h, self.weight, None, self.target, impl=impl)

    @staticmethod
    def pooled(h, dtype):
        return h.mean((2, 3), dtype=dtype) if h.dim() == 4 else h.to(dtype)

    def eager(self, h, weight=None):
        weight = self.weight if weight is None else weight
        return F.cross_entropy(self.pooled(h, weight.dtype) @ weight.t(), self.target)

    def lean(self, h):
        weight, pooled = self.weight.detach(), self.pooled(h, torch.float32)
        log_p = F.log_softmax(pooled @ weight.t(), 1)
        g = log_p.exp()
        g.scatter_add_(1, self.target.unsqueeze(1), g.new_full((len(g), 1), -1.0))
        g = g / len(g)
        grad = (g @ weight / self.case.size**2).to(h.dtype)[:, :, None, None].expand(h.shape)
        return F.nll_loss(log_p, self.target), grad, g.t() @ pooled

    def floor(self):
        h = self.input.detach()
        return lambda: {"": h.sum()}


class CrossEntropyCall(CrossEntropy):
    """Tiny inputs: what is timed is the way to the kernel and back."""

    op = "local_cross_entropy_call"
    title = "Cost of a call of `local_cross_entropy`, forward and backward"
    baseline = "eager"

    def contestants(self):
        ours = lambda: self.differentiated(self.library(self.inner, "auto"), self.inner)  # noqa: E731
        return [Contestant("lgkernels", "ours", lambda: ours), Contestant("eager", "eager", self.published)]


class Goodness(Problem):
    op = "local_goodness"
    registered_op = "goodness"
    title = "Forward-Forward's goodness, forward and backward"
    has_classes = False
    threshold = 1.0

    @cached_property
    def positive(self):
        return torch.arange(self.case.batch, device=self.device) % 2 == 0

    def library(self, h, impl):
        return LF.goodness_loss(h, self.positive, threshold=self.threshold, impl=impl)

    def eager(self, h):
        g = (h if h.dtype == torch.float64 else h.float()).pow(2).mean((1, 2, 3))
        return F.softplus(torch.where(self.positive, self.threshold - g, g - self.threshold)).mean()

    def lean(self, h):
        size = h[0].numel()
        square = torch.linalg.vector_norm(h, dim=(1, 2, 3), dtype=torch.float32).square()
        sign = self.positive.float() * 2 - 1
        margin = sign * (self.threshold - square / size)
        kappa = torch.sigmoid(margin) * sign * (-2 / (size * len(h)))
        return F.softplus(margin).mean(), h * kappa[:, None, None, None].to(h.dtype)


class Similarity(Problem):
    op = "local_similarity"
    registered_op = "similarity"
    title = "Similarity matching, forward and backward"

    def library(self, h, impl):
        return LF.similarity_matching_loss(h, self.target, num_classes=self.case.classes, impl=impl)

    @staticmethod
    def matrix(x):
        x = x - x.mean(1, keepdim=True)
        x = x / (1e-8 + x.norm(dim=1, keepdim=True))
        return (x @ x.t()).clamp(-1, 1)

    def eager(self, h):
        features = (h if h.dtype == torch.float64 else h.float()).flatten(2).std(2)
        targets = F.one_hot(self.target, self.case.classes).to(features.dtype)
        return F.mse_loss(self.matrix(features), self.matrix(targets))

    def lean(self, h):
        loss, grad, mean = reference.similarity(h, self.target, self.case.classes, True, True)
        return loss, reference.similarity_grad(h, grad, mean, torch.ones((), device=h.device))


HALF = dict(dtype="bfloat16", channels_last=True)
CALL = Case(CrossEntropyCall, 4, 8, classes=3)
CASES = {
    "smoke": [
        Case(CrossEntropy, 3, 6, size=5, classes=7),
        Case(Goodness, 4, 6, size=5),
        Case(Similarity, 4, 6, size=5),
        CALL,
    ],
    "cpu": [
        Case(CrossEntropy, 64, 256, size=56, classes=100),
        Case(CrossEntropy, 64, 256, size=56, classes=100, channels_last=True),
        Case(Goodness, 64, 256, size=56),
        Case(Similarity, 64, 256, size=56, classes=100),
        CALL,
    ],
    "gpu": [
        Case(CrossEntropy, 64, 256, size=56, classes=100, **HALF),
        Case(Goodness, 64, 256, size=56, **HALF),
        Case(Similarity, 64, 256, size=56, classes=100, **HALF),
    ],
}
