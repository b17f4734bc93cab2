"""Registered ops of the family lls: shapes, checks, and the call of the chosen backend.

The basis table is chosen inside of the op, with the backend: a compiled graph holds one opaque call.
"""

import torch
from torch import Tensor

from ...core import checks
from ...core.ops import class_indices, define, wide_dtype
from ...core.unit import one
from . import basis as tables
from . import block
from .options import LOSSES, REDUCTIONS, WAVEFORMS, BlockOptions, HeadOptions, Wanted

_DTYPES = {"target": checks.INTEGER}


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
    if waveform == "square" and kernels.CAPABILITIES.packed_basis:
        return tables.signs(rows, dim, device=device)
    return tables.table(rows, dim, waveform, device=device)


def _prepare_basis(kernels, rows, dim, waveform, device):
    """Make the basis, unless its size is a symbol."""
    if type(rows) is type(dim) is int:
        basis_for(kernels, rows, dim, waveform, device)


def _check_modulation(modulation, num_classes):
    if modulation is not None and (modulation.dim() not in (1, 2) or modulation.shape[-1] != num_classes):
        raise ValueError(
            f"modulation must be (num_classes,) or (K, num_classes) with num_classes={num_classes}, got shape "
            f"{checks.shape_of(modulation)}"
        )


def _check_words(waveform, options=None):
    if waveform not in WAVEFORMS:
        checks.choice("waveform", waveform, WAVEFORMS)
    if options is not None and options.loss not in LOSSES:
        checks.choice("loss", options.loss, LOSSES)
    if options is not None and options.reduction not in REDUCTIONS:
        checks.choice("reduction", options.reduction, REDUCTIONS)


# -- the basis, as the result of a public function ----------------------------------------------------------------


@define(
    backends_of="lls_loss",
    package=__package__,
    fake=lambda rows, dim, waveform, min_freq, max_freq, device: torch.empty(
        (rows, dim), dtype=torch.float32, device=device
    ),
    check=lambda rows, dim, waveform, *_: _check_words(waveform),
    where=lambda *arguments: (arguments[-1], torch.float32),
    choose=lambda *_: None,  # the same table for all
)
def lls_basis(
    kernels, rows: int, dim: int, waveform: str, min_freq: float, max_freq: float, device: torch.device
) -> Tensor:
    return tables.table(rows, dim, waveform, min_freq, max_freq, device).clone()


# -- the loss ---------------------------------------------------------------------------------------------------


def _check_sizes(name, shape, pool_size):
    """A bin of no position, or no bin, would be divided by."""
    if len(shape) not in (2, 4) or shape[0] < 0 or min(shape[1:]) < 1:
        raise ValueError(f"{name} must have no empty dimension but the batch, got shape {tuple(shape)}")
    if pool_size < 1:
        raise ValueError(f"pool_size must be at least 1, got {pool_size}")


def _check_loss(activation, target, modulation, basis, waveform, pool_size, options, compute_grad):
    if target.shape != activation.shape[:1]:
        checks.shape("target", target, activation.shape[:1], "one class index per row of activation")
    checks.dims("activation", activation, (2, 4), "(B, N) or (B, C, H, W)")
    _check_sizes("activation", activation.shape, pool_size)
    _check_modulation(modulation, options.num_classes)
    _check_words(waveform, options)
    if basis is not None:
        rows = basis_rows(modulation, None, options.num_classes)
        checks.shape("basis", basis, (rows, latent_size(activation.shape, pool_size)), "rows and latents")


def _loss_fake(activation, target, modulation, basis, waveform, pool_size, options, compute_grad):
    batch, wide = activation.shape[0], wide_dtype(activation.dtype)

    def new(*shape):
        return activation.new_empty(shape, dtype=wide)

    dim = latent_size(activation.shape, pool_size)
    grads = ((batch, dim), (batch, options.num_classes)) if compute_grad else ((0,), (0,))
    return (
        new(batch) if options.reduction == "none" else new(),
        new(*grads[0]),
        new(batch, basis_rows(modulation, basis, options.num_classes)),
        new(*grads[1]),
    )


def _prepare_loss(kernels, activation, target, modulation, basis, waveform, pool_size, options, compute_grad):
    if basis is None:
        rows, dim = basis_rows(modulation, None, options.num_classes), latent_size(activation.shape, pool_size)
        _prepare_basis(kernels, rows, dim, waveform, activation.device)
    one(activation.device)


@define(
    backends_of="lls_loss",
    package=__package__,
    fake=_loss_fake,
    check=_check_loss,
    prepare=_prepare_loss,
    dtypes=_DTYPES,
)
def lls_loss_forward(
    kernels,
    activation: Tensor,
    target: Tensor,
    modulation: Tensor | None,
    basis: Tensor | None,
    waveform: str,
    pool_size: int,
    options: HeadOptions,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = class_indices("target", target, options.num_classes, options.ignore_index)
    if basis is None:
        rows = basis_rows(modulation, basis, options.num_classes)
        basis = basis_for(kernels, rows, latent_size(activation.shape, pool_size), waveform, activation.device)
    if modulation is not None:
        modulation = modulation.to(wide_dtype(activation.dtype)).contiguous()
    return kernels.head(kernels.latents(activation, pool_size), target, modulation, basis, options, compute_grad)


def _empty(shape, dtype, channels_last, device):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _check_backward(
    grad_loss, grad_latents, similarity, grad_logits, shape, dtype, channels_last, pool_size, vector, *needs
):
    _check_sizes("shape", shape, pool_size)
    batch, dim = shape[0], latent_size(shape, pool_size)
    checks.shape("grad_latents", grad_latents, (batch, dim), "a gradient for each latent")
    if grad_loss.dim():
        checks.shape("grad_loss", grad_loss, (batch,), "one a row, or a single number")
    if needs[1] and (similarity.shape[0] != batch or grad_logits.shape[0] != batch):
        raise ValueError(
            f"similarity and grad_logits must have {batch} rows, got {similarity.shape[0]} and {grad_logits.shape[0]}"
        )
    if needs[1] and vector and similarity.shape != grad_logits.shape:
        checks.shape("similarity", similarity, grad_logits.shape, "that of grad_logits")


def _backward_fake(
    grad_loss, grad_latents, similarity, grad_logits, shape, dtype, channels_last, pool_size, vector, *needs
):
    needs_activation, needs_modulation = needs
    grad = _empty(shape, dtype, channels_last, grad_latents.device) if needs_activation else grad_latents.new_empty(0)
    if not needs_modulation:
        return grad, grad_latents.new_empty(0)
    rows, classes = similarity.shape[1], grad_logits.shape[1]
    return grad, similarity.new_empty((classes,) if vector else (rows, classes))


@define(
    backends_of="lls_loss",
    package=__package__,
    fake=_backward_fake,
    check=_check_backward,
    where=lambda grad_loss, grad_latents, similarity, grad_logits, shape, dtype, *_: (grad_latents.device, dtype),
)
def lls_loss_backward(
    kernels,
    grad_loss: Tensor,
    grad_latents: Tensor,
    similarity: Tensor,
    grad_logits: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    channels_last: bool,
    pool_size: int,
    vector: bool,
    needs_activation: bool,
    needs_modulation: bool,
) -> tuple[Tensor, Tensor]:
    none = grad_latents.new_empty(0)
    scale = grad_loss.contiguous()
    grad = none
    if needs_activation:
        grad = kernels.expand_grad(grad_latents, scale, _empty(shape, dtype, channels_last, none.device), pool_size)
    if not needs_modulation:
        return grad, none.clone()
    return grad, kernels.modulation_grad(similarity, grad_logits, vector, scale)


# -- the fused block --------------------------------------------------------------------------------------------


def _check_block(
    x, weight, bias, norm_weight, norm_bias, running_mean, running_var, target, modulation, options, wanted
):
    channels = weight.shape[:1]
    for name, tensor in (
        ("bias", bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor is not None and tensor.shape != channels:
            checks.shape(name, tensor, channels, "one for each output of weight")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if x.dim() != weight.dim() or weight.dim() not in (2, 4) or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must fit weight of shape {checks.shape_of(weight)} ({weight.shape[1]} inputs), got shape "
            f"{checks.shape_of(x)}"
        )
    if target.shape != x.shape[:1]:
        checks.shape("target", target, x.shape[:1], "one class index per row of x")
    if options.pool_size < 1:
        raise ValueError(f"pool_size must be at least 1, got {options.pool_size}")
    _check_modulation(modulation, options.num_classes)
    _check_words(options.waveform)


def _map_size(x, weight, options):
    """Height and width of the convolution's output."""
    geometry = zip(x.shape[2:], options.padding, weight.shape[2:], options.stride)
    return tuple((n + 2 * p - k) // s + 1 for n, p, k, s in geometry)


def _block_basis(weight, modulation, options):
    """Rows and columns of the block's basis."""
    dim = latent_size((0, 0) if weight.dim() == 2 else (0, weight.shape[0], 0, 0), options.pool_size)
    return basis_rows(modulation, None, options.num_classes), dim


def _prepare_block(
    kernels, x, weight, bias, norm_weight, norm_bias, running_mean, running_var, target, modulation, options, wanted
):
    rows, dim = _block_basis(weight, modulation, options)
    _prepare_basis(kernels, rows, dim, options.waveform, x.device)
    size = _map_size(x, weight, options) if weight.dim() == 4 else ()
    if size and all(type(n) is int for n in (*size, options.pool_size)):
        block.bin_areas(x.device, size, options.pool_size)
    one(x.device)


def _block_fake(
    x, weight, bias, norm_weight, norm_bias, running_mean, running_var, target, modulation, options, wanted
):
    wide = wide_dtype(x.dtype)
    if weight.dim() == 2:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    else:
        size = _map_size(x, weight, options)
        size = [n // 2 for n in size] if options.max_pool else size
        out = _empty((x.shape[0], weight.shape[0], *size), x.dtype, block.channels_last(x), x.device)

    def new(reference, asked=True):
        if asked and wanted.compute_grad and reference is not None:
            return torch.empty_like(reference, dtype=wide)
        return x.new_empty(0, dtype=wide)

    return (
        out,
        x.new_empty((), dtype=wide),
        new(weight, wanted.needs_weight),
        new(bias),
        new(norm_weight),
        new(norm_bias),
        new(modulation, wanted.needs_modulation),
    )


@define(
    backends_of="lls_block",
    package=__package__,
    fake=_block_fake,
    check=_check_block,
    prepare=_prepare_block,
    dtypes=_DTYPES,
    mutates=("running_mean", "running_var"),
)
def lls_block(
    kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    target: Tensor,
    modulation: Tensor | None,
    options: BlockOptions,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = class_indices("target", target, options.num_classes, -100)
    rows, dim = _block_basis(weight, modulation, options)
    basis = basis_for(kernels, rows, dim, options.waveform, x.device)
    parameters = block.Parameters(weight, bias, norm_weight, norm_bias, running_mean, running_var, modulation)
    if kernels.CAPABILITIES.whole_block:
        return kernels.block(x, target, parameters, basis, options, wanted)
    return block.forward(kernels, x, target, parameters, basis, options, wanted)
