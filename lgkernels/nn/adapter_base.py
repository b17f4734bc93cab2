"""What the adapters share: the frozen layer, several changes of it by name, merging."""

import math
import warnings
import weakref
from typing import Any, cast

import torch
from torch import nn

from ..core import checks, constructors

DEFAULT = "default"


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.partition(".")[0] == "transformers"


def linear_sizes(base: Any) -> tuple[int, int]:
    """(out, in)."""
    if is_conv1d(base):
        return base.weight.shape[1], base.weight.shape[0]
    constructors.instance("base", base, nn.Linear, "a torch.nn.Linear")
    return base.out_features, base.in_features


def factory(base: Any, autocast_adapter_dtype: bool) -> dict[str, Any]:
    """`device` and `dtype` of new factors: float32 beside a half-precision weight, unless that is switched off."""
    dtype = base.weight.dtype
    if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return dict(device=base.weight.device, dtype=dtype)


def probability(name: str, value: Any) -> float:
    """Of a dropout."""
    checks.number(name, value)
    value = checks.item(value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    return value


class _Kept:
    """As a weak reference, but strong."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _vector(adapter: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(adapter.parameters(recurse=False))


class Adapter(nn.Module):
    """A frozen layer, `base`, and the factors of a change of its weight. Beside them it has the base's attributes.

    ``scale`` is alpha / rank, with ``use_rslora`` alpha / sqrt(rank) (Kalajdzievski 2023); it is applied once, in
    ``forward`` and in ``delta`` (hence ``merge``) alike. Further adapters of the same layer are children in
    ``adapters``, by name; ``active`` says which of all work, and with what weight. ``state_dict`` knows whether the
    base is merged. A weight that has another owner too (an embedding's, beside lm_head's) stays as it is: ``merge``
    gives the base a weight of its own, ``unmerge`` the old one again.
    """

    _original: Any = None  # returns the weight before the merge, where somebody else has it or had it
    _rounded: Any = None  # (indices, values) of the weight that subtracting the change would not give back
    modules_to_save: tuple[str, ...] = ()  # names of those that it trains, or its file has, in full
    is_trainable = True  # whether it learns where it is active
    _told = False  # that a merged adapter does not learn

    def __init__(self, base: Any, rank: int, alpha: float, use_rslora: bool) -> None:
        super().__init__()
        rank = constructors.size("rank", rank)
        checks.number("alpha", alpha)
        checks.boolean("use_rslora", use_rslora)
        alpha = checks.item(alpha)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.adapter_name, self.active, self.enabled = DEFAULT, {DEFAULT: 1.0}, True
        # by adapter: its factors, in one vector, and the multiple of them that the base's weight holds
        self._merged: dict[str, tuple[torch.Tensor, float]] | None = None
        self.shared = False  # whether the weight has a second owner, as `adapt` finds
        for name in getattr(base, "__constants__", ()):
            setattr(self, name, getattr(base, name))

    # -- several adapters of one layer --------------------------------------------------------------------------------

    def named_adapters(self) -> dict[str, "Adapter"]:
        """This one and the others of its layer."""
        others = cast(nn.ModuleDict, self._modules.get("adapters") or nn.ModuleDict())
        return {self.adapter_name: self, **{name: cast(Adapter, other) for name, other in others.items()}}

    def add(self, name: str, adapter: "Adapter") -> None:
        """Another one of the same base, which is registered here alone."""
        if "adapters" not in self._modules:
            self.add_module("adapters", nn.ModuleDict())
        del adapter._modules["base"]
        object.__setattr__(adapter, "base", self.base)
        adapter.adapter_name, adapter.active = name, {}
        cast(nn.ModuleDict, self._modules["adapters"])[name] = adapter

    @property
    def is_first(self) -> bool:
        """Whether the layer of the model is this module: the others are within it."""
        return "base" in self._modules

    def _working(self) -> list[tuple["Adapter", float]]:
        """The adapters that take part in a forward, with the weights they were given."""
        if not self.enabled:
            return []
        all_ = self.named_adapters()
        return [(all_[name], weight) for name, weight in self.active.items() if weight and name in all_]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self._run_merged(x)
        working = self._working()
        y = None
        if working and not (self.training and working[0][0]._drops()):
            first, weight = working.pop(0)
            y = first._layer(x, first.scale * weight)
        if y is None:
            y = self.base(x)
        for adapter, weight in working:
            change = adapter._dropped(x, adapter.scale * weight) if self.training else None
            y = y + (adapter._change_of_output(x, adapter.scale * weight) if change is None else change)
        return y

    def _drops(self) -> bool:
        """Whether a dropout is set."""
        raise NotImplementedError

    def _dropped(self, x: torch.Tensor, scale: float) -> torch.Tensor | None:
        """`_change_of_output` with dropout, None where there is none."""
        raise NotImplementedError

    def _layer(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The base with this change, in one call."""
        raise NotImplementedError

    def _change_of_output(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """What the change adds to the base's output."""
        raise NotImplementedError

    # -- the weight ---------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the change."""
        return self._merged is not None

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer applies, built in full: who reads a layer's weight (torch's transformer layers in
        evaluation do) computes what the layer does."""
        return self.base.weight if self.merged else self._added(self.base.weight, self._change())

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        return self.base.bias

    def delta(self) -> torch.Tensor:
        """The change of the base's weight by this adapter, built in full: for merging and inspection."""
        return self.scale * self._product()

    def _product(self) -> torch.Tensor:
        """Of the factors, (out, in, ...)."""
        raise NotImplementedError

    def _change(self) -> torch.Tensor | None:
        """By all that work, as the base's weight lies."""
        changes = [adapter.delta() * weight if weight != 1 else adapter.delta() for adapter, weight in self._working()]
        if not changes:
            return None
        change = changes[0] if len(changes) == 1 else sum(changes[1:], changes[0])
        return change.t() if is_conv1d(self.base) else change

    @staticmethod
    def _added(weight: torch.Tensor, change: torch.Tensor | None, sign: int = 1) -> torch.Tensor:
        """weight + sign * change, in float32 or better, rounded once."""
        if change is None:
            return weight
        wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
        return torch.add(weight.to(wide), change.to(wide), alpha=sign).to(weight.dtype)

    def _matrix(self) -> torch.Tensor:
        """The base's weight (out, in)."""
        return self.base.weight.t() if is_conv1d(self.base) else self.base.weight

    # -- merging ------------------------------------------------------------------------------------------------------

    def _detach_weight(self, value: torch.Tensor) -> None:
        """A weight of the base's own; the old one is kept where somebody else has it, too."""
        weight = self.base.weight
        self._original = _Kept(weight) if self.shared else weakref.ref(weight)
        self.base.weight = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def merge(self) -> "Adapter":
        """Add what the active adapters change to the base's weight; forward then runs the base alone. Returns self."""
        if not self.merged:
            weight, change = self.base.weight, self._change()
            merged = self._added(weight, change) if change is not None else weight.clone()
            if not self.shared and change is not None:
                wrong = (self._added(merged, change, -1) != weight).flatten().nonzero().squeeze(1)
                self._rounded = wrong, weight.flatten()[wrong]
            self._detach_weight(merged)
            self._merged = {a.adapter_name: (_vector(a), w) for a, w in self._working()}
        return self

    @torch.no_grad()
    def unmerge(self) -> "Adapter":
        """Take off again what ``merge`` added, whatever the factors are now. The base's weight returns bit for bit
        (up to rounding, where it was merged in another process or has changed its dtype since). Returns self."""
        if self._merged is not None:
            original = self._original and self._original()
            if original is not None:
                self.base.weight = original
            else:
                self._subtract(self._merged)
            self._merged = self._original = self._rounded = None
        return self

    def _subtract(self, merged: dict[str, tuple[torch.Tensor, float]]) -> None:
        weight = self.base.weight
        change = None
        for name, (vector, multiple) in merged.items():
            delta = self.named_adapters()[name]._delta_of(vector) * multiple
            change = delta if change is None else change + delta
        if change is not None:
            weight.copy_(self._added(weight, change.t() if is_conv1d(self.base) else change, -1))
        if self._rounded is not None and self._rounded[1].dtype == weight.dtype:
            index, values = (t.to(weight.device) for t in self._rounded)
            weight.view(-1)[index] = values

    def _delta_of(self, vector: torch.Tensor) -> torch.Tensor:
        """`delta` of the factors in a vector, which is left in none of the parameters."""
        own = list(self.parameters(recurse=False))
        now = [p.clone() for p in own]
        for p, value in zip(own, vector.to(own[0]).split([p.numel() for p in own])):
            p.copy_(value.view_as(p))
        delta = self.delta()
        for p, value in zip(own, now):
            p.copy_(value)
        return delta

    @torch.no_grad()
    def _set_aside(self) -> Any:
        """Switch off, and for merged layers the merged weight aside; for `_put_back`."""
        self.enabled = False
        if not self.merged:
            return None
        kept = self.base.weight, self._merged, self._original, self._rounded
        self.base.weight = nn.Parameter(self.base.weight.clone(), requires_grad=False)
        self.unmerge()
        return kept

    def _put_back(self, enabled: bool, kept: Any) -> None:
        self.enabled = enabled
        if kept is not None:
            self.base.weight, self._merged, self._original, self._rounded = kept

    # -- what is saved ------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Any:
        """For ``state_dict``: the merged factors, empty where there are none; of several adapters by name."""
        if self._merged is None:
            return self.factor.new_empty(0)
        if list(self._merged) == [self.adapter_name] and self._merged[self.adapter_name][1] == 1:
            return self._merged[self.adapter_name][0]
        return dict(self._merged)

    @torch.no_grad()
    def set_extra_state(self, state: Any) -> None:
        """Of a ``state_dict``, before the base's weight is read: that goes to no other owner."""
        if not self.is_first:
            return
        if isinstance(state, torch.Tensor):
            merged = {self.adapter_name: (state.clone(), 1.0)} if len(state) else None
        else:
            merged = {name: (vector.clone(), multiple) for name, (vector, multiple) in state.items()}
        if merged is not None and not self.merged:
            self._detach_weight(self.base.weight.clone())
        elif merged is None and self.merged:
            self.unmerge()
        self._merged, self._rounded = merged, None

    @property
    def factor(self) -> torch.Tensor:
        """One of the factors."""
        return next(self.parameters(recurse=False))

    def __getstate__(self) -> dict[str, Any]:
        original = self._original and self._original()
        return {**vars(self), "_original": None if original is None else _Kept(original)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "active" not in vars(self):  # of a version that knew one adapter a layer
            self.adapter_name, self.active, self.enabled, self.use_rslora = DEFAULT, {DEFAULT: 1.0}, True, False
            if isinstance(self._merged, torch.Tensor):
                self._merged = {DEFAULT: (self._merged, 1.0)}

    def _run_merged(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self._told and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if any(p.requires_grad for p in self.parameters(recurse=False)):
                self._told = True
                warnings.warn(
                    f"this {type(self).__name__} is merged: its factors get no gradient; unmerge() before training",
                    stacklevel=3,
                )
        return self.base(x)

    def extra_repr(self) -> str:
        name = "" if self.adapter_name == DEFAULT else f"{self.adapter_name}, "
        return f"{name}rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}" + (", merged" if self.merged else "")
