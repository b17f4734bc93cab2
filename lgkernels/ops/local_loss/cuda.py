"""Local losses on the CUDA C++ kernels of `lgkernels._C` (csrc/cuda/local_loss*.cu): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""
from functools import partial

import torch

from ...core import native
from . import composed, reference
from .reference import local_cross_entropy_grads  # noqa: F401  products and scalings of small matrices

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _call(name, device, *args):
    entries = native.cuda_entries()
    entry = getattr(entries, f"local_loss_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = entry(*args, torch.cuda.current_stream().cuda_stream)
    else:
        status = entry(*args, 0)
    if status:
        raise RuntimeError(f"local loss {name}: CUDA error {status} ({entries.cuda_error_string(status)})")


def _new(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _moments(h, with_deviation):
    dense, shape = composed.planes(h)
    channels = h.shape[1] if h.dim() == 4 else h.shape[2]
    mean = _new(h, len(h), channels)
    deviation = torch.empty_like(mean) if with_deviation else None
    _call("moments", h.device, (*shape, _DTYPES[h.dtype]), _address(dense), _address(mean), _address(deviation))
    return (mean, deviation) if with_deviation else mean


def _scale(dense, shape, mean, factor, scale, like):
    """(dense - mean) * factor * scale, laid out as torch.empty_like(like)."""
    result, out = torch.empty_like(dense), torch.empty_like(like)
    if result.stride() == out.stride():
        result = out
    factor, scale = factor.contiguous(), scale.float()
    _call("scale", like.device, (*shape, _DTYPES[like.dtype]), _address(dense), _address(mean), _address(factor),
          _address(scale), _address(result))
    return out if result is out else out.copy_(result)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------

def _cross_entropy_rows(logits, target, label_smoothing, grad_scale, compute_grad):
    losses = _new(logits, len(logits))
    _call("cross_entropy", logits.device, *logits.shape, label_smoothing, grad_scale, compute_grad, _address(target),
          _address(logits), _address(losses))
    return losses


local_cross_entropy = partial(composed.local_cross_entropy, partial(_moments, with_deviation=False),
                              _cross_entropy_rows)


# -- Forward-Forward ----------------------------------------------------------------------------------------------

def goodness(h, is_positive, threshold, mean, compute_grad):
    if h.numel() == 0:
        return reference.goodness(h, is_positive, threshold, mean, compute_grad)
    dense, (batch, size, _) = composed.samples(h)
    shape, is_positive = (batch, size, 1, _DTYPES[h.dtype]), is_positive.contiguous()
    partial_sums = _new(h, native.cuda_entries().local_loss_goodness_splits(shape), batch)
    loss, kappa, squares = _new(h), _new(h, batch if compute_grad else 0), _new(h, batch)
    _call("goodness", h.device, shape, _address(dense), _address(is_positive), threshold, 1 / size if mean else 1.0,
          *map(_address, (partial_sums, squares, kappa, loss)))
    return loss, kappa, squares


def goodness_grad(h, kappa, scale):
    return _scale(*composed.samples(h), None, kappa, scale, h)


# -- similarity matching ------------------------------------------------------------------------------------------

def _normalize_rows(features):
    rows, norms = _new(features, *features.shape), _new(features, len(features))
    _call("normalize_rows", features.device, *features.shape, _DTYPES[features.dtype], _address(features),
          _address(rows), _address(norms))
    return rows, norms


def _match_rows(products, target, same, other):
    losses = _new(products, len(products))
    _call("match_rows", products.device, len(products), same, other, _address(target), _address(products),
          _address(losses))
    return losses


def _rows_grad(factor, grad, rows, norms, deviation, mean, positions):
    grad, out = grad.contiguous(), torch.empty_like(rows)
    _call("rows_grad", rows.device, (*rows.shape, positions), factor,
          *map(_address, (grad, rows, norms, deviation, mean, out)))
    return out


similarity = partial(composed.similarity, partial(_moments, with_deviation=True), _normalize_rows, _match_rows,
                     _rows_grad)


def similarity_grad(x, grad, mean, scale):
    if mean.numel() == 0:
        return reference.similarity_grad(x, grad, mean, scale)
    dense, shape = composed.planes(x)
    return _scale(dense, shape, mean.contiguous(), grad, scale, x)
