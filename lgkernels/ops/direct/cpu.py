"""The block of direct feedback over the C++ kernels in csrc/direct/cpu: the functions of `reference.py`, float32.

z is taken as contiguous planes (anything else is copied once); sums in an order that no number of threads changes.
"""

from ...core.native import cpu_entries, threads
from ..common.cpu import address, dense_rows, feedback, floats, matrix
from ..common.matrix import FeedbackMatrix

_C = cpu_entries()


def _block(z, gamma, beta, mean, rstd, activation):
    """The kernels' description of the block, and the contiguous float32 tensors that it points to, z first."""
    held = [t.float().contiguous() for t in (z, gamma, beta, mean, rstd)]
    return (*z.shape, *map(address, held), activation.negative_slope, activation.max_pool), held


def direct_forward(z, gamma, beta, running_mean, running_var, norm, activation):
    batch, channels, height, width = z.shape
    size = (height // 2, width // 2) if activation.max_pool else (height, width)
    out = floats(batch, channels, *size)
    mean, rstd = (floats(channels) for _ in range(2))
    block, _held = _block(z, gamma, beta, mean, rstd, activation)
    theirs = [t for t in (running_mean, running_var) if t is not None]
    ours = [t.float().contiguous() for t in theirs]
    addresses = map(address, ours) if ours else (0, 0)
    _C.direct_forward(block, *addresses, norm.momentum, norm.eps, out.data_ptr(), threads())
    for mine, used in zip(theirs, ours):
        if used is not mine:
            mine.copy_(used)
    return out.to(z.dtype), mean, rstd


def direct_backward_(z, mean, rstd, gamma, beta, delta, error, state, signal, activation):
    grad_gamma, grad_beta = (floats(z.shape[1]) for _ in range(2))
    block, held = _block(z, gamma, beta, mean, rstd, activation)
    error = None if error is None else dense_rows(error.float())
    delta = None if delta is None else delta.float().contiguous()
    law = feedback((0 if error is None else error.shape[1], 0), FeedbackMatrix(None, None, state, *signal))
    _C.direct_backward(
        block, address(delta), law, matrix(error), grad_gamma.data_ptr(), grad_beta.data_ptr(), threads()
    )
    if held[0] is not z:
        z.copy_(held[0])
    return grad_gamma, grad_beta
