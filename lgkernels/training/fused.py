"""Finds the end of a block that one kernel can run: Conv2d, BatchNorm2d, LeakyReLU or ReLU, MaxPool2d(2) or none."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..ops.direct import autograd as direct

End = tuple[nn.Module, nn.Module, nn.Module, nn.Module | None]  # convolution, norm, activation, pool

_PAIR = (2, (2, 2))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _leaves(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules in the order of their calls; a Sequential with hooks is one."""
    for module in modules:
        if type(module) is nn.Sequential and not _hooked(module):
            yield from _leaves(module)
        else:
            yield module


def _halves(pool: nn.Module) -> bool:
    return (
        type(pool) is nn.MaxPool2d
        and pool.kernel_size in _PAIR
        and pool.stride in _PAIR
        and pool.padding in (0, (0, 0))
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def split(modules: list[nn.Module]) -> tuple[list[nn.Module], End | None]:
    """`(modules before, (conv, norm, activation, pool or None))`, or `(modules, None)` where no kernel is for them."""
    leaves = list(_leaves(modules))
    pool = [leaves.pop()] if leaves and _halves(leaves[-1]) else []
    if len(leaves) < 3 or any(map(_hooked, [*leaves[-3:], *pool])):
        return modules, None
    conv, norm, activation = leaves[-3:]
    end: End = (conv, norm, activation, pool[0] if pool else None)
    fits = (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and type(norm) is nn.BatchNorm2d
        and norm.num_features == conv.out_channels  # else torch's own error
        and norm.training
        and norm.affine
        and (norm.momentum is not None or not norm.track_running_stats)
        and type(activation) in (nn.ReLU, nn.LeakyReLU)
        and conv.weight.is_contiguous()
        and conv.weight.dtype == norm.weight.dtype == torch.float32
    )
    return (leaves[:-3], end) if fits else (modules, None)


def _usable(x: torch.Tensor, conv: Any, pool: nn.Module | None) -> bool:
    """Whether x is what the kernel takes, and no error of torch's own layers is due."""
    if x.dim() != 4 or not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
        return False
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride)
    ]
    return min(size) > (1 if pool else 0) and len(x) * size[0] * size[1] > 1 and direct.fused(x.device, x.dtype)


def run(
    x: torch.Tensor, conv: Any, norm: Any, activation: nn.Module, pool: nn.Module | None
) -> tuple[torch.Tensor, Any]:
    """`(output, Signal)` of the block's end; without a kernel for x the modules themselves, and None."""
    if not _usable(x, conv, pool):
        for module in filter(None, (conv, norm, activation, pool)):
            x = module(x)
        return x, None
    signal = direct.Signal()
    slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
    out = direct.block(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        (norm.running_mean, norm.running_var),
        signal,
        (conv.stride, conv.padding, conv.dilation, conv.groups),
        norm.momentum or 0.0,
        norm.eps,
        slope,
        pool is not None,
    )
    if norm.track_running_stats and norm.num_batches_tracked is not None:  # None in what others have converted
        norm.num_batches_tracked.add_(1)
    return out, signal
