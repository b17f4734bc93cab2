"""The fused block: layer -> BatchNorm (batch statistics) -> LeakyReLU -> LLS head, local gradients included.

    z = layer(x)            library, without the bias, which batch normalisation cancels
    mean, rstd              batch_stats
    out, latents, S1, S2    norm_act_pool: one pass over z
    loss, dlatents          head
    dgamma, dbeta           norm_grads, from S1 and S2: no pass over z
    z <- dz                 grad_preactivation_, in place
    dweight                 library

No gradient goes to x. The pre-activation z never leaves this function.
"""

import math
from functools import lru_cache

import torch

from ...core.unit import one

_SMALL_PLANE = 64  # positions; the passes over z go along channels where a plane fills too few vectors

_convolution_backward = torch.ops.aten.convolution_backward.default


def channels_last(x):
    """True when `out` should be laid out with the channels innermost, as torch's convolution would."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _gradient_scale(z, pool_size, temperature):
    """Power of two that keeps a float16 dz away from underflow; it cancels in the float32 weight gradient.

    dz shrinks like 1 / (batch * temperature * bin area): unscaled, 2 to 6 % of VGG8's dz flush to zero at B=128.
    """
    if z.dtype != torch.float16 or z.shape[0] == 0:
        return 1.0
    area = max(z[0, 0].numel() // pool_size**2, 1) if z.dim() == 4 else max(z.shape[1] // pool_size, 1)
    return 2.0 ** math.floor(math.log2(max(z.shape[0] * temperature * area, 1.0)))


@lru_cache(maxsize=256)  # a host-to-device copy each step would be a synchronisation
def _bin_areas(size, pool_size, device):
    """Number of positions of each of the pool_size x pool_size bins, (P*P,) float32."""
    height, width = ([(-((-(i + 1) * n) // pool_size)) - (i * n) // pool_size for i in range(pool_size)] for n in size)
    return torch.tensor([h * w for h in height for w in width], dtype=torch.float32, device=device)


def _batch_stats(kernels, z, bias, running_mean, running_var, momentum, eps, wide):
    if z.shape[0] == 0:  # nothing to learn from: torch's batch norm leaves the running statistics alone, too
        running_mean = running_var = None
    if running_mean is None or running_mean.dtype == wide:
        return kernels.batch_stats(z, bias, running_mean, running_var, momentum, eps)
    running = running_mean.to(wide), running_var.to(wide)  # a half model's
    stats = kernels.batch_stats(z, bias, *running, momentum, eps)
    running_mean.copy_(running[0])
    running_var.copy_(running[1])
    return stats


def forward(
    kernels,
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    target,
    modulation,
    basis,
    stride,
    padding,
    momentum,
    norm_eps,
    negative_slope,
    max_pool,
    num_classes,
    pool_size,
    temperature,
    label_smoothing,
    compute_grad,
    needs_weight,
    needs_modulation,
):
    """Returns (out, loss, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_modulation); the last five
    are empty where not wanted, grad_bias is zero. Gradients are those of the mean local loss, in float32 (float64 for
    float64)."""
    is_conv = weight.dim() == 4
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    last, weight_last = channels_last(x), channels_last(weight)
    formats = is_conv and hasattr(kernels, "to_channels_last")
    if formats:
        # oneDNN wants large maps channels_last (NCHW ones it copies into blocks of its own); where the weight is the
        # larger part it stays as it is, and x, which is small, follows.
        if weight_last or x.numel() > 2 * weight.numel():
            x, weight = (kernels.to_channels_last(t) for t in (x, weight))
        else:
            x = kernels.to_contiguous(x)
    weight = weight.to(x.dtype)  # under autocast, and for half models, the norm's parameters stay wide
    norm_weight, norm_bias = norm_weight.to(wide), norm_bias.to(wide)
    modulation = None if modulation is None else modulation.to(wide).contiguous()
    if is_conv:
        z = torch.convolution(x, weight, None, stride, padding, (1, 1), False, (0, 0), 1)
    else:
        z = x @ weight.t()
    if z.numel() == z.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got a pre-activation of size {z.shape}"
        )
    z_last = channels_last(z)
    if formats and z.shape[2] * z.shape[3] <= _SMALL_PLANE:
        z = kernels.to_channels_last(z)
    mean, rstd = _batch_stats(kernels, z, bias, running_mean, running_var, momentum, norm_eps, wide)
    out, latents, s1, s2 = kernels.norm_act_pool(
        z,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        negative_slope,
        pool_size,
        max_pool,
        compute_grad,
        **({"out_channels_last": last} if formats else {}),
    )
    finishes = compute_grad and hasattr(kernels, "FINISHES_HEAD")  # with the norm's gradients: two launches less
    loss, grad_latents, similarity, grad_logits = kernels.head(
        latents,
        target,
        modulation,
        basis,
        num_classes=num_classes,
        temperature=temperature,
        label_smoothing=label_smoothing,
        normalize=True,
        eps=1e-12,
        zero_gradient_below_eps=False,
        basis_scale=1.0,
        loss="cross_entropy",
        ignore_index=-100,
        reduction="mean",
        compute_grad=compute_grad,
        **({"reduce": False} if finishes else {}),
    )
    none = loss.new_empty(0)
    if not compute_grad:
        return out, loss, none, *(loss.new_empty(0) for _ in range(4))
    scale = _gradient_scale(z, pool_size, temperature)
    finish = (loss, target, similarity, grad_logits, modulation if needs_modulation else None, -100)
    finish = {"finish": finish} if finishes else {}
    if is_conv:
        areas = _bin_areas(tuple(z.shape[2:]), pool_size, z.device)
        grad_gamma, grad_beta, grad_bias, *sums = kernels.norm_grads(grad_latents, s1, s2, z.shape[1], areas, **finish)
        if needs_weight:
            kernels.grad_preactivation_(
                z,
                mean,
                rstd,
                norm_weight,
                norm_bias,
                negative_slope,
                grad_latents,
                grad_gamma,
                grad_beta,
                pool_size,
                scale,
            )
    else:
        grad_gamma, grad_beta, grad_bias, *sums = kernels.linear_grad_preactivation_(
            z, mean, rstd, norm_weight, norm_bias, negative_slope, grad_latents, pool_size, scale, **finish
        )
    loss, grad_modulation = sums if finishes else (loss, none)
    grad_weight = none
    if needs_weight:
        if is_conv:
            z = kernels.to_contiguous(z) if formats and not z_last else z
            grad_weight = _convolution_backward(
                z, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (False, True, False)
            )[1]
        else:
            grad_weight = z.t() @ x
        memory_format = torch.channels_last if weight_last else torch.contiguous_format  # the parameter's
        grad_weight = grad_weight.to(loss.dtype, memory_format=memory_format)
        if scale != 1.0:
            grad_weight = grad_weight.div_(scale)
    if needs_modulation and not finishes:
        grad_modulation = kernels.modulation_grad(similarity, grad_logits, modulation.dim() == 1, one(loss.device))
    grad_bias = loss.new_empty(0) if bias is None else grad_bias
    return out, loss, grad_weight, grad_bias, grad_gamma, grad_beta, grad_modulation
