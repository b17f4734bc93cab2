"""The block of direct feedback in plain torch with few passes over memory: the functions of `reference.py`, float32 and
halves, any device, by torch's own batch norm and pooling.

A leaky ReLU and the maximum change places, which a slope of at least 0 allows: it runs over the pooled values alone.
"""

import torch
import torch.nn.functional as F

from ...random import random_matrix
from . import reference

_aten = torch.ops.aten
_WINDOW = (2, 2), (2, 2), (0, 0), (1, 1), False  # of the max-pool: size, stride, padding, dilation, ceil_mode


def _is_usual(z, activation):
    """More than one value a channel, and an activation that is monotone."""
    return z.numel() > z.shape[1] and activation.negative_slope >= 0


def direct_forward(z, gamma, beta, running_mean, running_var, norm, activation):
    if not _is_usual(z, activation):
        return reference.direct_forward(z, gamma, beta, running_mean, running_var, norm, activation)
    theirs = [t for t in (running_mean, running_var) if t is not None]
    ours = [t.float().contiguous() for t in theirs]
    u, mean, rstd = torch.native_batch_norm(
        z, gamma.float(), beta.float(), *(ours or (None, None)), True, norm.momentum, norm.eps
    )
    for mine, used in zip(theirs, ours):
        if used is not mine:
            mine.copy_(used)
    if activation.max_pool:
        u = F.max_pool2d(u, 2)
    return F.leaky_relu_(u, activation.negative_slope), mean, rstd


def direct_backward_(z, mean, rstd, gamma, beta, delta, error, state, signal, activation):
    if not _is_usual(z, activation):
        return reference.direct_backward_(z, mean, rstd, gamma, beta, delta, error, state, signal, activation)
    slope, max_pool = activation
    mean, rstd, gamma, beta = (t.float() for t in (mean, rstd, gamma, beta))
    wide = z.float()  # signs and maxima are those of values that nothing has rounded to a half
    u = torch.native_batch_norm(wide, gamma, beta, mean, rstd.pow(-2), False, 0.0, 0.0)[0]
    pooled, index = _aten.max_pool2d_with_indices(u, *_WINDOW) if max_pool else (u, None)
    if delta is None:
        law = random_matrix(state, error.shape[1], pooled[0].numel(), signal.law, signal.law_scale, signal.low)
        delta = error.float() @ law
    g = _aten.leaky_relu_backward(delta.float().reshape(pooled.shape), pooled, slope, False)
    if max_pool:
        g = _aten.max_pool2d_with_indices_backward(g, u, *_WINDOW, index)
    del u, pooled, index
    dz, grad_gamma, grad_beta = _aten.native_batch_norm_backward(
        g, wide, gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    z.copy_(dz)
    return grad_gamma, grad_beta
