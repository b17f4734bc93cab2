"""autograd entries of the family lls. The local gradient is taken inside the forward: it needs nothing from above."""

import warnings

import torch

from ...core.autograd import apply, first_order_only
from ...core.ops import autocasts
from ...core.unit import is_one
from . import op

_ops = torch.ops.lgkernels


class _LLSLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, target, modulation, link, basis, waveform, pool_size, options, impl, grad_enabled):
        needs = ctx.needs_input_grad
        compute_grad = grad_enabled and (needs[0] or needs[2])
        loss, grad_latents, similarity, grad_logits = _ops.lls_loss_forward(
            activation, target, modulation, basis, waveform, pool_size, *options, compute_grad, impl
        )
        if compute_grad:
            # An intermediate activation is not kept: its gradient is constant over each bin. `link` (or the leaf
            # itself) ties a second derivative to it, so that the guard is met.
            saved = (similarity, grad_logits, modulation) if needs[2] else (None, None, None)
            leaf = link is None and needs[0] and not torch.compiler.is_compiling()
            ctx.save_for_backward(grad_latents, *saved, activation if leaf else link)
            ctx.meta = (activation.shape, activation.dtype, op.block.channels_last(activation), pool_size)
            ctx.impl = impl
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_latents, similarity, grad_logits, modulation, link = ctx.saved_tensors
        none = grad_latents.new_empty(0)
        if _is_done(grad_latents, grad_loss, modulation, *ctx.meta):
            grad_activation = grad_latents.clone()  # the graph may be kept, and the caller may write to what it gets
        else:
            grad_activation, grad_modulation = _ops.lls_loss_backward(
                grad_loss,
                grad_latents,
                none if similarity is None else similarity,
                none if grad_logits is None else grad_logits,
                *ctx.meta,
                modulation is not None and modulation.dim() == 1,
                ctx.needs_input_grad[0],
                ctx.needs_input_grad[2],
                ctx.impl,
            )
        grad_activation = grad_activation if ctx.needs_input_grad[0] else None
        grad_modulation = grad_modulation.to(modulation.dtype) if ctx.needs_input_grad[2] else None
        grad_activation = first_order_only("lls_loss", grad_activation, link, modulation, grad_loss)
        grad_modulation = first_order_only("lls_loss", grad_modulation, link, modulation, grad_loss)
        return grad_activation, None, grad_modulation, *[None] * 7


def _is_done(grad_latents, grad_loss, modulation, shape, dtype, _channels_last, pool_size):
    """The activation is the latents, and nothing scales their gradient."""
    return (
        len(shape) == 2
        and shape[1] == pool_size
        and dtype == grad_latents.dtype
        and modulation is None
        and not torch.compiler.is_compiling()
        and is_one(grad_loss)
    )


def lls_loss(activation, target, modulation, basis, waveform, pool_size, options, impl):
    """`options`: a HeadOptions."""
    grad_enabled = torch.is_grad_enabled()
    link = None
    if grad_enabled and activation.requires_grad and not activation.is_leaf and not torch.compiler.is_compiling():
        link = activation[:0].sum()  # tied to the activation's history, holds none of its memory
    return apply(
        _LLSLoss,
        "lls_loss",
        activation,
        target,
        modulation,
        link,
        basis,
        waveform,
        pool_size,
        options,
        impl,
        grad_enabled,
    )


class _LLSBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        modulation,
        running_mean,
        running_var,
        target,
        grad_enabled,
        options,
        impl,
    ):
        needs = ctx.needs_input_grad
        compute_grad = grad_enabled and any(needs[1:6])
        out, loss, *grads = _ops.lls_block(
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            running_mean,
            running_var,
            target,
            modulation,
            *options,
            compute_grad,
            needs[1],
            needs[5],
            impl,
        )
        ctx.mark_non_differentiable(out)
        ctx.set_materialize_grads(False)
        ctx.grads = None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        elif compute_grad:
            # Not saved tensors: handed over in the first backward, AccumulateGrad can take them without a copy.
            ctx.grads = grads
            ctx.save_for_backward(weight, bias, norm_weight, norm_bias, modulation)
        ctx.compiled = torch.compiler.is_compiling()
        return out, loss

    @staticmethod
    def backward(ctx, _grad_out, grad_loss):
        if grad_loss is None:
            return (None,) * 12
        if ctx.compiled:
            grad_weight, grad_bias, *grads = ctx.saved_tensors
            # Zeros of its own: torch 2.10's partitioner raises over a result of the forward that is handed on as it is.
            grad_bias = grad_bias.new_zeros(grad_bias.shape)
            grads = [grad_weight * grad_loss, grad_bias, *(g * grad_loss for g in grads)]
            inputs = ()
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                raise RuntimeError(
                    "backward ran twice through a fused LLS block: its local gradients are handed over once, without "
                    "a copy. Call forward again, or use nn.LLSHead(block, ...), which keeps an ordinary graph"
                )
            if not is_one(grad_loss):  # one multiplication over all of them
                torch._foreach_mul_([grads[0], *grads[2:]], grad_loss)  # all but the zeros of the layer's bias
            inputs = ctx.saved_tensors if torch.is_grad_enabled() else ()
        grads = [None, *grads]
        for i, needed in enumerate(ctx.needs_input_grad[:6]):
            grads[i] = first_order_only("lls_block", grads[i], *inputs, grad_loss) if needed else None
        grads += [None] * 6
        return tuple(grads)


_warned_checkpoint = False


def _warn_under_checkpoint():
    """An activation checkpoint would keep, or run twice, what the block has already finished.

    A reentrant one shows when it runs the block again, inside a backward pass.
    """
    global _warned_checkpoint
    if _warned_checkpoint or torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    again = torch._C._current_graph_task_id() != -1
    if again or hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", ""):
        _warned_checkpoint = True
        warnings.warn(
            "activation checkpointing around a fused LLS block saves nothing and may run it twice: the block "
            "keeps no activation. Checkpoint only what lies around it",
            stacklevel=4,
        )


def lls_block(x, weight, bias, norm_weight, norm_bias, modulation, running_mean, running_var, target, options, impl):
    """`options`: a BlockOptions, or its fields in order."""
    grad_enabled = torch.is_grad_enabled()
    if grad_enabled:
        _warn_under_checkpoint()
    if autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return apply(
        _LLSBlock,
        "lls_block",
        x.detach(),
        weight,
        bias,
        norm_weight,
        norm_bias,
        modulation,
        running_mean,
        running_var,
        target,
        grad_enabled,
        options,
        impl,
    )
