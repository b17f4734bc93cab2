"""Whole models with adapters around their layers: LoRA and LoKr."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from ..core import checks, constructors, names
from ..core.whole import require_unsharded
from . import adapter_wrap as wrap_
from .adapter_base import DEFAULT, Adapter
from .adapter_files import load_adapter, save_adapter
from .adapter_lokr import LoKrConv2d, LoKrLinear
from .adapter_lokr import factorization as factorization
from .adapter_lora import LoRAConv2d, LoRALinear

__all__ = [
    "LoKrConv2d",
    "LoKrLinear",
    "LoRAConv2d",
    "LoRALinear",
    "adapt",
    "disable_adapter",
    "load_adapter",
    "merge",
    "save_adapter",
    "set_adapter",
    "unmerge",
]

_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention, Adapter)


def _is_norm(module: nn.Module) -> bool:
    """torch's normalisations, and others by their class's name: BatchNormAct2d, LlamaRMSNorm. A module that holds
    layers with matrices (PreNorm, NormalizedAttention, a norm-free block) is none, whatever it is called."""
    if isinstance(module, _TORCH_NORMS):
        return True
    if not re.search(r"Norm(?![a-z]|Free)", type(module).__name__) or any(
        isinstance(m, _WEIGHTED) for m in module.modules()
    ):
        return False
    return all(p.numel() == max(p.shape, default=1) for p in module.parameters())  # a scale and a shift a channel


def _no_layer(kind: str, model: nn.Module, target: str, near: str = "") -> ValueError:
    known = ", ".join(t.__name__ for t in wrap_.KINDS[kind])
    return ValueError(
        f"target must pick at least one of the layers that {kind!r} adapts ({known}), got none in "
        f"{type(model).__name__} with target={target}"
        + ("; None takes no convolution: name them" if kind == "lora" and target == "None" else near and f"; {near}")
    )


def _target(kind: str, target: Any, model: nn.Module, places: dict[nn.Module, list[str]]) -> Any:
    """(name, module) -> whether the target picks it."""
    if target is None:
        return lambda name, module: kind == "lokr" or not isinstance(module, nn.Conv2d)
    if callable(target):
        return target
    modules = wrap_.layers(model)
    could = {name for at in places.values() for name in at}
    found: set[str] = set()
    for text in constructors.texts("target", target):
        picked = names.by_part(text, modules)
        picked = {name for name in could if any(name == p or name.startswith(p + ".") for p in picked)}
        if not picked:
            raise _no_layer(kind, model, repr(text), names.near(text, could))
        found |= picked
    return lambda name, module: name in found


def _check_options(kind: str, options: dict[str, Any]) -> None:
    taken = inspect.signature(wrap_.KINDS[kind][nn.Linear].__init__).parameters.values()
    known = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            raise TypeError(
                f"{name} must be left out with kind={kind!r}, which takes {', '.join(known)}, got {checks.got(value)}"
            )


def _summary(kind: str, adapted: list[Any], modules: dict[str, nn.Module], in_head: Any, owners: Any) -> str:
    lines = [f"{kind}: {len(adapted)} layer{'' if len(adapted) == 1 else 's'} adapted"]
    for at, adapter in adapted:
        others = [name for name in owners[adapter.base.weight] if name.removesuffix(".base") not in at]
        tied = f"; the weight is also that of {', '.join(others)}, which keeps it" if others else ""
        lines.append(f"  {', '.join(at)}  {type(adapter).__name__}({adapter.extra_repr()}){tied}")
    left = []
    around = {module for at, _ in adapted for module in (modules[name] for name in at)}
    for name, module in modules.items():
        parameters = wrap_.layer_of(module).parameters(recurse=False)
        if module in around or not any(p.dim() > 1 for p in parameters):
            continue
        if in_head(name):
            reason = "learns in full (train_head)"
        elif wrap_.adapter_of(kind, module):
            reason = "not in target"
        else:
            reason = f"no {kind} adapter for this kind of layer"
        left.append(f"  {name or '(model)'}  {type(module).__name__}: {reason}")
    return "\n".join(lines + (["left alone", *left] if left else []))


def adapt(
    model: nn.Module,
    kind: Literal["lora", "lokr"] = "lora",
    target: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    rank: int = 1,
    alpha: float = 4.0,
    train_norm: bool = False,
    train_head: str | Iterable[str] = (),
    adapter_name: str = DEFAULT,
    verbose: bool = True,
    **options: Any,
) -> nn.Module:
    """Freeze `model` and put an adapter around each target layer, in place.

    Args:
        model (nn.Module): changed in place.
        kind (str): ``"lora"`` or ``"lokr"``, both for linear layers (transformers' Conv1D, too) and convolutions.
        target (callable, optional): (qualified name, module) -> whether to adapt it; or texts: the qualified name of a
            layer or of what holds it, else whole parts of it (``"attn.q"``), a shell pattern, or text that it contains
            (numbers whole: ``"layers.1"`` is not in ``layers.10``). One that picks no layer is an error. None: every
            linear layer, with ``"lokr"`` every convolution, too, but those of ``train_head``.
        rank (int), alpha (float): scale is alpha / rank. Defaults: the paper's 1 and 4.
        train_norm (bool): normalisation layers go on learning.
        train_head (iterable of str): names of submodules that are not adapted and learn in full.
        adapter_name (str): a model may have several adapters, also on one layer. The new one alone is active and
            learns, until :func:`set_adapter` chooses others.
        verbose (bool): print what was adapted, what was left alone and why.
        options: of the adapter: ``use_rslora``, ``autocast_adapter_dtype``; of LoRA: ``dropout``; of LoKr: ``factor``,
            ``decompose_both``, ``scale_convention``, ``rank_dropout``, ``module_dropout``.

    A layer that stands at several places keeps to be one: it is adapted at all of them, if ``target`` picks any. A
    weight that another module has, too (an embedding's), is adapted in the target alone.

    Returns:
        the model. Raises: TypeError, ValueError naming the argument, before the model changes.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = lnn.adapt(model, "lora", train_head=["2"])
        lora: 1 layer adapted
          0  LoRALinear(rank=1, alpha=4.0, scale=4)
        left alone
          2  Linear: learns in full (train_head)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.a', '0.b', '2.weight', '2.bias']
    """
    constructors.module("model", model)
    require_unsharded(model, "adapted", "adapt first")
    checks.choice("kind", kind, tuple(wrap_.KINDS))
    checks.boolean("train_norm", train_norm)
    checks.boolean("verbose", verbose)
    _check_options(kind, options)
    head = constructors.texts("train_head", train_head)
    in_head = lambda name: any(name == h or name.startswith(h + ".") for h in head)  # noqa: E731
    modules = wrap_.layers(model)
    for name in head:
        if name not in modules or not name:
            children = ", ".join(n for n, _ in model.named_children()) or "none"
            near = names.near(name, modules) or f"it has {children}"
            raise ValueError(f"train_head must name submodules of model, got {name!r}; {near}")
    wrap_.check_new_name(model, adapter_name)
    places: dict[nn.Module, list[str]] = {}  # of each layer that could be adapted
    for name, module in modules.items():
        if name and wrap_.adapter_of(kind, module):
            places.setdefault(module, []).append(name)
    if not places and wrap_.adapter_of(kind, modules[""]):
        raise ValueError(
            f"model must hold the layers that are adapted, got {type(model).__name__}, which is itself one: put it "
            "into a torch.nn.Sequential"
        )
    picks = _target(kind, target, model, places)
    wrap = [
        (module, at)
        for module, at in places.items()
        if not any(map(in_head, at)) and any(picks(name, wrap_.layer_of(module)) for name in at)
    ]
    if not wrap:
        raise _no_layer(kind, model, "None" if target is None else checks.got(target))
    adapters = wrap_.make(model, wrap, lambda layer, name: wrap_.adapter_of(kind, layer)(layer, rank, alpha, **options))
    norms = [name for name, module in modules.items() if train_norm and _is_norm(module)]
    in_full = [
        name
        for name, module in modules.items()
        if any(name == at or name.startswith(f"{at}.") for at in (*head, *norms)) and wrap_.own_parameters(module)
    ]
    owners = wrap_.owners(model)
    wrap_.put(model, adapters, adapter_name, in_full)
    if verbose:
        print(_summary(kind, adapters, modules, in_head, owners))
    return model


def set_adapter(
    model: nn.Module, adapter_name: str | Iterable[str], weights: float | Sequence[float] | None = None
) -> nn.Module:
    r"""Choose which adapters work, and learn: layers run :math:`W + \sum_i w_i \Delta W_i`.

    Args:
        model (nn.Module): with adapters, by :func:`adapt` or :func:`load_adapter`; not merged.
        adapter_name (str, or iterable of them): the active ones; none: the base runs alone.
        weights (float or sequence, optional): w, one for all or one for each. None: 1.

    What an adapter trains in full (``train_head``, ``train_norm``) learns where it is active, and is frozen elsewhere.
    Those that were loaded with ``is_trainable=False`` work, but do not learn.

    Returns:
        the model. Raises: TypeError, ValueError naming the argument, before the model changes.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> for name in ("style", "subject"):
        ...     _ = lnn.adapt(model, "lora", adapter_name=name, verbose=False)
        >>> _ = lnn.set_adapter(model, ["style", "subject"], [1.0, 0.5])
    """
    constructors.module("model", model)
    chosen, known = constructors.texts("adapter_name", adapter_name), wrap_.adapter_names(model)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"adapter_name must be of {', '.join(known) or 'an adapter of model, which has none'}, got {name!r}"
            )
    if weights is None:
        values: Sequence[float] = [1.0] * len(chosen)
    elif isinstance(weights, (tuple, list)):
        values = constructors.numbers("weights", weights, (len(chosen),), f"{len(chosen)} numbers")
    else:
        checks.number("weights", weights)
        values = [checks.item(weights)] * len(chosen)
    for at, first in wrap_.adapted(model).items():
        if first.merged:
            raise ValueError(f"model must not be merged, got {at or 'a layer'!r} merged: unmerge(model) first")
    wrap_.activate(model, dict(zip(chosen, map(float, values))))
    return model


class disable_adapter:
    """Context in which the base runs alone, of merged layers, too. What learns in full (``train_head``) stays as it is.

    Args:
        model (nn.Module): with adapters.

    Raises: TypeError naming the argument.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = torch.nn.Linear(4, 4)
        >>> model = lnn.adapt(torch.nn.Sequential(layer), "lora", verbose=False)
        >>> x = torch.ones(1, 4)
        >>> with lnn.disable_adapter(model):
        ...     torch.equal(model(x), layer(x))
        True
    """

    def __init__(self, model: nn.Module) -> None:
        constructors.module("model", model)
        self.model = model

    def __enter__(self) -> nn.Module:
        self._before = [(first, first.enabled, first._set_aside()) for first in wrap_.adapted(self.model).values()]
        return self.model

    def __exit__(self, *error: Any) -> None:
        for first, enabled, merged in self._before:
            first._put_back(enabled, merged)


def merge(model: nn.Module) -> nn.Module:
    """`merge()` of every layer in `model` that has adapters. Returns the model."""
    constructors.module("model", model)
    if wrap_.adapted(model):
        require_unsharded(model, "merged", "save_adapter, load_adapter into the whole model, merge")
    for first in wrap_.adapted(model).values():
        first.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """`unmerge()` of every layer in `model` that has adapters. Returns the model."""
    constructors.module("model", model)
    for first in wrap_.adapted(model).values():
        first.unmerge()
    return model
