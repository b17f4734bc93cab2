"""autograd entries of the family local_loss. The local gradient needs nothing from above: the forward takes it."""

import torch

from ...core.autograd import apply, first_order_only, link_to
from . import op, reference  # noqa: F401  op registers the ops

_ops = torch.ops.lgkernels


class _LocalCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, target, link, label_smoothing, reduction, grad_enabled, impl):
        compute_grad = grad_enabled and any(ctx.needs_input_grad[:3])
        loss, *grads = _ops.local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, compute_grad, impl)
        if compute_grad:
            ctx.save_for_backward(*grads, link)
            ctx.meta = h.shape, h.dtype, weight.dtype, bias.dtype if bias is not None else None, impl
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *saved, link = ctx.saved_tensors
        shape, dtype, weight_dtype, bias_dtype, impl = ctx.meta
        needs = ctx.needs_input_grad[:3]
        grad_h, grad_weight, grad_bias = _ops.local_cross_entropy_backward(
            grad_loss.contiguous(), *saved, dtype, *needs, impl
        )
        if needs[0] and len(shape) > 2:  # constant over the pooled positions: one value, repeated with stride 0
            grad_h = (grad_h.unsqueeze(1) if len(shape) == 3 else grad_h[:, :, None, None]).expand(shape)
        grads = (grad_h, grad_weight.to(weight_dtype), grad_bias.to(bias_dtype or grad_bias.dtype))
        return (
            *(first_order_only("local_cross_entropy", g, link, grad_loss) if n else None for g, n in zip(grads, needs)),
            *[None] * 6,
        )


def local_cross_entropy(h, weight, bias, target, label_smoothing, reduction, impl):
    return apply(
        _LocalCrossEntropy,
        "local_cross_entropy",
        h,
        weight,
        bias,
        target,
        link_to(h, weight, bias),
        label_smoothing,
        reduction,
        torch.is_grad_enabled(),
        impl,
    )


class _Goodness(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, is_positive, threshold, mean, grad_enabled, impl):
        compute_grad = grad_enabled and ctx.needs_input_grad[0]
        loss, kappa, squares = _ops.goodness(h, is_positive, threshold, mean, compute_grad, impl)
        ctx.mark_non_differentiable(squares)
        ctx.set_materialize_grads(False)
        if compute_grad:
            ctx.save_for_backward(h, kappa)
            ctx.impl = impl
        return loss, squares

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 6
        h, kappa = ctx.saved_tensors
        grad = _ops.goodness_backward(h.detach(), kappa, grad_loss, ctx.impl)
        return (first_order_only("goodness_loss", grad, h, grad_loss), *[None] * 5)


def goodness(h, is_positive, threshold, mean, impl):
    """`(loss, squares (B,))`: the sums of squares also normalise the next block's input."""
    return apply(_Goodness, "goodness_loss", h, is_positive, threshold, mean, torch.is_grad_enabled(), impl)


class _PeerNormalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, running_mean, momentum, link, impl):
        loss, mean, grad = _ops.peer_normalization(h, running_mean, momentum, impl)
        mean = mean.to(running_mean.dtype)
        ctx.mark_non_differentiable(mean)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, link)
        ctx.meta = h.shape, h.dtype
        return loss, mean

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 5
        (grad, link), (shape, dtype) = ctx.saved_tensors, ctx.meta
        grad = (grad * grad_loss).to(dtype).expand(shape)  # every row's gradient is the same
        return (first_order_only("peer_normalization_loss", grad, link, grad_loss), *[None] * 4)


def peer_normalization(h, running_mean, momentum, impl):
    return apply(_PeerNormalization, "peer_normalization_loss", h, running_mean.detach(), momentum, link_to(h), impl)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, num_classes, use_std, grad_enabled, impl):
        compute_grad = grad_enabled and ctx.needs_input_grad[0]
        loss, grad, mean = _ops.similarity(x, target, num_classes, use_std, compute_grad, impl)
        if compute_grad:
            ctx.save_for_backward(x, grad, mean)
            ctx.impl = impl
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        x, grad, mean = ctx.saved_tensors
        grad = _ops.similarity_backward(x.detach(), grad, mean, grad_loss, ctx.impl)
        return (first_order_only("similarity_matching_loss", grad, x, grad_loss), *[None] * 5)


def similarity(x, target, num_classes, use_std, impl):
    return apply(
        _Similarity, "similarity_matching_loss", x, target, num_classes, use_std, torch.is_grad_enabled(), impl
    )


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, z, labels, link, options, grad_enabled, impl):
        compute_grad = grad_enabled and ctx.needs_input_grad[1]
        loss, grad = _ops.contrastive(z, labels, *options, compute_grad, impl)
        if compute_grad:
            ctx.save_for_backward(grad, link)
            ctx.name, ctx.dtype = name, z.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, link = ctx.saved_tensors
        grad = (grad * grad_loss).to(ctx.dtype)
        return (None, first_order_only(ctx.name, grad, link, grad_loss), *[None] * 5)


def contrastive(name, z, labels, options, impl):
    """`name` of the public function, nt_xent_loss or supcon_loss."""
    return apply(_Contrastive, name, name, z, labels, link_to(z), options, torch.is_grad_enabled(), impl)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, negatives, link, temperature, grad_enabled, impl):
        compute_grad = grad_enabled and any(ctx.needs_input_grad[:2])
        loss, *grads = _ops.info_nce(query, keys, negatives, temperature, compute_grad, impl)
        if compute_grad:
            ctx.save_for_backward(*grads, link)
            ctx.dtypes = query.dtype, keys.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *grads, link = ctx.saved_tensors
        return (
            *(
                first_order_only("info_nce_loss", (g * grad_loss).to(d), link, grad_loss) if n else None
                for g, d, n in zip(grads, ctx.dtypes, ctx.needs_input_grad)
            ),
            *[None] * 5,
        )


def info_nce(query, keys, negatives, temperature, impl):
    return apply(
        _InfoNCE,
        "info_nce_loss",
        query,
        keys,
        negatives,
        link_to(query, keys),
        temperature,
        torch.is_grad_enabled(),
        impl,
    )
