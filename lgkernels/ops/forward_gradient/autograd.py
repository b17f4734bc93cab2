"""autograd entries of the family forward_gradient: exact VJPs, JVPs, and vmap over several tangents.

The losses are replicas, one for each patch and group, all of one value: each of them passes a gradient to its own
patch and group alone. So their derivatives are none of the forward's, and torch.compile, which drops a jvp written by
hand in silence, is refused inside of forward-mode differentiation. Without that, the plain form of a Function is
applied: it costs less, and compiles.
"""

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad

from ...core.autograd import apply, first_order_only, settled_dtypes
from ...core.ops import wide, without_autocast
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def transformed() -> bool:
    """Whether a dual level or one of torch.func's transforms is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_compiled() -> bool:
    """Whether this is traced, or runs in a part of a compiled function that is not: what follows may be traced."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() not in (None, False)


def refuse_compiled_duals(name: str) -> None:
    if transformed() and _is_compiled():
        raise NotImplementedError(
            f"{name} does not support torch.func transforms and dual levels under torch.compile, which would take "
            f"another derivative in silence. Compile {name}_dual, which takes the tangents as arguments"
        )


def _replicas(loss, patches, groups):
    """(N, P, G): contiguous, since forward-mode AD takes no expanded result."""
    return loss.view(-1, 1, 1).expand(-1, patches, groups).contiguous()


def _head_tangent(pooled, delta, weight_tangent, bias_tangent):
    """(N,): <delta, pooled weight_tangent + bias_tangent>, or None."""
    if weight_tangent is None and bias_tangent is None:
        return None
    with without_autocast(delta.device):
        if weight_tangent is None:
            return delta @ wide(bias_tangent)
        moved = pooled @ wide(weight_tangent)
        return (delta * (moved if bias_tangent is None else moved + wide(bias_tangent))).sum(1)


def _losses_tangent(x, x_tangent, teach, head, patches, groups, impl):
    """(N, P, G); x_tangent may be None."""
    if x_tangent is not None:
        return _ops.replicated_tangent(x, x_tangent, teach, head, impl)
    return _replicas(teach.new_zeros(len(teach)) if head is None else head, patches, groups)


def _head_grads(grad, pooled, delta, weight, bias_dtype, needs_weight, needs_bias):
    """Exact for any cotangent `grad`: every replica sees the whole head."""
    if not (needs_weight or needs_bias):
        return None, None
    delta = grad.sum((1, 2), dtype=delta.dtype).unsqueeze(1) * delta
    return (
        (pooled.t() @ delta).to(weight) if needs_weight else None,
        delta.sum(0).to(bias_dtype) if needs_bias else None,
    )


class _Tangent(torch.autograd.Function):
    """The tangents as a Function of their own: with a rule for vmap, and none for a second derivative."""

    @staticmethod
    def forward(x, x_tangent, teach, head, patches, groups, impl):
        return _losses_tangent(x, x_tangent, teach, head, patches, groups, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("the replicated losses have no second derivative")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("the replicated losses have no second derivative")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _loop(_Tangent, info.batch_size, in_dims, arguments)


def _loop(function, size, in_dims, arguments):
    """A rule for vmap: one call for each entry of the batch."""
    calls = [
        function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims))) for i in range(size)
    ]
    if isinstance(calls[0], tuple):
        return tuple(map(torch.stack, zip(*calls))), (0,) * len(calls[0])
    return torch.stack(calls), 0


# -- cross entropy ----------------------------------------------------------------------------------------------------


def _cross_entropy_backward(ctx, grad):
    x, weight, pooled, delta, teach = ctx.saved_tensors
    layer_norm, dtype, channels, bias_dtype, impl = ctx.meta
    needs = ctx.needs_input_grad
    grad_x = (
        _ops.replicated_cotangent(x if layer_norm else None, grad, teach, channels, dtype, impl) if needs[0] else None
    )
    return (grad_x, *_head_grads(grad, pooled, delta, weight, bias_dtype, *needs[1:3]))


def _keep(ctx, x, weight, bias, layer_norm, impl, *results):
    """What the derivatives need: of x itself only where a norm is in front of the loss."""
    kept = x if layer_norm else x.new_empty(0)
    ctx.save_for_backward(kept, weight, *results)
    ctx.meta = layer_norm, x.dtype, x.shape[3], None if bias is None else bias.dtype, impl
    return kept


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    @settled_dtypes
    def forward(ctx, x, weight, bias, target, layer_norm, impl):
        loss, *results = _ops.replicated_cross_entropy(x, weight, bias, target, layer_norm, impl)
        _keep(ctx, x, weight, bias, layer_norm, impl, *results)
        return _replicas(loss, *x.shape[1:3])

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        grads = _cross_entropy_backward(ctx, grad)
        tied = ctx.saved_tensors[:2]
        return (*(first_order_only("replicated_cross_entropy", g, *tied, grad) for g in grads), None, None, None)


class _DualCrossEntropy(torch.autograd.Function):
    """The same for torch.func and dual levels."""

    @staticmethod
    def forward(x, weight, bias, target, layer_norm, impl):
        loss, *results = _ops.replicated_cross_entropy(x, weight, bias, target, layer_norm, impl)
        return _replicas(loss, *x.shape[1:3]), *results

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, layer_norm, impl = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        kept = _keep(ctx, x, weight, bias, layer_norm, impl, *output[1:])
        ctx.save_for_forward(kept, weight, *output[1:])
        ctx.shape = x.shape[1:3]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        return (*_cross_entropy_backward(ctx, grad), None, None, None)

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, *_):
        x, _, pooled, delta, teach = ctx.saved_tensors
        layer_norm, *_, impl = ctx.meta
        head = _head_tangent(pooled, delta, weight_tangent, bias_tangent)
        tangent = _Tangent.apply(x if layer_norm else None, x_tangent, teach, head, *ctx.shape, impl)
        return tangent, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _loop(_DualCrossEntropy, info.batch_size, in_dims, arguments)


def cross_entropy(x, weight, bias, target, layer_norm, impl):
    """(N, P, G) losses."""
    refuse_compiled_duals("replicated_cross_entropy")
    arguments = x, weight, bias, target, layer_norm, impl
    if transformed():
        return _DualCrossEntropy.apply(*arguments)[0]
    return apply(_CrossEntropy, "replicated_cross_entropy", *arguments)


@torch.no_grad()
def cross_entropy_dual(x, x_tangent, weight, bias, target, weight_tangent, bias_tangent, layer_norm, impl):
    """`(loss (N,), tangents (N, P, G), pooled (N, D), delta (N, K))`."""
    loss, pooled, delta, teach = _ops.replicated_cross_entropy(x, weight, bias, target, layer_norm, impl)
    head = _head_tangent(pooled, delta, weight_tangent, bias_tangent)
    tangent = _losses_tangent(x if layer_norm else None, x_tangent, teach, head, *x.shape[1:3], impl)
    return loss, tangent, pooled, delta


# -- two views ----------------------------------------------------------------------------------------------------


def _nt_xent_backward(ctx, grad):
    weight, pooled, delta, teach = ctx.saved_tensors
    dtype, channels, bias_dtype, impl = ctx.meta
    needs = ctx.needs_input_grad
    n = len(grad) // 2
    grads = [
        _ops.replicated_cotangent(None, grad[rows], teach[rows], channels, dtype, impl) if needed else None
        for rows, needed in ((slice(n), needs[0]), (slice(n, None), needs[1]))
    ]
    return (*grads, *_head_grads(grad, pooled, delta, weight, bias_dtype, *needs[2:4]))


def _nt_xent_meta(x, bias, impl):
    return x.dtype, x.shape[3], None if bias is None else bias.dtype, impl


class _NtXent(torch.autograd.Function):
    @staticmethod
    @settled_dtypes
    def forward(ctx, x, y, weight, bias, temperature, impl):
        loss, *results = _ops.replicated_nt_xent(x, y, weight, bias, temperature, impl)
        ctx.save_for_backward(weight, *results)
        ctx.meta = _nt_xent_meta(x, bias, impl)
        return _replicas(loss, *x.shape[1:3])

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        grads = _nt_xent_backward(ctx, grad)
        weight = ctx.saved_tensors[0]
        return (*(first_order_only("replicated_nt_xent", g, weight, grad) for g in grads), None, None)


class _DualNtXent(torch.autograd.Function):
    @staticmethod
    def forward(x, y, weight, bias, temperature, impl):
        loss, *results = _ops.replicated_nt_xent(x, y, weight, bias, temperature, impl)
        return _replicas(loss, *x.shape[1:3]), *results

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, weight, bias, _, impl = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *output[1:])
        ctx.save_for_forward(weight, *output[1:])
        ctx.meta, ctx.shape = _nt_xent_meta(x, bias, impl), x.shape[1:3]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        return (*_nt_xent_backward(ctx, grad), None, None)

    @staticmethod
    def jvp(ctx, x_tangent, y_tangent, weight_tangent, bias_tangent, *_):
        _, pooled, delta, teach = ctx.saved_tensors
        head, n = _head_tangent(pooled, delta, weight_tangent, bias_tangent), len(teach) // 2
        tangents = [
            _Tangent.apply(None, t, teach[rows], None if head is None else head[rows], *ctx.shape, ctx.meta[3])
            for t, rows in ((x_tangent, slice(n)), (y_tangent, slice(n, None)))
        ]
        return torch.cat(tangents), None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _loop(_DualNtXent, info.batch_size, in_dims, arguments)


def nt_xent(x, y, weight, bias, temperature, impl):
    """(2N, P, G) losses."""
    refuse_compiled_duals("replicated_nt_xent")
    arguments = x, y, weight, bias, temperature, impl
    if transformed():
        return _DualNtXent.apply(*arguments)[0]
    return apply(_NtXent, "replicated_nt_xent", *arguments)


@torch.no_grad()
def nt_xent_dual(x, y, x_tangent, y_tangent, weight, bias, weight_tangent, bias_tangent, temperature, impl):
    """`(loss (2N,), tangents (2N, P, G), pooled (2N, D), delta (2N, K))`."""
    loss, pooled, delta, teach = _ops.replicated_nt_xent(x, y, weight, bias, temperature, impl)
    head, n = _head_tangent(pooled, delta, weight_tangent, bias_tangent), len(x)
    tangents = [
        _losses_tangent(None, t, teach[rows], None if head is None else head[rows], *x.shape[1:3], impl)
        for t, rows in ((x_tangent, slice(n)), (y_tangent, slice(n, None)))
    ]
    return loss, torch.cat(tangents), pooled, delta
