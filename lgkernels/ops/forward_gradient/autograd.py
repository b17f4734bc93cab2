"""autograd entries of the family forward_gradient: exact VJPs, JVPs, and vmap over several tangents.

The losses are replicas, one for each patch and group, all of one value: each of them passes a gradient to its own
patch and group alone. So their derivatives are none of the forward's, and torch.compile, which drops a jvp written by
hand in silence, is refused inside of forward-mode differentiation. Without that, the plain form of a Function is
applied: it costs less, and compiles.
"""

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad

from ...core.autograd import apply, link_to, settled_dtypes
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


class _Once(torch.autograd.Function):
    """A derivative as it is, tied to what it was taken at: differentiating it raises, in every mode."""

    @staticmethod
    def forward(name, derivative, *inputs):
        return derivative.view_as(derivative)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            f"{ctx.name} has no second derivative, and its derivative was differentiated. Write this loss in plain "
            "torch where you need one"
        )

    @staticmethod
    def jvp(ctx, *tangents):
        return _Once.backward(ctx, None)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _Once.apply(*arguments), in_dims[1]


def _once(name, derivative, *inputs):
    """`derivative`, of the loss `name`; the inputs may be None."""
    if derivative is None or torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transformed()):
        return derivative
    return _Once.apply(name, derivative, *inputs)


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
    x, weight, pooled, delta, teach, _ = ctx.saved_tensors
    layer_norm, dtype, channels, bias_dtype, impl = ctx.meta
    needs = ctx.needs_input_grad
    grad_x = (
        _ops.replicated_cotangent(x if layer_norm else None, grad, teach, channels, dtype, impl) if needs[0] else None
    )
    return (grad_x, *_head_grads(grad, pooled, delta, weight, bias_dtype, *needs[1:3]))


def _cross_entropy_meta(x, bias, layer_norm, impl):
    return layer_norm, x.dtype, x.shape[3], None if bias is None else bias.dtype, impl


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    @settled_dtypes
    def forward(ctx, x, weight, bias, target, layer_norm, impl, link):
        loss, *results = _ops.replicated_cross_entropy(x, weight, bias, target, layer_norm, impl)
        # Of x itself only where a norm is in front of the loss; `link` holds none of its memory.
        ctx.save_for_backward(x if layer_norm else x.new_empty(0), weight, *results, link)
        ctx.meta = _cross_entropy_meta(x, bias, layer_norm, impl)
        return _replicas(loss, *x.shape[1:3])

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        grads = _cross_entropy_backward(ctx, grad)
        link = ctx.saved_tensors[-1]
        return (*(_once("replicated_cross_entropy", g, link, grad) for g in grads), *[None] * 4)


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
        ctx.save_for_backward(x, weight, *output[1:], bias)
        ctx.save_for_forward(x, weight, *output[1:], bias)
        ctx.meta, ctx.shape = _cross_entropy_meta(x, bias, layer_norm, impl), x.shape[1:3]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        x, weight, *_, bias = ctx.saved_tensors
        grads = _cross_entropy_backward(ctx, grad)
        return (*(_once("replicated_cross_entropy", g, x, weight, bias, grad) for g in grads), None, None, None)

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, *_):
        x, weight, pooled, delta, teach, bias = ctx.saved_tensors
        layer_norm, *_, impl = ctx.meta
        head = _head_tangent(pooled, delta, weight_tangent, bias_tangent)
        tangent = _Tangent.apply(x if layer_norm else None, x_tangent, teach, head, *ctx.shape, impl)
        return _once("replicated_cross_entropy", tangent, x, weight, bias), None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _loop(_DualCrossEntropy, info.batch_size, in_dims, arguments)


def cross_entropy(x, weight, bias, target, layer_norm, impl):
    """(N, P, G) losses."""
    refuse_compiled_duals("replicated_cross_entropy")
    arguments = x, weight, bias, target, layer_norm, impl
    if transformed():
        return _DualCrossEntropy.apply(*arguments)[0]
    return apply(_CrossEntropy, "replicated_cross_entropy", *arguments, link_to(x, weight, bias))


@torch.no_grad()
def cross_entropy_dual(x, x_tangent, weight, bias, target, weight_tangent, bias_tangent, layer_norm, impl):
    """`(loss (N,), tangents (N, P, G), pooled (N, D), delta (N, K))`."""
    loss, pooled, delta, teach = _ops.replicated_cross_entropy(x, weight, bias, target, layer_norm, impl)
    head = _head_tangent(pooled, delta, weight_tangent, bias_tangent)
    tangent = _losses_tangent(x if layer_norm else None, x_tangent, teach, head, *x.shape[1:3], impl)
    return loss, tangent, pooled, delta


# -- two views ----------------------------------------------------------------------------------------------------


def _nt_xent_backward(ctx, grad):
    weight, pooled, delta, teach, *_ = ctx.saved_tensors
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
    def forward(ctx, x, y, weight, bias, temperature, impl, link):
        loss, *results = _ops.replicated_nt_xent(x, y, weight, bias, temperature, impl)
        ctx.save_for_backward(weight, *results, link)
        ctx.meta = _nt_xent_meta(x, bias, impl)
        return _replicas(loss, *x.shape[1:3])

    @staticmethod
    @settled_dtypes
    def backward(ctx, grad):
        grads = _nt_xent_backward(ctx, grad)
        link = ctx.saved_tensors[-1]
        return (*(_once("replicated_nt_xent", g, link, grad) for g in grads), None, None, None)


class _DualNtXent(torch.autograd.Function):
    @staticmethod
    def forward(x, y, weight, bias, temperature, impl):
        loss, *results = _ops.replicated_nt_xent(x, y, weight, bias, temperature, impl)
        return _replicas(loss, *x.shape[1:3]), *results

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, weight, bias, _, impl = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *output[1:], x, y, bias)
        ctx.save_for_forward(weight, *output[1:], x, y, bias)
        ctx.meta, ctx.shape = _nt_xent_meta(x, bias, impl), x.shape[1:3]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        weight, *_, x, y, bias = ctx.saved_tensors
        grads = _nt_xent_backward(ctx, grad)
        return (*(_once("replicated_nt_xent", g, x, y, weight, bias, grad) for g in grads), None, None)

    @staticmethod
    def jvp(ctx, x_tangent, y_tangent, weight_tangent, bias_tangent, *_):
        weight, pooled, delta, teach, x, y, bias = ctx.saved_tensors
        head, n = _head_tangent(pooled, delta, weight_tangent, bias_tangent), len(teach) // 2
        tangents = [
            _Tangent.apply(None, t, teach[rows], None if head is None else head[rows], *ctx.shape, ctx.meta[3])
            for t, rows in ((x_tangent, slice(n)), (y_tangent, slice(n, None)))
        ]
        return _once("replicated_nt_xent", torch.cat(tangents), x, y, weight, bias), None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _loop(_DualNtXent, info.batch_size, in_dims, arguments)


def nt_xent(x, y, weight, bias, temperature, impl):
    """(2N, P, G) losses."""
    refuse_compiled_duals("replicated_nt_xent")
    arguments = x, y, weight, bias, temperature, impl
    if transformed():
        return _DualNtXent.apply(*arguments)[0]
    return apply(_NtXent, "replicated_nt_xent", *arguments, link_to(x, y, weight, bias))


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
