"""Whole models with adapters around their layers: LoRA and LoKr."""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from ..core import checks, constructors, names
from .adapter_layers import Adapter, LoKrConv2d, LoKrLinear, LoRALinear, is_conv1d
from .adapter_layers import factorization as factorization

__all__ = ["LoKrConv2d", "LoKrLinear", "LoRALinear", "adapt", "merge", "unmerge"]

KINDS: dict[str, dict[type[nn.Module], Any]] = {
    "lora": {nn.Linear: LoRALinear},
    "lokr": {nn.Linear: LoKrLinear, nn.Conv2d: LoKrConv2d},
}


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


def _adapter_of(kind: str, module: nn.Module) -> Any:
    """The adapter's class for a layer, None where there is none."""
    return KINDS[kind].get(nn.Linear if is_conv1d(module) else type(module))


def _made(name: str, adapter: Any, module: nn.Module, rank: int, alpha: float, options: dict[str, Any]) -> Adapter:
    try:
        return adapter(module, rank, alpha, **options)
    except ValueError as error:
        if str(error).startswith("base "):
            raise ValueError(f"layer {name!r}: {error}") from None
        raise


def _target(kind: str, target: Any, model: nn.Module, places: dict[nn.Module, list[str]]) -> Any:
    """(name, module) -> whether the target picks it; None: all."""
    if target is None or callable(target):
        return target
    modules = dict(model.named_modules(remove_duplicate=False))
    could = {name for at in places.values() for name in at}
    found: set[str] = set()
    for text in constructors.texts("target", target):
        picked = names.by_part(text, modules)
        picked = {name for name in could if any(name == p or name.startswith(p + ".") for p in picked)}
        if not picked:
            near = names.near(text, could)
            raise ValueError(
                f"target must pick at least one of the layers that {kind!r} adapts "
                f"({', '.join(t.__name__ for t in KINDS[kind])}), got none in {type(model).__name__} with "
                f"target={text!r}" + (near and f"; {near}")
            )
        found |= picked
    return lambda name, module: name in found


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of the modules that have each parameter."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {p for p in module._parameters.values() if p is not None}:
            owners.setdefault(parameter, []).append(name)
    return owners


def _summary(kind: str, adapted: list[Any], modules: dict[str, nn.Module], in_head: Any, owners: Any) -> str:
    lines = [f"{kind}: {len(adapted)} layer{'' if len(adapted) == 1 else 's'} adapted"]
    for at, adapter in adapted:
        others = [name for name in owners[adapter.base.weight] if name not in at]
        tied = f"; the weight is also that of {', '.join(others)}, which keeps it" if others else ""
        lines.append(f"  {', '.join(at)}  {type(adapter).__name__}({adapter.extra_repr()}){tied}")
    left = []
    around = {module for at, _ in adapted for module in (modules[name] for name in at)}
    for name, module in modules.items():
        if module in around or not any(p.dim() > 1 for p in module.parameters(recurse=False)):
            continue
        if in_head(name):
            reason = "learns in full (train_head)"
        elif _adapter_of(kind, module):
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
    verbose: bool = True,
    **options: Any,
) -> nn.Module:
    """Freeze `model` and put an adapter around each target layer, in place.

    Args:
        model (nn.Module): changed in place.
        kind (str): ``"lora"`` (linear layers) or ``"lokr"`` (linear layers and convolutions).
        target (callable, optional): (qualified name, module) -> whether to adapt it; or texts: the qualified name of a
            layer or of what holds it, else whole parts of it (``"attn.q"``), a shell pattern, or text that it contains
            (numbers whole: ``"layers.1"`` is not in ``layers.10``). One that picks no layer is an error. None: every
            layer that the kind knows, but those of ``train_head``.
        rank (int), alpha (float): scale is alpha / rank. Defaults: the paper's 1 and 4.
        train_norm (bool): normalisation layers go on learning.
        train_head (iterable of str): names of submodules that are not adapted and learn in full.
        verbose (bool): print what was adapted, what was left alone and why.
        options: of the adapter: ``factor``, ``decompose_both``, ``scale_convention``.

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
    checks.choice("kind", kind, tuple(KINDS))
    checks.boolean("train_norm", train_norm)
    checks.boolean("verbose", verbose)
    head = constructors.texts("train_head", train_head)
    in_head = lambda name: any(name == h or name.startswith(h + ".") for h in head)  # noqa: E731
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in head:
        if name not in modules or not name:
            children = ", ".join(n for n, _ in model.named_children()) or "none"
            near = names.near(name, modules) or f"it has {children}"
            raise ValueError(f"train_head must name submodules of model, got {name!r}; {near}")
    places: dict[nn.Module, list[str]] = {}  # of each layer that could be adapted
    for name, module in modules.items():
        if isinstance(module, Adapter):
            raise ValueError(
                f"model must not hold adapters yet, got {type(module).__name__} at {name!r}: adapt once, "
                "and pick the layers with target"
            )
        if name and _adapter_of(kind, module):
            places.setdefault(module, []).append(name)
    picks = _target(kind, target, model, places)
    wrap = {
        module: at
        for module, at in places.items()
        if not any(map(in_head, at)) and (picks is None or any(picks(name, module) for name in at))
    }
    if not wrap:
        raise ValueError(
            f"target must pick at least one of the layers that {kind!r} adapts "
            f"({', '.join(t.__name__ for t in KINDS[kind])}), got none in {type(model).__name__} with "
            f"target={checks.got(target)}"
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        adapters = [
            (at, _made(at[0], _adapter_of(kind, module), module, rank, alpha, options)) for module, at in wrap.items()
        ]
    except Exception:
        for p in learning:  # those before the one that failed have frozen their layers
            p.requires_grad_(True)
        raise
    model.requires_grad_(False)
    owners = _owners(model)
    for at, adapter in adapters:
        adapter.shared = len(owners[adapter.base.weight]) > 1
        for name in at:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, adapter)
        for parameter in adapter.parameters(recurse=False):
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        if in_head(name) or train_norm and _is_norm(module):
            module.requires_grad_(True)
    if verbose:
        print(_summary(kind, adapters, modules, in_head, owners))
    return model


def merge(model: nn.Module) -> nn.Module:
    """`merge()` of every adapter in `model`. Returns the model."""
    constructors.module("model", model)
    for module in model.modules():
        if isinstance(module, Adapter):
            module.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """`unmerge()` of every adapter in `model`. Returns the model."""
    constructors.module("model", model)
    for module in model.modules():
        if isinstance(module, Adapter):
            module.unmerge()
    return model
