"""The modules of a model that applies them one after the other, whatever its class: read off its forward."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class Applied(nn.Module):
    """A function of one tensor, as a module."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.arguments, self.options = function, arguments, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.arguments, **self.options)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", str(self.function))


class _Method:
    """A method of tensors, by name."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return getattr(x, self.__name__)(*arguments, **options)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential


class _NoChain(Exception):
    pass


def _constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_constant, value))
    if isinstance(value, slice):
        return all(map(_constant, (value.start, value.stop, value.step)))
    return not isinstance(value, (fx.Node, torch.Tensor))


def _size_of(node: Any, x: Any) -> bool:
    """`x.size(0)` or `x.shape[0]`, for a view: the batch size."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "size":
        return node.args == (x, 0)
    if node.target is operator.getitem and node.args[1:] == (0,):
        inner: Any = node.args[0]
        return inner.target in (getattr, "size") and inner.args[0] is x
    return False


def _part(node: fx.Node, x: Any, model: nn.Module) -> nn.Module:
    """What a node does to x alone."""
    if node.op == "call_module":
        if node.args != (x,) or node.kwargs:
            raise _NoChain
        return model.get_submodule(str(node.target))
    if node.op == "call_method" and node.target in ("view", "reshape") and node.args[0] is x:
        if len(node.args) == 3 and _size_of(node.args[1], x) and node.args[2] == -1:
            return nn.Flatten()
    if node.op not in ("call_function", "call_method") or not node.args or node.args[0] is not x:
        raise _NoChain
    arguments, options = node.args[1:], dict(node.kwargs)
    if not _constant(arguments) or not _constant(list(options.values())):
        raise _NoChain
    if node.target is F.dropout:  # the flag was that of the moment
        rate: Any = options.get("p", arguments[0] if arguments else 0.5)
        return nn.Dropout(rate)
    if "training" in options or node.op == "call_function" and not callable(node.target):
        raise _NoChain
    function: Any = _Method(str(node.target)) if node.op == "call_method" else node.target
    return Applied(function, arguments, options)


def chain_of(model: nn.Module) -> list[nn.Module] | None:
    """The model's modules, and the functions between them, in the order of its forward; None where that is no chain.

    Modules of the user's own that are chains are opened; any other, a residual block say, stays whole.
    """
    if type(model).__module__.startswith("torch.nn.") and type(model) is not nn.Sequential:
        return None
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return None  # set on the instance: its parts have it not
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a forward does that cannot be traced
        return None
    found: list[nn.Module] = []
    x: Any = None
    try:
        for node in graph.nodes:
            if node.op == "placeholder":
                if x is not None and node.users:
                    return None
                x = node if x is None else x
            elif node.op == "output":
                if node.args[0] is not x:
                    return None
            elif all(user.op in ("call_method", "call_function") and _is_view(user) for user in node.users) and (
                node.target in (getattr, operator.getitem, "size")
            ):
                continue  # the batch size of a view
            else:
                found.append(_part(node, x, model))
                x = node
    except _NoChain:
        return None
    return [part for module in found for part in (chain_of(module) or [module])]


def _is_view(node: fx.Node) -> bool:
    return node.target in ("view", "reshape", operator.getitem)
