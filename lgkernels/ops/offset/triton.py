"""The step in Triton: one launch over a table of chunks, whose rows hold the addresses of a piece of a parameter and of
what belongs to it. float32 parameters; offsets in float32 or bfloat16 (one launch each where both occur).

The table is an int64 tensor on the device, built once for the same addresses and sizes; gradients that move cost a new
copy of it. CPU tensors work under TRITON_INTERPRET=1.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from ...core.kept import capturing
from ..common.addressing import offset, program_id
from ..common.launch import block_count, configuration, launch
from .memory import stepper
from .tiles import TILES


@triton.jit
def _at(address, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    at = tl.cast(address, tl.pointer_type(DTYPE)) + i
    return tl.max_contiguous(tl.multiple_of(at, 16), 16) if ALIGNED else at


@triton.jit
def _chunk(
    weights,
    grads,
    buffers,
    offsets,
    size,
    lr,
    momentum,
    weight_decay,
    grad_scale,
    offset_scale,
    MOMENTUM: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    if ALIGNED:
        size = size // 16 * 16  # as it is, and now the compiler knows: the mask does not break up the loads
    for part in range(PARTS):
        i = part * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        w_at, v_at = _at(weights, i, tl.float32, ALIGNED), _at(buffers, i, tl.float32, ALIGNED)
        w = tl.load(w_at, mask=inside, other=0.0)
        g = tl.load(_at(grads, i, tl.float32, ALIGNED), mask=inside, other=0.0)
        tilt = tl.load(
            _at(offsets, i, tl.bfloat16 if HALF else tl.float32, ALIGNED), mask=inside & (offsets != 0), other=0.0
        ).to(tl.float32)
        v = g * grad_scale + tilt * offset_scale + w * weight_decay
        if MOMENTUM:
            v += tl.load(v_at, mask=inside, other=0.0) * momentum
            tl.store(v_at, v, mask=inside)
        tl.store(w_at, w - v * lr, mask=inside)


@triton.jit
def offset_sgd_kernel(
    table,
    lr,
    momentum,
    weight_decay,
    grad_scale,
    offset_scale,
    MOMENTUM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """g = grad_scale * grad + offset_scale * offset + weight_decay * w; v = momentum * v + g; w -= lr * v, over one row
    (addresses of w, grad, v and offset, number of elements) of the table; 0 is the address of an offset that is 0."""
    row = table + offset(program_id(0), 5)
    weights, grads, buffers = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    offsets, size = tl.load(row + 3), tl.load(row + 4)
    lr, momentum = tl.cast(lr, tl.float32), tl.cast(momentum, tl.float32)
    weight_decay = tl.cast(weight_decay, tl.float32)
    grad_scale, offset_scale = tl.cast(grad_scale, tl.float32), tl.cast(offset_scale, tl.float32)
    if (weights | grads | buffers | offsets | size) % 16 == 0:
        _chunk(
            weights,
            grads,
            buffers,
            offsets,
            size,
            lr,
            momentum,
            weight_decay,
            grad_scale,
            offset_scale,
            MOMENTUM,
            HALF,
            True,
            BLOCK,
            PARTS,
        )
    else:
        _chunk(
            weights,
            grads,
            buffers,
            offsets,
            size,
            lr,
            momentum,
            weight_decay,
            grad_scale,
            offset_scale,
            MOMENTUM,
            HALF,
            False,
            BLOCK,
            PARTS,
        )


_captured: list[tuple[torch.Tensor, torch.Tensor]] = []  # what a CUDA graph reads at every replay


def _pinned(host):
    """Memory of the host like this, from which a copy to the device needs no waiting."""
    return torch.empty(host.shape, dtype=host.dtype, pin_memory=True, device="cpu")


def _copied(host, device):
    """A copy on the device, made by the current stream. `host` is pinned."""
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)


class _Table:
    """The rows (chunks, 5) on the host, and a copy of them on the device for one stream.

    Another stream gets a copy of its own: nothing orders it behind the first one's. A step that is captured in a CUDA
    graph gets one too, with the addresses of that moment, whose source in pinned memory is never written again: the
    graph copies it at every replay. That memory is made by an eager step before, since a capture must not.
    """

    def __init__(self, rows, places, starts, device, spare=None):
        self.rows, self.places, self.starts, self.device = rows, places, starts, device
        self.copy, self.stream, self.spare = None, None, spare

    def moved(self, addresses):
        """The table for gradients at other addresses, by the number of their parameter."""
        rows = self.rows.copy()
        rows[:, 1] = np.asarray(addresses, dtype=np.int64)[self.places] + self.starts
        spare, self.spare = self.spare, None
        return _Table(rows, self.places, self.starts, self.device, spare)

    def on_device(self):
        """The copy for the current stream."""
        host = torch.from_numpy(self.rows)
        if self.device.type == "cpu":
            return host
        if capturing(self.device):
            return self._of_a_graph(host)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if self.copy is None or self.stream != stream:
            self.copy, self.stream = _copied(_pinned(host).copy_(host), self.device), stream
        if self.spare is None:
            self.spare = _pinned(host)
        return self.copy

    def _of_a_graph(self, host):
        if self.spare is None:
            raise RuntimeError(
                "the offset step cannot make a new table of addresses while a CUDA graph is captured: take a step "
                "of the same optimizer, with the same parameters, before each capture, or set LGKERNELS_IMPL=cuda: "
                "that kernel's table is an argument"
            )
        source, self.spare = self.spare, None
        copy = _copied(source.copy_(host), self.device)
        _captured.append((source, copy))
        return copy


@lru_cache(maxsize=64)
def _table(pieces, chunk, device):
    """From rows (addresses of w, grad, v and offset, bytes of an element of the offset, elements, number of the
    parameter)."""
    rows = np.array(pieces, dtype=np.int64)
    addresses, offset_bytes, sizes, numbers = rows[:, :4], rows[:, 4], rows[:, 5], rows[:, 6]
    chunks = block_count(sizes, chunk)
    owner = np.repeat(np.arange(len(rows)), chunks)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk
    element = np.stack([np.full_like(sizes, 4)] * 3 + [offset_bytes], 1)
    table = np.empty((len(owner), 5), np.int64)
    table[:, :4] = np.where(addresses[owner] != 0, addresses[owner] + start[:, None] * element[owner], 0)
    table[:, 4] = np.minimum(sizes[owner] - start, chunk)
    return _Table(table, numbers[owner], 4 * start, device)


def prepare(rows):
    """[(table, whether its offsets are bfloat16, launch settings)]"""
    pieces = {}
    for number, (param, grad, buffer, tilt) in enumerate(rows):
        if param.numel():
            half = tilt is not None and tilt.dtype == torch.bfloat16
            addresses = (0 if t is None else t.data_ptr() for t in (param, grad, buffer, tilt))
            pieces.setdefault(half, []).append((*addresses, 2 if half else 4, param.numel(), number))
    tables, device = [], rows[0][0].device if rows else None
    for half, members in pieces.items():
        largest = max(piece[5] for piece in members)
        config = configuration(TILES["offset_sgd"], (largest,), rows[0][0])
        tables.append((_table(tuple(members), config["BLOCK"] * config["PARTS"], device), half, config))
    return tables


def moved(tables, addresses):
    """The tables for gradients at other addresses."""
    return [(table.moved(addresses), half, config) for table, half, config in tables]


def run(tables, device, options):
    for table, half, config in tables:
        rows = table.on_device()
        launch(
            offset_sgd_kernel,
            len(rows),
            device,
            rows,
            *options.of_kernels(),
            MOMENTUM=bool(options.momentum),
            HALF=half,
            **config,
        )


step_ = stepper(prepare, run)
