"""Direct feedback alignment of whole models: each unit's output gets a projection of the error for its gradient.

What `convert(model, "dfa")` puts on a model: forward hooks, and a :class:`DirectFeedback` in the last layer of each
unit.
"""

import zlib
from bisect import bisect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core import constructors, names
from .direct import DirectFeedback
from .direct_hooks import PLACE, Alone, Begin, Begun, End, Output, Pass, Ran, Start, Whole, remove
from .layer_list import Named, layers_of, starts_of
from .random_state import name_without_wrappers

OPTIONS = ("units", "path", "output", "init", "law", "impl")


def _output_name(model: nn.Module, layers: Named, output: str | None) -> str:
    modules = dict(model.named_modules())
    if output is not None:
        constructors.instance("output", output, str, "the name of a module")
        if output not in modules:
            raise names.unmatched("output", output, modules)
        if any(output == name or output.startswith(name + ".") for name, _ in layers):
            raise ValueError(f"output must name a module behind the layers, got {output!r}, which is in one of them")
        return output
    embeddings: Any = getattr(model, "get_output_embeddings", None)  # transformers'
    found = embeddings() if callable(embeddings) else None
    if found is None and hasattr(model, "config") and "For" in type(model).__name__:
        inside = {name.partition(".")[0] for name, _ in layers}
        behind = [m for n, m in model.named_children() if n not in inside and any(True for _ in m.parameters())]
        found = behind[-1] if behind else None
    return next((name for name, module in modules.items() if module is found), "")


def _check_between(model: nn.Module, before: str, after: str) -> None:
    """Between two units of one Sequential no module may have parameters: no gradient would reach them."""
    ways = before.split("."), after.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(*ways)) if a != b), 0)
    path = ".".join(ways[0][:shared])
    parent = model.get_submodule(path)
    if type(parent) is not nn.Sequential:
        return
    children = [name for name, _ in parent.named_children()]
    for name in children[children.index(ways[0][shared]) + 1 : children.index(ways[1][shared])]:
        if any(True for _ in parent.get_submodule(name).parameters()):
            raise ValueError(
                f"path must name a list that holds all layers with parameters (what lies between two units would learn "
                f"nothing), got {name!r} of {path or 'the model'!r} between {before!r} and {after!r}: give "
                f"path={path!r}, which has it, or cut elsewhere by units"
            )


def convert_units(
    model: nn.Module,
    seed: int,
    *,
    units: int | Sequence[int] | None = None,
    path: str | Sequence[str] | None = None,
    output: str | None = None,
    **options: Any,
) -> str:
    """`convert(model, "dfa")`. Returns the summary. `options`: of :class:`DirectFeedback`."""
    layers = layers_of(model, path)
    if len(layers) < 2:
        raise ValueError(
            f"model must have a list of at least two layers, got {type(model).__name__} with {len(layers)}: name it "
            'by path, as convert(model, "dfa", path="model.layers") does'
        )
    starts = starts_of(units, len(layers))
    ends = [start - 1 for start in starts[1:]]
    for end in ends:
        _check_between(model, layers[end][0], layers[end + 1][0])
    name_of_output = _output_name(model, layers, output)
    places = {
        end: DirectFeedback(
            seed=seed, stream=zlib.crc32(name_without_wrappers(layers[end][0], model).encode()), **options
        )
        for end in ends
    }
    remove(model)  # nothing has changed before
    state = Pass()
    for i, (_, layer) in enumerate(layers):
        number = bisect(starts, i) - 1
        if number:
            begin = Begin(state, number, i in starts, [layers[end][1] for end in ends])
            layer.register_forward_pre_hook(begin, with_kwargs=True)
            if i in starts:
                layer.register_forward_hook(Begun())
            if i == starts[-1]:
                layer.register_forward_hook(Alone(state, name_of_output))
        layer.register_forward_pre_hook(Ran(state, number))
        if i in places:
            device = next((p.device for p in layer.parameters()), None)
            layer.add_module(PLACE, places[i].to(device))
            layer.register_forward_hook(End(state, number))
    model.get_submodule(name_of_output).register_forward_hook(Output(state, name_of_output))
    if ends:
        model.register_forward_pre_hook(Start(state))
        model.register_forward_hook(Whole(state, name_of_output))
    return _summary(layers, starts, name_of_output)


def _summary(layers: Named, starts: list[int], output: str) -> str:
    limits = [*starts[1:], len(layers)]
    lines = [f"dfa: {len(starts)} units, the error is that of {output or 'the model'}'s output"]
    for start, limit in zip(starts, limits):
        first, last = layers[start][0], layers[limit - 1][0]
        what = "its own gradient" if limit == len(layers) else f"{getattr(layers[limit - 1][1], PLACE).extra_repr()}"
        lines.append(f"  {first if first == last else f'{first} to {last}'}  {what}")
    return "\n".join(lines)
