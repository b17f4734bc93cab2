"""How far a kernel may be from the truth: the one definition, for the tests and for the trial on a user's device.

    err(kernel, truth) <= 1.5 * err(torch, truth) + C * eps(dtype) * sqrt(K) * scale

truth is the float64 reference on the same inputs, torch the same formula in plain torch at the kernel's dtype,
K the length of the longest sum behind one entry, eps that of the output's dtype, and scale the largest entry of the
truth (of each row, where rows differ by orders of magnitude). Every error is an absolute maximum.
"""

import math

import torch
from torch import Tensor

SAME_DTYPE_FACTOR = 1.5
C = 2.0


def largest(values: Tensor, per_row: bool = False) -> Tensor:
    """The largest absolute entry, of each row or of all."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    if per_row and values.dim() > 1:
        return values.abs().flatten(1).amax(1).reshape(-1, *[1] * (values.dim() - 1))
    return values.abs().max()


def bound(rival_error: Tensor, scale: Tensor, eps: float, length: int) -> Tensor:
    """What an absolute error may be; `rival_error` is that of torch at the same dtype."""
    return SAME_DTYPE_FACTOR * rival_error + C * eps * math.sqrt(max(length, 1)) * scale
