"""The one form of autograd Function of all families, and what keeps it from being silently wrong.

A rule is a classic `torch.autograd.Function` (`forward(ctx, ...)`) around registered ops: it passes `opcheck` and
`torch.compile(fullgraph=True)`, and costs a quarter of the form with `setup_context`. It is applied by `apply`,
which refuses by name what this form cannot do:

- `torch.func` transforms refuse it, but under `torch.compile` Dynamo drops the rule in silence: the inputs of a
  feedback layer would get exact back-propagation, those of a loss 0.
- `torch.export` keeps the forward alone. The exported graph runs; a backward pass through it raises. A feedback layer
  in evaluation mode is exported as torch's own layer: it needs no lgkernels where it is loaded.
- A second derivative is implemented, or raises: see `first_order_only`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import ops

_VMAP = torch._C._functorch.TransformType.Vmap
_levels = torch._C._functorch.get_interpreter_stack


def refuse_transforms(name: str, *, vmap: bool = True) -> None:
    """Raise inside of a torch.func transform: what the public function `name` does is none of torch's derivatives.
    Without `vmap` inside of vmap alone, too, nothing is refused."""
    if torch._C._are_functorch_transforms_active():
        if not vmap and all(level.key() == _VMAP for level in _levels() or ()):
            return
        raise NotImplementedError(
            f"{name} does not support torch.func transforms (grad, vjp, jvp, vmap, ...): its gradient, where "
            "it has one, is written by hand. Use loss.backward() or torch.autograd.grad"
        )


def settled_dtypes(method: Callable) -> Callable:
    """Decorator of a Function's forward or backward that computes outside of ops, whose door does the same: an ambient
    autocast does not touch the arithmetic. The first argument after `ctx` is a tensor."""

    @functools.wraps(method)
    def settled(ctx, tensor, *arguments):
        if not ops.autocasts(tensor.device):
            return method(ctx, tensor, *arguments)
        with ops.without_autocast(tensor.device):
            return method(ctx, tensor, *arguments)

    return settled


def exporting() -> bool:
    """Whether torch.export is tracing: `torch.compiler.is_exporting` of torch 2.10 says so under torch.compile, too."""
    return torch.compiler._is_exporting_flag


def apply(function: type[torch.autograd.Function], name: str, *arguments: Any) -> Any:
    """`function.apply(*arguments)` of the public function `name`."""
    refuse_transforms(name)
    result = function.apply(*arguments)
    if exporting() and torch.is_grad_enabled():
        learning = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        if learning and isinstance(result, tuple):
            return tuple(torch.ops.lgkernels.without_backward(t, learning, name) for t in result)
        if learning:
            return torch.ops.lgkernels.without_backward(result, learning, name)
    return result


def _without_backward(x: torch.Tensor, learning: list[torch.Tensor], name: str) -> torch.Tensor:
    """A copy of x whose backward pass, to x and to the tensors that learn, raises."""
    return x.clone()


def _refuse(ctx: Any, _grad: torch.Tensor) -> Any:
    raise NotImplementedError(
        f"an exported graph has no backward pass of {ctx.name}: torch.export keeps the forward alone, and its own "
        "backward would be another rule. Export the model for inference, and train the module itself"
    )


# Not by `ops.define`: it has no backends, looks at no memory, and its gradient is registered with torch.
ops.LIBRARY.define("without_backward(Tensor x, Tensor[] learning, str name) -> Tensor")
ops.LIBRARY.impl("without_backward", _without_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lgkernels::without_backward", lambda x, learning, name: torch.empty_like(x), lib=ops.LIBRARY
)
torch.library.register_autograd(
    "lgkernels::without_backward",
    _refuse,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "name", inputs[2]),
    lib=ops.LIBRARY,
)


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


def first_order_only(name: str, grad: torch.Tensor | None, *inputs: torch.Tensor | None) -> torch.Tensor | None:
    """`grad`, tied to `inputs` when a graph of the backward is being built: differentiating it raises.

    `@once_differentiable` does not catch the usual case, where the incoming gradient needs no gradient itself.
    """
    if grad is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    tied = [t for t in inputs if t is not None and t.requires_grad]
    return _FirstOrderOnly.apply(name, grad, *tied) if tied else grad


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        ctx.count = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.count


def link_to(*tensors: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor tied to the history of `tensors` that holds none of their memory: a second derivative meets it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return None
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return _Link.apply(*wanted) if wanted else None
