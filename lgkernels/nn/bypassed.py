"""Converted layers that a rule never reaches: another module multiplies by their weight itself."""

import dis
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_SET_UP = ("__init__", "init", "reset", "extra_repr", "load", "_load", "state_dict")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def weight_alone_is_read(parent: nn.Module, child: str) -> bool:
    """Whether the parent's own methods read ``self.<child>.weight`` and use the child for nothing else.

    What sets a module up (initialisation, loading) does not count. Where Python holds no code, the answer is no.
    """
    reads = False
    for kind in type(parent).__mro__:
        if kind.__module__.partition(".")[0] == "torch":
            continue
        for name, function in vars(kind).items():
            if not isinstance(function, FunctionType) or name.lstrip("_").startswith(_SET_UP) or name in _SET_UP:
                continue
            for code in _codes(function.__code__):
                steps = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
                for step, after in zip(steps, steps[1:]):
                    if not step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) or step.argval != child:
                        continue
                    if not after.opname.startswith("LOAD_ATTR") or after.argval not in ("weight", "bias"):
                        return False
                    reads = reads or after.argval == "weight"
    return reads


class Watch:
    """A forward hook on the parent of converted layers, until its first training forward is over: those whose own
    forward has not run by then are named in a warning."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers

    def __call__(self, parent: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not parent.training or not torch.is_grad_enabled():
            return
        hooks = parent._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
        if missed := [name for name, layer in self.layers.items() if vars(layer).pop("_unseen", None)]:
            warnings.warn(
                f"{', '.join(missed)}: converted, but the forward of {type(parent).__name__} is over and theirs has "
                "not run, so their rule did nothing. Where it multiplies by their weight itself, they are trained by "
                "back-propagation: call the layers, or exclude them from convert",
                stacklevel=2,
            )


def watch(model: nn.Module, chosen: list[tuple[str, Any]]) -> None:
    """Put a :class:`Watch` on every parent with a forward of its own."""
    modules = dict(model.named_modules())
    children: dict[nn.Module, dict[str, Any]] = {}
    for name, layer in chosen:
        parent = modules[name.rpartition(".")[0]] if name else layer
        if type(parent).forward is not nn.Sequential.forward and parent is not layer:
            children.setdefault(parent, {})[name] = layer
    for parent, layers in children.items():
        for layer in layers.values():
            vars(layer)["_unseen"] = True
        for key in [key for key, hook in parent._forward_hooks.items() if isinstance(hook, Watch)]:
            del parent._forward_hooks[key]  # of an earlier convert
        parent.register_forward_hook(Watch(layers))
