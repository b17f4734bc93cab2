"""LLS in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

A block's kernels are in triton_stats.py, triton_norm.py (convolution) and triton_linear.py, a head's in
triton_fused_head.py (one launch), triton_head.py (three) and triton_finish.py; block sizes are in tiles.py. Half inputs
are widened on load, everything is computed in float32 and rounded once on store; sums have a fixed order. CPU tensors
work under TRITON_INTERPRET=1.
"""

from ..common.launch import new
from .options import Capabilities
from .triton_bins import expand_maps
from .triton_finish import modulation_grad  # noqa: F401
from .triton_fused_head import fused_head, fused_kernel
from .triton_head import head_in_steps
from .triton_linear import expand_columns, linear_grad_preactivation_, pool_columns  # noqa: F401
from .triton_norm import grad_preactivation_, norm_grads, pool_maps  # noqa: F401
from .triton_stats import batch_stats  # noqa: F401
from .triton_steps import HeadResults

CAPABILITIES = Capabilities(packed_basis=True, finishes_head=True)


def latents(activation, pool_size):
    if activation.dim() == 2:
        return pool_columns(activation, None, 0.0, pool_size)[1]
    return pool_maps(activation, None, 0.0, pool_size, 1, False)[1]


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    norm, slope = (mean, rstd, gamma, beta), float(negative_slope)
    empty = new(mean, 0), new(mean, 0)
    if z.dim() == 2:
        return *pool_columns(z, norm, slope, pool_size), *empty
    out, pooled, s1, s2 = pool_maps(z, norm, slope, pool_size, 2 if max_pool else 1, compute_grad)
    return (out, pooled, s1, s2) if compute_grad else (out, pooled, *empty)


def expand_grad(grad_latents, scale, out, pool_size):
    if out.numel() == 0:
        return out
    expand = expand_columns if out.dim() == 2 else expand_maps
    return expand(grad_latents.contiguous(), scale.contiguous(), out, pool_size)


def head(x, target, modulation, basis, options, compute_grad, reduce=True):
    """Without `reduce` the first result are the losses of the rows, for `finish` of a later call."""
    (B, d), K, C = x.shape, basis.shape[0], options.num_classes
    losses, similarity = new(x, B), new(x, B, K)
    loss = new(x) if reduce and options.reduction != "none" else None
    grad_latents, grad_logits = (new(x, B, d), new(x, B, C)) if compute_grad else (new(x, 0), new(x, 0))
    if B:
        grad_similarity = None
        if compute_grad:
            grad_similarity = grad_logits if modulation is None else new(x, B, K)
        out = HeadResults(losses, loss, similarity, grad_logits, grad_similarity, grad_latents)
        modulation = None if modulation is None else modulation.contiguous()
        arguments = x.contiguous(), target, modulation, basis.contiguous(), options, compute_grad, out
        name = fused_kernel(B, d, K, C)
        head_in_steps(*arguments) if name is None else fused_head(name, *arguments)
    elif loss is not None:
        loss.fill_(float("nan") if options.reduction == "mean" else 0.0)
    return losses if loss is None else loss, grad_latents, similarity, grad_logits
