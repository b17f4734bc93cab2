"""The hooks of :mod:`lgkernels.nn.direct_units`: what they do in a forward pass, and what the backward does then.

A unit's output goes on detached; the graph behind it hangs on the model's output by `_Signal`, which hands the error
over. So a plain `loss.backward()` runs each unit's own backward, one unit after the other.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core import checks
from ..core.autograd import refuse_transforms
from .direct import DirectFeedback
from .direct_error import NAME, Call, tied_to

PLACE = "direct_feedback"


def _in_backward() -> bool:
    """Activation checkpointing runs a layer again there, for what it keeps alone."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Pass:
    """The forward pass that is under way, of all hooks of one model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.ungraphed = False  # a unit ran without a graph
        self.lowest: int | None = None  # the first unit that has run
        self.inside = False  # whether the model itself runs, not a part of it alone
        self.open: int | None = None  # the unit of which a layer has run, and its last has not
        self.hooked = False  # whether a forward of the model has called a layer
        self.cut: list[Tensor] | None = []  # what went into units detached; None once a forward has been looked at

    def begin(self) -> None:
        """Forget whatever a pass has left behind that did not come to its end."""
        self.call, self.ungraphed, self.open, self.lowest = None, False, None, None
        if self.cut:
            self.cut = []

    def wait(self, h: Tensor, place: DirectFeedback) -> None:
        """h, a unit's output, waits for the error."""
        self.call = self.call or Call()
        self.call.wait(h, place)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pass":
        memo[id(self)] = fresh = Pass()
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return vars(Pass())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """(keys, tensor) of all tensors of an output, in order."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, (*path, key))


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that a backward of the tensors would reach."""
    leaves, seen, waiting = set(), set(), []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            waiting.append(tensor.grad_fn)
        elif tensor.requires_grad:
            leaves.add(id(tensor))
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions if following is not None]
    return leaves


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.requires_grad else value


class Begin:
    """Before a layer of any unit but the first: what comes from elsewhere carries no gradient back.

    A forward may drop layers. The first unit is then the first of which one runs, and where the last layer of a unit
    has not run, the last that has is its end.
    """

    def __init__(self, state: Pass, number: int, first: bool, ends: list[nn.Module]) -> None:
        self.state, self.number = state, number
        self.first = first  # of its unit: then its hidden state comes from elsewhere too
        self.ends = ends  # the last layer of each unit but the last

    def _hidden(self, h: Any) -> Any:
        """The hidden state, cut off where a unit begins.

        It needs a gradient as before: activation checkpointing runs the layer again, then without the cut, and the
        layer must keep the same.
        """
        if _in_backward():
            return h
        number = self.state.open
        if not torch.is_grad_enabled():
            self.state.ungraphed |= number is not None and number < self.number
            return h
        if number is not None and number < self.number:
            self.state.open = None
            if isinstance(h, Tensor) and h.requires_grad:
                self.state.wait(h, getattr(self.ends[number], PLACE))
            return tree_map(_leaf, h)
        return self._cut(h, _leaf) if self.first else h

    def _cut(self, value: Any, by: Callable[[Any], Any] = _detached) -> Any:
        cut = self.state.cut
        if (
            cut is not None
            and not torch.compiler.is_compiling()
            and self.state.inside
            and torch.is_grad_enabled()
            and not _in_backward()
        ):
            cut += [tensor for _, tensor in _tensors(value) if tensor.requires_grad]
        return tree_map(by, value)

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.state.lowest in (None, self.number):
            return None
        if arguments:
            return (self._hidden(arguments[0]), *self._cut(arguments[1:])), self._cut(options)
        hidden = next(iter(options), None)
        return arguments, {
            key: self._hidden(value) if key == hidden else self._cut(value) for key, value in options.items()
        }


_REENTRANT = (
    "a unit ran without a graph inside of a forward that has one: activation checkpointing must be that with "
    "use_reentrant=False, which keeps it where a unit's input needs no gradient"
)


class Begun:
    """After the first layer of a unit, whose input needs no gradient: its output does, if the layer trains."""

    def __call__(self, layer: nn.Module, arguments: Any, out: Any) -> None:
        h = out if isinstance(out, Tensor) else out[0]
        if torch.is_grad_enabled() and not h.requires_grad and any(p.requires_grad for p in layer.parameters()):
            refuse_transforms(NAME)
            raise RuntimeError(_REENTRANT)


class Alone:
    """After the first layer of the last unit: a loss that is not taken of the tied output would train it alone.

    Not under torch.compile, which traces no hook of a tensor inside of its graph.
    """

    def __init__(self, state: Pass, output: str) -> None:
        self.state, self.output = state, output

    def __call__(self, layer: nn.Module, arguments: Any, out: Any) -> None:
        call, h = self.state.call, out if isinstance(out, Tensor) else out[0]
        if call is None or not call.waiting or not h.requires_grad or _in_backward() or torch.compiler.is_compiling():
            return

        def check(grad: Tensor) -> None:
            if call.over and call.error is None:
                raise RuntimeError(
                    f"the loss must be taken of {call.tied}, which carries the error to the units, got one of another "
                    "output alone: no unit but the last would learn. Name the module whose output the loss is taken of "
                    "in convert(model, 'dfa', output=...); several losses are added before one backward()"
                )
            if not call.over:
                raise RuntimeError(
                    f"the loss must be taken of the output of {self.output or 'the model'!r}, which has not run: no "
                    "unit but the last would learn. Call the model whole, or name the module whose output the loss is "
                    "taken of in convert(model, 'dfa', output=...)"
                )

        h.register_hook(check)


class End:
    """After the last layer of a unit: its output goes on detached, and waits for the error."""

    def __init__(self, state: Pass, number: int) -> None:
        self.state, self.number = state, number

    def __call__(self, layer: nn.Module, arguments: Any, out: Any) -> Any:
        if self.number == 0 and not self.state.inside and not _in_backward():
            self.state.begin()  # a part of the model runs alone
        if not _in_backward():
            self.state.open = None
        if not torch.is_grad_enabled():
            self.state.ungraphed = True
            return None
        h = out if isinstance(out, Tensor) else out[0]
        if h.requires_grad:
            (Pass() if _in_backward() else self.state).wait(h, getattr(layer, PLACE))
        return tree_map(_detached, out)


class Output:
    """After the module that gives the model's output: what waits is tied to it.

    Of several outputs to the one named logits, else to the first. The others keep their graph, which ends where the
    last unit begins: what lies behind the units learns by its own gradient, and the last unit by the sum.
    """

    def __init__(self, state: Pass, name: str) -> None:
        self.state, self.name = state, name

    def __call__(self, module: nn.Module, arguments: Any, out: Any) -> Any:
        call, self.state.call = self.state.call, None
        ungraphed, self.state.ungraphed = self.state.ungraphed, False
        if ungraphed and torch.is_grad_enabled():
            raise RuntimeError(_REENTRANT)
        if call is None or not call.waiting:
            return None
        call.over = True
        learning = {path: t for path, t in _tensors(out) if t.requires_grad}
        for tensor in learning.values():
            if tensor.dim() == 0:
                raise ValueError(
                    f"output must name the module of {type(module).__name__} that gives what its loss is taken of, "
                    'as convert(model, "dfa", output="classifier") does, or the loss must be taken outside, got a '
                    "model that returns its loss"
                )
        if not learning:
            return None
        path = next((path for path in learning if path[-1:] == ("logits",)), next(iter(learning)))
        chosen, tied = learning[path], self._tied(learning[path], call)
        key = f"the output {'.'.join(str(key) for key in path)!r}" if path else "the output"
        call.tied = f"{key} of {self.name or 'the model'!r}"

        def tie(value: Any) -> Any:
            return tied if value is chosen else value

        if isinstance(out, dict):  # a ModelOutput keeps its class and its attributes
            for key, value in list(out.items()):
                if (new := tree_map(tie, value)) is not value:
                    out[key] = new
            return out
        return tree_map(tie, out)

    def _tied(self, output: Tensor, call: Call) -> Tensor:
        if output.dim() not in (2, 3):
            raise ValueError(
                f"output must give (B, C), or (B, T, C) for tokens, got a tensor of shape {checks.shape_of(output)}"
            )
        return tied_to(output, call)


class Start:
    """Before the model."""

    def __init__(self, state: Pass) -> None:
        self.state = state

    def __call__(self, model: nn.Module, arguments: Any) -> None:
        if not _in_backward():
            self.state.begin()
            self.state.inside = True


class Ran:
    """Before each layer: its unit runs."""

    def __init__(self, state: Pass, number: int) -> None:
        self.state, self.number = state, number

    def __call__(self, layer: nn.Module, arguments: Any) -> None:
        if not _in_backward():
            self.state.open = self.number
            if self.state.lowest is None:
                self.state.lowest = self.number


class Whole:
    """After the model: where its forward has not come by what the units need, they would learn nothing, in silence."""

    def __init__(self, state: Pass, output: str) -> None:
        self.state, self.output = state, output

    def __call__(self, model: nn.Module, arguments: Any, out: Any) -> None:
        if _in_backward():
            return
        call, self.state.call, self.state.inside = self.state.call, None, False
        if call is not None and call.waiting:
            raise RuntimeError(
                f"the forward of {type(model).__name__} is over and that of {self.output!r} has not run after the "
                "units: name the module that gives the model's output in convert(model, 'dfa', output=...)"
            )
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for _, tensor in _tensors(out)):
            return
        self.state.hooked |= self.state.lowest is not None
        if not self.state.hooked:
            raise RuntimeError(
                f"the forward of {type(model).__name__} has called none of the layers of its units: its gradients "
                "would be those of back-propagation. It must call layer(x), not layer.forward(x), which skips hooks; "
                "where it runs other layers, name their list in convert(model, 'dfa', path=...)"
            )
        self._look_between(model, out)

    def _look_between(self, model: nn.Module, out: Any) -> None:
        """Once: what went into a unit detached must come from parameters that the backward reaches otherwise."""
        if not self.state.cut:
            return
        reached = _leaves(tensor for _, tensor in _tensors(out) if tensor.requires_grad)
        lost = _leaves(self.state.cut) - reached
        for name, parameter in model.named_parameters():
            if id(parameter) in lost:
                raise RuntimeError(
                    f"all that {type(model).__name__} learns between its layers must be in one of them, or in what all "
                    f"have in common: {name!r} acts between two units alone, and no gradient would reach it. Cut "
                    "elsewhere by units, name a list that holds it in convert(model, 'dfa', path=...), or freeze it"
                )
        self.state.cut = None


HOOKS = (Start, Ran, Begin, Begun, Alone, End, Output, Whole)


def remove(model: nn.Module) -> None:
    """Take hooks and places off again."""
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in table.items() if isinstance(hook, HOOKS)]:
                del table[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(getattr(module, PLACE, None), DirectFeedback):
            del module._modules[PLACE]
