"""The vector field of layered nets, its derivatives, and the loop that settles them: what all backends in torch share.

A net's layers 0, ..., L - 1 have states u_l and activities r_l = phi(u_l). An edge a -> b with weight W adds to u_b

    dense            r_a W
    conv, a < b      P(r_a) = pool(conv(r_a) + bias)
    conv, a > b      DP(r_b)^T r_a, the vector-Jacobian product at r_b of a pool and convolution with weights of its own

and the input adds `drive`. Convolutions are 3x3 of padding 1, those to and from the last layer of padding 0. One step
replaces the states: u <- H(phi(u)), for the leak cancels. On the last layer, a nudge adds beta dL/dr.

The linear maps are real. `Arithmetic` says how values are held: as complex tensors, or as packed real rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activity
from .options import Phases
from .pool import curved, pooled, scattered, windows


class Net(NamedTuple):
    """weights: one for each edge; biases: of a conv net, one for each edge that goes up, in order, else none.
    edges: source and destination of each weight, in pairs."""

    weights: list[Tensor]
    biases: list[Tensor]
    readout: Tensor | None
    readout_bias: Tensor | None
    edges: list[int]
    layers: int

    def routes(self):
        """(source, destination, weight, bias or None) of every edge."""
        biases = iter(self.biases)
        pairs = zip(self.edges[::2], self.edges[1::2], self.weights)
        return [(a, b, w, next(biases) if self.biases and a < b else None) for a, b, w in pairs]

    def padding(self, a, b):
        return 0 if max(a, b) == self.layers - 1 else 1


class Arithmetic:
    """Values as they are, real or complex: one phase."""

    def __init__(self, beta=0.0):
        self.beta = beta

    def linear(self, function, r, weight):
        return function(r, weight.to(r.dtype))

    def pointwise(self, function, *values):
        return function(*values)

    def shifted(self, z, constant):
        """z + constant, which is real."""
        return z + constant

    def nudged(self, u, force):
        return u + self.beta * force

    def squares(self, values):
        """(1, B): the sums of squares over all values of a sample."""
        return sum(v.abs().square().flatten(1).sum(1) for v in values).unsqueeze(0)


def _numbers(values, dtype, device):
    """A tensor of them, written on the device: a graph may be recording, which no copy from the host may enter."""
    made = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in zip(made, values):
        place.fill_(value)
    return made


class Packed(Arithmetic):
    """All phases in the rows of real tensors: see `Phases`."""

    def __init__(self, phases: Phases, samples: int, like: Tensor):
        self.samples, self.phases = samples, phases
        self.real, self.rest = phases.real_phases, phases.many - phases.real_phases
        self.split = self.real * samples
        kind = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        self.betas = (
            _numbers(phases.beta_real[: self.real], like.dtype, like.device),
            _numbers(phases.betas[self.real :], kind, like.device),
        )

    def linear(self, function, r, weight):
        return function(r, weight)

    def _real(self, rows):
        """(real phases, B, ...), a view."""
        return rows[: self.split].view(self.real, self.samples, *rows.shape[1:])

    def _rest(self, rows):
        """(other phases, Re and Im, B, ...), a view."""
        return rows[self.split :].view(self.rest, 2, self.samples, *rows.shape[1:])

    def pointwise(self, function, *values):
        """function of (phases, B, ...) values: those of real phases, and complex ones."""
        if not self.rest:
            return function(*map(self._real, values)).flatten(0, 1)
        made = function(*(torch.complex(*self._rest(v).unbind(1)) for v in values))
        rows = torch.view_as_real(made.resolve_conj()).movedim(-1, 1).flatten(0, 2)
        return torch.cat((function(*map(self._real, values)).flatten(0, 1), rows)) if self.real else rows

    def shifted(self, z, constant):
        if not self.rest:
            return (self._real(z) + constant).flatten(0, 1)
        z = z.clone()
        self._real(z).add_(constant)
        self._rest(z)[:, 0] += constant
        return z

    def rows_of(self, constant):
        """A real value of each sample in the rows of all phases."""
        rows = constant.repeat(self.phases.rows, *[1] * (constant.dim() - 1))
        self._rest(rows)[:, 1] = 0
        return rows

    def nudged(self, u, force):
        def scaled(v):
            return v * self.betas[v.is_complex()].view(-1, *[1] * u.dim())

        return u + self.pointwise(scaled, force)

    def squares(self, values):
        sums = sum(v.square().flatten(1).sum(1) for v in values)
        return torch.cat((self._real(sums), self._rest(sums).sum(1)))

    def fourier(self, u, free, points, name):
        """The error of a layer from its states: see reference.error."""
        real, (re, im) = activity(self._real(u), name), self._rest(u).unbind(1)
        if points == 1:
            return (real[0] - activity(free, name)) / self.betas[0][0]
        total = sum(v / beta for v, beta in zip(real, self.betas[0]))
        for v, beta in zip(activity(torch.complex(re, im), name) if self.rest else (), self.betas[1]):
            total = total + 2 * (v / beta).real
        return total / points


# -- the field --------------------------------------------------------------------------------------------------------


def _product(r, weight):
    return r @ weight


def _up(z):
    return pooled(z)[0]


def _spread(z, high):
    """High, through the pool of z."""
    return scattered(pooled(z)[2] * high.unsqueeze(-1), z)


def edge(net, a, b, weight, bias, r, values):
    """What the edge adds to u_b."""
    if weight.dim() == 2:
        return values.linear(_product, r[a], weight)
    padding = net.padding(a, b)
    z = values.linear(lambda r, w: F.conv2d(r, w, padding=padding), r[min(a, b)], weight)
    if a < b:
        return values.pointwise(_up, z if bias is None else values.shifted(z, bias.view(-1, 1, 1)))
    back = values.pointwise(_spread, z, r[a])
    return values.linear(lambda r, w: F.conv_transpose2d(r, w, padding=padding), back, weight)


def force(net, r, target, loss):
    """dL/dr of the last layer's activities (..., B, *): cross entropy of the readout, or half the squared error."""
    flat = r.flatten(-3) if net.weights and net.weights[0].dim() == 4 else r
    if loss == "mse":
        return (flat - target).view(r.shape)
    z = flat if net.readout is None else flat @ net.readout.to(r.dtype)
    if net.readout_bias is not None:
        z = z + net.readout_bias
    real = z.real if z.is_complex() else z
    w = torch.exp(z - real.amax(-1, keepdim=True))
    g = w / w.sum(-1, keepdim=True) - target
    return (g if net.readout is None else g @ net.readout.t().to(r.dtype)).view(r.shape)


def cost(net, r, target, loss):
    """L of each sample, (B,), of the last layer's real activities (B, n): `force` is its derivative."""
    if loss == "mse":
        return (r - target).square().sum(1) / 2
    z = r if net.readout is None else r @ net.readout
    z = z if net.readout_bias is None else z + net.readout_bias
    return torch.logsumexp(z, 1) - (target * z).sum(1)


def field(net, drive, r, target, loss, values, layers=None):
    """H(r): the next states of the layers."""
    layers, edges, states = range(net.layers) if layers is None else layers, net.routes(), []
    for b in layers:
        terms = [edge(net, a, c, w, bias, r, values) for a, c, w, bias in edges if c == b]
        u = sum(terms[1:], terms[0]) if terms else torch.zeros_like(r[b])
        if b < len(drive):
            u = values.shifted(u, drive[b])
        if b == net.layers - 1 and target is not None:
            u = values.nudged(u, values.pointwise(lambda r: force(net, r, target, loss), r[b]))
        states.append(u)
    return states


def settle(net, drive, state, target, options, values, step=field):
    """`(states, steps, residual, orbit)`: see reference.settle. step: `field`, or the same in fewer passes."""
    parts = [range(net.layers)] if options.schedule == "synchronous" else [range(k, net.layers, 2) for k in (0, 1)]
    parts = [part for part in parts if len(part)]
    past, u = [], list(state)
    r = [values.pointwise(lambda v: activity(v, options.activation), v) for v in u]
    used = taken = None
    for t in range(options.steps):
        past, u = [u, *past[:1]], list(u)
        for part in parts:
            for b, v in zip(part, step(net, drive, r, target, options.loss, values, part)):
                u[b] = v
            for b in part:
                r[b] = values.pointwise(lambda v: activity(v, options.activation), u[b])
        taken = t + 1
        if options.tolerance is not None:
            residual, orbit = _moves(u, past, values)
            done = torch.minimum(residual, orbit) <= options.tolerance
            used = torch.full_like(residual, options.steps + 1) if used is None else used
            used = torch.where(done, used.clamp(max=taken), torch.full_like(used, options.steps + 1))
            if bool(done.all()):
                break
    residual, orbit = _moves(u, past, values)
    steps = torch.full_like(residual, taken or 0) if used is None else used.clamp(max=taken or 0)
    return u if taken else [v.clone() for v in u], steps.long(), residual, orbit


def _moves(u, past, values):
    """How far each sample moved in the last step, and in the last two; inf where there were fewer."""
    made = [values.squares([v - w for v, w in zip(u, before)]).sqrt() for before in past]
    shape = made[0] if made else values.squares([v * 0 for v in u])
    return tuple(made[i] if i < len(made) else torch.full_like(shape, torch.inf) for i in (0, 1))


# -- derivatives ------------------------------------------------------------------------------------------------------


def edge_tangent(net, a, b, weight, bias, r, e):
    """The edge's derivative at r along e."""
    if weight.dim() == 2:
        return e[a] @ weight
    low, padding = min(a, b), net.padding(a, b)
    z = F.conv2d(r[low], weight, bias, padding=padding)
    moved = windows(F.conv2d(e[low], weight, padding=padding))
    _, p, q = pooled(z)
    if a < b:
        return (q * moved).sum(-1)
    back = r[a].unsqueeze(-1) * curved(moved, p, q) + q * e[a].unsqueeze(-1)
    return F.conv_transpose2d(scattered(back, z), weight, padding=padding)


def field_tangent(net, r, e):
    """The derivative of H at r along e."""
    out = [torch.zeros_like(v) for v in e]
    for a, b, w, bias in net.routes():
        out[b] = out[b] + edge_tangent(net, a, b, w, bias, r, e)
    return out


def field_cotangent(net, r, d):
    """The transposed derivative of H at r applied to d."""
    out = [torch.zeros_like(v) for v in d]
    for a, b, w, bias in net.routes():
        if w.dim() == 2:
            out[a] = out[a] + d[b] @ w.t()
            continue
        low, padding = min(a, b), net.padding(a, b)
        z = F.conv2d(r[low], w, bias, padding=padding)
        _, p, q = pooled(z)
        if a < b:
            back = q * d[b].unsqueeze(-1)
        else:
            moved = windows(F.conv2d(d[low], w, padding=padding))
            out[a] = out[a] + (q * moved).sum(-1)
            back = r[a].unsqueeze(-1) * curved(moved, p, q)
        out[low] = out[low] + F.conv_transpose2d(scattered(back, z), w, padding=padding)
    return out
