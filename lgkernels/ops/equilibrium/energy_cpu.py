"""Energy nets over csrc/equilibrium/cpu/pooled.h: 3x3 convolutions with a max pool of layers whose channels are
multiples of 16, float32. All else is plain torch's."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.native import cpu_entries
from ..common.cpu import address
from . import energy_torch as lean
from .energy_torch import gradients

__all__ = ["gradients", "prepare", "settle"]

_C = cpu_entries()
_CHANNELS = 16  # the widest vector


class Panels(NamedTuple):
    """A kernel, transformed and packed, for both directions."""

    shape: torch.Size
    up: Tensor
    down: Tensor


def _transformed(kernel):
    """G g G^T, (16, low, high)."""
    half = kernel.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.einsum("ai,oxij,bj->abxo", half, kernel, half).reshape(16, *kernel.shape[1::-1]).contiguous()


def _edge(shape, padding, images):
    """PooledEdge of the kernels."""
    return len(images), *images.shape[2:], shape[1], shape[0], padding


def kernel_of(edge, kernel):
    wide = not any(n % _CHANNELS for n in kernel.shape[:2])
    if edge.pool != "max" or edge.stride != 1 or kernel.shape[2] != 3 or not wide:
        return lean.kernel_of(edge, kernel)
    weights = _transformed(kernel)
    panels = [torch.empty_like(weights) for _ in range(2)]
    high, low = kernel.shape[:2]
    sizes = 1, 1, 1, low, high, 1
    _C.equilibrium_pack_pooled(sizes, *map(address, (weights, *panels)), torch.get_num_threads())
    return Panels(kernel.shape, *panels)


class CpuSteps(lean.Steps):
    @staticmethod
    def up(edge, kernel, s):
        if not isinstance(kernel, Panels):
            return lean.up(edge, kernel, s)
        high, low = kernel.shape[:2]
        size = [(n + 2 * edge.padding - 2) // 2 for n in s.shape[2:]]
        value = torch.empty((len(s), high, *size), dtype=s.dtype, memory_format=torch.channels_last)
        place = torch.empty_like(value, dtype=torch.int32)
        points = s.new_empty(16 * len(s) * size[0] * size[1] * low)
        sizes = _edge(kernel.shape, edge.padding, s)
        tensors = s, kernel.up, value, place, points
        _C.equilibrium_pooled_up(sizes, *map(address, tensors), torch.get_num_threads())
        return value, place

    @staticmethod
    def down(edge, kernel, kept, s, high):
        if not isinstance(kernel, Panels):
            return lean.down(edge, kernel, kept, s, high)
        result = torch.empty_like(s, memory_format=torch.channels_last)
        points = s.new_empty(16 * high.numel())
        sizes = _edge(kernel.shape, edge.padding, s)
        tensors = high, kept, kernel.down, result, points
        _C.equilibrium_pooled_down(sizes, *map(address, tensors), torch.get_num_threads())
        return result


def _by_kernel(weights, x):
    learning = torch.is_grad_enabled() and any(w.requires_grad for w in weights.kernels)
    return x.dtype == torch.float32 and len(x) and not learning


@torch.compiler.disable  # as below
def prepare(net, weights, x):
    return lean.prepare(net, weights, x, kernel_of) if _by_kernel(weights, x) else lean.prepare(net, weights, x)


@torch.compiler.disable  # its calls of the native module take addresses, of which Dynamo would keep no tensor alive
def settle(net, weights, x, states, target, betas, steps, schedule, ready=None):
    """As energy.settle."""
    ready = prepare(net, weights, x) if ready is None else ready
    return lean.settle(net, weights, x, states, target, betas, steps, schedule, ready, CpuSteps)
