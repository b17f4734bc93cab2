"""The contestants of the feedback cases: lgkernels' backends, back-propagation (the baseline), a lean hand-written
torch Function, `torch.compile` of it, BioTorch where it can be imported, and the floor.

Builders as in `providers.py`. F = scale * sign(W) (usf), |M| * sign(W) with M kept (frsf) or drawn in each backward
(brsf), or M alone (fa). Where a provider draws its own M, its dX is not compared.
"""

import importlib
import math

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.optim import fuse_update
from lgkernels.recipes.models import build
from lgkernels.training import BackpropTrainer, DirectTrainer

from . import providers as base
from .providers import Problem

OPS = ("feedback_linear", "feedback_conv2d", "feedback_product", "feedback_step", "dfa_step")
_gradients = torch.ops.aten.convolution_backward.default


def biotorch(layer, rule):
    """BioTorch's layer class, or None where it isn't installed (`pip install --no-deps biotorch==0.0.16`)."""
    try:
        return getattr(importlib.import_module(f"biotorch.layers.{rule}"), layer)
    except ImportError:
        return None


def names(case, device, compiled):
    """Providers of a case, in the order of its tables."""
    if case.op == "dfa_step":
        return ["lgkernels", "bp"]
    ours = base.backends("feedback_matrix" if case.size else "feedback_product", device, case.torch_dtype)
    ours = [f"lgkernels {b}" for b in ours if b != "reference"] or ["lgkernels reference"]
    lean = ["lean torch"] + ["lean torch.compile"] * compiled
    if case.op == "feedback_product":
        return ours + ["torch.mm with W"] + lean + ["floor"]
    if case.op == "feedback_step":
        return (
            [f"{name}, fused update" for name in ours]
            + ours
            + ["nn.Linear", "nn.Linear, fused update", "lean torch", "floor"]
        )
    layer = "Linear" if case.op == "feedback_linear" else "Conv2d"
    peer = ["BioTorch"] * (biotorch(layer, case.rule) is not None and device.type == "cpu")
    return ours + [f"nn.{layer}"] + lean + peer + ["floor"]


# -- what an expert writes in plain torch -------------------------------------------------------------------------


def lean_matrix(weight, rule, magnitude, scale):
    if rule == "fa":
        return magnitude
    if rule == "usf":
        return weight.sign().mul_(scale)
    if rule == "frsf":
        return weight.sign().mul_(magnitude)
    return torch.rand_like(weight).mul_(weight.sign()).mul_(scale * 3**0.5)


class LeanLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, magnitude, rule, scale):
        ctx.save_for_backward(x, weight, magnitude)
        ctx.rule, ctx.scale = rule, scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, magnitude = ctx.saved_tensors
        grad_x = grad @ lean_matrix(weight, ctx.rule, magnitude, ctx.scale) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x, grad.sum(0), None, None, None


class LeanConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, magnitude, rule, scale):
        ctx.save_for_backward(x, weight, magnitude)
        ctx.rule, ctx.scale = rule, scale
        return F.conv2d(x, weight, bias, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, magnitude = ctx.saved_tensors
        feedback = lean_matrix(weight, ctx.rule, magnitude, ctx.scale)
        grads = _gradients(grad, x, feedback, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3)
        return *grads, None, None, None


# -- one layer, forward and backward --------------------------------------------------------------------------------


def _shapes(case):
    """Of the input and of the weight."""
    if case.size:
        return (case.batch, case.channels, case.size, case.size), (case.out_channels, case.channels, 3, 3)
    return (case.batch, case.channels), (case.out_channels, case.channels)


def _layer(case, impl=None, device="cpu"):
    """nn.Linear or nn.Conv2d (impl None), or the rule's layer, with the same weights."""
    kind, sizes = (
        ("Conv2d", (case.channels, case.out_channels, 3, 1, 1))
        if case.size
        else ("Linear", (case.channels, case.out_channels))
    )
    if impl is None:
        layer = getattr(nn, kind)(*sizes)
    elif case.rule == "fa":
        layer = getattr(lnn, f"FeedbackAlignment{kind}")(*sizes, feedback_init="xavier", impl=impl)
    else:
        layer = getattr(lnn, f"SignSymmetric{kind}")(*sizes, rule=case.rule, scale="xavier", impl=impl)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
    return layer.to(device, case.torch_dtype)


def _feedback(case, device):
    """(F of lgkernels' layer as a float64 tensor, the number in its scale)."""
    layer = _layer(case, "reference", device)
    return layer.feedback_weight(torch.float64), lnn.feedback.scale_of("xavier", layer.weight.shape)


def _truth(case, x, grad, feedback):
    plain = _layer(case, None, x.device).double()
    x, grad = x.double().requires_grad_(), grad.double()
    y = plain(x)
    y.backward(grad)
    layer = F.conv2d if case.size else F.linear
    arguments = (1, 1) if case.size else ()
    (down,) = torch.autograd.grad(layer(x, feedback, None, *arguments), x, grad)
    return {"y": y.detach(), "grad_x": down, "grad_weight": plain.weight.grad, "grad_bias": plain.bias.grad}


def _step(layer, call, x, grad, result="grad_x", after=lambda: None):
    """A provider: forward and backward. `result` is grad_x's name among the results: another is not compared."""
    parameters = list(layer.parameters())

    def run(i):
        x.grad = None
        for p in parameters:
            p.grad = None
        y = call(x)
        y.backward(grad)
        after()
        return {"y": y.detach(), result: x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}

    return run


def _layers(case, device, compiled):
    x_shape, w_shape = _shapes(case)
    x = base._random(x_shape, case, device, 1, requires_grad=True)[0]
    plain = _layer(case, None, device)
    grad = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(1)).to(device, case.torch_dtype)
    feedback, scale = _feedback(case, device)
    magnitude = (
        feedback.to(case.torch_dtype)
        if case.rule == "fa"
        else (feedback.abs().to(case.torch_dtype) if case.rule == "frsf" else None)
    )
    drawn = "grad_x" if case.rule != "brsf" else "own draw"
    kind = "Conv2d" if case.size else "Linear"

    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            layer = _layer(case, name.split()[1], device)
            # brSF draws anew after every step; only its first step is compared
            providers[name] = _step(
                layer, layer, x, grad, after=layer.feedback.advance if case.rule == "brsf" else lambda: None
            )
    providers[f"nn.{kind}"] = _step(plain, plain, x, grad, "back-propagated")
    lean = LeanConv2d if case.size else LeanLinear
    layer = _layer(case, None, device)

    def call(x, apply=lean.apply):
        return apply(x, layer.weight, layer.bias, magnitude, case.rule, scale)

    providers["lean torch"] = _step(layer, call, x, grad, drawn)
    if compiled:
        function = torch.compile(lambda x, w, b, m: lean.apply(x, w, b, m, case.rule, scale), dynamic=False)
        providers["lean torch.compile"] = _step(
            layer, lambda x: function(x, layer.weight, layer.bias, magnitude), x, grad, drawn
        )
    peer = biotorch(kind, case.rule)
    if peer is not None and device.type == "cpu":
        options = {"type": case.rule, "options": {"init": "xavier", "gradient_clip": False, "constrain_weights": False}}
        sizes = (case.channels, case.out_channels, 3, 1, 1) if case.size else (case.channels, case.out_channels)
        theirs = peer(*sizes, layer_config=options)
        theirs.load_state_dict(_layer(case).state_dict(), strict=False)
        providers["BioTorch"] = _step(theirs, theirs, x, grad, "grad_x" if case.rule == "usf" else "own draw")
    # no layer can do without its forward and its weight gradient; dX for nothing is what none can beat
    weight, bias, data = plain.weight.detach(), plain.bias.detach(), x.detach()
    if case.size:

        def floor(i):
            F.conv2d(data, weight, bias, 1, 1)
            _gradients(
                grad, data, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True]
            )
    else:

        def floor(i):
            return {"": (F.linear(data, weight, bias), grad.t() @ data, grad.sum(0))}

    providers["floor"] = floor
    return Problem(
        providers,
        f"nn.{kind}",
        _truth(case, x.detach(), grad, feedback),
        base._tolerance(case),
        flops=6 * grad.numel() * math.prod(w_shape[1:]),
    )


feedback_linear = feedback_conv2d = _layers


# -- the product with F alone ---------------------------------------------------------------------------------------


def feedback_product(case, device, compiled):
    weight = _layer(case, None, device).weight.detach()
    grad = torch.randn(case.batch, case.out_channels, generator=torch.Generator().manual_seed(1))
    grad = grad.to(device, case.torch_dtype)
    feedback, scale = _feedback(case, device)
    magnitude = feedback.to(case.torch_dtype) if case.rule == "fa" else None
    formula, tensors = _layer(case, "reference", device)._formula()
    random = (tensors["state"], formula.law, formula.law_scale, formula.low) if "state" in tensors else None
    weight_of_f = None if case.rule == "fa" else weight
    f = FeedbackMatrix(weight_of_f, None, *(random or (None, "uniform", 1.0, None)), formula.scale)
    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            kernels = base.dispatch.backend("feedback_product", name.split()[1], device, case.torch_dtype)
            providers[name] = lambda i, kernels=kernels: {"grad_x": kernels.product(grad, case.channels, f)}
    providers["torch.mm with W"] = lambda i: {"": grad @ weight}
    result = "grad_x" if case.rule in ("usf", "fa") else "own draw"

    def lean(weight, magnitude):
        return grad @ lean_matrix(weight, case.rule, magnitude, scale)

    providers["lean torch"] = lambda i: {result: lean(weight, magnitude)}
    if compiled:
        function = torch.compile(lean, dynamic=False)
        providers["lean torch.compile"] = lambda i: {result: function(weight, magnitude)}
    providers["floor"] = lambda i: {"": weight.sum()}  # it has to read the weight (FA has not)
    size = weight.numel() * weight.element_size()
    return Problem(
        providers,
        "torch.mm with W",
        {"grad_x": grad.double() @ feedback},
        base._tolerance(case),
        bytes=size if case.rule != "fa" and case.batch <= 64 else 0,
        flops=2 * grad.numel() * case.channels,
    )


# -- forward, backward and SGD with momentum ---------------------------------------------------------------------------


def feedback_step(case, device, compiled):
    """The learning rate is 0, so that any step can be compared with the first."""
    x = base._random((case.batch, case.channels), case, device, 1, requires_grad=True)[0]
    grad = torch.randn(case.batch, case.out_channels, generator=torch.Generator().manual_seed(1))
    grad = grad.to(device, case.torch_dtype)
    feedback, scale = _feedback(case, device)

    def step(impl, fused=False, lean=False):
        layer = _layer(case, impl, device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9, fused=not fused)
        if fused:
            fuse_update(layer, optimizer, include=[""])

        def run(i):
            x.grad = None
            y = LeanLinear.apply(x, layer.weight, layer.bias, None, case.rule, scale) if lean else layer(x)
            y.backward(grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"grad_x" if impl else "own": x.grad}

        return run

    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            providers[name] = step(name.split()[1].rstrip(","), fused=name.endswith("fused update"))
    providers["nn.Linear"], providers["nn.Linear, fused update"] = step(None), step(None, fused=True)
    providers["lean torch"] = step(None, lean=True)
    weight = _layer(case, None, device).weight.detach()
    buffer = torch.zeros_like(weight)

    def floor(i):  # it has to read the weight once, and to read and write weight and momentum
        F.linear(x.detach(), weight)
        weight.mul_(1.0)
        buffer.mul_(1.0)

    providers["floor"] = floor
    return Problem(providers, "nn.Linear", {"grad_x": grad.double() @ feedback}, base._tolerance(case))


# -- DFA: a whole training step of VGG8 ------------------------------------------------------------------------------


def dfa_step(case, device, compiled):
    x, target = (
        base._random((case.batch, case.channels, case.size, case.size), case, device, 1)[0],
        base._target(case, device),
    )

    def step(trainer, network, **options):
        torch.manual_seed(5)
        layers = build("vgg8", network, in_channels=case.channels, num_classes=case.classes)
        made = trainer([layer.to(device) for layer in layers], lambda own: torch.optim.SGD(own, lr=0.0), **options)
        return lambda i: {"": made.step(x, target)}

    providers = {"lgkernels": step(DirectTrainer, "dfa", rule="dfa"), "bp": step(BackpropTrainer, "bp")}
    return Problem(providers, "bp")
