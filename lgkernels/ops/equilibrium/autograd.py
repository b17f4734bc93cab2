"""Entries of the family equilibrium: the ops, called with what the dicts of the public functions hold.

Settling and its errors have no graph. The homeostatic loss has its gradient, taken in the forward.
"""

import torch
import torch.nn.functional as F

from ...core.autograd import apply, first_order_only, settled_dtypes
from ...core.ops import wide, without_autocast
from ...random import random_matrix
from . import op  # noqa: F401  registers the ops
from .activations import activity, slope
from .conv_homeostasis import probe_loss
from .field import Arithmetic, Net, cost, field, field_cotangent, field_tangent, force
from .field import settle as run
from .network import READOUT, Network
from .options import Phases, Settling
from .pool import pooled

_ops = torch.ops.lgkernels
_ONEDNN_WORK = 1 << 20
_DEVIATION = {"uniform": 3**-0.5, "uniform8": ((1 - 2.0**-16) / 3) ** 0.5}


def _flat(edges):
    return [layer for edge in edges for layer in edge]


def _bias(weights, key):
    bias = weights.get(f"{key}/bias")
    return None if bias is None else wide(bias)


def net_of(weights, found: Network) -> Net:
    """In the dtype that is computed in. A convolution's bias is inside of its pool, and 0 where there is none."""
    kernels = [wide(weights[f"{found.key(e)}/kernel"]) for e in found.edges]
    biases = []
    for edge, kernel in zip(found.edges, kernels):
        if found.conv and edge[0] < edge[1]:
            bias = _bias(weights, found.key(edge))
            biases.append(kernel.new_zeros(len(kernel)) if bias is None else bias)
    readout = wide(weights[f"{READOUT}/kernel"]) if found.readout else None
    return Net(kernels, biases, readout, _bias(weights, READOUT), _flat(found.edges), len(found.names))


def _product(x, weight):
    """x @ weight, on a CPU by oneDNN: AVX-512 on every processor, where the library's own product (MKL's) keeps to AVX2
    on some. It has no derivative, and costs 10 us more to call, which a million products pay for."""
    apart = torch.is_grad_enabled() or torch.compiler.is_compiling() or len(x) * weight.numel() < _ONEDNN_WORK
    if apart or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return x @ weight
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")


def drive_of(weights, found: Network, x):
    """The constant part of the layers' input, of the first layer alone in a conv net."""
    x = wide(x)
    if found.conv:
        key = f"in-{found.names[0]}"
        padding = 0 if len(found.names) == 1 else 1
        return [pooled(F.conv2d(x, wide(weights[f"{key}/kernel"]), _bias(weights, key), padding=padding))[0]]
    drives = []
    for layer, name in enumerate(found.names):
        into = [f"in-{name}"] if layer in found.inputs else []
        total = _product(x, wide(weights[f"{into[0]}/kernel"])) if into else None
        for key in into + [found.key(e) for e in found.edges if e[1] == layer]:
            bias = _bias(weights, key)
            if bias is not None:
                total = bias.expand(len(x), -1) if total is None else total + bias
        if total is None:
            width = next(weights[f"{found.key(e)}/kernel"].shape[1] for e in found.edges if e[1] == layer)
            total = x.new_zeros(len(x), width)
        drives.append(total.contiguous())
    return drives


def _settled(x):
    """No graph, no autocast."""
    return without_autocast(x.device)


@torch.no_grad()
def settle(weights, found, x, state, target, phases: Phases, options: Settling, impl):
    """`(states in rows, steps, residual, orbit)`; state: rows as `phases` lays them out."""
    with _settled(x):
        drive, net = drive_of(weights, found, x), net_of(weights, found)
        state = [v.contiguous() for v in state]
        return _ops.equilibrium_settle(state, drive, *net, target, *phases, *options, impl)


def _recorded(v):
    """A constant that a graph may hold, as one that was made in torch.inference_mode() may not."""
    return v.detach().clone() if v.is_inference() else v.detach()


@torch.no_grad()
def error(weights, found, x, state, target, beta, points, options, impl):
    """`(e, residual)`."""
    with _settled(x):
        drive, net = drive_of(weights, found, x), net_of(weights, found)
        state = [wide(v).contiguous() for v in state]
        return _ops.equilibrium_error(state, drive, *net, target, beta, points, *options, impl)


@torch.no_grad()
def residual(weights, found, x, state, activation):
    """(B,)"""
    with _settled(x):
        drive, net, state = drive_of(weights, found, x), net_of(weights, found), [wide(v) for v in state]
        after = field(net, drive, [activity(v, activation) for v in state], None, "mse", Arithmetic())
        return Arithmetic().squares([v - w for v, w in zip(after, state)])[0].sqrt()


@torch.no_grad()
def recurrent(weights, found, x, state, target, steps, method, activation, loss):
    """`(delta, residual (B,))` of the recurrence delta <- D J^T delta + dL/du, D = phi', from 0."""
    with _settled(x):
        net, state = net_of(weights, found), [wide(v) for v in state]
        r, d = [activity(v, activation) for v in state], [slope(v, activation) for v in state]
        source = [torch.zeros_like(v) for v in state]
        source[-1] = d[-1] * force(net, r[-1], target, loss)
        total = term = [torch.zeros_like(v) for v in state]
        moved = [torch.full_like(v, torch.inf) for v in state]
        for step in range(steps):
            if method == "neumann":
                term = source if step == 0 else [a * b for a, b in zip(d, field_cotangent(net, r, term))]
                total, moved = [a + b for a, b in zip(total, term)], term
            else:
                after = [s + a * b for s, a, b in zip(source, d, field_cotangent(net, r, total))]
                total, moved = after, [a - b for a, b in zip(after, total)]
        return total, Arithmetic().squares(moved)[0].sqrt()


def through_time(weights, found, x, state, target, options):
    """A dict as `weights`: the gradient of the mean loss after `options.steps` free steps from `state`, a constant."""
    with torch.inference_mode(False), _settled(x), torch.enable_grad():
        leaves = {key: _recorded(wide(w)).requires_grad_() for key, w in weights.items()}
        drive, net = drive_of(leaves, found, _recorded(wide(x))), net_of(leaves, found)
        u, *_ = run(net, drive, [_recorded(wide(v)) for v in state], None, options, Arithmetic())
        r = activity(u[-1], options.activation).flatten(1)
        loss = cost(net, r, _recorded(target), options.loss).sum() / max(len(x), 1)
        if not loss.requires_grad:  # no step, no readout
            return {key: torch.zeros_like(w) for key, w in weights.items()}
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {key: g.to(w.dtype) for (key, w), g in zip(weights.items(), grads)}


# -- the homeostatic loss ---------------------------------------------------------------------------------------------


def _noise(eps, state, law, probe, samples, shapes):
    """Of one probe: given, or rows probe * B + sample of the random matrix of `state`, one column a unit."""
    if eps is not None:
        return [wide(e[probe]) for e in eps]
    widths = [shape.numel() for shape in shapes]
    made = random_matrix(state, samples, sum(widths), law, offset=(probe * samples, 0)) / _DEVIATION.get(law, 1.0)
    return [part.reshape(samples, *shape) for part, shape in zip(made.split(widths, 1), shapes)]


def _keep(ctx, grads, tensors):
    """The gradients, and the tensors themselves, which a second derivative meets."""
    ctx.save_for_backward(*grads, *tensors)


def _scaled(ctx, grad):
    count = len(ctx.saved_tensors) // 2
    grads, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    made = [(grad * g).to(t.dtype) for g, t in zip(grads, tensors)]
    return tuple(first_order_only("homeostatic_loss", g, *tensors, grad) for g in made)


class _Homeostasis(torch.autograd.Function):
    """Of a dense net. tensors: the kernels, then the noise of each layer."""

    @staticmethod
    def forward(ctx, sizes, edges, estimator, impl, *tensors):
        kernels = tensors[: len(edges) // 2]
        given = [wide(w).contiguous() for w in kernels]
        loss, grads = _ops.equilibrium_homeostasis(
            given, list(tensors[len(kernels) :]), list(edges), list(sizes), estimator, impl
        )
        _keep(ctx, grads, kernels)
        ctx.noise = len(tensors) - len(kernels)
        return loss

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        return (None,) * 4 + _scaled(ctx, grad) + (None,) * ctx.noise


class _ConvHomeostasis(torch.autograd.Function):
    """Of a conv net: probe after probe, each with a graph of its own, which is gone when the next one comes."""

    @staticmethod
    @settled_dtypes
    def forward(ctx, first, eps, noise, activities, make, estimator, *tensors):
        leaves = [wide(t).detach().requires_grad_() for t in tensors]
        activities = [wide(r) for r in activities]
        samples, shapes = len(activities[0]), [r.shape[1:] for r in activities]
        probes = 1 if estimator == "exact" else len(eps[0]) if eps is not None else noise[1][0]
        total, grads = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for probe in range(probes):
            e = None
            if estimator != "exact":
                e = _noise(eps, *(noise[0] if noise else (None, None)), probe, samples, shapes)
                e = [v.to(leaves[0].dtype) for v in e]
            with torch.enable_grad():
                loss = probe_loss(make(leaves), activities, e, estimator) / probes
            made = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            total, grads = total + loss.detach(), [a + b for a, b in zip(grads, made)]
        _keep(ctx, grads, tensors)
        return total

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        return (None,) * 6 + _scaled(ctx, grad)


class _Tied(torch.autograd.Function):
    """The loss itself, with gradients of 0 for the weights that it does not depend on: the input's and the readout."""

    @staticmethod
    def forward(ctx, loss, *others):
        ctx.save_for_backward(*others)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        return grad, *(torch.zeros_like(t) if need else None for t, need in zip(ctx.saved_tensors, needed))


def homeostasis(weights, found: Network, activities, eps, noise, estimator, impl):
    """noise: `((state, law), (probes, B))`, or None where there is `eps`."""
    loss, keys = _homeostasis(weights, found, activities, eps, noise, estimator, impl)
    others = [w for key, w in weights.items() if key not in keys and w.requires_grad]
    return apply(_Tied, "homeostatic_loss", loss, *others) if others else loss


def _homeostasis(weights, found, activities, eps, noise, estimator, impl):
    """`(loss, keys of the weights that it depends on)`."""
    keys = [f"{found.key(e)}/kernel" for e in found.edges]
    if not keys:  # nothing is recurrent: J = -1
        return wide(next(iter(weights.values()))).new_zeros(()), keys
    if not found.conv:
        sizes = tuple(r.shape[1] for r in activities)
        kernels = [weights[key] for key in keys]
        rows: list = []
        if estimator != "exact" and eps is not None:
            rows = [wide(e).flatten(0, 1).contiguous() for e in eps]
        elif estimator != "exact":
            (state, law), (probes, samples) = noise
            rows = _noise(None, state, law, 0, probes * samples, [r.shape[1:] for r in activities])
            rows = [e.to(wide(kernels[0]).dtype).contiguous() for e in rows]
        edges = tuple(_flat(found.edges))
        return apply(_Homeostasis, "homeostatic_loss", sizes, edges, estimator, impl, *kernels, *rows), keys
    ups = [found.key(e) for e in found.edges if e[0] < e[1]]
    biases = [f"{key}/bias" for key in ups if f"{key}/bias" in weights]
    tensors = [weights[key] for key in (*keys, *biases)]

    def make(leaves):
        named = dict(zip((*keys, *biases), leaves))
        return net_of(named, found._replace(readout=False))

    first = tensors[0].detach()
    loss = apply(_ConvHomeostasis, "homeostatic_loss", first, eps, noise, activities, make, estimator, *tensors)
    return loss, [*keys, *biases]


@torch.no_grad()
def symmetry(weights, found: Network, activities, eps, noise):
    """(B,): |S| / (|S| + |A|) of the Jacobian."""
    r = [wide(v) for v in activities]
    with without_autocast(r[0].device):
        net, samples = net_of(weights, found._replace(readout=False)), len(r[0])
        if not found.conv:
            kernels = dict(zip(found.edges, net.weights))
            square = trace = r[0].new_full((samples,), sum(v.shape[1] for v in r))
            for edge, w in kernels.items():
                square = square + w.square().sum()
                trace = trace + (w * kernels[edge[::-1]].t()).sum() if edge[::-1] in kernels else trace
        else:
            square, trace = r[0].new_zeros(samples), r[0].new_zeros(samples)
            for probe in range(noise[1][0] if eps is None else len(eps[0])):
                state, law = noise[0] if noise else (None, None)
                e = _noise(eps, state, law, probe, samples, [v.shape[1:] for v in r])
                e = [v.to(r[0].dtype) for v in e]
                forward = [a - b for a, b in zip(field_tangent(net, r, e), e)]
                back = [a - b for a, b in zip(field_cotangent(net, r, e), e)]
                square = square + Arithmetic().squares(forward)[0]
                trace = trace + sum((a * b).flatten(1).sum(1) for a, b in zip(forward, back))
        s, a = ((square + trace).clamp(min=0) / 2).sqrt(), ((square - trace).clamp(min=0) / 2).sqrt()
        return s / (s + a)
