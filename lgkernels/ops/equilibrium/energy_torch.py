"""Energy nets in plain torch with few operations: closed forms of energy.py.

The convolution of a state serves the layer above, and, by what its pool kept, the state itself: it is made once for
each new state. All phases go in the rows of one batch. A transposed convolution of stride 1 is a convolution with the
kernel turned round; one that is averaged by 2x2 is a convolution of twice the stride with a larger kernel. Images lie
channel by channel of a pixel (channels last), as the library's convolutions want them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .energy import Edge, EnergyNet, logits, phi
from .pool import pooled, scattered

_backward = torch.ops.aten.convolution_backward


class Kernel(NamedTuple):
    """Of an edge: as it goes up, its stride, and as it goes down (None: by torch's transposed convolution)."""

    up: Tensor
    stride: int
    down: Tensor | None


def _averaged(kernel, stride):
    """The kernel of conv and 2x2 mean in one."""
    shifts = [(i, stride - i, j, stride - j) for i in (0, stride) for j in (0, stride)]
    return sum(F.pad(kernel, shift) for shift in shifts) / 4


def kernel_of(edge: Edge, kernel: Tensor, both: bool = True) -> Kernel:
    """What the steps read; both: for the way down too."""
    if not edge.stride:
        return Kernel(kernel, 0, kernel.t())
    stride = edge.stride
    if edge.pool == "avg":
        kernel, stride = _averaged(kernel, stride), 2 * stride
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    down = None
    if both and stride == 1 and edge.padding < kernel.shape[2]:
        down = kernel.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    return Kernel(kernel, stride, down)


def up(edge: Edge, kernel: Kernel, s: Tensor):
    """`(P(s), what the pool kept)`."""
    z = F.conv2d(s, kernel.up, stride=kernel.stride, padding=edge.padding)
    if edge.pool == "max":
        return F.max_pool2d(z, 2, return_indices=True)
    if edge.pool == "softmax":
        o, _, q = pooled(z)
        return o, q
    return z, None


def spread(edge: Edge, kernel: Kernel, kept, s: Tensor, high: Tensor) -> Tensor:
    """High, through the pool of the convolution of s."""
    if kept is None:
        return high
    height, width = ((n + 2 * edge.padding - kernel.up.shape[2]) // kernel.stride + 1 for n in s.shape[2:])
    if edge.pool == "max":
        return F.max_unpool2d(high, kept, [2, 2], output_size=[height, width])
    return scattered(kept * high.unsqueeze(-1), high.new_empty(()).expand(height, width))


def down(edge: Edge, kernel: Kernel, kept, s: Tensor, high: Tensor) -> Tensor:
    """DP(s)^T high."""
    back = spread(edge, kernel, kept, s, high)
    if kernel.down is not None:
        return F.conv2d(back, kernel.down, padding=kernel.up.shape[2] - 1 - edge.padding)
    size = kernel.up.shape[2]
    rest = [n - ((m - 1) * kernel.stride - 2 * edge.padding + size) for n, m in zip(s.shape[2:], back.shape[2:])]
    return F.conv_transpose2d(back, kernel.up, None, kernel.stride, edge.padding, rest)


def force(net: EnergyNet, weights, out: Tensor, target: Tensor) -> Tensor:
    """dL/ds of the last layer."""
    z = logits(net, weights, out)
    if net.loss == "mse":
        return (z - target).view(out.shape)
    g = torch.softmax(z, 1) - target
    return (g if weights.readout is None else g @ weights.readout.t()).view(out.shape)


def _upwards(edge: Edge, kernel: Tensor) -> Kernel:
    return kernel_of(edge, kernel, both=False)


class Ready(NamedTuple):
    """What does not change while a batch is learned: the edges' kernels, and what the input adds to the layers."""

    kernels: list
    drive: list[Tensor]


def prepare(net: EnergyNet, weights, x: Tensor, kernel_of=kernel_of) -> Ready:
    """For `settle`."""
    ends = zip(net.edges, weights.kernels)
    kernels = [kernel_of(e, w) if e.source else _upwards(e, w) for e, w in ends]
    drives = []
    for layer, (bias, shape) in enumerate(zip(weights.biases, net.shapes[1:])):
        drive = bias.view(-1, *[1] * (len(shape) - 1))
        for e, kernel in zip(net.edges, kernels):
            if e.target == layer + 1 and not e.source:
                drive = drive + (up(e, kernel, _last(x))[0] if e.stride else _dense(net, e, kernel, x))
        drives.append(drive)
    return Ready(kernels, drives)


def _dense(net: EnergyNet, e: Edge, kernel: Kernel, s: Tensor) -> Tensor:
    return (s.flatten(1) @ kernel.up).view(len(s), *net.shapes[e.target])


class Steps:
    """The states of a net, and the convolutions that were made of them."""

    up, down = staticmethod(up), staticmethod(down)

    def __init__(self, net: EnergyNet, ready: Ready, states, phases: int):
        self.net, self.phases = net, phases
        self.kernels, self.drive = ready
        self.states = [_last(s) for s in states]
        self.made: dict[int, tuple] = {}  # edge -> what `up` gave for the present state
        self.into = [
            [i for i, e in enumerate(net.edges) if e.target == b and e.source] for b in range(1, net.layers + 1)
        ]
        self.out_of = [[i for i, e in enumerate(net.edges) if e.source == a] for a in range(1, net.layers + 1)]

    def _up(self, i: int):
        e = self.net.edges[i]
        if i not in self.made:
            self.made[i] = self.up(e, self.kernels[i], self.states[e.source - 1])
        return self.made[i]

    def preactivation(self, layer: int) -> Tensor:
        net, s = self.net, self.states[layer]
        total = None
        for i in self.into[layer]:
            e = net.edges[i]
            part = self._up(i)[0] if e.stride else _dense(net, e, self.kernels[i], self.states[e.source - 1])
            total = part if total is None else total + part
        for i in self.out_of[layer]:
            e, high = net.edges[i], self.states[net.edges[i].target - 1]
            if e.stride:
                part = self.down(e, self.kernels[i], self._up(i)[1], s, high)
            else:
                part = (high.flatten(1) @ self.kernels[i].down).view(s.shape)
            scale = net.scales[e.target - 1] / net.scales[layer]
            part = part if scale == 1 else part * scale
            total = part if total is None else total + part
        drive = self.drive[layer]
        if total is None:
            return drive.expand(s.shape) if drive.dim() < s.dim() else drive.repeat(self.phases, *[1] * (s.dim() - 1))
        if self.phases == 1 or drive.dim() < s.dim():
            return total + drive
        return (total.unflatten(0, (self.phases, -1)) + drive).flatten(0, 1)

    def replace(self, layer: int, s: Tensor) -> None:
        self.states[layer] = _last(s)
        for i in self.out_of[layer]:
            self.made.pop(i, None)


def _last(s: Tensor) -> Tensor:
    return s.contiguous(memory_format=torch.channels_last) if s.dim() == 4 else s


def settle(net, weights, x, states, target, betas, steps, schedule, ready=None, make=Steps):
    """As energy.settle; ready: of `prepare`, for these weights and this x."""
    ready = prepare(net, weights, x) if ready is None else ready
    run, last = make(net, ready, states, len(betas)), net.layers - 1
    beta = None
    if any(betas):
        rows = x.new_tensor(betas).repeat_interleave(len(x))
        beta, goal = rows.view(-1, *[1] * (states[-1].dim() - 1)), target.repeat(len(betas), 1)
    before = run.states
    for _ in range(steps):
        before = list(run.states)
        for part in net.parts(schedule):
            fresh = []
            for layer in part:
                u = run.preactivation(layer)
                if beta is not None and layer == last:
                    u = u - beta * force(net, weights, run.states[last], goal)
                fresh.append(phi(net, layer, u))
            for layer, s in zip(part, fresh):
                run.replace(layer, s)
    moved = sum((a - b).detach().square().flatten(1).sum(1) for a, b in zip(run.states, before)).sqrt()
    moved = moved.view(len(betas), -1) if steps else moved.new_full((len(betas), len(x)), torch.inf)
    return run.states, moved


def gradients(net, weights, x, states, betas):
    """As energy.gradients."""
    samples = len(x)
    scale = -1 / ((betas[1] - betas[0]) * max(samples, 1))
    sign = x.new_tensor([-scale, scale]).repeat_interleave(samples)
    s = [_last(x), *map(_last, states)]
    signed = [v * sign.view(-1, *[1] * (v.dim() - 1)) for v in states]
    kernels, biases = [], []
    for e, weight in zip(net.edges, weights.kernels):
        before, after = s[e.source], signed[e.target - 1] * net.scales[e.target - 1]
        if not e.source:
            after = after[:samples] + after[samples:]
        if not e.stride:
            kernels.append(before.flatten(1).t() @ after.flatten(1))
            continue
        kernel = _upwards(e, weight)
        kept = up(e, kernel, before)[1] if e.pool in ("max", "softmax") else None
        back = spread(e, kernel, kept, before, _last(after))
        sizes = [kernel.stride] * 2, [e.padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
        grad = _backward(back, before, kernel.up, None, *sizes)[1]
        kernels.append(_of_averaged(grad, weight, e.stride) if e.pool == "avg" else grad)
    for c, bias, v in zip(net.scales, weights.biases, signed):
        total = (v * c).flatten(2).sum((0, 2)) if v.dim() == 4 else (v * c).sum(0)
        biases.append(total.view(bias.shape))
    return [g.contiguous() for g in kernels], biases


def _of_averaged(grad, weight, stride):
    size = weight.shape[2]
    return sum(grad[..., i : i + size, j : j + size] for i in (0, stride) for j in (0, stride)) / 4
