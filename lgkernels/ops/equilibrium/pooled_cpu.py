"""3x3 convolutions of stride 1 with a 2x2 max, softmax or average pool, and their transposes, by the C++ kernels in
csrc/equilibrium/cpu/pooled.h. Float32, of layers whose channels are multiples of 16."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.native import cpu_entries, threads
from ..common.cpu import address

_C = cpu_entries()
_CHANNELS = 16  # the widest vector
_MEAN = [0, 1, 3, 4, 5, 7, 12, 13, 15]  # the points that a mean needs


class Panels(NamedTuple):
    """A kernel, transformed and packed, for both directions."""

    shape: torch.Size
    padding: int
    pool: str
    up: Tensor
    down: Tensor

    def edge(self, images: Tensor) -> tuple:
        """PooledEdge of the kernels."""
        return len(images), *images.shape[2:], self.shape[1], self.shape[0], self.padding, self.pool


def takes(kernel: Tensor) -> bool:
    """Whether the kernels have such a convolution."""
    return (
        kernel.dtype == torch.float32
        and kernel.shape[2:] == (3, 3)
        and not any(n % _CHANNELS for n in kernel.shape[:2])
    )


def panels(kernel: Tensor, padding: int, pool: str) -> Panels:
    half = kernel.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    weights = torch.einsum("ai,oxij,bj->abxo", half, kernel.detach(), half)  # G g G^T
    weights = weights.reshape(16, *kernel.shape[1::-1])
    weights = (weights[_MEAN] if pool == "avg" else weights).contiguous()
    both = [torch.empty_like(weights) for _ in range(2)]
    high, low = kernel.shape[:2]
    sizes = 1, 1, 1, low, high, padding, pool
    _C.equilibrium_pack_pooled(sizes, *map(address, (weights, *both)), threads())
    return Panels(kernel.shape, padding, pool, *both)


def _kept(made: Panels, kept: Tensor | None) -> tuple:
    """PoolKept of the kernels."""
    return (address(kept), 0) if made.pool == "max" else (0, address(kept))  # of a mean both 0


def up(made: Panels, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """`(P(s), what the pool kept)`: the places of the maxima, shaped like P(s), slopes (B, H, W, 4, C), or None."""
    s = s.contiguous(memory_format=torch.channels_last)
    high, low = made.shape[:2]
    size = [(n + 2 * made.padding - 2) // 2 for n in s.shape[2:]]
    value = torch.empty((len(s), high, *size), dtype=s.dtype, memory_format=torch.channels_last, device="cpu")
    kept = None
    if made.pool == "max":
        kept = torch.empty_like(value, dtype=torch.int32)
    elif made.pool == "softmax":
        kept = s.new_empty(len(s), *size, 4, high)
    points = s.new_empty(len(made.up) * len(s) * size[0] * size[1] * low)
    tensors = [address(t) for t in (s, made.up, value)]
    _C.equilibrium_pooled_up(made.edge(s), *tensors, _kept(made, kept), address(points), threads())
    return value, kept


def down(made: Panels, kept: Tensor | None, s: Tensor, high: Tensor) -> Tensor:
    """DP(s)^T high."""
    high = high.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(s, memory_format=torch.channels_last)
    points = s.new_empty(len(made.up) * high.numel())
    tensors = [address(t) for t in (made.down, result, points)]
    _C.equilibrium_pooled_down(made.edge(s), address(high), _kept(made, kept), *tensors, threads())
    return result
