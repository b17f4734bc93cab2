"""A layer whose weight is stepped from the factors of its gradient, and the weight, which several layers may share.

The layer's backward is its own (back-propagation, feedback alignment, sign-symmetry), with its weight detached; a node
behind it keeps the two factors of dW = dy^T x where `weight.grad` would lie. `optimizer.step()` finds them there. So
nothing moves before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..ops.fused_update import op as _op  # noqa: F401  (registers the operator)
from . import fused_rules, fused_states
from .fused_factors import Factors, Pair, joined

# The number of the backward that runs. Private, the only way to tell one backward from another: see _After.
current_backward: Any = getattr(torch._C, "_current_graph_task_id", None)


def hooked(weight: Tensor) -> bool:
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


class _After(torch.autograd.Function):
    """Identity; its backward takes the gradient. `weight` is an input so that there is a backward in any case."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, layer: "FusedLayer") -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        # the same memory, but no view, which an activation in place may not write to
        return y.new_empty(0).set_(y)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # A gradient of x alone (torch.autograd.grad, backward(inputs=...)) never comes to the weight's AccumulateGrad;
        # a graph that was retained does, in another backward. What was meant for this one is kept in this one alone.
        layer, (x,), task = ctx.layer, ctx.saved_tensors, current_backward()
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {layer.name!r} met a backward with create_graph=True: a second derivative needs the weight in "
                "the graph, where it is not: exclude the layer, or undo fuse_update with .remove()"
            )
        weight, accumulate = layer.step, ctx.next_functions[2][0]

        def after(*_: Any) -> None:
            hook.remove()
            if current_backward() == task:
                weight.receive(layer.rows(grad), layer.rows(layer.taken(x)))

        hook = accumulate.register_hook(after)
        return grad, None, None, None


class FusedWeight:
    """The weight of one fused layer, or of several that share it."""

    def __init__(
        self, weight: nn.Parameter, optimizer: torch.optim.Optimizer, running_sum: bool, state_bits: int
    ) -> None:
        self.weight, self.optimizer, self.running_sum, self.state_bits = weight, optimizer, running_sum, state_bits
        self.names: list[str] = []
        self.aside: Factors | None = None
        self.accumulate: Any = None  # the node at which gradients of the weight arrive, from wherever they come
        self.hooks: tuple[Any, ...] = ()
        self.counted: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def group(self) -> dict[str, Any]:
        """Looked up at each step: `optimizer.load_state_dict` makes new groups."""
        for group in self.optimizer.param_groups:
            if any(p is self.weight for p in group["params"]):
                return group
        raise RuntimeError(
            f"the weight of layer {self.name!r} is no longer in the optimizer: undo fuse_update with "
            ".remove() before its parameters change"
        )

    # -- in the backward ----------------------------------------------------------------------------------------------

    def watch(self, accumulate: Any) -> None:
        """What reaches the weight in another way, in this backward or in another, is added to the dense part."""
        if accumulate is not self.accumulate:
            self.unwatch()
            self.accumulate = accumulate
            self.hooks = accumulate.register_prehook(self.set_aside), accumulate.register_hook(self.bring_back)

    def unwatch(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.accumulate, self.hooks = None, ()

    def set_aside(self, *_: Any) -> None:
        """Before a gradient from elsewhere is added to `weight.grad` (a tied embedding's, a penalty's)."""
        self.aside = None  # of a backward that raised
        if isinstance(self.weight.grad, Factors):
            self.refuse_touched(self.weight.grad)
            self.aside, self.weight.grad = self.weight.grad, self.weight.grad.dense

    def bring_back(self, *_: Any) -> None:
        if self.aside is not None:
            self.aside.dense, self.weight.grad, self.aside = self.weight.grad, self.aside, None

    @torch.no_grad()
    def receive(self, grad: Tensor, x: Tensor) -> None:
        """Leave the two factors of dW = grad^T x where the gradient lies, beside what is there."""
        now, weight = self.weight.grad, self.weight
        if isinstance(now, Factors):
            factors = now
        else:
            factors = Factors.of(weight)
            factors.dense, weight.grad = now, factors
        self.refuse_touched(factors)
        if self.running_sum:
            self._add(factors)
        factors.pairs.append(Pair(grad, x, (grad._version, x._version)))

    def refuse_touched(self, factors: Factors) -> None:
        if factors.touched:
            raise RuntimeError(
                f"layer {self.name!r} got another gradient after the one before was clipped or unscaled: step or "
                "zero_grad first"
            )

    def _add(self, factors: Factors) -> None:
        """The products so far into the running sum."""
        if factors.pairs:
            self.refuse_changes()
            grad, x, dense = factors.matrices()
            if dense is None:
                factors.dense = torch.zeros_like(self.weight)
                dense = factors.dense.flatten(1)
            dense.addmm_(grad.to(dense.dtype).t(), x.to(dense.dtype))
            factors.pairs.clear()

    # -- in the step --------------------------------------------------------------------------------------------------

    def refuse_changes(self) -> None:
        gradient = self.weight.grad
        if isinstance(gradient, Factors) and any(pair.changed() for pair in gradient.pairs):
            raise RuntimeError(
                f"the input of layer {self.name!r}, or the gradient of its output, was written to "
                "between the backward and optimizer.step(), which reads them: step first"
            )

    def refuse(self) -> None:
        """Raises where the step cannot be taken from the factors."""
        gradient = self.weight.grad
        if not self._is_ours(gradient):
            return
        if isinstance(gradient, Factors):
            self._refuse_factors(gradient)
        dense = gradient.dense if isinstance(gradient, Factors) else gradient
        if dense is not None and dense.layout != torch.strided:
            raise RuntimeError(
                f"the weight of layer {self.name!r} got a sparse gradient too: make the embedding that shares it with "
                "sparse=False, or exclude the layer"
            )
        fused_rules.check_state(self.optimizer, self.group, self.weight, self.name, self.state_bits)

    def _is_ours(self, gradient: Tensor | None) -> bool:
        """Whether the fused step takes it: the factors of a backward, or, where the optimizer cannot read the states,
        any gradient."""
        return isinstance(gradient, Factors) or (self.state_bits == 8 and gradient is not None)

    def _refuse_factors(self, gradient: Factors) -> None:
        if hooked(self.weight):
            raise RuntimeError(
                f"the weight of layer {self.name!r} has hooks for its gradient, which is never formed: exclude the "
                "layer, or remove the hooks"
            )
        self.refuse_changes()
        if gradient.low != -gradient.high:
            raise RuntimeError(
                f"the gradient of layer {self.name!r} was clipped to [{gradient.low}, {gradient.high}]: the fused "
                "step takes bounds of the same size"
            )

    @torch.no_grad()
    def update(self, grad_scale: float) -> None:
        """The step, where a backward has left its factors."""
        weight, gradient = self.weight, self.weight.grad
        if gradient is None or not self._is_ours(gradient):
            return  # none since zero_grad; or a gradient of the caller's own, for the optimizer to step
        states, rule = fused_rules.next_step(self.optimizer, self.group, weight, self.counted, self.state_bits)
        scale = rule.grad_scale * grad_scale
        if isinstance(gradient, Factors):
            grad, x, dense = gradient.matrices()
            rule = rule._replace(grad_scale=scale * gradient.scale, clip_value=gradient.clip_value)
        else:
            (grad, x), dense = joined((), weight), gradient.to(weight.dtype).flatten(1)
            rule = rule._replace(grad_scale=scale)
        own = (t if t is None or t.dim() == 2 else t.flatten(1) for t in (weight, *states))
        coded = self.state_bits == 8 and states[0] is not None
        step = torch.ops.lgkernels.fused_update_8bit_ if coded else torch.ops.lgkernels.fused_update_
        step(*own, dense, grad, x, *rule, "auto")
        weight.grad = None

    def skip(self) -> None:
        """No step: a GradScaler found infinities."""
        if self._is_ours(self.weight.grad):
            self.weight.grad = None

    def release(self) -> None:
        """The optimizer's own states again."""
        if self.state_bits == 8 and self.weight in self.optimizer.state:
            fused_states.release(self.optimizer.state[self.weight], self.weight)

    def drop_factors(self) -> None:
        if isinstance(self.weight.grad, Factors):
            self.weight.grad = None


class FusedLayer:
    """The forward of a linear layer, or of a convolution with a 1x1 kernel, whose weight is fused."""

    step: FusedWeight | None = None  # of a copied or pickled model's: its layers are plain again

    def __init__(self, name: str, module: Any, step: FusedWeight) -> None:
        self.name, self.module, self.step = name, module, step
        self.plain_forward: Callable[[Tensor], Tensor] = module.forward
        step.names.append(name)
        module.forward = self.forward

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def rows(self, tensor: Tensor) -> Tensor:
        """Features last."""
        return tensor.movedim(-3, -1) if isinstance(self.module, nn.Conv2d) else tensor

    def taken(self, x: Tensor) -> Tensor:
        """What of x a strided 1x1 convolution reads."""
        if not isinstance(self.module, nn.Conv2d):
            return x
        down, right = self.module.stride
        return x[..., ::down, ::right]

    def forward(self, input: Tensor) -> Tensor:
        """The layer's, with the weight detached and a node behind it that keeps the factors."""
        module, step = self.module, self.step
        if step is None or not torch.is_grad_enabled() or not step.weight.requires_grad:
            return self.plain_forward(input)
        if torch.compiler.is_compiling():
            raise RuntimeError(f"layer {self.name!r}: fuse_update is not for torch.compile; compile the other layers")
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(
                f"layer {self.name!r} runs inside DistributedDataParallel, which exchanges gradients that fuse_update "
                "never forms: exclude it, or undo it with .remove()"
            )
        if module.weight is not step.weight:
            raise RuntimeError(
                f"layer {self.name!r}: its weight is not the parameter that fuse_update found (FSDP, or "
                "a module moved after it): shard or move first, and leave FSDP's layers out"
            )
        # The weight enters detached: the layer's backward then makes dX and db, and no dW.
        module._parameters["weight"] = step.weight.detach()
        try:
            y = self.plain_forward(input)
        finally:
            module._parameters["weight"] = step.weight
        x = input.detach()
        y = _After.apply(y, x if x.dtype == y.dtype else x.to(y.dtype), step.weight, self)
        step.watch(y.grad_fn.next_functions[2][0])
        return y
