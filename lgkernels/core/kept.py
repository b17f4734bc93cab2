"""Tensors that are made once in a process and stay where they are: tables and constants that ops read.

A CUDA graph reads them at every replay, so on a device they are never freed, and never lie in the memory of a graph. A
graph that is warmed up or recorded (`torch.compile(mode="reduce-overhead")`) takes over what its thread allocates, and
writes over it later. Therefore a thread of its own makes them, which has no modes of the caller's either (inference,
fake tensors). And where sizes are known, they are made before the first run: `prepare=` of `core/ops.define`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any

import torch

MOST = 64  # of a kind that are kept where no graph holds their addresses


def capturing(device: torch.device) -> bool:
    """Whether the current stream is recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def present(device: torch.device) -> bool:
    """Whether tensors can be made there: a trace may be about a device that is not."""
    return device.type == "cpu" or device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()


def made(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """`make()`, a tensor of the CPU, on `device`. The copy is complete when this returns, for every stream."""
    if capturing(device):
        raise RuntimeError(
            "a table that an op makes at its first call cannot be made while a CUDA graph is captured: run one step "
            "before the capture, as torch's documentation asks for"
        )
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: make().to(device)).result()


def kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: `make(*key)`, a tensor of the CPU, becomes `get(device, *key)`, the same tensor at each call."""

    def on(device: torch.device, *key: Any) -> torch.Tensor:
        return made(lambda: make(*key), device)

    some, all_ = lru_cache(maxsize=MOST)(on), lru_cache(maxsize=None)(on)

    @wraps(make)
    def get(device: torch.device, *key: Any) -> torch.Tensor:
        if device.type != "cuda":
            return some(device, *key)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return all_(device, *key)

    return get
