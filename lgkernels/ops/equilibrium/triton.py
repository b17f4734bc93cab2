"""Nets that settle in Triton: the functions of reference.py, float32.

A dense net's step is one launch for all layers (triton_step.py); a conv net's is the library's convolutions with a
launch for each pool and its derivative, and one for each layer's sum and activity (triton_pool.py). Steps are started
one by one and wait for nothing, so that a CUDA graph can hold them, unless there is a tolerance: then the host looks at
every step. Real and complex phases run by themselves.

An error's sum over its phases is a launch a layer, of the activities that the last step leaves. It is no part of that
step: the phases of a sample belong to different programs, and what they would add in any order is not repeatable.

Plain torch's: noisy homeostatic losses, tangents of conv nets, and dense nets whose nudged last layer or classes are
more than a tile has. CPU tensors work under TRITON_INTERPRET=1.
"""

import torch
import torch.nn.functional as F

from ..common.dot import float32_precision
from ..common.launch import block_count, configuration, launch, new
from . import reference, triton_pool
from . import torch as lean
from .dense_plan import packed_weights, padded, plan_of
from .field import Packed, force
from .loop import by_kind, repeated
from .options import Phases, circle, one_phase, shares
from .tiles import TILES, WIDEST
from .torch import by_phase
from .triton_activations import COMPLEX, REAL, TANGENT
from .triton_step import step_kernel

_MOST = 2**31 - 1


def settle(state, drive, net, target, phases, options):
    if not _by_kernels(state, net, target, len(state[0])):
        return lean.settle(state, drive, net, target, phases, options)
    if options.tolerance is not None and phases.many > 1:
        return by_phase(settle, state, drive, net, target, phases, options)
    return by_kind(_of_one_kind, state, drive, net, target, phases, options)


def error(state, drive, net, target, beta, points, options):
    phases, dense = circle(beta, points) if points else one_phase(1.0), state[0].dim() == 2
    taken = _by_kernels(state, net, target, len(state[0]) * phases.rows)
    if not taken or options.tolerance is not None if points else not taken or not dense:
        return reference.error(state, drive, net, target, beta, points, options, settle)
    free, dtype = [v.float().contiguous() for v in state], state[0].dtype
    if not points:
        options = options._replace(schedule="synchronous", tolerance=None)
        run = _Dense(free, drive, net, target, phases, options, TANGENT.value, free=True)
        steps, _, residual, _ = run.settled()
        return [e.to(dtype) for e in run.tangents()], (residual if steps else torch.zeros_like(residual)).to(dtype)
    e, residuals, counts = [torch.empty_like(v) for v in free], [], shares(phases, points)
    for some, real in ((slice(0, phases.real_phases), True), (slice(phases.real_phases, phases.many), False)):
        betas = phases.beta_real[some], phases.beta_imag[some]
        own = Phases(*betas, len(betas[0]) if real else 0)
        if own.many:
            run = (_Dense if dense else _Conv)(
                free, drive, net, target, own, options, REAL.value if real else COMPLEX.value, free=True
            )
            residuals.append(run.settled()[2])
            share = new(free[0], own.many, 2)
            for k, count in enumerate(counts[some]):  # as the betas are written
                share[k, 0].fill_(count.real)
                share[k, 1].fill_(count.imag)
            for layer, (out, v) in enumerate(zip(e, free)):
                _add_phases(run, layer, v, share, out, not real)
    return [v.to(dtype) for v in e], torch.cat(residuals).to(dtype)


def _add_phases(run, layer, start, share, out, add):
    samples, units = len(start), start[0].numel()
    config = configuration(TILES["error"], (start.numel(),), start, torch.float32)
    launch(
        triton_pool.error_kernel,
        block_count(start.numel(), config["BLOCK"]),
        start.device,
        run.activities(layer),
        start,
        share,
        out,
        run.many,
        *run.distances(layer),
        samples,
        run.width(layer),
        units,
        int(add),
        KIND=run.kind,
        ACTIVATION=run.options.activation,
        **config,
    )


def _by_kernels(state, net, target, rows):
    """Whether kernels take so many rows: they have entries, indices of int32 are enough, and tiles have all of the last
    layer."""
    if not all(v.numel() for v in state):
        return False
    if state[0].dim() != 2:
        windows = max(v[0].numel() for v in state) * 4 * rows
        return windows <= _MOST
    wide = target is not None and max(state[-1].shape[1], target.shape[1]) > WIDEST
    sizes = sum(w.numel() for w in net.weights) + WIDEST * sum(v.shape[1] for v in state), rows
    return not wide and max(sizes) <= _MOST // 8


def _of_one_kind(state, drive, net, target, phases, options):
    kind = REAL.value if phases.real_phases else COMPLEX.value
    run = (_Dense if state[0].dim() == 2 else _Conv)(state, drive, net, target, phases, options, kind)
    _, steps, residual, orbit = run.settled()
    dtype = state[0].dtype
    return run.states(), steps, residual.to(dtype), orbit.to(dtype)


class _Dense:
    """The buffers of a run. u: the states of three steps in turn; r: activities, those now and those to come. free:
    state is what all phases start from, (B, n) of a layer."""

    def __init__(self, state, drive, net, target, phases, options, kind, free=False):
        self.like, self.kind, self.options = state, kind, options
        self.samples, self.many, self.parts = len(drive[0]), phases.many, 1 if kind == REAL.value else 2
        self.items = self.samples * self.many
        widths, last = tuple(v.shape[1] for v in state), state[-1].shape[1]
        self.softmax = options.loss != "mse"
        readout = net.readout if self.softmax and target is not None else None
        sizes = self.items, 0 if target is None else last, self.parts == 2
        config = configuration(TILES["step"], sizes, state[0], torch.float32)
        nudge = 0
        if target is not None:
            classes = 64 if target.shape[1] > 32 else 32
            nudge = config["BLOCK_N"] if readout is None else max(classes, config["BLOCK_K"])
        self.config = config | {"BLOCK_C": max(nudge, 16)}
        device = state[0].device
        self.plan = plan = plan_of(widths, tuple(net.edges), nudge, config["BLOCK_N"], config["BLOCK_K"], device)
        self.weights = packed_weights(plan, net.weights, readout, last)
        self.readout = self.bias = self.goal = self.beta = None
        if target is not None:
            self.goal = padded(target, self.samples, nudge)
            self.readout = None if readout is None else padded(readout, config["BLOCK_N"], nudge)
            if self.softmax:
                zero = torch.zeros_like(target[0]) if net.readout_bias is None else net.readout_bias
                self.bias = padded(zero, nudge, value=-torch.inf)
            self.beta = new(target, self.many, 2)
            for k, beta in enumerate(phases.betas):  # written on the device: a graph may be recording
                self.beta[k, 0].fill_(beta.real)
                self.beta[k, 1].fill_(beta.imag)
        self.drive = new(state[0], self.samples, plan.width).zero_()
        for v, column in zip(drive, plan.columns):
            self.drive[:, column : column + v.shape[1]].copy_(v)
        self.u = new(state[0], 3, self.parts, self.items, plan.width)
        self.u[0].zero_()
        for layer, v in enumerate(state):
            self._layer(self.u[0], layer, one=free).copy_(v if free else self._outer(v))
        self.r = new(state[0], 2, *self.u.shape[1:])
        self.now = [0, 0]  # which half of r the even and the odd layers have
        self.precision = float32_precision()

    def _outer(self, v):
        """A layer's rows, as `Phases` lays them out, by parts (1 or 2, phases, B, n)."""
        if self.kind == COMPLEX.value:
            return v.unflatten(0, (self.many, 2, self.samples)).transpose(0, 1)
        return v.unflatten(0, (1, self.many, self.samples))

    def _layer(self, buffer, layer, one=False):
        """The same of a buffer (1 or 2, items, N); one: of the first part alone."""
        column = self.plan.columns[layer]
        rows = buffer[: 1 if one else self.parts, :, column : column + self.like[layer].shape[1]]
        return rows.unflatten(1, (self.many, self.samples))

    def _launch(self, part, u, start=False):
        first, blocks = (0, sum(n for _, n in self.plan.blocks)) if part is None else self.plan.blocks[part]
        launch(
            step_kernel,
            blocks * block_count(self.items, self.config["BLOCK_M"]),
            u.device,
            self.plan.table,
            self.weights,
            self.u[0] if start else self.drive,
            self.r,
            u,
            self.readout,
            self.bias,
            self.goal,
            self.beta,
            first,
            *self.now,
            self.items,
            self.samples,
            self.items if start else self.samples,
            int(start),
            self.plan.width,
            KIND=self.kind,
            ACTIVATION=self.options.activation,
            NUDGE=self.goal is not None,
            SOFTMAX=self.softmax,
            PRECISION=self.precision,
            **self.config,
        )
        for k in (0, 1) if part is None else (part,):
            self.now[k] = 1 - self.now[k]

    def _step(self, t):
        for part in (None,) if self.options.schedule == "synchronous" else (0, 1):
            self._launch(part, self.u[(t + 1) % 3])

    def _moved(self, t, back):
        """Of all parts of a complex state, of a tangent's value alone."""
        parts = 1 if self.kind == TANGENT.value else self.parts
        now, before = (self.u[k % 3, :parts, :, : self.plan.units] for k in (t, t - back))
        return (now - before).square().sum((0, 2)).sqrt().view(self.many, self.samples)

    def settled(self):
        self._launch(None, self.u[0], start=True)
        result = repeated(self._step, self._moved, self.options, new(self.u, self.many, self.samples))
        self.last = self.u[result[0] % 3]
        return result

    def states(self):
        results = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in self.like]
        for layer, v in enumerate(results):
            self._outer(v).copy_(self._layer(self.last, layer))
        return results

    def tangents(self):
        """Those of the activities."""
        results = [torch.empty_like(v) for v in self.like]
        for layer, v in enumerate(results):
            self._outer(v).copy_(self._layer(self.r[self.now[layer % 2], 1:], layer, one=True))
        return results

    def activities(self, layer):
        """Of a layer after the last step; from its first unit on."""
        return self.r[self.now[layer % 2]].flatten()[self.plan.columns[layer] :]

    def distances(self, layer):
        """Of a row of the activities to that of the next phase, and to its imaginary part."""
        return self.samples * self.plan.width, self.items * self.plan.width

    def width(self, layer):
        return self.plan.width


class _Conv:
    """A run of a conv net. Complex rows are convolved as real ones: the weights are real."""

    def __init__(self, state, drive, net, target, phases, options, kind, free=False):
        self.like, self.kind, self.options, self.net, self.target = state, kind, options, net, target
        self.samples, self.many = len(drive[0]), phases.many
        self.drive = drive[0].float().contiguous()
        self.values = Packed(phases, self.samples, self.drive)
        self.u = [[self.values.rows_of(v) if free else v.float().contiguous() for v in state]]
        self.pairs = {}
        for a, b, w, bias in net.routes():
            pair = self.pairs.setdefault(min(a, b), [None, None, None])
            pair[0 if a < b else 1] = w.float().contiguous()
            pair[2] = (None if bias is None else bias.float().contiguous()) if a < b else pair[2]
        self.both = {low: torch.cat(pair[:2]) for low, pair in self.pairs.items() if None not in pair[:2]}
        self.r = [self._close(v, None, None, False)[1] for v in self.u[0]]

    def _launch(self, kernel, first, images, each, *args, **meta):
        config = configuration(TILES["stream"], (images * each,), first, torch.float32)
        programs = block_count(images * each, config["BLOCK"])
        launch(kernel, programs, first.device, first, *args, KIND=self.kind, **meta, **config)

    def _images(self):
        return self.samples * self.many

    def _close(self, first, second, drive, keep=True):
        """(u, r) of a layer from what comes in."""
        u, r = torch.empty_like(first) if keep else None, torch.empty_like(first)
        size, images = first[0].numel(), self._images()
        args = second, drive, u, r, images, self.samples, size
        self._launch(triton_pool.layer_kernel, first, images, size, *args, ACTIVATION=self.options.activation)
        return u, r

    def _pair(self, low, up, down):
        """What the edges between a layer and the next one add to either; up, down: whether it is wanted."""
        w_up, w_down, bias = self.pairs[low]
        up, down = up and w_up is not None, down and w_down is not None
        if not (up or down):
            return None, None
        padding = self.net.padding(low, low + 1)
        z = F.conv2d(self.r[low], self.both[low] if up and down else w_up if up else w_down, padding=padding)
        rows, channels = len(z), (w_up if up else w_down).shape[0]
        height, width = z.shape[2:]
        out = new(z, rows, channels, height // 2, width // 2) if up else None
        # an odd last row or column is in no window
        make = torch.zeros if height % 2 or width % 2 else torch.empty
        back = make(rows, channels, height, width, dtype=z.dtype, device=z.device) if down else None
        images, windows = self._images(), channels * (height // 2) * (width // 2)
        args = bias if up else None, self.r[low + 1], out, back, images, self.samples, channels, height, width
        self._launch(triton_pool.pool_kernel, z.contiguous(), images, windows, *args)
        return out, F.conv_transpose2d(back, w_down, padding=padding).contiguous() if down else None

    def _step(self, t):
        layers = range(self.net.layers)
        u = [None] * self.net.layers
        for part in (layers,) if self.options.schedule == "synchronous" else (layers[::2], layers[1::2]):
            terms = {b: [] for b in layers}
            for low in self.pairs:
                up, down = self._pair(low, low + 1 in part, low in part)
                terms[low + 1].append(up)
                terms[low].append(down)
            new_r = list(self.r)
            for b in part:
                first, *rest = [v for v in terms[b] if v is not None] or [torch.zeros_like(self.r[b])]
                if b == self.net.layers - 1 and self.target is not None:
                    nudge = self.values.pointwise(self._force, self.r[b])
                    first = self.values.nudged(first, nudge)
                u[b], new_r[b] = self._close(first, *(rest or [None]), self.drive if b == 0 else None)
            self.r = new_r
        self.u = [*self.u[-2:], u]

    def _force(self, r):
        return force(self.net, r, self.target, self.options.loss)

    def _moved(self, t, back):
        return self.values.squares([v - w for v, w in zip(self.u[-1], self.u[-1 - back])]).sqrt()

    def settled(self):
        return repeated(self._step, self._moved, self.options, new(self.drive, self.many, self.samples))

    def activities(self, layer):
        return self.r[layer]

    def distances(self, layer):
        """As of a dense net."""
        image = self.width(layer) * self.samples
        return image * (2 if self.kind == COMPLEX.value else 1), image

    def width(self, layer):
        return self.r[layer][0].numel()

    def states(self):
        return [v.to(like.dtype).clone() if v is like else v.to(like.dtype) for v, like in zip(self.u[-1], self.like)]


# -- the homeostatic loss ---------------------------------------------------------------------------------------------


def homeostasis(weights, eps, edges, sizes, estimator):
    pairs = list(zip(edges[::2], edges[1::2]))
    single = len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs)
    if estimator != "exact" or not single or not all(w.numel() for w in weights):
        return lean.homeostasis(weights, eps, edges, sizes, estimator)
    given = [w.float().contiguous() for w in weights]
    grads = [torch.empty_like(w) for w in given]
    jobs, place = [], dict(zip(pairs, range(len(pairs))))
    for i, (a, b) in enumerate(pairs):
        j = place.get((b, a))
        if j is None or i < j:
            config = configuration(TILES["skew"], given[i].shape, given[i])
            blocks = [block_count(n, config[f"BLOCK_{x}"]) for n, x in zip(given[i].shape, "RC")]
            jobs.append((i, j, config, blocks[0] * blocks[1]))
    sums = new(given[0], sum(job[-1] for job in jobs))
    for (i, j, config, programs), own in zip(jobs, sums.split([job[-1] for job in jobs])):
        down, grad = (None, None) if j is None else (given[j], grads[j])
        args = given[i], down, grads[i], grad, own, *given[i].shape, 2.0 / sum(sizes)
        launch(triton_pool.skew_kernel, programs, own.device, *args, **config)
    dtype = weights[0].dtype
    return (sums.sum() / sum(sizes)).to(dtype), [g.to(w.dtype) for g, w in zip(grads, weights)]
