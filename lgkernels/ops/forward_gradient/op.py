"""Registered ops of the family forward_gradient: shapes, checks, and the call of the chosen backend."""

from functools import partial

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import class_indices, define, wide, wide_dtype
from ..common.matrix import check_law, check_state
from .options import Noise, NormOptions

_define = partial(define, package=__package__, dtypes={"state": (torch.int64,), "target": checks.INTEGER})


def _wide(like, *shape):
    return like.new_empty(shape, dtype=wide_dtype(like.dtype))


# -- the replicated losses --------------------------------------------------------------------------------------------


def _check_features(**inputs):
    for name, x in inputs.items():
        checks.dims(name, x, (4,), "(N, P, G, C)")


def _check_head(x, weight, bias):
    width = x.shape[2] * x.shape[3]
    if weight.dim() != 2 or weight.shape[0] != width:
        checks.shape("weight", weight, (width, *weight.shape[1:2]), "the G * C channels of x, and classes")
    if bias is not None and bias.shape != weight.shape[1:]:
        checks.shape("bias", bias, weight.shape[1:], "one for each column of weight")


def _check_cross_entropy(x, weight, bias, target, layer_norm):
    _check_features(x=x)
    _check_head(x, weight, bias)
    checks.shape("target", target, x.shape[:1], "one class index a sample")


def _head_results(rows, x, weight):
    width = x.shape[2] * x.shape[3]
    return _wide(x, rows), _wide(x, rows, width), _wide(x, rows, weight.shape[1]), _wide(x, rows, width)


@_define(
    backends_of="replicated_cross_entropy",
    fake=lambda x, weight, bias, target, layer_norm: _head_results(len(x), x, weight),
    check=_check_cross_entropy,
)
def replicated_cross_entropy(
    kernels, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, layer_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss (N,), pooled (N, D), delta (N, K), teach (N, D))`."""
    pooled = kernels.pooled(x, layer_norm)
    loss, delta, teach = kernels.classify(pooled, weight, bias, class_indices("target", target, weight.shape[1]))
    return loss, pooled, delta, teach


def _check_nt_xent(x, y, weight, bias, temperature):
    _check_features(x=x, y=y)
    _check_head(x, weight, bias)
    if y.shape != x.shape or y.dtype != x.dtype:
        checks.shape("y", y, x.shape, "that of the other view")
        raise TypeError(f"y must be {checks.dtype_of(x)} as x, got {checks.dtype_of(y)}")


@_define(
    backends_of="replicated_nt_xent",
    fake=lambda x, y, weight, bias, temperature: _head_results(2 * len(x), x, weight),
    check=_check_nt_xent,
)
def replicated_nt_xent(
    kernels, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss (2N,), pooled (2N, D), delta (2N, K), teach (2N, D))` of x's rows, then y's; delta: of the projections."""
    pooled = torch.cat((kernels.pooled(x, False), kernels.pooled(y, False)))
    weight = wide(weight)
    projected = pooled @ weight if bias is None else torch.addmm(wide(bias), pooled, weight)
    loss, delta = kernels.contrast(projected, temperature)
    return loss, pooled, delta, delta @ weight.t()


def _check_teach(x, x_tangent, teach, head_tangent):
    _check_features(x_tangent=x_tangent)
    if x is not None:
        checks.shape("x", x, x_tangent.shape, "that of its tangent")
    n, _, groups, channels = x_tangent.shape
    checks.shape("teach", teach, (n, groups * channels), "one a channel of each sample")
    if head_tangent is not None:
        checks.shape("head_tangent", head_tangent, (n,), "one a sample")


@_define(
    backends_of="replicated_tangent",
    fake=lambda x, x_tangent, teach, head_tangent: _wide(x_tangent, *x_tangent.shape[:3]),
    check=_check_teach,
    where=lambda x, x_tangent, teach, head_tangent: (x_tangent.device, x_tangent.dtype),
)
def replicated_tangent(
    kernels, x: Tensor | None, x_tangent: Tensor, teach: Tensor, head_tangent: Tensor | None
) -> Tensor:
    """(N, P, G): the losses' tangents; x is needed where a layer norm is in front."""
    return kernels.tangent(x, x_tangent, teach, head_tangent, _wide(x_tangent, *x_tangent.shape[:3]))


def _check_cotangent(x, grad, teach, channels, dtype):
    checks.dims("grad", grad, (3,), "(N, P, G)")
    shape = (*grad.shape, channels)
    if x is not None:
        checks.shape("x", x, shape, "grad's with the channels of a group")
    checks.shape("teach", teach, (grad.shape[0], grad.shape[2] * channels), "one a channel of each sample")


@_define(
    backends_of="replicated_tangent",
    fake=lambda x, grad, teach, channels, dtype: grad.new_empty((*grad.shape, channels), dtype=dtype),
    check=_check_cotangent,
    where=lambda x, grad, teach, channels, dtype: (grad.device, dtype),
)
def replicated_cotangent(
    kernels, x: Tensor | None, grad: Tensor, teach: Tensor, channels: int, dtype: torch.dtype
) -> Tensor:
    """(N, P, G, C) in `dtype`: the gradient of x for the losses' cotangents `grad`."""
    return kernels.cotangent(x, grad, teach, grad.new_empty((*grad.shape, channels), dtype=dtype))


# -- layers with a tangent ----------------------------------------------------------------------------------------


def _check_noise(z, noise, options):
    if not 0 <= options.dim < z.dim() or not z.dim():
        raise ValueError(f"dim must be a dimension of z, got {options.dim} for shape {checks.shape_of(z)}")
    if noise.values is not None:
        checks.shape("values", noise.values, z.shape, "that of z")
    check_state(noise.state)
    check_law(noise.law)


def _check_dual_norm(z, z_tangent, residual, noise, options):
    _check_noise(z, noise, options)
    for name, other in (("z_tangent", z_tangent), ("residual", residual)):
        if other is not None:
            checks.shape(name, other, z.shape, "that of z")


def _dual_norm_fake(z, z_tangent, residual, noise, options):
    return z.new_empty((2 if z_tangent is not None or noise.exists else 1, *z.shape))


@_define(backends_of="dual_norm", fake=_dual_norm_fake, check=_check_dual_norm)
def dual_norm(
    kernels, z: Tensor, z_tangent: Tensor | None, residual: Tensor | None, noise: Noise, options: NormOptions
) -> Tensor:
    """(2, *z.shape): the activation and its tangent; (1, *z.shape) without a tangent."""
    return kernels.dual_norm(z, z_tangent, residual, noise, options)


def _check_activity(z, y, coefficient, noise, options):
    _check_noise(z, noise, options)
    if not noise.exists:
        raise ValueError("noise must be a tensor or a random state, got none")
    checks.shape("y", y, z.shape, "that of z")
    dim = options.dim
    runs = coefficient.shape[dim] if coefficient.dim() == z.dim() else 0
    if not runs or z.shape[dim] % runs or coefficient.shape != (*z.shape[:dim], runs, *z.shape[dim + 1 :]):
        expected = (*z.shape[:dim], max(runs, 1), *z.shape[dim + 1 :])
        checks.shape("coefficient", coefficient, expected, "z's, with a divisor of the size of dim")
        raise ValueError(f"coefficient must divide z's {z.shape[dim]} entries of dim {dim}, got {runs}")


@_define(
    backends_of="dual_norm",
    fake=lambda z, y, coefficient, noise, options: torch.empty_like(z, memory_format=torch.contiguous_format),
    check=_check_activity,
)
def activity_grad(kernels, z: Tensor, y: Tensor, coefficient: Tensor, noise: Noise, options: NormOptions) -> Tensor:
    """The gradient of z, before the norm, of one draw of the noise."""
    return kernels.activity_grad(z, y, coefficient, noise, options)
