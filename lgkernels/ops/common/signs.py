"""Packed signs inside Triton kernels: 32 of them a word, a set bit for a negative one."""

import triton
import triton.language as tl


@triton.jit
def unpacked(words):
    """+-1 (rows, 32 * words) of int32 `words` (rows, words), in float32."""
    negative = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(1.0 - 2.0 * negative.to(tl.float32), (words.shape[0], words.shape[1] * 32))
