"""A model with a list of layers, cut into what comes before them, the layers, and what comes behind.

The part before is the model itself whose layers only write down what they are called with, masks and position
embeddings among it; the part behind is the model itself whose layers give what the last one gave, and in which what
comes before them does not run. So nothing of a model's forward is written a second time here.
"""

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Layout(NamedTuple):
    """What a run of a model has shown of its layers, by name."""

    layers: tuple[str, ...]
    forms: tuple[int, ...]  # of each layer's output: 0 a tensor, else the length of a tuple that begins with it
    bare: tuple[bool, ...]  # whether a layer is called with its input alone, and gives a tensor
    before: frozenset[str]  # modules beside the layers' ancestors that run before the last layer does
    after: frozenset[str]  # that run behind it alone
    late: frozenset[str]  # parameters of the ancestors that the part before makes no use of
    inside: dict[int, "Layout"] = {}  # of layers that are stages, with a list of their own


class Context:
    """What the part before leaves for the layers and for the part behind, in one forward pass."""

    def __init__(self) -> None:
        self.input: Any = None
        self.hidden: Any = None
        self.rows = -1
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.before: dict[str, list[Any]] = {}
        self.taken: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Context":
        memo[id(self)] = fresh = Context()
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return vars(Context())

    def fits(self, h: Tensor) -> None:
        """h is the batch that the first part saw."""
        if len(h) != self.rows:
            raise RuntimeError(
                f"a unit of a model with layers takes the batch that the first unit took just before it ({self.rows} "
                f"rows, for masks and positions), got {len(h)} rows: run the units in order"
            )


class Reached(Exception):
    """The last layer of the list has been called."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def output_of(out: Any) -> Any:
    """The first tensor of what a model returns."""
    return out if isinstance(out, Tensor) else out[0]


def first_argument(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return arguments[0] if arguments else next(iter(options.values()))


class _Usual(TorchDispatchMode):
    """Without memory a model cannot look whether a mask masks nothing, or whether texts are packed: the usual answer to
    such a question, `.all()`, is yes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return function(*args, **(kwargs or {}))


def _usual(x: Any) -> AbstractContextManager:
    return _Usual() if isinstance(x, Tensor) and x.is_meta else nullcontext()


def called(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, or for a mapping of its arguments; without a cache of keys and values."""
    takes = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    with _usual(x):
        return output_of(model(**x, **options) if isinstance(x, Mapping) else model(x, **options))


# -- stand-ins ----------------------------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """In a module's place, with its attributes; the module itself is not among its children."""

    def __init__(self, real: nn.Module, context: Context) -> None:
        super().__init__()
        self.real, self.context = (real,), context

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "real":  # not yet there, in a copy
                raise
            return getattr(self.real[0], name)


class _Noting(_StandIn):
    """A layer that writes down what it is called with."""

    def __init__(self, real: nn.Module, context: Context, form: int, last: bool) -> None:
        super().__init__(real, context)
        self.form, self.last = form, last

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.context.calls.append((arguments, options))
        hidden = first_argument(arguments, options)
        if self.last:
            raise Reached(hidden)
        return _formed(hidden, self.form)


class _Giving(_StandIn):
    """A layer that gives what the last one gave."""

    def __init__(self, real: nn.Module, context: Context, form: int) -> None:
        super().__init__(real, context)
        self.form = form

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return _formed(self.context.hidden, self.form)


class _Blank(_StandIn):
    """A module that has run before the layers, and does not again: zeros of what it gave, without memory."""

    def __init__(self, real: nn.Module, context: Context, name: str) -> None:
        super().__init__(real, context)
        self.name = name

    def forward(self, *arguments: Any, **options: Any) -> Any:
        number = self.context.taken.get(self.name, 0)
        self.context.taken[self.name] = number + 1
        outs = self.context.before.get(self.name, [])
        return outs[number] if number < len(outs) else self.real[0](*arguments, **options)


class _Running(nn.Module):
    """A module before the layers: what it gave is written down without its values."""

    def __init__(self, module: nn.Module, context: Context, name: str) -> None:
        super().__init__()
        self.module, self.context, self.name = module, context, name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = self.module(*arguments, **options)
        self.context.before.setdefault(self.name, []).append(tree_map(_blank, out))
        return out


def _blank(value: Any) -> Any:
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) else value


def _formed(hidden: Tensor, form: int) -> Any:
    return (hidden, *[None] * (form - 1)) if form else hidden


# -- parts --------------------------------------------------------------------------------------------------------


def above(layers: tuple[str, ...]) -> set[str]:
    """Names of the modules that hold the layers, the model's "" among them."""
    return {name.rsplit(".", depth)[0] for name in layers for depth in range(1, name.count(".") + 1)} | {""}


class _End(nn.Module):
    """What the parts before and behind share: a copy of the model around stand-ins."""

    def __init__(self, model: nn.Module, layout: Layout, context: Context) -> None:
        super().__init__()
        self.layout, self.context = layout, context
        self.above = above(layout.layers)
        self.copies: list[tuple[Any, tuple[nn.Module]]] = []
        self.own: list[nn.Module] = []  # modules of the model in this part
        self.model = self._copied(model, "")

    def _copied(self, module: nn.Module, name: str) -> nn.Module:
        share = copy.copy(module)
        share._modules = {}
        self._take_tensors(share, module, name)
        for flag in ("grad_checkpointing", "gradient_checkpointing"):  # of the layers by their parent
            if getattr(share, flag, False):
                setattr(share, flag, False)
        for key, child in module._modules.items():
            at = f"{name}.{key}" if name else key
            if child is None:
                share._modules[key] = None
            elif at in self.layout.layers:
                share._modules[key] = self._layer(child, self.layout.layers.index(at))
            elif at in self.above:
                share._modules[key] = self._copied(child, at)
            elif (inside := self._other(child, at)) is not None:
                share._modules[key] = inside
            else:
                vars(share)[key] = child  # to be read, not of this part
        self.copies.append((share, (module,)))
        return share

    def _take_tensors(self, share: nn.Module, module: nn.Module, name: str) -> None:
        raise NotImplementedError

    def _layer(self, layer: nn.Module, number: int) -> nn.Module:
        raise NotImplementedError

    def _other(self, child: nn.Module, name: str) -> nn.Module | None:
        raise NotImplementedError

    def _follow(self) -> None:
        """The mode of the copies is that of the modules inside, which the model's train() and the unit's both reach."""
        if self.own:
            for share, _ in self.copies:
                share.training = self.own[0].training


class Before(_End):
    """The model up to its layers: x -> the first layer's input."""

    def _take_tensors(self, share: nn.Module, module: nn.Module, name: str) -> None:
        late = {k for k in module._parameters if (f"{name}.{k}" if name else k) in self.layout.late}
        if late:
            share._parameters = {k: p for k, p in module._parameters.items() if k not in late}
            vars(share).update({k: p for k, p in module._parameters.items() if k in late})

    def _layer(self, layer: nn.Module, number: int) -> nn.Module:
        return _Noting(layer, self.context, self.layout.forms[number], number + 1 == len(self.layout.layers))

    def _other(self, child: nn.Module, name: str) -> nn.Module | None:
        if name in self.layout.after:
            return None
        self.own.append(child)
        return _Running(child, self.context, name) if name in self.layout.before else child

    def forward(self, x: Any) -> Tensor:
        context = self.context
        context.input, context.hidden, context.calls, context.before = x, None, [], {}
        self._follow()
        try:
            called(self.model, x)
        except Reached as reached:
            context.calls = [_without_cache(*call) for call in context.calls]
            context.rows = len(reached.hidden)
            return reached.hidden
        raise RuntimeError(f"the forward of {type(self.model).__name__} is over and its layers have not been called")


def _without_cache(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with beside its input: ((), {}) for most."""
    rest = arguments[1:] if arguments else ()
    named = dict(options) if arguments else dict(list(options.items())[1:])
    return tuple(None if _is_cache(v) else v for v in rest), {k: None if _is_cache(v) else v for k, v in named.items()}


def _is_cache(value: Any) -> bool:
    """transformers': keys and values of earlier tokens."""
    return type(value).__name__.endswith("Cache")


class Layer(nn.Module):
    """One layer, with what it is called with beside its input."""

    def __init__(self, layer: nn.Module, context: Context, number: int) -> None:
        super().__init__()
        self.layer, self.context, self.number = layer, context, number

    def forward(self, h: Tensor) -> Tensor:
        self.context.fits(h)
        arguments, options = self.context.calls[self.number]
        with _usual(h):
            return output_of(self.layer(h, *arguments, **options))


class Behind(_End):
    """The model behind its layers: the last layer's output -> the model's."""

    def _take_tensors(self, share: nn.Module, module: nn.Module, name: str) -> None:
        late = {k for k in module._parameters if (f"{name}.{k}" if name else k) in self.layout.late}
        share._parameters = {k: p for k, p in module._parameters.items() if k in late}
        share._buffers = {}

    def _layer(self, layer: nn.Module, number: int) -> nn.Module:
        return _Giving(layer, self.context, self.layout.forms[number])

    def _other(self, child: nn.Module, name: str) -> nn.Module | None:
        if name in self.layout.before:
            return _Blank(child, self.context, name)
        if name not in self.layout.after:
            return None
        self.own.append(child)
        return child

    def forward(self, h: Tensor) -> Tensor:
        self.context.fits(h)
        self.context.hidden, self.context.taken = h, {}
        self._follow()
        for share, (module,) in self.copies:  # tensors of the part before that the forward reads in passing
            others = {k: v for k, v in module._parameters.items() if k not in share._parameters}
            vars(share).update(others, **module._buffers)
        try:
            return called(self.model, self.context.input)
        finally:
            self.context.hidden = None


def parts(model: nn.Module, layout: Layout) -> list[nn.Module]:
    """[before, layers, behind]; a layer that takes its input alone is itself, and one that is a stage its layers."""
    context = Context()
    middle: list[nn.Module] = []
    for i, (name, bare) in enumerate(zip(layout.layers, layout.bare)):
        layer = model.get_submodule(name)
        if i in layout.inside:
            before, first, *others, last, behind = parts(layer, layout.inside[i])
            middle += [nn.Sequential(before, first), *others, nn.Sequential(last, behind)]
        else:
            middle.append(layer if bare else Layer(layer, context, i))
    return [Before(model, layout, context), *middle, Behind(model, layout, context)]
