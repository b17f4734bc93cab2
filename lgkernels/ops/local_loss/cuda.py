"""Local losses on the CUDA C++ kernels of `lgkernels._C` (csrc/local_loss/cuda): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""

from functools import partial

import torch

from ...core import native
from ..common.cuda import DTYPES, address, call
from . import composed, reference
from .reference import local_cross_entropy_grads  # noqa: F401  products and scalings of small matrices


def _new(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _moments(h, with_deviation):
    dense, shape = composed.planes(h)
    channels = h.shape[1] if h.dim() == 4 else h.shape[2]
    mean = _new(h, len(h), channels)
    deviation = torch.empty_like(mean) if with_deviation else None
    call("local_loss_moments", h.device, (*shape, DTYPES[h.dtype]), address(dense), address(mean), address(deviation))
    return (mean, deviation) if with_deviation else mean


def _scale(dense, shape, mean, factor, scale, like):
    """(dense - mean) * factor * scale, laid out as torch.empty_like(like)."""
    result, out = torch.empty_like(dense), torch.empty_like(like)
    if result.stride() == out.stride():
        result = out
    factor, scale = factor.float().contiguous(), scale.float()
    call(
        "local_loss_scale",
        like.device,
        (*shape, DTYPES[like.dtype]),
        address(dense),
        address(mean),
        address(factor),
        address(scale),
        address(result),
    )
    return out if result is out else out.copy_(result)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def _cross_entropy_rows(logits, target, label_smoothing, grad_scale, compute_grad):
    losses = _new(logits, len(logits))
    call(
        "local_loss_cross_entropy",
        logits.device,
        *logits.shape,
        label_smoothing,
        grad_scale,
        compute_grad,
        address(target),
        address(logits),
        address(losses),
    )
    return losses


local_cross_entropy = partial(
    composed.local_cross_entropy, partial(_moments, with_deviation=False), _cross_entropy_rows
)


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def goodness(h, is_positive, threshold, mean, compute_grad):
    if h.numel() == 0:
        return reference.goodness(h, is_positive, threshold, mean, compute_grad)
    dense, (batch, size, _) = composed.samples(h)
    shape, is_positive = (batch, size, 1, DTYPES[h.dtype]), is_positive.contiguous()
    partial_sums = _new(h, native.cuda_entries().local_loss_goodness_splits(shape), batch)
    loss, kappa, squares = _new(h), _new(h, batch if compute_grad else 0), _new(h, batch)
    call(
        "local_loss_goodness",
        h.device,
        shape,
        address(dense),
        address(is_positive),
        threshold,
        1 / size if mean else 1.0,
        *map(address, (partial_sums, squares, kappa, loss)),
    )
    return loss, kappa, squares


def goodness_grad(h, kappa, scale):
    return _scale(*composed.samples(h), None, kappa, scale, h)


# -- similarity matching ------------------------------------------------------------------------------------------


def _normalize_rows(features):
    rows, norms = _new(features, *features.shape), _new(features, len(features))
    call(
        "local_loss_normalize_rows",
        features.device,
        *features.shape,
        DTYPES[features.dtype],
        address(features),
        address(rows),
        address(norms),
    )
    return rows, norms


def _match_rows(products, target, same, other):
    losses = _new(products, len(products))
    call(
        "local_loss_match_rows",
        products.device,
        len(products),
        same,
        other,
        address(target),
        address(products),
        address(losses),
    )
    return losses


def _rows_grad(factor, grad, rows, norms, deviation, mean, positions):
    grad, out = grad.contiguous(), torch.empty_like(rows)
    call(
        "local_loss_rows_grad",
        rows.device,
        *rows.shape,
        positions,
        factor,
        *map(address, (grad, rows, norms, deviation, mean, out)),
    )
    return out


similarity = partial(
    composed.similarity, partial(_moments, with_deviation=True), _normalize_rows, _match_rows, _rows_grad
)


def similarity_grad(x, grad, mean, scale):
    if mean.numel() == 0:
        return reference.similarity_grad(x, grad, mean, scale)
    dense, shape = composed.planes(x)
    return _scale(dense, shape, mean.float().contiguous(), grad, scale, x)
