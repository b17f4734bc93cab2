"""A second derivative either exists or raises by name; it is never silently wrong."""

import torch


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, grad, *inputs):
        ctx.name, ctx.count = name, len(inputs)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(
            f"{ctx.name} has no second derivative, and its backward, built with create_graph=True, was differentiated. "
            "Write this loss in plain torch where you need one"
        )


def first_order_only(name, grad, *inputs):
    """`grad`, tied to `inputs` when a graph of the backward is being built: differentiating it raises.

    `@once_differentiable` does not catch the usual case, where the incoming gradient needs no gradient itself.
    """
    if grad is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    inputs = [t for t in inputs if t is not None and t.requires_grad]
    return _FirstOrderOnly.apply(name, grad, *inputs) if inputs else grad
