"""Weight gradient and optimizer step of a large linear layer in one pass over its weight: dW is never formed.

The layer's backward is its own (back-propagation, feedback alignment, sign-symmetry), with its weight detached; a node
behind it keeps the two factors of dW = dy^T x where `weight.grad` would lie. `optimizer.step()` finds them there. So
nothing moves before it, and whoever wants the gradient in between is refused in time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import constructors
from ..ops.feedback import op as _op  # noqa: F401  (registers the operators)
from .manhattan import BatchManhattan

__all__ = ["FusedUpdate", "fuse_update"]

# The number of the backward that runs. Private, the only way to tell one backward from another: see _After.
_current_backward: Any = getattr(torch._C, "_current_graph_task_id", None)
_HELP = "fuse_update needs one backward for each optimizer.step() and plain gradients"


def _name(function: Any) -> Any:
    """Of a torch function, or of the attribute that a getter is for."""
    name = getattr(function, "__name__", function)
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


class _Factors(torch.Tensor):
    """Lies in `weight.grad` for dy^T x, with the two in `factors`; whoever wants to compute with it learns why not.
    One element of memory."""

    factors: list[tuple[torch.Tensor, int]]  # each with the version that it had

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("__get__", "__set__"):  # dtype, shape, is_sparse, ...
            with torch._C.DisableTorchFunctionSubclass():
                value = function(*args, **(kwargs or {}))
            if not isinstance(value, torch.Tensor):
                return value  # else it is .data, .T, ...: its numbers are nobody's gradient
        raise RuntimeError(
            f"the gradient of a fused layer's weight was asked for ({_name(function)}), but "
            f"it is never formed: {_HELP}. Gradient clipping by global norm, a GradScaler and zero_grad(set_to_none="
            "False) do not go with it: leave them out, or undo it with .remove()"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return "factors of a gradient (fuse_update)"


class _After(torch.autograd.Function):
    """Identity; its backward takes the gradient. `weight` is an input so that there is a backward in any case."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, layer: "_FusedLayer") -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        # the same memory, but no view, which an activation in place may not write to
        return y.new_empty(0).set_(y)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # A gradient of x alone (torch.autograd.grad, backward(inputs=...)) never comes to the weight's AccumulateGrad;
        # a graph that was retained does, in another backward. What was meant for this one is kept in this one alone.
        layer, factors, task = ctx.layer, (grad, *ctx.saved_tensors), _current_backward()
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {layer.name!r} met a backward with create_graph=True: a second derivative needs "
                f"the weight in the graph, where it is not: {_HELP}. Exclude the layer, or undo it with "
                ".remove()"
            )

        def accumulate(*_: Any) -> None:
            handle.remove()
            if _current_backward() == task:
                layer.receive(*factors)

        handle = ctx.next_functions[2][0].register_hook(accumulate)
        return grad, None, None, None


def _hooked(weight: torch.Tensor) -> bool:
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


class _FusedLayer:
    def __init__(self, name: str, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.module, self.optimizer = name, module, optimizer
        self.weight = module.weight
        self.plain_forward = module.forward
        module.forward = self.forward

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied or pickled model: its layers are plain again, and no optimizer comes with them."""
        return dict(self.__dict__, optimizer=None)

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's, with the weight detached and a node behind it that keeps the factors."""
        module = self.module
        if self.optimizer is None or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return self.plain_forward(x)
        if torch.compiler.is_compiling():
            raise RuntimeError(f"layer {self.name!r}: fuse_update is not for torch.compile; compile the other layers")
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(
                f"layer {self.name!r} runs inside DistributedDataParallel, which exchanges gradients "
                f"that fuse_update never forms: {_HELP}. Exclude it, or undo it with .remove()"
            )
        if module.weight is not self.weight:
            raise RuntimeError(
                f"layer {self.name!r}: its weight is not the parameter that fuse_update found (FSDP, or "
                "a module moved after it): shard or move first, and leave FSDP's layers out"
            )
        # The weight enters detached: the layer's backward then makes dX and db, and no dW.
        module._parameters["weight"] = self.weight.detach()
        try:
            y = self.plain_forward(x)
        finally:
            module._parameters["weight"] = self.weight
        x = x.detach()
        return _After.apply(y, x if x.dtype == y.dtype else x.to(y.dtype), self.weight, self)

    @torch.no_grad()
    def receive(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Leave the two factors of dW = grad^T x where the gradient would lie."""
        weight = self.weight
        if weight.grad is not None:
            raise RuntimeError(
                f"layer {self.name!r} got a second gradient before optimizer.step(), gradient accumulation or a layer "
                f"used twice in one forward: {_HELP}. Exclude the layer, or undo it with .remove()"
            )
        factors: Any = weight.new_zeros(()).expand_as(weight).as_subclass(_Factors)
        factors.factors = [(t, t._version) for t in (grad, x)]
        weight.grad = factors

    @torch.no_grad()
    def update(self) -> None:
        """The step, where a backward has left its factors."""
        weight, group, state = self.weight, self.group, self.optimizer.state[self.weight]
        if not isinstance(weight.grad, _Factors):
            return  # none since zero_grad; or a gradient of the caller's own, for the optimizer to step
        grad, x = (t.reshape(-1, t.shape[-1]) for t, _ in weight.grad.factors)
        momentum, dampening = group["momentum"], group.get("dampening", 0.0)
        buffer = None
        if momentum:
            buffer = state.get("momentum_buffer")
            if buffer is None:  # the first step: v = g
                buffer = state["momentum_buffer"] = torch.zeros_like(weight)
                dampening = 0.0
        torch.ops.lgkernels.feedback_update_(
            weight,
            buffer,
            grad,
            x,
            float(group["lr"]),
            momentum,
            dampening,
            group["weight_decay"],
            group.get("nesterov", False),
            isinstance(self.optimizer, BatchManhattan),
            -1.0 if group.get("maximize") else 1.0,
            "auto",
        )
        weight.grad = None

    def refuse(self) -> None:
        """Raises where the step cannot be taken from the factors."""
        if not isinstance(self.weight.grad, _Factors):
            return
        if _hooked(self.weight):
            raise RuntimeError(
                f"the weight of layer {self.name!r} has hooks for its gradient: {_HELP}. Exclude the "
                "layer, or remove the hooks"
            )
        if any(t._version != was for t, was in self.weight.grad.factors):
            raise RuntimeError(
                f"the input of layer {self.name!r}, or the gradient of its output, was written to "
                "between the backward and optimizer.step(), which reads them: step first"
            )

    def drop_factors(self) -> None:
        if isinstance(self.weight.grad, _Factors):
            self.weight.grad = None


class FusedUpdate:
    """What :func:`fuse_update` did: `layers` (names), and `remove()` to undo it."""

    def __init__(self, fused: list[_FusedLayer], optimizer: torch.optim.Optimizer) -> None:
        self._fused = fused
        self.layers = [layer.name for layer in fused]
        self._hook = optimizer.register_step_pre_hook(self._step)

    def _step(self, optimizer: torch.optim.Optimizer, arguments: tuple, keywords: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*arguments[1:], *keywords.values())):
            raise RuntimeError(
                "optimizer.step() must have no closure with fuse_update, whose steps come before it: "
                "call it after the backward, or undo it with .remove()"
            )
        for layer in self._fused:
            layer.refuse()
        for layer in self._fused:
            layer.update()

    def remove(self) -> None:
        """Back to plain layers and a plain optimizer; momentum goes on, a gradient not yet stepped is dropped."""
        self._hook.remove()
        for layer in self._fused:
            layer.drop_factors()
            del layer.module.forward
        self._fused, self.layers = [], []

    def __repr__(self) -> str:
        return f"FusedUpdate({', '.join(self.layers)})"


def fuse_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    min_weights: int = 2**20,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> FusedUpdate:
    r"""Weight gradient and step of large linear layers in one pass, in ``optimizer.step()``: dW is never formed.

    .. math:: v \leftarrow \mu v + (1 - d)\,(dy^T x + \lambda W), \qquad W \leftarrow W - \eta v

    exactly as ``torch.optim.SGD`` (momentum, dampening, Nesterov, weight decay, maximize) or `BatchManhattan`. All
    other parameters, biases included, are stepped by the optimizer as ever. Until the step the layer's input x and the
    gradient dy of its output are kept in place of dW: M (N + K) elements for N K; the step uses them up, so a second
    one without a backward leaves these weights as they are. Momentum lies in the optimizer's state under its usual
    key: its ``state_dict`` is that of the plain optimizer. A copy of the model has plain layers.

    Args:
        model (nn.Module): holds the layers. nn.Linear and its subclasses of this package are fused.
        optimizer: ``torch.optim.SGD`` or `BatchManhattan` (without ``no_sign_change``), made with their weights.
        min_weights (int): smaller layers stay as they are. Default: 2^20.
        include (sequence of str, optional): names of the layers to fuse, of any size.
        exclude (sequence of str): names of layers to leave out.

    Returns:
        FusedUpdate: with ``layers``, the fused names, and ``remove()``.

    Raises: TypeError, ValueError naming the argument; RuntimeError, before any weight has moved, for a second backward
    before ``optimizer.step()`` (gradient accumulation), a layer used twice in one forward, clipping by global norm,
    hooks of the weight, create_graph=True, a GradScaler, DistributedDataParallel, FSDP, a closure. torch.compile breaks
    its graph at these layers, with fullgraph=True it raises.

    Example:
        >>> import torch
        >>> from lgkernels.optim import fuse_update
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> fused = fuse_update(model, optimizer, include=["0"])
        >>> loss = model(torch.randn(2, 8)).square().mean()
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> fused
        FusedUpdate(0)
    """
    if _current_backward is None:
        raise RuntimeError(
            "fuse_update needs torch._C._current_graph_task_id, which this torch "
            f"({torch.__version__}) does not have: use the plain optimizer"
        )
    _check_model(model)
    _check_optimizer(optimizer)
    min_weights = constructors.size("min_weights", min_weights, 0)
    include = None if include is None else constructors.texts("include", include)
    exclude = constructors.texts("exclude", exclude)
    if include == ():
        raise ValueError("include must name at least one linear layer, or be None, got ()")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for argument, names in (("include", include or ()), ("exclude", exclude)):
        for name in names:
            if name not in linear:
                raise ValueError(
                    f"{argument} must name linear layers of model ({', '.join(linear) or 'none here'}), got {name!r}"
                )
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    shared = _shared_parameters(model)
    fused = []
    for name, module in linear.items():
        weight = module.weight
        chosen = name in include if include is not None else weight.numel() >= min_weights
        if not chosen or name in exclude or not weight.requires_grad:
            continue
        reason = (
            "is not among the optimizer's parameters"
            if weight not in stepped
            else "is not contiguous"
            if not weight.is_contiguous()
            else "is shared with another module"
            if weight in shared
            else None
        )
        if reason is not None and include is None:
            continue
        if reason is not None:
            raise ValueError(f"include: the weight of layer {name!r} {reason}")
        _check_layer(name, module)
        fused.append((name, module))
    if not fused:
        raise ValueError(
            "model has no linear layer to fuse: none of at least "
            f"min_weights={min_weights} weights that the optimizer steps"
        )
    return FusedUpdate([_FusedLayer(*entry, optimizer) for entry in fused], optimizer)


def _check_model(model: nn.Module) -> None:
    constructors.module("model", model)
    for module in model.modules():
        sharded = any("FSDP" in base.__name__ for base in type(module).__mro__)
        if sharded or isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model must not be wrapped in {type(module).__name__}: ranks exchange gradients that "
                "fuse_update never stores"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) is not torch.optim.SGD and not isinstance(optimizer, BatchManhattan):
        raise TypeError(
            f"optimizer must be torch.optim.SGD or lgkernels.optim.BatchManhattan, got {type(optimizer).__name__}"
        )
    if any(group.get("no_sign_change") for group in optimizer.param_groups):
        raise ValueError("optimizer must not have no_sign_change=True: the fused pass does not hold signs")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("optimizer must not have differentiable=True: the fused pass has no graph")


def _shared_parameters(model: nn.Module) -> set[torch.Tensor]:
    """Of more than one module."""
    users: dict[torch.Tensor, set[nn.Module]] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            users.setdefault(p, set()).add(module)
    return {p for p, modules in users.items() if len(modules) > 1}


def _check_layer(name: str, module: nn.Linear) -> None:
    """Raises where a layer to be fused has hooks for its gradient, or a forward that is not its class's."""
    if _hooked(module.weight):
        raise ValueError(
            f"the weight of layer {name!r} has hooks for its gradient, which is never formed: exclude "
            "the layer, or remove the hooks"
        )
    owner = getattr(vars(module).get("forward"), "__self__", None)
    if isinstance(owner, _FusedLayer) and owner.optimizer is None:
        del module.forward  # of a copied model
    if "forward" in vars(module):
        raise ValueError(f"layer {name!r} has a forward of its own (an earlier fuse_update?): remove it first")
