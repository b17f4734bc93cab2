"""Block sizes of the Triton kernels: pure functions over the tables of each family (`ops/<family>/tiles.py`).

A family's `TILES[op](sizes, dtype, arch)` gives blocks, warps and stages. `select` rounds sizes up to powers of two
first, so that a changing batch or feature map does not compile a kernel anew. There is no tuning at run time. Under
TRITON_INTERPRET=1 the architecture is "interpret": a program costs about a millisecond there, whatever its size, so
blocks are as large as the data.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

# Shared memory that one block may use, bytes.
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# Architectures with bfloat16, and with matrix instructions that Triton uses. Turing (75) has those of float16, which
# libraries use; Triton multiplies with plain arithmetic there.
MATRIX_INSTRUCTIONS_FROM = 80

# Elementwise passes: elements of a tile. With sixteen elements a thread enough loads are in flight, and three float32
# accumulators of that size still fit the registers.
ELEMENTS = 2048


def power_of_two(n: int) -> int:
    """Smallest power of two >= n (1 for n = 0)."""
    return 1 << max(int(n) - 1, 0).bit_length()


@lru_cache(maxsize=64)
def type_of(device: torch.device) -> str:
    """`device.type`, of which torch makes a new string each time."""
    return device.type


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> int | str:
    """The table that serves `device`: the newest architecture that is not newer than it, or "interpret"."""
    if device.type != "cuda":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    older = [arch for arch in SHARED_MEMORY if arch <= 10 * major + minor]
    return max(older, default=min(SHARED_MEMORY))


def half_precision(device: torch.device) -> torch.dtype:
    """The 16-bit dtype to train in: bfloat16, or float16 where the device has no arithmetic for bfloat16."""
    arch = architecture(device)
    return torch.float16 if arch != "interpret" and arch < MATRIX_INSTRUCTIONS_FROM else torch.bfloat16


def fits(m: int, k: int, d: int, stages: int, arch: int) -> bool:
    """Whether the tiles of a product, three float32 matrices in each stage, fit the shared memory."""
    return 4 * (m * k + k * d + m * d) * stages <= SHARED_MEMORY[arch]


def fitting(candidates: tuple, arch: int) -> list:
    """The rows (three block sizes, warps, stages) that fit."""
    return [row for row in candidates if fits(*row[:3], row[4], arch)]


def first_fit(candidates: tuple, arch: int, wanted: Callable) -> tuple:
    """The first row (three block sizes, warps, stages) that is wanted and fits; rows are in order, largest first."""
    return next(row for row in fitting(candidates, arch) if wanted(*row[:3]))


@lru_cache(maxsize=4096)
def _select(tile: Callable, bucket: tuple, dtype: torch.dtype, arch: int | str) -> dict:
    return tile(bucket, dtype, arch)


def select(tile: Callable, sizes: tuple, dtype: torch.dtype, arch: int | str) -> dict:
    """Block sizes, warps and stages by the table's function `tile`, for sizes (ints, or bools)."""
    bucket = tuple(n if isinstance(n, bool) else power_of_two(n) for n in sizes)
    return _select(tile, bucket, dtype, arch)
