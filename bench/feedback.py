"""Feedback matrices: layers, the product with F alone, the step with the update fused in, and the cost of a call.

F = scale * sign(W) (usf), |M| * sign(W) with M kept (frsf) or drawn in each backward (brsf), or M alone (fa). Where a
contestant draws its own M, its dX is not compared.
"""

import math
from dataclasses import replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.optim import fuse_update

from .common import Case, Contestant, Problem
from .rivals.feedback import LeanConv2d, LeanLinear, biotorch, conv2d_gradients, lean_matrix


class Layer(Problem):
    """Forward and backward of one layer; the other problems take its parts."""

    registered_op = "feedback_product"
    kind = "Linear"
    baseline = "nn.Linear"
    differentiable = True
    lean_function = LeanLinear
    function = staticmethod(F.linear)
    padding = ()  # stride and padding, as arguments

    def __init__(self, case, device):
        super().__init__(case, device)
        self.sizes = (case.channels, case.out_channels, *((3, *self.padding) if case.size else ()))
        self.flops = (
            6 * case.batch * case.out_channels * (case.size or 1) ** 2 * case.channels * (9 if case.size else 1)
        )

    @property
    def footprint(self):
        weights = self.case.channels * self.case.out_channels * (9 if self.case.size else 1)
        return self.input_bytes + weights * torch.finfo(self.case.torch_dtype).bits // 8

    def layer(self, impl=None):
        """nn.Linear or nn.Conv2d (impl None), or the rule's layer, with the same weights."""
        if impl is None:
            layer = getattr(nn, self.kind)(*self.sizes)
        elif self.case.rule == "fa":
            layer = getattr(lnn, f"FeedbackAlignment{self.kind}")(*self.sizes, feedback_init="xavier", impl=impl)
        else:
            options = dict(rule=self.case.rule, scale="xavier", impl=impl)
            layer = getattr(lnn, f"SignSymmetric{self.kind}")(*self.sizes, **options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
        return layer.to(self.device, self.case.torch_dtype)

    @cached_property
    def feedback(self):
        """F of lgkernels' layer, in float64."""
        return self.layer("reference").feedback_weight(torch.float64)

    @cached_property
    def scale(self):
        return lnn.feedback.scale_of("xavier", self.layer().weight.shape)

    @cached_property
    def magnitude(self):
        """M, where it is kept."""
        if self.case.rule not in ("fa", "frsf"):
            return None
        return (self.feedback if self.case.rule == "fa" else self.feedback.abs()).to(self.case.torch_dtype)

    @cached_property
    def grad(self):
        return self.incoming(self.case.batch, self.case.out_channels, *self.shape[2:])

    def contestants(self):
        peer = biotorch(self.kind, self.case.rule) if self.device.type == "cpu" else None
        return [
            *self.ours(self.library, reference=False),
            Contestant(f"nn.{self.kind}", "bp", self.backpropagation),
            Contestant("lean torch", "lean", lambda: self.lean(self.apply_lean)),
            Contestant("lean torch.compile", "compiled", lambda: self.lean(self.compiled(self.apply_lean))),
            *([Contestant("BioTorch", "peer", lambda: self.peer(peer))] if peer else []),
            Contestant("floor", "floor", self.floor),
        ]

    def step(self, layer, call, result="grad_x", after=lambda: None):
        """Forward and backward. `result` is grad_x's name among the results: another is not compared."""
        parameters, x, grad = list(layer.parameters()), self.input, self.grad

        def run():
            x.grad = None
            for p in parameters:
                p.grad = None
            y = call(x)
            y.backward(grad)
            after()
            return {"y": y.detach(), result: x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}

        return run

    def library(self, impl):
        layer = self.layer(impl)
        # brSF draws anew after every step; only its first step is compared
        return self.step(layer, layer, after=layer.feedback.advance if self.case.rule == "brsf" else lambda: None)

    def backpropagation(self):
        layer = self.layer()
        return self.step(layer, layer, "back-propagated")

    def apply_lean(self, x, weight, bias, magnitude):
        return self.lean_function.apply(x, weight, bias, magnitude, self.case.rule, self.scale)

    def lean(self, function):
        layer, magnitude = self.layer(), self.magnitude
        _ = self.scale  # computed here, not while it is timed or compiled

        def call(x):
            return function(x, layer.weight, layer.bias, magnitude)

        return self.step(layer, call, "grad_x" if self.case.rule != "brsf" else "own draw")

    def peer(self, kind):
        options = {"init": "xavier", "gradient_clip": False, "constrain_weights": False}
        layer = kind(*self.sizes, layer_config={"type": self.case.rule, "options": options})
        layer.load_state_dict(self.layer().state_dict(), strict=False)
        return self.step(layer, layer, "grad_x" if self.case.rule == "usf" else "own draw")

    def floor(self):
        """Forward and weight gradient, which no layer can do without; dX for nothing is what none can beat."""
        weight, bias = (p.detach() for p in self.layer().parameters())
        x, grad = self.input.detach(), self.grad
        return lambda: {"": (F.linear(x, weight, bias), grad.t() @ x, grad.sum(0))}

    def truth(self):
        layer = self.layer().double()
        x, grad = self.input.detach().double().requires_grad_(), self.grad.double()
        y = layer(x)
        y.backward(grad)
        (down,) = torch.autograd.grad(self.function(x, self.feedback, None, *self.padding), x, grad)
        return {"y": y.detach(), "grad_x": down, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}


class Linear(Layer):
    op = "feedback_linear"
    title = "Feedback in a linear layer, forward and backward"


class LinearCall(Layer):
    """Tiny inputs: what is timed is the way to the kernel and back."""

    op = "feedback_linear_call"
    title = "Cost of a call of `feedback_linear` (fa) or `sign_symmetric_linear`, forward and backward"
    baseline = "eager"

    def contestants(self):
        eager = Contestant("eager", "eager", lambda: self.lean(self.apply_lean))
        return [Contestant("lgkernels", "ours", self.functional), eager]

    def functional(self):
        layer = self.layer()
        if self.case.rule == "fa":
            call = partial(LF.feedback_linear, weight=layer.weight, bias=layer.bias, feedback=self.magnitude)
        else:
            call = partial(LF.sign_symmetric_linear, weight=layer.weight, bias=layer.bias, scale=self.scale)
        return self.step(layer, call)


class Conv2d(Layer):
    op = "feedback_conv2d"
    registered_op = "feedback_matrix"
    title = "Feedback in a 3x3 convolution, forward and backward"
    kind = "Conv2d"
    baseline = "nn.Conv2d"
    lean_function = LeanConv2d
    function = staticmethod(F.conv2d)
    padding = (1, 1)

    def floor(self):
        weight, bias = (p.detach() for p in self.layer().parameters())
        x, grad = self.input.detach(), self.grad

        def run():
            F.conv2d(x, weight, bias, *self.padding)
            conv2d_gradients(grad, x, weight, [False, True, True])

        return run


class Product(Layer):
    op = "feedback_product"
    title = "The product with the feedback matrix alone"
    baseline = "torch.mm with W"

    def __init__(self, case, device):
        super().__init__(case, device)
        size = case.channels * case.out_channels * torch.finfo(case.torch_dtype).bits // 8
        self.bytes = size if case.rule != "fa" and case.batch <= 64 else 0
        self.flops = 2 * case.batch * case.out_channels * case.channels

    @cached_property
    def weight(self):
        return self.layer().weight.detach()

    def contestants(self):
        return [
            *self.ours(self.library, reference=False),
            Contestant("torch.mm with W", "bp", lambda: lambda: {"": self.grad @ self.weight}),
            Contestant("lean torch", "lean", lambda: self.lean(self.multiply)),
            Contestant("lean torch.compile", "compiled", lambda: self.lean(self.compiled(self.multiply))),
            Contestant("floor", "floor", lambda: lambda: {"": self.weight.sum()}),  # read the weight (FA need not)
        ]

    def library(self, impl):
        formula, tensors = self.layer("reference")._formula()
        weight = None if self.case.rule == "fa" else self.weight
        law = {}
        if "state" in tensors:
            law = dict(state=tensors["state"], law=formula.law, law_scale=formula.law_scale, low=formula.low)
        f = FeedbackMatrix(weight, scale=formula.scale, **law)
        kernels = dispatch.backend("feedback_product", impl, self.device, self.case.torch_dtype)
        return lambda: {"grad_x": kernels.product(self.grad, self.case.channels, f)}

    def multiply(self, grad, weight, magnitude):
        return grad @ lean_matrix(weight, self.case.rule, magnitude, self.scale)

    def lean(self, function):
        result = "grad_x" if self.case.rule in ("usf", "fa") else "own draw"
        arguments, _ = (self.grad, self.weight, self.magnitude), self.scale
        return lambda: {result: function(*arguments)}

    def truth(self):
        return {"grad_x": self.grad.double() @ self.feedback}


class Step(Layer):
    """The learning rate is 0, so that any step can be compared with the first."""

    op = "feedback_step"
    title = "Linear layer: forward, backward and SGD with momentum"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.flops = 0

    def contestants(self):
        ours = self.ours(self.optimized, reference=False)
        fused = self.ours(lambda impl: self.optimized(impl, fused=True), reference=False)
        return [
            *(replace(c, name=f"{c.name}, fused update") for c in fused),
            *ours,
            Contestant("nn.Linear", "bp", lambda: self.optimized(None)),
            Contestant("nn.Linear, fused update", "bp", lambda: self.optimized(None, fused=True)),
            Contestant("lean torch", "lean", lambda: self.optimized(None, lean=True)),
            Contestant("floor", "floor", self.floor),
        ]

    def optimized(self, impl, fused=False, lean=False):
        layer, x, grad = self.layer(impl), self.input, self.grad
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9, fused=not fused)
        if fused:
            fuse_update(layer, optimizer, include=[""])

        def run():
            x.grad = None
            y = self.apply_lean(x, layer.weight, layer.bias, None) if lean else layer(x)
            y.backward(grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"grad_x" if impl else "own": x.grad}

        return run

    def floor(self):
        """Read the weight once, read and write weight and momentum."""
        weight = self.layer().weight.detach()
        x, buffer = self.input.detach(), torch.zeros_like(weight)

        def run():
            F.linear(x, weight)
            weight.mul_(1.0)
            buffer.mul_(1.0)

        return run

    def truth(self):
        return {"grad_x": self.grad.double() @ self.feedback}


def each(problem, rules, batch, channels, out_channels, size=0, **more):
    return [Case(problem, batch, channels, out_channels, size, rule=rule, **more) for rule in rules.split()]


CASES = {
    "smoke": [
        *each(Linear, "usf frsf brsf fa", 3, 40, 24),
        *each(Conv2d, "usf brsf", 2, 4, 6, 5),
        *each(Product, "usf brsf fa", 3, 40, 24),
        *each(Step, "usf", 3, 40, 24),
        *each(LinearCall, "usf fa", 4, 8, 4),
    ],
    "cpu": [
        *each(Linear, "usf frsf brsf fa", 8, 9216, 4096),
        *each(Linear, "usf brsf", 128, 9216, 4096),
        *each(Linear, "usf brsf", 512, 768, 3072),
        *each(Conv2d, "usf brsf", 2, 512, 512, 7),
        *each(Product, "usf brsf fa", 8, 9216, 4096),
        *each(Product, "usf brsf", 128, 9216, 4096),
        *each(Product, "usf brsf", 512, 768, 3072),
        *each(Step, "usf", 8, 9216, 4096),
        *each(LinearCall, "usf fa", 4, 8, 4),
    ],
    "gpu": [
        *each(Linear, "usf brsf fa", 8, 9216, 4096),
        *each(Linear, "usf brsf", 64, 9216, 4096, dtype="bfloat16"),
        *each(Linear, "usf brsf", 4096, 9216, 4096, dtype="bfloat16"),
        *each(Product, "usf brsf fa", 8, 9216, 4096, dtype="bfloat16"),
        *each(Step, "usf", 8, 9216, 4096),
    ],
}
