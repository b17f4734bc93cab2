"""The contestants of the local-loss cases: lgkernels' backends, eager torch (autograd of the formulas as published), a
lean closed-form torch version, `torch.compile` of it, LyCORIS where it can be imported, and the floor.

Builders as in `providers.py`. A feature map stands for a block's output: it is not a leaf, and what would consume its
gradient costs nothing, so a gradient that is one value a channel is not written out.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.ops.local_loss import reference
from lgkernels.optim import OffsetSGD

from . import providers as base
from .providers import Problem

OPS = ("local_cross_entropy", "local_goodness", "local_similarity", "offset_step", "lokr_linear")
_OP = {
    "local_cross_entropy": "local_cross_entropy",
    "local_goodness": "goodness",
    "local_similarity": "similarity",
    "offset_step": "offset_sgd_",
    "lokr_linear": "lokr_linear",
}


def lycoris():
    """LyCORIS' module, or None where it isn't installed (`pip install lycoris-lora==4.1.3`)."""
    try:
        from lycoris.modules.lokr import LokrModule

        return LokrModule
    except ImportError:
        return None


def names(case, device, compiled):
    """Providers of a case, in the order of its tables."""
    ours = [f"lgkernels {b}" for b in base.backends(_OP[case.op], device, case.torch_dtype)]
    if case.op == "offset_step":
        best = "lgkernels cpu" if "lgkernels cpu" in ours else ours[-1]
        return [n for n in ours if n != "lgkernels reference" or len(ours) == 1] + [
            f"{best}, bfloat16 offsets",
            "add, SGD foreach",
            "add, SGD fused",
            "floor",
        ]
    if case.op == "lokr_linear":
        return ours + ["frozen nn.Linear", "eager"] + ["LyCORIS"] * (lycoris() is not None and device.type == "cpu")
    return ours + ["eager", "lean torch"] + ["lean torch.compile"] * compiled + ["floor"]


# -- losses of a feature map ----------------------------------------------------------------------------------------


def _losses(case, device, compiled, ours, eager, lean, shared=(), floor=None):
    """`ours(h, impl)` and `eager(h)` return a loss, `lean(h)` the loss and the gradients of h and of `shared`."""
    h = base._random((case.batch, case.channels, case.size, case.size), case, device, 1, requires_grad=True)[0]
    inner = h.view_as(h)

    def results(values):
        return dict(zip(("loss", "grad_h", "grad_weight"), (v.detach() for v in values)))

    def differentiated(loss, at=inner, shared=shared):
        return results((loss, *torch.autograd.grad(loss, [at, *shared])))

    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            impl = name.split()[1]
            providers[name] = lambda i, impl=impl: differentiated(ours(inner, impl))
    providers["eager"] = lambda i: differentiated(eager(inner))
    detached = h.detach()
    providers["lean torch"] = lambda i: results(lean(detached))
    if compiled:
        function = torch.compile(lean, dynamic=False)
        providers["lean torch.compile"] = lambda i: results(function(detached))
    providers["floor"] = floor or (lambda i: {"": detached.sum()})
    wide = detached.double().requires_grad_()
    doubles = [t.detach().double().requires_grad_() for t in shared]
    truth = differentiated(eager(wide, *doubles), wide, doubles)
    size = h.numel() * h.element_size()
    return Problem(providers, "floor", truth, base._tolerance(case), bytes=size if floor is None else 3 * size)


def local_cross_entropy(case, device, compiled):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(case.classes, case.channels, generator=generator).to(device).requires_grad_()
    target, positions = base._target(case, device), case.size**2

    def lean(h):
        w, pooled = weight.detach(), h.mean((2, 3), dtype=torch.float32)
        log_p = F.log_softmax(pooled @ w.t(), 1)
        g = log_p.exp()
        g.scatter_add_(1, target.unsqueeze(1), g.new_full((len(g), 1), -1.0))
        g = g / len(g)
        grad = (g @ w / positions).to(h.dtype)[:, :, None, None].expand(h.shape)
        return F.nll_loss(log_p, target), grad, g.t() @ pooled

    def eager(h, w=weight):
        return F.cross_entropy(h.to(w.dtype).mean((2, 3)) @ w.t(), target)

    return _losses(
        case,
        device,
        compiled,
        lambda h, impl: LF.local_cross_entropy(h, weight, None, target, impl=impl),
        eager,
        lean,
        (weight,),
    )


def _copied(case, device):
    """Reads the map to reduce it, then reads it and writes the gradient."""
    h = base._random((case.batch, case.channels, case.size, case.size), case, device, 1)[0]

    def floor(i):
        h.sum()
        return {"": torch.empty_like(h).copy_(h)}

    return floor


def local_goodness(case, device, compiled):
    positive = torch.arange(case.batch, device=device) % 2 == 0
    threshold = 1.0

    def lean(h):
        size = h[0].numel()
        square = torch.linalg.vector_norm(h, dim=(1, 2, 3), dtype=torch.float32).square()
        sign = positive.float() * 2 - 1
        margin = sign * (threshold - square / size)
        kappa = torch.sigmoid(margin) * sign * (-2 / (size * len(h)))
        return F.softplus(margin).mean(), h * kappa[:, None, None, None].to(h.dtype)

    def eager(h):
        g = (h if h.dtype == torch.float64 else h.float()).pow(2).mean((1, 2, 3))
        return F.softplus(torch.where(positive, threshold - g, g - threshold)).mean()

    return _losses(
        case,
        device,
        compiled,
        lambda h, impl: LF.goodness_loss(h, positive, threshold=threshold, impl=impl),
        eager,
        lean,
        floor=_copied(case, device),
    )


def local_similarity(case, device, compiled):
    target = base._target(case, device)

    def lean(h):
        loss, grad, mean = reference.similarity(h, target, case.classes, True, True)
        return loss, reference.similarity_grad(h, grad, mean, torch.ones((), device=h.device))

    def matrix(x):
        x = x - x.mean(1, keepdim=True)
        x = x / (1e-8 + x.norm(dim=1, keepdim=True))
        return (x @ x.t()).clamp(-1, 1)

    def eager(h):
        features = (h if h.dtype == torch.float64 else h.float()).flatten(2).std(2)
        return F.mse_loss(matrix(features), matrix(F.one_hot(target, case.classes).to(features.dtype)))

    return _losses(
        case,
        device,
        compiled,
        lambda h, impl: LF.similarity_matching_loss(h, target, num_classes=case.classes, impl=impl),
        eager,
        lean,
        floor=_copied(case, device),
    )


# -- the optimizer step -----------------------------------------------------------------------------------------------


def _resnet50_shapes():
    """Of the 161 parameters of torchvision's ResNet-50."""

    def norm(width):
        return [(width,), (width,)]

    shapes, width = [(64, 3, 7, 7), *norm(64)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            shapes += [
                (planes, width, 1, 1),
                *norm(planes),
                (planes, planes, 3, 3),
                *norm(planes),
                (4 * planes, planes, 1, 1),
                *norm(4 * planes),
            ]
            if i == 0:
                shapes += [(4 * planes, width, 1, 1), *norm(4 * planes)]
            width = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def offset_step(case, device, compiled):
    """A learning rate of 0, so that any step can be compared with the first; the momentum of gradients that never
    change has its fixed point in the buffers from the start."""
    shapes = _resnet50_shapes() if case.rule == "ResNet-50" else [(5, 3), (7,), (2, 3, 5, 4)]
    generator = torch.Generator().manual_seed(0)
    values, grads, offsets = ([torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(3))
    options = dict(lr=0.0, momentum=0.9)

    def parameters():
        made = [nn.Parameter(v.clone()) for v in values]
        for p, g in zip(made, grads):
            p.grad = g.clone()
        return made

    def ours(impl, dtype=None):
        made = parameters()
        buffers = [torch.zeros_like(p) for p in made]
        tilt = [o.clone() if dtype is None else o.to(dtype) for o in offsets]
        optimizer = OffsetSGD(made, offset_dtype=dtype, **options)
        for p, buffer, offset in zip(made, buffers, tilt):
            optimizer.state[p].update(momentum_buffer=buffer, offset=offset)
        with torch.no_grad():
            torch._foreach_copy_(buffers, [10 * (g + o) for g, o in zip(grads, tilt)])

        def step(i):
            if impl == "auto":
                optimizer.step()
            else:
                with torch.no_grad():
                    torch.ops.lgkernels.offset_sgd_(
                        [p.data for p in made],
                        [p.grad for p in made],
                        buffers,
                        tilt,
                        0.0,
                        0.9,
                        0.0,
                        1.0,
                        1.0,
                        1.0,
                        impl,
                    )
            return {"momentum": buffers[0]}

        return step

    def rival(**how):
        made = parameters()
        optimizer = torch.optim.SGD(made, **options, **how)
        for p, g, o in zip(made, grads, offsets):
            optimizer.state[p]["momentum_buffer"] = 10 * (g + o)
        first = [None]

        def step(i):
            torch._foreach_add_([p.grad for p in made], offsets)
            optimizer.step()
            first[0] = optimizer.state[made[0]]["momentum_buffer"].clone() if first[0] is None else first[0]
            return {"momentum": first[0]}

        return step

    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            impl = name.split()[1].rstrip(",")
            auto = device.type == "cpu" and impl == "cpu"  # what a user calls
            providers[name] = ours("auto" if auto else impl, torch.bfloat16 if name.endswith("offsets") else None)
    providers["add, SGD foreach"], providers["add, SGD fused"] = rival(foreach=True), rival(fused=True)
    count = sum(math.prod(s) for s in shapes)
    source, out = (torch.zeros(2 * count, device=device) for _ in range(2))
    providers["floor"] = lambda i: {"": out.add_(source)}  # as the step: 16 bytes a parameter read, 8 written in place
    return Problem(
        providers, "add, SGD fused", {"momentum": 10 * (grads[0] + offsets[0]).double()}, 2e-2, bytes=24 * count
    )


# -- LoKr -------------------------------------------------------------------------------------------------------------


def lokr_linear(case, device, compiled):
    torch.manual_seed(3)
    layer = nn.Linear(case.channels, case.out_channels).to(device, case.torch_dtype)
    adapted = lnn.LoKrLinear(layer, rank=1, alpha=4.0)
    nn.init.normal_(adapted.w2_b)
    factors = [adapted.w1, adapted.w2_a, adapted.w2_b]
    x = base._random((case.batch, case.channels), case, device, 1, requires_grad=True)[0]
    grad = torch.randn(case.batch, case.out_channels, generator=torch.Generator().manual_seed(1))
    grad = grad.to(device, case.torch_dtype)
    keys = ("y", "grad_x", "grad_w1", "grad_a", "grad_b")

    def run(y, inputs, g=grad):
        return dict(zip(keys, (y.detach(), *torch.autograd.grad(y, inputs, g))))

    def ours(x, w1, a, b, impl, weight=layer.weight, bias=layer.bias, g=grad):
        return run(LF.lokr_linear(x, weight, bias, w1=w1, w2=(a, b), scale=4.0, impl=impl), [x, w1, a, b], g)

    providers = {}
    for name in names(case, device, False):
        if name.startswith("lgkernels"):
            impl = name.split()[1]
            providers[name] = lambda i, impl=impl: ours(x, *factors, impl)
    providers["frozen nn.Linear"] = lambda i: {"": run(layer(x), [x])}
    providers["eager"] = lambda i: run(
        F.linear(x, layer.weight + 4.0 * torch.kron(adapted.w1, adapted.w2_a @ adapted.w2_b), layer.bias), [x, *factors]
    )
    if lycoris() is not None and device.type == "cpu":
        host = nn.Linear(case.channels, case.out_channels)
        host.load_state_dict(layer.state_dict())
        host.requires_grad_(False)
        peer = lycoris()("lokr", host, 1.0, 1, 4)
        peer.apply_to()
        own = {name: p for name, p in peer.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in zip(("lokr_w1", "lokr_w2_a", "lokr_w2_b"), factors):
                own[name].copy_(value)
        inputs = [x] + [own[name] for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")]
        providers["LyCORIS"] = lambda i: run(host(x), inputs)
    doubles = [t.detach().double().requires_grad_() for t in (x, *factors)]
    truth = ours(*doubles, "reference", layer.weight.double(), layer.bias.double(), grad.double())
    return Problem(providers, "frozen nn.Linear", truth, base._tolerance(case), flops=4 * grad.numel() * case.channels)
