"""LLS on the CUDA C++ kernels of `lgkernels._C` (csrc/lls/cuda): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""

import torch

from ...core import native
from ..common.cuda import DTYPES, address, call
from .options import Capabilities

CAPABILITIES = Capabilities(packed_basis=True, finishes_head=True)

_WIDEST_ROW = 4096  # of an NCHW kernel, whose column sums lie in shared memory; wider tensors go by channels_last


def _float(tensor):
    """Contiguous float32 of a small tensor (the same one where it is so already)."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _dense(z):
    """`(z, channels_last)`: z itself where one of the two memory formats holds it, else a dense copy."""
    if z.dim() == 2:
        return z.contiguous(), True
    by_channel = z.is_contiguous(memory_format=torch.channels_last)
    if z.shape[3] > _WIDEST_ROW:
        return z.contiguous(memory_format=torch.channels_last), True
    if by_channel and (not z.is_contiguous() or z.shape[2] * z.shape[3] == 1):
        return z, True
    return z.contiguous(), False


def _image(z, channels_last, pool_size):
    """The kernels' description of a tensor; a (B, N) one is N channels of one position."""
    batch, channels, height, width = z.shape if z.dim() == 4 else (*z.shape, 1, 1)
    return batch, channels, height, width, pool_size, pool_size, channels_last, DTYPES[z.dtype]


def _norm(mean, rstd, gamma, beta):
    """Float32 parameters (kept alive by the caller) and their addresses."""
    tensors = [_float(t) for t in (mean, rstd, gamma, beta)]
    return tensors, [t.data_ptr() for t in tensors]


def _new(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def latents(activation, pool_size):
    dense, channels_last = _dense(activation)
    identity = 0, 0, 0, 0, 1.0
    if activation.dim() == 2:
        result = _new(dense, activation.shape[0], pool_size)
        call(
            "lls_linear_norm_act_pool",
            dense.device,
            (*dense.shape, pool_size, DTYPES[dense.dtype]),
            identity,
            address(dense),
            0,
            address(result),
        )
        return result
    result = _new(dense, activation.shape[0], activation.shape[1] * pool_size**2)
    call(
        "lls_norm_act_pool",
        dense.device,
        _image(dense, channels_last, pool_size),
        identity,
        address(dense),
        False,
        0,
        address(result),
        0,
        0,
    )
    return result


def head(x, target, modulation, basis, options, compute_grad, reduce=True):
    """Without `reduce` the first result are the losses of the rows, for `finish` of a later call."""
    x, modulation, target = _float(x), _float(modulation), target.contiguous()
    packed = basis.dtype == torch.int32
    basis = basis.contiguous() if packed else _float(basis)
    (batch, dim), rows = x.shape, basis.shape[0]
    shape = batch, dim, rows, packed, 0 if modulation is None else modulation.dim(), compute_grad
    row_loss, similarity = _new(x, batch), _new(x, batch, rows)
    value = row_loss if options.reduction == "none" or not reduce else _new(x)
    grad_latents, grad_logits = (_new(x, *((batch, n) if compute_grad else (0,))) for n in (dim, options.num_classes))
    scratch = native.cuda_entries().lls_head_scratch(options, shape)
    scratch = _new(x, scratch) if scratch else None
    call(
        "lls_head",
        x.device,
        options,
        shape,
        tuple(map(address, (x, target, modulation, basis))),
        tuple(map(address, (None if value is row_loss else value, row_loss, grad_latents, similarity, grad_logits))),
        address(scratch),
    )
    return value, grad_latents, similarity, grad_logits


def modulation_grad(similarity, grad_logits, vector, scale):
    similarity, grad_logits, scale = _float(similarity), _float(grad_logits), _float(scale)
    rows, classes = similarity.shape[1], grad_logits.shape[1]
    grad = _new(similarity, *((classes,) if vector else (rows, classes)))
    call("lls_modulation_grad", grad.device, _modulation_grad(similarity, grad_logits, vector, scale, grad))
    return grad


def _modulation_grad(similarity, grad_logits, vector, scale, grad):
    return (
        *similarity.shape,
        grad_logits.shape[1],
        vector,
        address(similarity),
        address(grad_logits),
        address(scale),
        scale is not None and scale.dim() == 1,
        address(grad),
    )


def _finishing(finish):
    """What the kernels that finish a head take and, after their own results, return, for
    `finish` = (losses, target, similarity, dL/dlogits, modulation or None, ignore_index)."""
    if finish is None:
        return None, ()
    losses, target, similarity, grad_logits, modulation, ignore_index = finish
    loss, grad = _new(losses), _new(losses, *((0,) if modulation is None else modulation.shape))
    vector = modulation is not None and modulation.dim() == 1
    gradient = _modulation_grad(similarity, grad_logits, vector, None, grad)
    return (address(target), ignore_index, address(losses), address(loss), gradient), (loss, grad)


def expand_grad(grad_latents, scale, out, pool_size):
    grad_latents, scale = _float(grad_latents), _float(scale)
    channels_last = out.dim() == 4 and not out.is_contiguous()
    if out.dim() == 2:  # one channel, one row, the features as columns
        image = out.shape[0], 1, 1, out.shape[1], 1, pool_size, False, DTYPES[out.dtype]
    else:
        image = _image(out, channels_last, pool_size)
    call("lls_expand_grad", out.device, image, address(grad_latents), address(scale), scale.dim() == 1, address(out))
    return out


# -- the pieces of the fused block ------------------------------------------------------------------------------


def batch_stats(z, bias, running_mean, running_var, momentum, eps):
    dense, channels_last = _dense(z)
    image = _image(dense, channels_last, 1)
    channels, bias = z.shape[1], _float(bias)
    mean, rstd = _new(z, channels), _new(z, channels)
    scratch = _new(z, 4, native.cuda_entries().lls_batch_stats_splits(image), channels)
    running = [_float(t) for t in (running_mean, running_var)]
    call(
        "lls_batch_stats",
        z.device,
        image,
        address(dense),
        (address(bias), *map(address, running), momentum, eps, address(mean), address(rstd)),
        address(scratch),
    )
    for theirs, ours in zip((running_mean, running_var), running):
        if theirs is not ours:
            theirs.copy_(ours)
    return mean, rstd


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    parameters, addresses = _norm(mean, rstd, gamma, beta)
    dense, channels_last = _dense(z)
    if z.dim() == 2:
        out, result = torch.empty_like(dense), _new(z, z.shape[0], pool_size)
        call(
            "lls_linear_norm_act_pool",
            z.device,
            (*z.shape, pool_size, DTYPES[z.dtype]),
            (*addresses, negative_slope),
            address(dense),
            address(out),
            address(result),
        )
        return out, result, _new(z, 0), _new(z, 0)
    batch, channels, height, width = z.shape
    size = (height // 2, width // 2) if max_pool else (height, width)
    plain = not channels_last or height * width == 1 and z.is_contiguous()
    out = torch.empty(
        (batch, channels, *size),
        dtype=z.dtype,
        device=z.device,
        memory_format=torch.contiguous_format if plain else torch.channels_last,
    )
    result, *sums = (_new(z, batch, channels * pool_size**2) for _ in range(3 if compute_grad else 1))
    s1, s2 = sums or (_new(z, 0), _new(z, 0))
    call(
        "lls_norm_act_pool",
        z.device,
        _image(dense, channels_last, pool_size),
        (*addresses, negative_slope),
        address(dense),
        max_pool,
        address(out),
        address(result),
        address(s1),
        address(s2),
    )
    return (out.contiguous() if z.is_contiguous() else out), result, s1, s2


def norm_grads(grad_latents, s1, s2, channels, area, finish=None):
    """With `finish` (see `_finishing`) also the loss and the gradient of the modulation, after the other three."""
    grad_latents, area = _float(grad_latents), _float(area)
    grads = tuple(_new(s1, channels) for _ in range(3))
    finishing, finished = _finishing(finish)
    call(
        "lls_norm_grads",
        s1.device,
        grad_latents.shape[0],
        channels,
        area.numel(),
        *map(address, (grad_latents, s1, s2, area, *grads)),
        finishing,
    )
    return grads + finished


def _in_place(z, run):
    """`run(dense, channels_last)` overwrites z, or a dense copy of it that is copied back."""
    dense, channels_last = _dense(z)
    result = run(dense, channels_last)
    if dense.data_ptr() != z.data_ptr():
        z.copy_(dense)
    return result


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    parameters, addresses = _norm(mean, rstd, gamma, beta)
    grads = [_float(t) for t in (grad_latents, grad_gamma, grad_beta)]
    _in_place(
        z,
        lambda dense, channels_last: call(
            "lls_grad_preactivation",
            z.device,
            _image(dense, channels_last, pool_size),
            (*addresses, negative_slope),
            address(dense),
            *map(address, grads),
            scale,
        ),
    )
    return z


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale, finish=None):
    parameters, addresses = _norm(mean, rstd, gamma, beta)
    grad_latents = _float(grad_latents)
    grads = tuple(_new(z, z.shape[1]) for _ in range(3))
    finishing, finished = _finishing(finish)
    _in_place(
        z,
        lambda dense, _: call(
            "lls_linear_grad_preactivation",
            z.device,
            (*z.shape, pool_size, DTYPES[z.dtype]),
            (*addresses, negative_slope),
            address(dense),
            address(grad_latents),
            scale,
            *map(address, grads),
            finishing,
        ),
    )
    return grads + finished
