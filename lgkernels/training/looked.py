"""What a run of a model shows of its layers: how it is cut by `layered`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .layered import Before, Context, Layout, above, called, first_argument


class Unlike(TypeError):
    """A model whose layers are not called in turn: what is unlike that, in words."""


@torch.no_grad()
def look(model: nn.Module, names: list[str], x: Any) -> tuple[Layout, list[Any]]:
    """Run the model on x: what its layers do, and their inputs. Raises Unlike where they are not called in turn."""
    holders, order, inputs = above(tuple(names)), [], []
    layers = {model.get_submodule(name): name for name in names}
    events: list[tuple[str, str]] = []
    found: dict[str, tuple[int, bool]] = {}
    handles = []

    def note(name: str, kind: str) -> Any:
        return lambda *_: events.append((kind, name))

    def after(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
        order.append(layers[layer])
        inputs.append(first_argument(arguments, options))
        form = 0 if isinstance(out, Tensor) else len(out)
        found[layers[layer]] = form, form == 0 and len(arguments) == 1 and not options

    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if module in layers:
            handles.append(module.register_forward_pre_hook(note(name, "layer")))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        elif name and name not in holders and parent in holders:
            handles.append(module.register_forward_pre_hook(note(name, "other")))
    try:
        called(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if order != names:
        raise Unlike(f"its layers {names[0]} to {names[-1]} are not called once each, one after the other")
    first = events.index(("layer", names[0]))
    last = events.index(("layer", names[-1]))
    before = frozenset(name for kind, name in events[:last] if kind == "other")
    behind = frozenset(name for kind, name in events[last:] if kind == "other") - before
    if any(kind == "other" for kind, _ in events[first:last]):
        raise Unlike(f"other modules run between its layers {names[0]} to {names[-1]}")
    layout = Layout(
        tuple(names),
        tuple(found[name][0] for name in names),
        tuple(found[name][1] for name in names),
        before,
        behind,
        frozenset(),
    )
    return layout._replace(late=_late(model, layout, holders, x)), inputs


def _late(model: nn.Module, layout: Layout, holders: set[str], x: Any) -> frozenset[str]:
    """Parameters of the model itself, and of what holds the layers, that the part before makes no use of."""
    own = {
        (f"{name}.{key}" if name else key): p
        for name in holders
        for key, p in model.get_submodule(name)._parameters.items()
        if p is not None and p.is_floating_point()
    }
    if not own:
        return frozenset()
    first = Before(model, layout, Context())
    asked = [p.requires_grad for p in own.values()]
    try:
        with torch.enable_grad():
            for p in own.values():
                p.requires_grad_(True)
            given = [
                t for t in tree_leaves((first(x), first.context.calls)) if isinstance(t, Tensor) and t.requires_grad
            ]
            used = torch.autograd.grad([t.sum() for t in given], list(own.values()), allow_unused=True) if given else ()
    finally:
        for p, asks in zip(own.values(), asked):
            p.requires_grad_(asks)
    return frozenset(name for name, g in zip(own, used or [None] * len(own)) if g is None)
