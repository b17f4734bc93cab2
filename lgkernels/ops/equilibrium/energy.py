"""Hopfield energies of nets with tied weights: the definition, all of it by autograd of the energy.

Layers 1, ..., L have states s_l; layer 0 is the input x. An edge a -> b, a < b, has one weight W for both directions:

    dense    P(s_a) = flat(s_a) W                       W (in, out)
    conv     P(s_a) = pool(conv(s_a, W))                W (O, I, k, k); pool: none, avg, max, softmax (2x2, stride 2)

    E(s) = sum_l c_l (sum G(s_l) - <b_l, s_l>) - sum_(a -> b) c_b <s_b, P(s_a)>

G' is the inverse of the activation phi, so E is stationary where s_l = phi(u_l) for all layers, with

    u_l = b_l + sum_(a -> l) P(s_a) + sum_(l -> b) (c_b / c_l) DP(s_l)^T s_b

What comes down an edge is scaled by c_b / c_l, one number an edge. A nudge settles to E + beta L, L the loss of the
last layer, whose c is 1: u_L - beta dL/ds_L. One step replaces the states: s <- phi(u).

Sources: Scellier & Bengio 2017; Ernoult et al. 2019; Laborieux et al. 2021 (cross entropy, beta of both signs);
Scellier et al. 2023 (asynchronous steps); Liu & Chen 2026 (scaled feedback); Elayedam & Srinivasan 2025 (skips).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activity
from .options import POOLS, EnergyForm
from .pool import pooled

VARIANTS = ("positive", "negative", "centered")


class Edge(NamedTuple):
    """stride 0: dense."""

    source: int
    target: int
    stride: int = 0
    padding: int = 0
    pool: str = "none"


class EnergyNet(NamedTuple):
    """shapes: of the input and of each layer, without the batch. scales: c of each layer. ceiling: of clipped_relu.
    linear_output: the last layer is not clipped. loss: "mse" of the last layer, "cross_entropy" of a readout."""

    shapes: tuple[tuple[int, ...], ...]
    edges: tuple[Edge, ...]
    scales: tuple[float, ...]
    activation: str
    ceiling: float
    linear_output: bool
    loss: str

    @property
    def layers(self) -> int:
        return len(self.scales)

    def parts(self, schedule: str) -> list[range]:
        """Layers (from 0) that move together: all, or 0, 2, ... and then 1, 3, ..."""
        both = [range(self.layers)] if schedule == "synchronous" else [range(k, self.layers, 2) for k in (0, 1)]
        return [part for part in both if len(part)]

    def form(self) -> EnergyForm:
        edges = [n for e in self.edges for n in (*e[:4], POOLS.index(e.pool))]
        return EnergyForm(edges, list(self.scales), *self[3:])

    @classmethod
    def of(cls, form: EnergyForm, x: Tensor, states: list[Tensor]) -> "EnergyNet":
        """The net of such a form with layers of these sizes."""
        rows = [form.edges[i : i + 5] for i in range(0, len(form.edges), 5)]
        edges = tuple(Edge(a, b, stride, padding, POOLS[pool]) for a, b, stride, padding, pool in rows)
        return cls(tuple(tuple(s.shape[1:]) for s in (x, *states)), edges, tuple(form.scales), *form[2:])


class Weights(NamedTuple):
    """kernels: one for each edge. biases: one for each layer, (units,) or (channels,). readout: (units, classes)."""

    kernels: list[Tensor]
    biases: list[Tensor]
    readout: Tensor | None = None
    readout_bias: Tensor | None = None


def nudges(variant: str, beta: float) -> tuple[float, float]:
    """The betas of the first and the second phase."""
    return {"positive": (0.0, beta), "negative": (-beta, 0.0), "centered": (-beta, beta)}[variant]


def phi(net: EnergyNet, layer: int, u: Tensor) -> Tensor:
    """The activation of a layer (from 0)."""
    if net.linear_output and layer == net.layers - 1:
        return u
    return u.clamp(0, net.ceiling) if net.activation == "clipped_relu" else activity(u, net.activation)


def own(net: EnergyNet, layer: int, s: Tensor) -> Tensor:
    """(B,): sum G(s), the integral of the activation's inverse."""
    if net.linear_output and layer == net.layers - 1 or net.activation == "clipped_relu":
        g = s.square() / 2
    elif net.activation == "hard_sigmoid":
        g = s.square()
    else:
        g = (torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)) / 4 + s / 2
    return g.flatten(1).sum(1)


def along(edge: Edge, shape: tuple[int, ...], kernel: Tensor, s: Tensor) -> Tensor:
    """P(s)."""
    if not edge.stride:
        return (s.flatten(1) @ kernel).view(len(s), *shape)
    z = F.conv2d(s, kernel, stride=edge.stride, padding=edge.padding)
    if edge.pool == "softmax":
        return pooled(z)[0]
    return z if edge.pool == "none" else F.avg_pool2d(z, 2) if edge.pool == "avg" else F.max_pool2d(z, 2)


def shaped(bias: Tensor, like: Tensor) -> Tensor:
    """A layer's bias, to be added to its states."""
    return bias.view(-1, *[1] * (like.dim() - 2))


def coupling(net: EnergyNet, weights: Weights, x: Tensor, states: list[Tensor]) -> Tensor:
    """(B,): -E without the states' own parts."""
    s, total = [x, *states], x.new_zeros(len(x))
    for c, bias, state in zip(net.scales, weights.biases, states):
        total = total + c * (shaped(bias, state) * state).flatten(1).sum(1)
    for e, kernel in zip(net.edges, weights.kernels):
        product = s[e.target] * along(e, net.shapes[e.target], kernel, s[e.source])
        total = total + net.scales[e.target - 1] * product.flatten(1).sum(1)
    return total


def energy(net: EnergyNet, weights: Weights, x: Tensor, states: list[Tensor]) -> Tensor:
    """E of each sample, (B,)."""
    parts = [c * own(net, layer, s) for layer, (c, s) in enumerate(zip(net.scales, states))]
    return sum(parts) - coupling(net, weights, x, states)


def logits(net: EnergyNet, weights: Weights, out: Tensor) -> Tensor:
    """(B, C): the last layer's states, or their readout."""
    out = out.flatten(1)
    if weights.readout is None or weights.readout_bias is None:
        return out
    return torch.addmm(weights.readout_bias, out, weights.readout)


def cost(net: EnergyNet, weights: Weights, out: Tensor, target: Tensor) -> Tensor:
    """L of each sample, (B,). target: (B, C)."""
    z = logits(net, weights, out)
    if net.loss == "mse":
        return (z - target).square().sum(1) / 2
    return -(target * torch.log_softmax(z, 1)).sum(1)


# -- settling ---------------------------------------------------------------------------------------------------------


def _preactivations(net, weights, x, states, target, beta, graph):
    with torch.enable_grad():
        # copies: one state may have been computed from another
        leaves = [s.clone() if graph and s.requires_grad else s.detach().clone().requires_grad_() for s in states]
        total = coupling(net, weights, x, leaves).sum()
        u = [g / c for g, c in zip(torch.autograd.grad(total, leaves, create_graph=graph), net.scales)]
        if beta:
            loss = cost(net, weights, leaves[-1], target).sum()
            u[-1] = u[-1] - beta * torch.autograd.grad(loss, leaves[-1], create_graph=graph)[0]
    return u


def prepare(net, weights, x):
    """What a backend keeps for the phases of one batch: nothing."""


def settle(net, weights, x, states, target, betas, steps, schedule, ready=None):
    """`(states, residual (P, B))` after `steps` steps from `states`, whose rows are [phase][B], a beta each.

    target: (B, C), or None where no phase is nudged. residual: the norm of the last step over all layers; inf without a
    step. Where the weights require a gradient, autograd can go back through the steps.
    """
    graph = torch.is_grad_enabled() and any(w.requires_grad for w in weights.kernels)
    samples, ended, residuals = len(x), [], []
    for k, beta in enumerate(betas):
        s = [state[k * samples : (k + 1) * samples] for state in states]
        before = s
        for _ in range(steps):
            before, s = s, list(s)
            for part in net.parts(schedule):
                u = _preactivations(net, weights, x, s, target, beta, graph)
                for layer in part:
                    s[layer] = phi(net, layer, u[layer])
        moved = sum((a - b).detach().square().flatten(1).sum(1) for a, b in zip(s, before)).sqrt()
        ended.append(s)
        residuals.append(moved if steps else torch.full_like(moved, torch.inf))
    return [torch.cat(parts) for parts in zip(*ended)], torch.stack(residuals)


def phases(net, weights, x, states, target, options, settle=settle, prepare=prepare):
    """`(states, residual (B,))` of a free phase that starts at `states`, and `(states, residual (P, B))` of the nudged
    ones, whose rows are [phase][B]."""
    ready = prepare(net, weights, x)
    free, residual = settle(net, weights, x, states, None, (0.0,), options.free_steps, options.schedule, ready)
    many = len(options.betas)
    if not many:
        return free, residual[0], [s[:0] for s in free], residual[:0]
    rows = [s.repeat(many, *[1] * (s.dim() - 1)) for s in free]
    rest = options.nudge_steps, options.schedule, ready
    return free, residual[0], *settle(net, weights, x, rows, target, tuple(options.betas), *rest)


def gradients(net, weights, x, states, betas):
    """`(kernels, biases)` of the mean loss: (dE/dtheta(second) - dE/dtheta(first)) / (beta_2 - beta_1), for the rows of
    two phases."""
    samples, leaves = max(len(x), 1), [w.detach().requires_grad_() for w in (*weights.kernels, *weights.biases)]
    own_ = Weights(leaves[: len(weights.kernels)], leaves[len(weights.kernels) :])
    first, second = ([s[k * len(x) : (k + 1) * len(x)] for s in states] for k in (0, 1))
    with torch.enable_grad():
        total = coupling(net, own_, x, first).sum() - coupling(net, own_, x, second).sum()
        made = torch.autograd.grad(total / ((betas[1] - betas[0]) * samples), leaves)
    return list(made[: len(weights.kernels)]), list(made[len(weights.kernels) :])


def through_time(net, weights, x, target, states, steps, schedule, settle=settle):
    """`(kernels, biases, readout's)`: the gradient of the mean loss after `steps` more steps from `states`, which are
    taken as constants, by autograd through the steps."""
    given = [w for w in (*weights.kernels, *weights.biases, weights.readout, weights.readout_bias) if w is not None]
    leaves = [w.detach().requires_grad_() for w in given]
    many = len(weights.kernels)
    kernels, biases, rest = leaves[:many], leaves[many : many + net.layers], leaves[many + net.layers :]
    own_ = Weights(kernels, biases, *rest)
    with torch.enable_grad():
        ended, _ = settle(net, own_, x, states, target, (0.0,), steps, schedule)
        loss = cost(net, own_, ended[-1], target).sum() / max(len(x), 1)
    if loss.requires_grad:
        made = list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    else:  # no step, no readout
        made = [torch.zeros_like(leaf) for leaf in leaves]
    return made[:many], made[many : many + net.layers], made[many + net.layers :]


def readout_gradients(net, weights, out, target):
    """[kernel, bias] of the readout, of the mean loss at these states; [] where there is none."""
    if weights.readout is None:
        return []
    delta = (torch.softmax(logits(net, weights, out), 1) - target) / max(len(out), 1)
    return [out.flatten(1).t() @ delta, delta.sum(0)]
