"""Registered ops of the family local_loss: shapes, checks, and the call of the chosen backend."""

from functools import partial

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import class_indices, define, wide_dtype
from . import reference
from .options import ContrastiveOptions

_define = partial(
    define,
    package=__package__,
    dtypes={
        "target": checks.INTEGER,
        "labels": checks.INTEGER,
        "negatives": checks.INTEGER,
        "is_positive": (torch.bool,),
    },
)
_REDUCTIONS = ("mean", "sum", "none")


def _new(tensor, dtype=None):
    """Makes an empty result of a shape, of no elements where it is not wanted."""
    dtype = wide_dtype(tensor.dtype) if dtype is None else dtype
    return lambda wanted, *shape: tensor.new_empty(shape if wanted else (0,), dtype=dtype)


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def _check_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    if target.shape != h.shape[:1]:
        checks.shape("target", target, h.shape[:1], "one class index per row of h")
    if not 2 <= h.dim() <= 4:
        checks.dims("h", h, (2, 3, 4), "(B, C), (B, T, C) or (B, C, H, W)")
    channels = h.shape[-1] if h.dim() < 4 else h.shape[1]
    if weight.dim() != 2 or weight.shape[1] != channels:
        checks.shape("weight", weight, (weight.shape[0], channels), "classes and channels of h")
    if bias is not None and bias.shape != weight.shape[:1]:
        checks.shape("bias", bias, weight.shape[:1], "one for each class of weight")
    if reduction not in _REDUCTIONS:
        checks.choice("reduction", reduction, _REDUCTIONS)


def _cross_entropy_fake(h, weight, bias, target, label_smoothing, reduction, compute_grad):
    new, (classes, channels), batch = _new(h), weight.shape, h.shape[0]
    loss = new(True, batch) if reduction == "none" else new(True)
    return (
        loss,
        new(compute_grad, batch, channels),
        new(compute_grad, batch, classes),
        new(compute_grad, batch, channels),
    )


@_define(backends_of="local_cross_entropy", fake=_cross_entropy_fake, check=_check_cross_entropy)
def local_cross_entropy(
    kernels,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = class_indices("target", target, weight.shape[0])
    return kernels.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad)


def _check_cross_entropy_backward(scale, pooled, grad_logits, grad_pooled, dtype, *needs):
    batch = pooled.shape[0]
    if scale.dim():
        checks.shape("scale", scale, (batch,), "one a row, or a single number")
    if grad_logits.shape != (batch, *grad_logits.shape[-1:]) or grad_pooled.shape != pooled.shape:
        checks.shape("grad_pooled", grad_pooled, pooled.shape, "that of pooled")
        checks.shape("grad_logits", grad_logits, (batch, *grad_logits.shape[-1:]), "the rows of pooled")


def _cross_entropy_backward_fake(scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias):
    new, (batch, channels), classes = _new(pooled), pooled.shape, grad_logits.shape[1]
    return (
        _new(pooled, dtype)(needs_h, batch, channels),
        new(needs_weight, classes, channels),
        new(needs_bias, classes),
    )


@_define(
    backends_of="local_cross_entropy",
    fake=_cross_entropy_backward_fake,
    check=_check_cross_entropy_backward,
    where=lambda scale, pooled, grad_logits, grad_pooled, dtype, *_: (pooled.device, dtype),
)
def local_cross_entropy_backward(
    kernels,
    scale: Tensor,
    pooled: Tensor,
    grad_logits: Tensor,
    grad_pooled: Tensor,
    dtype: torch.dtype,
    needs_h: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.local_cross_entropy_grads(
        scale, pooled, grad_logits, grad_pooled, dtype, needs_h, needs_weight, needs_bias
    )


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def _check_goodness(h, is_positive, *_):
    if is_positive.shape != h.shape[:1]:
        checks.shape("is_positive", is_positive, h.shape[:1], "one a row of h")


def _goodness_fake(h, is_positive, threshold, mean, compute_grad):
    new = _new(h)
    return new(True), new(compute_grad, h.shape[0]), new(True, h.shape[0])


@_define(backends_of="goodness", fake=_goodness_fake, check=_check_goodness)
def goodness(
    kernels, h: Tensor, is_positive: Tensor, threshold: float, mean: bool, compute_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.goodness(h, is_positive, threshold, mean, compute_grad)


def _check_goodness_backward(h, kappa, scale):
    if kappa.shape != h.shape[:1] or scale.dim():
        checks.shape("kappa", kappa, h.shape[:1], "one a row of h")
        checks.shape("scale", scale, (), "a single number")


@_define(backends_of="goodness", fake=lambda h, kappa, scale: torch.empty_like(h), check=_check_goodness_backward)
def goodness_backward(kernels, h: Tensor, kappa: Tensor, scale: Tensor) -> Tensor:
    return kernels.goodness_grad(h, kappa, scale)


def _check_peer(h, running_mean, momentum):
    checks.shape("running_mean", running_mean, h.shape[1:], "that of one row of h")


@_define(
    backends_of="peer_normalization",
    fake=lambda h, running_mean, momentum: (_new(h)(True), *(_new(h)(True, *h.shape[1:]) for _ in "mg")),
    check=_check_peer,
    backends=("reference",),
)
def peer_normalization(kernels, h: Tensor, running_mean: Tensor, momentum: float) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.peer_normalization(h, running_mean, momentum)


# -- similarity matching ------------------------------------------------------------------------------------------


def _check_similarity(x, target, *_):
    if target.shape != x.shape[:1]:
        checks.shape("target", target, x.shape[:1], "one class index per row")


def _similarity_fake(x, target, num_classes, use_std, compute_grad):
    new, spatial = _new(x), reference.uses_std(x.shape, use_std)
    features = x.shape[1] if spatial else x.shape[1:].numel()
    return new(True), new(compute_grad, x.shape[0], features), new(compute_grad and spatial, *x.shape[:2])


@_define(backends_of="similarity", fake=_similarity_fake, check=_check_similarity)
def similarity(
    kernels, x: Tensor, target: Tensor, num_classes: int, use_std: bool, compute_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.similarity(x, class_indices("target", target, num_classes), num_classes, use_std, compute_grad)


def _check_similarity_backward(x, grad, mean, scale):
    if scale.dim():
        checks.shape("scale", scale, (), "a single number")
    if mean.numel():
        checks.dims("x", x, (4,), "(B, C, H, W)")
        checks.shape("mean", mean, x.shape[:2], "one a channel of each row")
        checks.shape("grad", grad, x.shape[:2], "one a channel of each row")
    elif grad.numel() != x.numel():
        checks.shape("grad", grad, (x.shape[0], x.shape[1:].numel()), "that of x, flattened")


@_define(
    backends_of="similarity", fake=lambda x, grad, mean, scale: torch.empty_like(x), check=_check_similarity_backward
)
def similarity_backward(kernels, x: Tensor, grad: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return kernels.similarity_grad(x, grad, mean, scale)


# -- contrastive losses -------------------------------------------------------------------------------------------


def _check_contrastive(z, labels, options, *_):
    checks.shape("labels", labels, z.shape[:1], "one a row of z")
    if not 0 <= options.anchors <= z.shape[0]:
        raise ValueError(f"anchors must lie in [0, {z.shape[0]}], got {options.anchors}")


@_define(
    backends_of="contrastive",
    fake=lambda z, labels, options, compute_grad: (_new(z)(True), _new(z)(compute_grad, *z.shape)),
    check=_check_contrastive,
    backends=("reference",),
)
def contrastive(
    kernels, z: Tensor, labels: Tensor, options: ContrastiveOptions, compute_grad: bool
) -> tuple[Tensor, Tensor]:
    return kernels.contrastive(z, labels.long(), options, compute_grad)


def _check_info_nce(query, keys, negatives, *_):
    if negatives.dim() != 2 or negatives.shape[0] != query.shape[0]:
        raise ValueError(f"negatives must be ({query.shape[0]}, n), got shape {checks.shape_of(negatives)}")
    if keys.dim() != 2 or keys.shape[1:] != query.shape[1:] or keys.shape[0] < query.shape[0]:
        raise ValueError(
            f"keys must be (M, {query.shape[1]}) with M at least {query.shape[0]}, got shape {checks.shape_of(keys)}"
        )


def _info_nce_fake(query, keys, negatives, temperature, compute_grad):
    new = _new(query)
    return new(True), new(compute_grad, *query.shape), new(compute_grad, *keys.shape)


@_define(backends_of="info_nce", fake=_info_nce_fake, check=_check_info_nce, backends=("reference",))
def info_nce(
    kernels, query: Tensor, keys: Tensor, negatives: Tensor, temperature: float, compute_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    negatives = class_indices("negatives", negatives, keys.shape[0])
    return kernels.info_nce(query, keys, negatives, temperature, compute_grad)
