"""A tiny case of the family's ops for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`."""

import torch

from ..common.selftest import values
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def direct(impl, device, dtype):
    """The block of direct feedback forward and backward; the ops go together."""
    z = values(3, 4, 6, 7, device=device, dtype=dtype)
    gamma, beta = (values(n, 1, device=device, dtype=dtype)[:4, 0].contiguous() for n in (5, 6))
    error, state = values(3, 5, device=device, dtype=dtype), torch.tensor([11, 3, 2], device=device, dtype=torch.int64)
    out, mean, rstd = _ops.direct_forward(z, gamma, beta, None, None, 0.1, 1e-5, 0.01, True, impl)
    gradients = _ops.direct_backward_(
        z, mean, rstd, gamma, beta, None, error, state, "uniform", 0.5, None, 0.01, True, impl
    )
    return [out, mean, rstd, *gradients, z]


CASES = {"direct_forward": direct, "direct_backward_": direct}
