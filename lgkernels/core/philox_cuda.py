"""Rows of a random matrix (lgkernels/random.py) on a CUDA device without a kernel of this library: one or two
launches of functions that torch compiles (torch.cuda.jiterator), and at most ten in all.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# One Philox call, as two int64 of two words each. LAW makes float32 values of the words.
CODE = """
template <typename T> void random_call(T block, T row, T stream, T step, T seed, T& first, T& second) {
  unsigned c[4] = {(unsigned)block, (unsigned)row, (unsigned)step, (unsigned)stream};
  unsigned low = (unsigned)seed, high = (unsigned)((unsigned long long)seed >> 32);
  for (int i = 0; i < 10; ++i, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    unsigned long long p = c[0] * 0xD2511F53ull, q = c[2] * 0xCD9E8D57ull;
    c[0] = (unsigned)(q >> 32) ^ c[1] ^ low;
    c[1] = (unsigned)q;
    c[2] = (unsigned)(p >> 32) ^ c[3] ^ high;
    c[3] = (unsigned)p;
  }
  union { unsigned word; float value; } out[4];
  for (int i = 0; i < 4; ++i) out[i].word = c[i];
  LAW
  first = (T)(out[0].word | (unsigned long long)out[1].word << 32);
  second = (T)(out[2].word | (unsigned long long)out[3].word << 32);
}
"""
LAWS = {
    "words": "",
    "unit": "for (int i = 0; i < 4; ++i) out[i].value = ((float)(c[i] >> 9) + 0.5f) * 1.1920928955078125e-7f;",
    "signed": "for (int i = 0; i < 4; ++i) out[i].value = ((float)(c[i] >> 9) + 0.5f) * 2.384185791015625e-7f - 1.0f;",
    "normal": """for (int i = 0; i < 4; i += 2) {
    float u = ((float)(c[i] >> 9) + 0.5f) * 1.1920928955078125e-7f;
    float angle = ((float)(c[i + 1] >> 9) + 0.5f) * 1.1920928955078125e-7f * 6.283185307179586f;
    double radius = sqrt(-2.0 * log((double)u));
    out[i].value = (float)(radius * cos((double)angle));
    out[i + 1].value = (float)(radius * sin((double)angle));
  }""",
}
FUSED_MULTIPLY_ADD = "template <typename T> T affine(T unit, T span, T low) { return fma(unit, span, low); }"


def code(kind: str) -> str:
    """The source of a kernel of `LAWS`."""
    return CODE.replace("LAW", LAWS[kind])


@cache
def kernel(kind: str) -> Callable[..., Any]:
    return torch.cuda.jiterator._create_multi_output_jit_fn(code(kind), num_outputs=2)


def words(block: Tensor, row: Tensor, state: Tensor, kind: str = "words") -> Tensor:
    """(..., 4) int32 words, or the bits of float32 values, of the broadcast counters."""
    seed, stream, step = state.unbind()
    return torch.stack(kernel(kind)(block, row, stream, step, seed), -1).view(torch.int32)


@cache
def fused_multiply_add() -> Callable[..., Any]:
    return torch.cuda.jiterator._create_jit_fn(FUSED_MULTIPLY_ADD, span=1.0, low=0.0)


def _affine(unit: Tensor, scale: float, low: float) -> Tensor:
    span, low = float(np.float32(scale - low)), float(np.float32(low))
    return unit.mul_(span) if low == 0 else fused_multiply_add()(unit, span=span, low=low)


def _values(block: Tensor, row: Tensor, state: Tensor, law: str, scale: float, low: float | None) -> Tensor:
    """(rows, blocks, values of one Philox call)"""
    if law in ("uniform", "normal"):
        kind = "normal" if law == "normal" else "signed" if low is None else "unit"
        unit = words(block, row, state, kind).view(torch.float32)
        return unit.mul_(scale) if low is None else _affine(unit, scale, low)
    byte = words(block, row, state).view(torch.uint8)
    if law == "sign":
        bits = byte.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=byte.device))
        return bits.bitwise_and_(1).float().mul_(-2).add_(1).mul_(scale)
    byte = byte.float()
    if low is None:
        return byte.mul_(2).sub_(255).div_(256).mul_(scale)
    return _affine(byte.add_(0.5).div_(256), scale, low)


def rows(
    state: Tensor,
    index: Tensor,
    columns: tuple[int, int],
    law: str,
    values_per_call: int,
    scale: float,
    low: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """(len(index), stop - start) in `dtype`: rows `index` (int64), `columns` (start, stop) of the matrix of `state`."""
    start, stop = columns
    first, blocks = start // values_per_call, -(-stop // values_per_call) - start // values_per_call
    block = torch.arange(first, first + blocks, device=state.device)
    values = _values(block, index.unsqueeze(1), state, law, scale, low).flatten(1)
    skip = start - first * values_per_call
    return values[:, skip : skip + stop - start].to(dtype).contiguous()
