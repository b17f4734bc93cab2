"""Registered ops of the family local_loss: schema, shapes (fake), and the call of the chosen backend."""

import contextlib
import os

import torch

from ...core import checks, dispatch
from . import reference

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")

_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton", "cuda": "cuda"}
for _name in ("local_cross_entropy", "goodness", "similarity"):
    dispatch.register(_name, **{backend: f"lgkernels.ops.local_loss.{module}" for backend, module in _MODULES.items()})
for _name in ("peer_normalization", "contrastive", "info_nce"):
    dispatch.register(_name, reference="lgkernels.ops.local_loss.reference")


def without_autocast(device):
    """Inside an op the dtypes are settled: an ambient autocast must not touch the float32 arithmetic."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def class_indices(name, target, num_classes):
    """int64 targets; range-checked where looking at them costs no synchronisation, or when LGKERNELS_CHECK=1."""
    target = target.long()
    if target.device.type == "cpu" or os.environ.get("LGKERNELS_CHECK") == "1":
        checks.class_indices(name, target, num_classes)
    return target.contiguous()


def wide_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _op(name, schema, function, fake):
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgkernels::{name}", fake, lib=LIBRARY)


def _new(tensor, dtype=None):
    dtype = wide_dtype(tensor.dtype) if dtype is None else dtype
    return lambda wanted, *shape: tensor.new_empty(shape if wanted else (0,), dtype=dtype)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def _cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad, impl):
    kernels = dispatch.backend("local_cross_entropy", impl, h.device, h.dtype)
    target = class_indices("target", target, weight.shape[0])
    with without_autocast(h.device):
        return kernels.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)


def _cross_entropy_fake(h, weight, bias, target, label_smoothing, reduction, compute_grad, impl):
    new, (classes, channels), batch = _new(h), weight.shape, h.shape[0]
    loss = new(True, batch) if reduction == "none" else new(True)
    return (
        loss,
        new(compute_grad, batch, channels),
        new(compute_grad, batch, classes),
        new(compute_grad, batch, channels),
    )


def _cross_entropy_backward(scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias, impl):
    kernels = dispatch.backend("local_cross_entropy", impl, pooled.device, dtype)
    with without_autocast(pooled.device):
        return kernels.local_cross_entropy_grads(
            scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias
        )


def _cross_entropy_backward_fake(
    scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias, impl
):
    new, (batch, channels), classes = _new(pooled), pooled.shape, grad_logits.shape[1]
    return (
        _new(pooled, dtype)(needs_h, batch, channels),
        new(needs_weight, classes, channels),
        new(needs_bias, classes),
    )


_op(
    "local_cross_entropy",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor target, float label_smoothing, "
    "str reduction, bool compute_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)
_op(
    "local_cross_entropy_backward",
    "(Tensor scale, Tensor pooled, Tensor grad_logits, Tensor grad_pooled, "
    "ScalarType dtype, bool needs_h, bool needs_weight, bool needs_bias, str impl) -> (Tensor, Tensor, Tensor)",
    _cross_entropy_backward,
    _cross_entropy_backward_fake,
)


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def _goodness(h, is_positive, threshold, mean, compute_grad, impl):
    kernels = dispatch.backend("goodness", impl, h.device, h.dtype)
    with without_autocast(h.device):
        return kernels.goodness(h, is_positive, threshold, mean, compute_grad)


def _goodness_fake(h, is_positive, threshold, mean, compute_grad, impl):
    new = _new(h)
    return new(True), new(compute_grad, h.shape[0]), new(True, h.shape[0])


def _goodness_backward(h, kappa, scale, impl):
    return dispatch.backend("goodness", impl, h.device, h.dtype).goodness_grad(h, kappa, scale)


_op(
    "goodness",
    "(Tensor h, Tensor is_positive, float threshold, bool mean, bool compute_grad, str impl) -> "
    "(Tensor, Tensor, Tensor)",
    _goodness,
    _goodness_fake,
)
_op(
    "goodness_backward",
    "(Tensor h, Tensor kappa, Tensor scale, str impl) -> Tensor",
    _goodness_backward,
    lambda h, kappa, scale, impl: torch.empty_like(h),
)


def _peer(h, running_mean, momentum, impl):
    kernels = dispatch.backend("peer_normalization", impl, h.device, h.dtype)
    with without_autocast(h.device):
        return kernels.peer_normalization(h, running_mean, momentum)


_op(
    "peer_normalization",
    "(Tensor h, Tensor running_mean, float momentum, str impl) -> (Tensor, Tensor, Tensor)",
    _peer,
    lambda h, running_mean, momentum, impl: (_new(h)(True), *(_new(h)(True, *h.shape[1:]) for _ in "mg")),
)


# -- similarity matching ------------------------------------------------------------------------------------------


def _similarity(x, target, num_classes, use_std, compute_grad, impl):
    kernels = dispatch.backend("similarity", impl, x.device, x.dtype)
    target = class_indices("target", target, num_classes)
    with without_autocast(x.device):
        return kernels.similarity(x, target, num_classes, use_std, compute_grad)


def _similarity_fake(x, target, num_classes, use_std, compute_grad, impl):
    new, spatial = _new(x), reference.uses_std(x.shape, use_std)
    features = x.shape[1] if spatial else x.shape[1:].numel()
    return (new(True), new(compute_grad, x.shape[0], features), new(compute_grad and spatial, *x.shape[:2]))


def _similarity_backward(x, grad, mean, scale, impl):
    return dispatch.backend("similarity", impl, x.device, x.dtype).similarity_grad(x, grad, mean, scale)


_op(
    "similarity",
    "(Tensor x, Tensor target, int num_classes, bool use_std, bool compute_grad, str impl) -> (Tensor, Tensor, Tensor)",
    _similarity,
    _similarity_fake,
)
_op(
    "similarity_backward",
    "(Tensor x, Tensor grad, Tensor mean, Tensor scale, str impl) -> Tensor",
    _similarity_backward,
    lambda x, grad, mean, scale, impl: torch.empty_like(x),
)


# -- contrastive losses -------------------------------------------------------------------------------------------


def _contrastive(z, labels, anchors, temperature, factor, normalize, compute_grad, impl):
    kernels = dispatch.backend("contrastive", impl, z.device, z.dtype)
    with without_autocast(z.device):
        return kernels.contrastive(z, labels.long(), anchors, temperature, factor, normalize, compute_grad)


def _contrastive_fake(z, labels, anchors, temperature, factor, normalize, compute_grad, impl):
    return _new(z)(True), _new(z)(compute_grad, *z.shape)


def _info_nce(query, keys, negatives, temperature, compute_grad, impl):
    kernels = dispatch.backend("info_nce", impl, query.device, query.dtype)
    negatives = class_indices("negatives", negatives, keys.shape[0])
    with without_autocast(query.device):
        return kernels.info_nce(query, keys, negatives, temperature, compute_grad)


def _info_nce_fake(query, keys, negatives, temperature, compute_grad, impl):
    new = _new(query)
    return new(True), new(compute_grad, *query.shape), new(compute_grad, *keys.shape)


_op(
    "contrastive",
    "(Tensor z, Tensor labels, int anchors, float temperature, float factor, bool normalize, "
    "bool compute_grad, str impl) -> (Tensor, Tensor)",
    _contrastive,
    _contrastive_fake,
)
_op(
    "info_nce",
    "(Tensor query, Tensor keys, Tensor negatives, float temperature, bool compute_grad, str impl) -> "
    "(Tensor, Tensor, Tensor)",
    _info_nce,
    _info_nce_fake,
)
