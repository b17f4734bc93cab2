"""LLS in plain torch with few passes over memory: what runs where no kernel does. float32 and halves, any device.

The functions of `reference.py`, and `block` in place of those for its pieces: it is not fused, but made of the
library's own layers, forward and backward.
"""

import torch
import torch.nn.functional as F

from ...core.unit import one
from . import block as fused
from . import reference
from .options import Capabilities

CAPABILITIES = Capabilities(whole_block=True)

_aten = torch.ops.aten
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # torch's numbers for them


def _tiles(shape, pool_size):
    """The shape with each bin in dimensions of its own; None where bins differ in size or overlap."""
    batch, channels, *size = shape
    if len(shape) == 2:
        return None if channels % pool_size else (batch, pool_size, channels // pool_size)
    if any(n % pool_size for n in size):
        return None
    height, width = size
    return batch, channels, pool_size, height // pool_size, pool_size, width // pool_size


def _per_bin(grad_latents, tiles):
    """A view that broadcasts to `tiles`."""
    rows, *bins = tiles
    return grad_latents.view((rows, bins[0], 1) if len(bins) == 2 else (rows, *bins[:2], 1, bins[3], 1))


def latents(activation, pool_size):
    """(B, C, H, W) -> (B, C*P*P); (B, N) -> (B, P), in float32."""
    if activation.dim() == 2 and activation.shape[1] == pool_size:
        return activation.float()
    tiles = _tiles(activation.shape, pool_size)
    # A CPU takes several times as long for such a mean as for its own pooling, which would round a half.
    if tiles is None or activation.is_cpu and activation.dtype == torch.float32:
        if activation.dim() == 2:
            return F.adaptive_avg_pool1d(activation.float().unsqueeze(1), pool_size).squeeze(1)
        return F.adaptive_avg_pool2d(activation.float(), pool_size).flatten(1)
    means = activation.view(tiles).mean(2 if len(tiles) == 3 else (3, 5), dtype=torch.float32)
    return means.flatten(1)


# -- the head -------------------------------------------------------------------------------------------------------


def _cross_entropy(v, target, options, compute_grad):
    """(loss, its gradient with respect to v)."""
    log_p = _aten._log_softmax(v, 1, False)
    settings = None, _REDUCTIONS[options.reduction], options.ignore_index
    value, count = _aten.nll_loss_forward(log_p, target, *settings)
    smoothing = options.label_smoothing
    if smoothing:
        valid = (target != options.ignore_index).to(v.dtype)
        rows = log_p.mean(1).mul_(valid)
        if options.reduction != "none":
            rows = rows.sum() / count if options.reduction == "mean" else rows.sum()
        value = value * (1 - smoothing) - rows * smoothing
    if not compute_grad:
        return value, None
    unit = v.new_ones(len(v)) if options.reduction == "none" else one(v.device)
    grad = _aten.nll_loss_backward(unit, log_p, target, *settings, count)
    if smoothing:
        share = valid.mul_(smoothing / options.num_classes)
        if options.reduction == "mean":
            share = share.div_(count.clamp_min(1))
        grad = grad.mul_(1 - smoothing).sub_(share.unsqueeze(1))
    return value, _aten._log_softmax_backward_data(grad, log_p, 1, v.dtype)


def _hard_sigmoid_mse(v, target, options, compute_grad):
    """As above; the hard sigmoid passes gradients as they are."""
    ignored = target == options.ignore_index
    one_hot = F.one_hot(target.masked_fill(ignored, 0), options.num_classes)
    difference = (v * 0.25).add_(0.5).clamp_(0, 1).sub_(one_hot).masked_fill_(ignored.unsqueeze(1), 0)
    value = difference.square().mean(1)
    count = (~ignored).sum() if options.reduction == "mean" else 1
    if options.reduction != "none":
        value = value.sum() / count
    if not compute_grad:
        return value, None
    grad = difference.mul_(2 / options.num_classes)
    return value, grad.div_(count.clamp_min(1)) if options.reduction == "mean" else grad


def _scaled(tensor, factor):
    return tensor if factor == 1 else tensor * factor


def head(x, target, modulation, basis, options, compute_grad):
    """Latents to loss and gradients, as the reference's."""
    basis_scale, unit = options.basis_scale, x
    if options.normalize:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        divisor = norm.clamp_min(options.eps)
        unit = x / divisor
    s = _scaled(unit @ basis.t(), basis_scale)
    if modulation is None:
        logits = s
    else:
        logits = s * modulation if modulation.dim() == 1 else s @ modulation
    loss = _cross_entropy if options.loss == "cross_entropy" else _hard_sigmoid_mse
    v = _scaled(logits, 1 / options.temperature)
    value, grad_logits = loss(v, target, options, compute_grad)
    if not compute_grad:
        return value, x.new_empty(0), s, x.new_empty(0)
    grad_logits = _scaled(grad_logits, 1 / options.temperature)
    if modulation is None:
        grad_s = grad_logits
    else:
        grad_s = grad_logits * modulation if modulation.dim() == 1 else grad_logits @ modulation.t()
    if options.normalize:
        above = norm >= options.eps  # below, the norm is the constant eps
        along = (grad_s * s).sum(1, keepdim=True).div_(divisor).mul_(above)
        grad_x = _scaled(grad_s / divisor, basis_scale) @ basis
        grad_x.addcmul_(unit, along, value=-1)
        if options.zero_gradient_below_eps:
            grad_x.mul_(above)
    else:
        grad_x = _scaled(grad_s, basis_scale) @ basis
    return value, grad_x, s, grad_logits


def modulation_grad(similarity, grad_logits, vector, scale):
    """As the reference's."""
    return reference.modulation_grad(similarity.float(), grad_logits.float(), vector, scale.float())


def expand_grad(grad_latents, scale, out, pool_size):
    """Gradient of the activation into `out`: unpool(scale * grad_latents); `scale` () or (B,). Returns `out`."""
    grad_latents, scale = grad_latents.float(), scale.float()
    scale = scale.unsqueeze(1) if scale.dim() else scale
    if out.dim() == 2 and out.shape[1] == pool_size:
        return torch.mul(grad_latents, scale, out=out)
    return _unpool(grad_latents, scale, out, pool_size)


def _unpool(grad_latents, scale, out, pool_size):
    """As above; `scale` is a number, (), or (B, 1)."""
    tiles = _tiles(out.shape, pool_size)
    if tiles is None:
        return out.copy_(reference.unpool(grad_latents * scale, out.shape, pool_size))
    area = tiles[2] if len(tiles) == 3 else tiles[3] * tiles[5]
    out.view(tiles).copy_(_per_bin(grad_latents * (scale / area), tiles))
    return out


# -- the block ------------------------------------------------------------------------------------------------------


def _norm(z, gamma, beta, parameters, options):
    """Batch norm in training: (u, mean, rstd); the running statistics are updated."""
    running = fused.running_statistics(parameters, z)
    normed = torch.native_batch_norm(z, gamma, beta, *running, True, options.momentum, options.norm_eps)
    if running[0] is not None and parameters.bias is not None:
        running[0].add_(parameters.bias, alpha=options.momentum)  # z lacks the layer's bias
    fused.store_statistics(parameters, running)
    return normed


def _grad_norm(grad_latents, kept, options, scale):
    """Gradient of the batch norm's output times `scale`; `kept` is what the activation's slope is read from: its
    output, or with a negative slope, where the output's sign says nothing, its input."""
    # Unpooled first: a CPU takes ten times as long for the slope of bins that broadcast.
    grad, slope = _unpool(grad_latents, scale, torch.empty_like(kept), options.pool_size), options.negative_slope
    return _aten.leaky_relu_backward(grad, kept, slope, slope >= 0, grad_input=grad)


def block(x, target, parameters, basis, options, wanted):
    """Layer, batch norm, activation, head, and back: the results of block.py's `forward`."""
    if x.shape[0] == 0:
        return fused.forward(reference, x, target, parameters, basis, options, wanted)
    layer, z = fused.start(reference, x, parameters, options)
    gamma, beta = (t.float().contiguous() for t in (parameters.norm_weight, parameters.norm_bias))
    kept, mean, rstd = _norm(z, gamma, beta, parameters, options)
    activate = F.leaky_relu_ if options.negative_slope >= 0 else F.leaky_relu
    activation = activate(kept, options.negative_slope)
    x_latents = latents(activation, options.pool_size)
    layout = torch.channels_last if fused.channels_last(x) else torch.contiguous_format
    out = (F.max_pool2d(activation, 2) if options.max_pool else activation).contiguous(memory_format=layout)
    del activation

    modulation = None if parameters.modulation is None else parameters.modulation.float().contiguous()
    loss, grad_latents, similarity, grad_logits = head(
        x_latents, target, modulation, basis, options.head, wanted.compute_grad
    )
    if not wanted.compute_grad:
        return out, loss, *(loss.new_empty(0) for _ in range(5))
    scale = fused.gradient_scale(z, options.pool_size, options.temperature)
    grad = _grad_norm(grad_latents, kept, options, scale)
    del kept
    dz, grad_gamma, grad_beta = _aten.native_batch_norm_backward(
        grad, z, gamma, None, None, mean, rstd, True, options.norm_eps, [wanted.needs_weight, True, True]
    )
    del grad, z
    grad_weight, grad_bias, grad_modulation = (loss.new_empty(0) for _ in range(3))
    if wanted.needs_weight:
        grad_weight = layer.grad_weight(dz).to(loss.dtype, memory_format=layer.memory_format)
    if scale != 1.0:
        for scaled in (grad_weight, grad_gamma, grad_beta):
            scaled.div_(scale)
    if wanted.needs_modulation:
        grad_modulation = modulation_grad(similarity, grad_logits, modulation.dim() == 1, one(loss.device))
    if parameters.bias is not None:
        grad_bias = torch.zeros_like(grad_beta)
    return out, loss, grad_weight, grad_bias, grad_gamma, grad_beta, grad_modulation
