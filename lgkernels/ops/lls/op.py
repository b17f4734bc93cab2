"""Registered ops of the family lls: schema, shapes (fake), and the call of the chosen backend.

`define`/`impl` instead of `torch.library.custom_op`: a third of the call's cost. Backend and basis table are
chosen inside the op, so a compiled graph holds one opaque call and no environment look-ups.
"""

import contextlib
import os

import torch

from ...core import checks, dispatch
from . import basis as tables
from . import block

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")

for _name in ("lls_loss", "lls_block"):
    dispatch.register(
        _name,
        **{
            name: f"lgkernels.ops.lls.{module}"
            for name, module in (("reference", "reference"), ("cpu", "cpu"), ("triton", "triton"), ("cuda", "cuda"))
        },
    )


def without_autocast(device):
    """Inside an op the dtypes are settled: an ambient autocast must not touch the float32 arithmetic."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def basis_rows(modulation, basis, num_classes):
    """K: rows of the basis, from whichever argument fixes it."""
    if basis is not None:
        return basis.shape[0]
    return modulation.shape[0] if modulation is not None and modulation.dim() == 2 else num_classes


def latent_size(shape, pool_size):
    """d: pool_size for (B, N); channels * pool_size^2 for (B, C, H, W)."""
    return pool_size if len(shape) == 2 else shape[1] * pool_size * pool_size


def basis_for(kernels, rows, dim, waveform, device):
    """The periodic table in the form that this backend reads."""
    if waveform == "square" and kernels.PACKED_BASIS:
        return tables.signs(rows, dim, device=device)
    return tables.table(rows, dim, waveform, device=device)


def class_indices(target, num_classes, ignore_index):
    """int64 targets; range-checked where looking at them costs no synchronisation, or when LGKERNELS_CHECK=1."""
    target = target.long()
    if target.device.type == "cpu" or os.environ.get("LGKERNELS_CHECK") == "1":
        checks.class_indices("target", target, num_classes, ignore_index)
    return target.contiguous()


# -- the loss ---------------------------------------------------------------------------------------------------

LIBRARY.define(
    "lls_loss_forward(Tensor activation, Tensor target, Tensor? modulation, Tensor? basis, str waveform, "
    "int num_classes, int pool_size, float temperature, float label_smoothing, bool normalize, float eps, "
    "bool zero_gradient_below_eps, float basis_scale, str loss, int ignore_index, str reduction, "
    "bool compute_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "lls_loss_backward(Tensor grad_loss, Tensor grad_latents, Tensor similarity, Tensor grad_logits, "
    "SymInt[] shape, ScalarType dtype, bool channels_last, int pool_size, bool vector, bool needs_activation, "
    "bool needs_modulation, str impl) -> (Tensor, Tensor)"
)


def _forward(
    activation,
    target,
    modulation,
    basis,
    waveform,
    num_classes,
    pool_size,
    temperature,
    label_smoothing,
    normalize,
    eps,
    zero_gradient_below_eps,
    basis_scale,
    loss,
    ignore_index,
    reduction,
    compute_grad,
    impl,
):
    kernels = dispatch.backend("lls_loss", impl, activation.device, activation.dtype)
    target = class_indices(target, num_classes, ignore_index)
    with without_autocast(activation.device):
        if basis is None:
            rows = basis_rows(modulation, basis, num_classes)
            basis = basis_for(kernels, rows, latent_size(activation.shape, pool_size), waveform, activation.device)
        wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
        modulation = None if modulation is None else modulation.to(wide).contiguous()
        arguments = dict(
            num_classes=num_classes,
            temperature=temperature,
            label_smoothing=label_smoothing,
            normalize=normalize,
            eps=eps,
            zero_gradient_below_eps=zero_gradient_below_eps,
            basis_scale=basis_scale,
            loss=loss,
            ignore_index=ignore_index,
            reduction=reduction,
            compute_grad=compute_grad,
        )
        if hasattr(kernels, "loss_forward"):  # one call for pooling and head
            return kernels.loss_forward(activation, target, modulation, basis, pool_size, **arguments)
        return kernels.head(kernels.latents(activation, pool_size), target, modulation, basis, **arguments)


def _forward_fake(
    activation,
    target,
    modulation,
    basis,
    waveform,
    num_classes,
    pool_size,
    temperature,
    label_smoothing,
    normalize,
    eps,
    zero_gradient_below_eps,
    basis_scale,
    loss,
    ignore_index,
    reduction,
    compute_grad,
    impl,
):
    batch = activation.shape[0]
    wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
    new = lambda *shape: activation.new_empty(shape, dtype=wide)  # noqa: E731
    grads = ((batch, latent_size(activation.shape, pool_size)), (batch, num_classes)) if compute_grad else ((0,), (0,))
    return (
        new(batch) if reduction == "none" else new(),
        new(*grads[0]),
        new(batch, basis_rows(modulation, basis, num_classes)),
        new(*grads[1]),
    )


def _empty(shape, dtype, channels_last, device):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _backward(
    grad_loss,
    grad_latents,
    similarity,
    grad_logits,
    shape,
    dtype,
    channels_last,
    pool_size,
    vector,
    needs_activation,
    needs_modulation,
    impl,
):
    kernels = dispatch.backend("lls_loss", impl, grad_latents.device, dtype)
    none = grad_latents.new_empty(0)
    with without_autocast(grad_latents.device):
        scale = grad_loss.contiguous()
        grad = none
        if needs_activation:
            grad = kernels.expand_grad(grad_latents, scale, _empty(shape, dtype, channels_last, none.device), pool_size)
        if not needs_modulation:
            return grad, none.clone()
        return grad, kernels.modulation_grad(similarity, grad_logits, vector, scale)


def _backward_fake(
    grad_loss,
    grad_latents,
    similarity,
    grad_logits,
    shape,
    dtype,
    channels_last,
    pool_size,
    vector,
    needs_activation,
    needs_modulation,
    impl,
):
    grad = _empty(shape, dtype, channels_last, grad_latents.device) if needs_activation else grad_latents.new_empty(0)
    if not needs_modulation:
        return grad, grad_latents.new_empty(0)
    rows, classes = similarity.shape[1], grad_logits.shape[1]
    return grad, similarity.new_empty((classes,) if vector else (rows, classes))


# -- the fused block --------------------------------------------------------------------------------------------

LIBRARY.define(
    "lls_block(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor target, Tensor? modulation, str waveform, "
    "int[] stride, int[] padding, float momentum, float norm_eps, float negative_slope, bool max_pool, "
    "int num_classes, int pool_size, float temperature, float label_smoothing, bool compute_grad, "
    "bool needs_weight, bool needs_modulation, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _block(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    target,
    modulation,
    waveform,
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
    impl,
):
    kernels = dispatch.backend("lls_block", impl, x.device, x.dtype)
    target = class_indices(target, num_classes, -100)
    dim = latent_size((0,) * weight.dim() if weight.dim() == 2 else (0, weight.shape[0], 0, 0), pool_size)
    basis = basis_for(kernels, basis_rows(modulation, None, num_classes), dim, waveform, x.device)
    with without_autocast(x.device):
        return block.forward(
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
        )


def _block_fake(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    target,
    modulation,
    waveform,
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
    impl,
):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight.dim() == 2:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    else:
        size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride)]
        size = [n // 2 for n in size] if max_pool else size
        out = _empty((x.shape[0], weight.shape[0], *size), x.dtype, block.channels_last(x), x.device)
    new = lambda reference, wanted=True: (  # noqa: E731
        torch.empty_like(reference, dtype=wide)
        if wanted and compute_grad and reference is not None
        else x.new_empty(0, dtype=wide)
    )
    return (
        out,
        x.new_empty((), dtype=wide),
        new(weight, needs_weight),
        new(bias),
        new(norm_weight),
        new(norm_bias),
        new(modulation, needs_modulation),
    )


for _name, _implementation, _fake in (
    ("lls_loss_forward", _forward, _forward_fake),
    ("lls_loss_backward", _backward, _backward_fake),
    ("lls_block", _block, _block_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgkernels::{_name}", _fake, lib=LIBRARY)
