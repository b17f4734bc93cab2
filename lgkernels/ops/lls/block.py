"""The fused block: layer -> BatchNorm (batch statistics) -> LeakyReLU -> LLS head, local gradients included.

    z = layer(x)            library, without the bias, which batch normalisation cancels
    mean, rstd              batch_stats
    out, latents, S1, S2    norm_act_pool: one pass over z
    loss, dlatents          head
    dgamma, dbeta           norm_grads, from S1 and S2: no pass over z
    z <- dz                 grad_preactivation_, in place
    dweight                 library

No gradient goes to x. The pre-activation z never leaves this file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.kept import kept
from ...core.ops import wide_dtype
from ...core.unit import one

_SMALL_PLANE = 64  # positions; the passes over z go along channels where a plane fills too few vectors

_convolution_backward = torch.ops.aten.convolution_backward.default


class Parameters(NamedTuple):
    """What a block learns, and its running statistics, which it updates."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    modulation: Tensor | None


def channels_last(x):
    """True when `out` should be laid out with the channels innermost, as torch's convolution would."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def gradient_scale(z, pool_size, temperature):
    """Power of two that keeps a float16 dz away from underflow; it cancels in the float32 weight gradient.

    dz shrinks like 1 / (batch * temperature * bin area): unscaled, 2 to 6 % of VGG8's dz flush to zero at B=128.
    """
    if z.dtype != torch.float16 or z.shape[0] == 0:
        return 1.0
    area = max(z[0, 0].numel() // pool_size**2, 1) if z.dim() == 4 else max(z.shape[1] // pool_size, 1)
    return 2.0 ** math.floor(math.log2(max(z.shape[0] * temperature * area, 1.0)))


@kept  # a host-to-device copy each step would be a synchronisation
def bin_areas(size, pool_size):
    """Number of positions of each of the pool_size x pool_size bins, (P*P,) float32."""
    height, width = ([(-((-(i + 1) * n) // pool_size)) - (i * n) // pool_size for i in range(pool_size)] for n in size)
    return torch.tensor([h * w for h in height for w in width], dtype=torch.float32, device="cpu")


# -- the layer ------------------------------------------------------------------------------------------------------


class _Linear:
    """z = x W^T and, from dz, the gradient of W."""

    def __init__(self, kernels, x, weight, options):
        self.x, self.weight = x, weight.to(x.dtype)  # under autocast, and for half models, the norm stays wide
        self.memory_format = torch.contiguous_format

    def preactivation(self):
        return self.x @ self.weight.t()

    def for_grad_weight(self, dz):
        return dz

    def grad_weight(self, dz):
        return dz.t() @ self.x


class _Convolution:
    """z = W * x and, from dz, the gradient of W, each in the memory format that the library is fastest in."""

    def __init__(self, kernels, x, weight, options):
        self.kernels = kernels if kernels.CAPABILITIES.converts_layouts else None
        self.geometry = (options.stride, options.padding, (1, 1), False, (0, 0), 1)
        self.memory_format = torch.channels_last if channels_last(weight) else torch.contiguous_format  # W's gradient's
        if self.kernels:
            # oneDNN wants large maps channels_last (NCHW ones it copies into blocks of its own); where the weight is
            # the larger part it stays as it is, and x, which is small, follows.
            if channels_last(weight) or x.numel() > 2 * weight.numel():
                x, weight = (kernels.to_channels_last(t) for t in (x, weight))
            else:
                x = kernels.to_contiguous(x)
        self.x, self.weight = x, weight.to(x.dtype)

    def preactivation(self):
        z = torch.convolution(self.x, self.weight, None, *self.geometry)
        self.z_last = channels_last(z)
        if self.kernels and z.numel() != z.shape[1] and z.shape[2] * z.shape[3] <= _SMALL_PLANE:
            return self.kernels.to_channels_last(z)
        return z

    def for_grad_weight(self, dz):
        """dz in the format that `grad_weight` wants; apart from it, so that the caller's dz is freed before."""
        return self.kernels.to_contiguous(dz) if self.kernels and not self.z_last else dz

    def grad_weight(self, dz):
        return _convolution_backward(dz, self.x, self.weight, None, *self.geometry, (False, True, False))[1]


# -- the norm, the head, and back --------------------------------------------------------------------------------------


def start(kernels, x, parameters, options):
    """The layer, and its pre-activation."""
    layer = (_Convolution if parameters.weight.dim() == 4 else _Linear)(kernels, x, parameters.weight, options)
    z = layer.preactivation()
    if z.numel() == z.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got a pre-activation of size {z.shape}"
        )
    return layer, z


def running_statistics(parameters, z):
    """The running mean and variance that a backend updates: a half model's are copies."""
    running = parameters.running_mean, parameters.running_var
    if running[0] is None or z.shape[0] == 0:  # of no rows there is nothing to learn, as in torch's batch norm
        return None, None
    wide = wide_dtype(z.dtype)
    return tuple(t.to(wide).contiguous() for t in running)


def store_statistics(parameters, running):
    """What was updated, where it was a copy."""
    for theirs, used in zip((parameters.running_mean, parameters.running_var), running):
        if used is not None and used is not theirs:
            theirs.copy_(used)


def _batch_stats(kernels, z, parameters, options):
    running = running_statistics(parameters, z)
    bias = None if parameters.bias is None else parameters.bias.contiguous()
    stats = kernels.batch_stats(z, bias, *running, options.momentum, options.norm_eps)
    store_statistics(parameters, running)
    return stats


def forward(kernels, x, target, parameters, basis, options, wanted):
    """Returns (out, loss, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_modulation); the last five
    are empty where not wanted, grad_bias is zero. Gradients are those of the mean local loss, in float32 (float64 for
    float64)."""
    wide, last, modulation = wide_dtype(x.dtype), channels_last(x), parameters.modulation
    modulation = None if modulation is None else modulation.to(wide).contiguous()
    layer, z = start(kernels, x, parameters, options)
    stats = _batch_stats(kernels, z, parameters, options)
    affine = (t.to(wide).contiguous() for t in (parameters.norm_weight, parameters.norm_bias))
    norm = (*stats, *affine, options.negative_slope)
    layout = {"out_channels_last": last} if z.dim() == 4 and kernels.CAPABILITIES.converts_layouts else {}
    out, latents, *sums = kernels.norm_act_pool(
        z, *norm, options.pool_size, options.max_pool, wanted.compute_grad, **layout
    )

    # Some backends leave the loss's mean and the modulation's gradient to the launch of the norm's gradients.
    finishes = wanted.compute_grad and kernels.CAPABILITIES.finishes_head
    loss, grad_latents, similarity, grad_logits = kernels.head(
        latents, target, modulation, basis, options.head, wanted.compute_grad, **({"reduce": False} if finishes else {})
    )
    if not wanted.compute_grad:
        return out, loss, *(loss.new_empty(0) for _ in range(5))
    finish = (loss, target, similarity, grad_logits, modulation if wanted.needs_modulation else None, -100)
    finish = {"finish": finish} if finishes else {}
    scale = gradient_scale(z, options.pool_size, options.temperature)
    if z.dim() == 4:
        areas = bin_areas(z.device, tuple(z.shape[2:]), options.pool_size)
        grad_gamma, grad_beta, grad_bias, *finished = kernels.norm_grads(
            grad_latents, *sums, z.shape[1], areas, **finish
        )
        if wanted.needs_weight:
            kernels.grad_preactivation_(z, *norm, grad_latents, grad_gamma, grad_beta, options.pool_size, scale)
    else:
        grad_gamma, grad_beta, grad_bias, *finished = kernels.linear_grad_preactivation_(
            z, *norm, grad_latents, options.pool_size, scale, **finish
        )
    loss, grad_modulation = finished if finishes else (loss, loss.new_empty(0))

    grad_weight = loss.new_empty(0)
    if wanted.needs_weight:
        z = layer.for_grad_weight(z)
        grad_weight = layer.grad_weight(z).to(loss.dtype, memory_format=layer.memory_format)
        if scale != 1.0:
            grad_weight = grad_weight.div_(scale)
    if wanted.needs_modulation and not finishes:
        grad_modulation = kernels.modulation_grad(similarity, grad_logits, modulation.dim() == 1, one(loss.device))
    grad_bias = loss.new_empty(0) if parameters.bias is None else grad_bias
    return out, loss, grad_weight, grad_bias, grad_gamma, grad_beta, grad_modulation
