"""Local losses on the CPU: the functions of `reference.py` over the C++ kernels in csrc/local_loss/cpu.

A feature map is taken as it lies, planes or channels last, with any distance between samples; anything else is copied
once. Products of matrices are the library's. Arithmetic is float32, sums in an order that no number of threads changes.
"""

import torch
import torch.nn.functional as F

from ...core.native import cpu_entries, threads
from ..common.cpu import floats
from . import reference
from .reference import local_cross_entropy_grads  # noqa: F401  products and scalings of small matrices

_C = cpu_entries()
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _code(t):
    code = _DTYPES.get(t.dtype)
    if code is None:
        raise TypeError(f"the CPU kernels take {list(_DTYPES)}, got {t.dtype}; float64 runs with impl='reference'")
    return code


def _samples(t):
    """Whether each sample is dense in its own order of dimensions."""
    return not len(t) or t[0].is_contiguous()


def _feature_map(h):
    """`(description, tensor it describes)` of (B, C, H, W) or of (B, T, C)."""
    if h.dim() == 3:
        planes = not _samples(h) and _samples(h.transpose(1, 2))
        h = h if planes or _samples(h) else h.contiguous()
        batch, positions, channels = h.shape
    else:
        planes = _samples(h)
        h = h if planes or _samples(h.permute(0, 2, 3, 1)) else h.contiguous()
        planes = planes or _samples(h)
        (batch, channels), positions = h.shape[:2], h.shape[2] * h.shape[3]
    return (h.data_ptr(), batch, channels, positions, h.stride(0), not planes, _code(h)), h


def _moments(h, with_variance):
    """`(var or None, mean)`, (B, C) float32, over the positions; var is unbiased."""
    x, keep = _feature_map(h)
    shape = h.shape[0], h.shape[1] if h.dim() == 4 else h.shape[2]
    mean = floats(shape)
    var = floats(shape) if with_variance else None
    _C.local_moments(x, mean.data_ptr(), 0 if var is None else var.data_ptr(), threads())
    return var, mean


def _scale_shifted(x, shift, scale):
    """(x - shift) * scale in x's dtype and memory format; `x` (B, C, H, W), the others (B, C)."""
    description, used = _feature_map(x)
    shift, scale = shift.float().contiguous(), scale.float().contiguous()
    out = torch.empty_like(used, memory_format=torch.contiguous_format if _samples(used) else torch.channels_last)
    _C.local_scale_shifted(description, shift.data_ptr(), scale.data_ptr(), out.data_ptr(), threads())
    return out if used is x else torch.empty_like(x).copy_(out)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------

_SMALL = 2**22  # multiplications of a product that the loss's own pass takes on: the library's call costs more


def local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    if not len(h):
        return reference.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)
    p = h.float() if h.dim() == 2 else _moments(h, False)[1]
    weight, bias = weight.float(), None if bias is None else bias.float()
    (batch, channels), classes = p.shape, weight.shape[0]
    positions = h.shape[1] if h.dim() == 3 else h.shape[2:].numel()
    loss = floats((batch,) if reduction == "none" else ())
    grad = floats((batch, classes) if compute_grad else 0)
    small = batch * channels * classes <= _SMALL
    if small:
        p, weight, bias = p.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        products = (p.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), 0)
    else:
        logits = F.linear(p, weight, bias)
        products = (0, 0, 0, logits.data_ptr())
    grad_pooled = floats((batch, channels) if compute_grad and small else 0)
    _C.local_logit_loss(
        (batch, classes, channels, *products, target.data_ptr()),
        label_smoothing,
        batch if reduction == "mean" else 1,
        reduction == "none",
        (
            loss.data_ptr(),
            grad.data_ptr() if compute_grad else 0,
            grad_pooled.data_ptr() if compute_grad and small else 0,
            1 / max(positions, 1),
        ),
        threads(),
    )
    if not compute_grad:
        return (loss, grad, floats(0), floats(0))
    if not small:
        grad_pooled = grad @ weight if positions == 1 else (grad @ weight).div_(positions)
    return loss, p.clone() if p is h else p, grad, grad_pooled


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def _dense(h):
    return h.is_contiguous() or h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)


def goodness(h, is_positive, threshold, mean, compute_grad):
    h = h if _dense(h) else h.contiguous()
    batch, size = h.shape[0], h.shape[1:].numel()
    loss, squares = (floats(()), floats(batch))
    kappa = floats(batch if compute_grad else 0)
    is_positive = is_positive.contiguous()
    _C.local_goodness(
        (
            h.data_ptr(),
            batch,
            size,
            _code(h),
            is_positive.data_ptr(),
            threshold,
            1 / max(size, 1) if mean else 1.0,
            loss.data_ptr(),
            kappa.data_ptr() if compute_grad else 0,
            squares.data_ptr(),
        ),
        threads(),
    )
    return loss, kappa, squares


def goodness_grad(h, kappa, scale):
    if not _dense(h):
        return reference.goodness_grad(h, kappa, scale)
    out, factor = torch.empty_like(h), (kappa * scale).float().contiguous()
    x = (h.data_ptr(), len(h), 1, h.shape[1:].numel(), h.stride(0), False, _code(h))
    _C.local_scale_shifted(x, 0, factor.data_ptr(), out.data_ptr(), threads())
    return out


# -- similarity matching ------------------------------------------------------------------------------------------


def similarity(x, target, num_classes, use_std, compute_grad):
    return reference.similarity(x, target, num_classes, use_std, compute_grad, var_mean=lambda x: _moments(x, True))


def similarity_grad(x, grad, mean, scale):
    if not mean.numel():
        return reference.similarity_grad(x, grad, mean, scale)
    return _scale_shifted(x, mean, grad * scale)
