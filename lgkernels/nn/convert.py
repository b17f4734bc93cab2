"""Whole models under another feedback rule, and back."""

import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from torch import nn

from ..core import checks, constructors, names
from ..core.whole import is_sharded, is_sharded_module
from ..random import RandomFeedback
from . import direct_hooks, direct_units, lls_convert
from .bypassed import watch, weight_alone_is_read
from .feedback import FeedbackAlignmentConv2d, FeedbackAlignmentLinear, SignSymmetricConv2d, SignSymmetricLinear
from .feedback_layer import SIGN_SYMMETRIC_RULES, FeedbackLayer
from .random_state import feedback_state, load_feedback_state, name_without_wrappers, redraw_after  # noqa: F401  as before

__all__ = ["convert"]

Pattern = str | type | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]
NamedModule = tuple[str, nn.Module]


class _Rule(NamedTuple):
    """A rule's layers in the place of torch's, and which options of theirs `convert` takes."""

    layers: dict[type[nn.Module], type[nn.Module]]
    options: tuple[str, ...]
    arguments: dict[str, str]  # what tells the layer its rule, where its class has several


_ALIGNMENT = {nn.Linear: FeedbackAlignmentLinear, nn.Conv2d: FeedbackAlignmentConv2d}
_SYMMETRIC = {nn.Linear: SignSymmetricLinear, nn.Conv2d: SignSymmetricConv2d}
_SYMMETRIC_OPTIONS = ("scale", "law", "sign_zero", "packed_signs", "impl")
_RULES = {"fa": _Rule(_ALIGNMENT, ("feedback_init", "law", "impl"), {})}
for _name in SIGN_SYMMETRIC_RULES:
    _options = (*_SYMMETRIC_OPTIONS, "signs") if _name == "signed_init" else _SYMMETRIC_OPTIONS
    _RULES[_name] = _Rule(_SYMMETRIC, _options, {"rule": _name})

#: The rules that `convert` knows beside "bp". A command writes them with "-" for "_".
FEEDBACK_RULES = tuple(_RULES)

_PLAIN = {layer: plain for rule in _RULES.values() for plain, layer in rule.layers.items()}


def convert(
    model: nn.Module,
    rule: str,
    *,
    last_layer: Literal["bp", "convert"] = "bp",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    seed: int = 0,
    verbose: bool = True,
    **options: Any,
) -> nn.Module:
    """Put every ``nn.Linear`` and ``nn.Conv2d`` of a model under a feedback rule, in place, and back.

    Or, with the rule ``"dfa"``, its units under direct feedback alignment, see below.

    Each layer changes its class: the module, its parameters (bit for bit, but for signs="formula" below, and the same
    objects, so an optimizer goes on), hooks, device and dtype stay, as do shared modules and the ``state_dict``. A
    layer that is already converted changes its rule. The rest of the model (normalisation, attention's ``in_proj`` and
    ``out_proj``, other kinds of layers, subclasses) is left alone, and the printed summary says so.

    Args:
        model (nn.Module): the model, or a single layer.
        rule (str): ``"bp"`` (back to torch's own class), ``"fa"``, ``"usf"``, ``"frsf"``, ``"brsf"`` (add
            :func:`redraw_after`), ``"signed_init"`` (needs the option ``signs``: ``"formula"``, for a network not yet
            trained, changes the signs of the weights to those of F, a formula; ``"weight"`` leaves the weights as they
            are and stores their signs, one bit a weight), ``"dfa"``, ``"lls"``.
        last_layer (str): ``"bp"`` gives the last Linear or Conv2d of the model, in order of registration, its exact
            gradient (worth 1.4 points for sign-symmetry, 5.5 for FA on CIFAR-10, by the reproduction of Xiao et al.);
            ``"convert"`` takes it too. A single layer as model is converted in any case. A model with several
            outputs has several last layers: `exclude` the others.
        include, exclude: qualified names (``"backbone"``, with all that is in it), shell patterns of them
            (``"blocks.*.attn"``), module classes, functions ``(name, module) -> bool``, or a list of those. Default:
            all. A text or a class that matches no module is an error.
        seed (int): of the random values. A layer's stream is a hash of its qualified name (CRC-32).
        verbose (bool): print what was converted, what was left alone and why.
        **options: of the rule's class, e.g. ``scale``, ``law``, ``sign_zero``, ``packed_signs``, ``impl``, or for FA
            ``feedback_init``.

    **Direct feedback alignment.** ``convert(model, "dfa", units=..., path=..., output=..., init=..., law=...)``: the
    model's list of layers is cut into units, and in a plain ``loss.backward()`` the output h of each unit but the last
    receives :math:`e B` in place of its gradient, with e the gradient of the loss at the model's output, (B, C) or
    (B, T, C) for tokens; then the unit's own backward runs, and ends at its input. The first unit has what comes before
    the layers with it, the last what comes behind, and the true gradient. Where a forward drops layers, a unit ends
    with the last that runs. B is a formula: nothing is stored. Layers keep a feedback rule of their own.

    - units (int or list of ints): how many, or the layers at which units but the first begin. Default: each layer.
    - path (str, or several): the list of layers ("transformer.h"); by default the largest, or a Sequential's children.
    - output (str): the module whose output the error is taken at. Default: the head of a model of ``transformers``
      (which may compute its loss inside), else the model. Of several tensors e is that of the one named "logits", else
      of the first; the others keep their exact gradient, which ends in the last unit.
    - init, law, impl: of :class:`DirectFeedback`.

    **LLS.** ``convert(model, "lls", num_classes=..., pool_size=..., temperature=..., ...)`` returns an
    ``nn.Sequential`` of blocks for :class:`lgkernels.training.BlockwiseTrainer`, made of the model's own layers (which
    must be applied one after the other): :class:`LLSConvBlock` or :class:`LLSLinearBlock` of each layer with the norm,
    activation and 2x2 max-pool behind it, :class:`LLSHead` around a residual block, :class:`ClassifierBlock` of the
    last layer. Options are those of the blocks' heads; ``pool_size`` is that of the authors' tables by default: the
    largest power of two with at most 2,048 latents.

    Source: Nokland 2016; Launay, Poli, Boniface, Krzakala, "Direct feedback alignment scales to modern deep learning
    tasks and architectures", NeurIPS 2020.

    Returns:
        nn.Module: `model` itself; with "lls" its blocks.

    Raises:
        ValueError, TypeError: naming the argument; the model is then as before.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = lnn.convert(model, "usf", scale="xavier")
        usf: 1 layer converted
          0  SignSymmetricLinear(in_features=4, out_features=8, bias=True, rule='usf', scale='xavier')
        left alone
          2  Linear: the last layer (last_layer='bp')
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)]
        >>> model = lnn.convert(torch.nn.Sequential(*layers, torch.nn.Linear(8, 2)), "dfa", units=[2])
        dfa: 2 units, the error is that of the model's output
          0 to 1  init='nokland', law='uniform'
          2 to 4  its own gradient
        >>> torch.nn.functional.cross_entropy(model(torch.ones(3, 8)), torch.tensor([0, 1, 1])).backward()
    """
    constructors.module("model", model)
    checks.choice("rule", rule, ("bp", *FEEDBACK_RULES, "dfa", "lls"))
    checks.choice("last_layer", last_layer, ("bp", "convert"))
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    RandomFeedback(seed)  # checks it, also where nothing is converted
    checks.boolean("verbose", verbose)
    _check_options(rule, options)
    if rule in ("dfa", "lls"):
        if included is not None or excluded is not None or last_layer != "bp":
            raise ValueError(
                f"include, exclude and last_layer must be left out with rule={rule!r}, got one of them: it takes the "
                "model whole, and its last layer has its own gradient"
            )
        if rule == "dfa":
            said, result = direct_units.convert_units(model, seed, **options), model
        else:
            result = lls_convert.convert_lls(model, **options)
            said = lls_convert.summary(result)
        if verbose:
            print(said)
        return result
    pick = _Picks(model, included, excluded)
    if rule != "bp":
        _check_whole(model, pick, rule)
    layers = _choose(model, pick, spare_last=last_layer == "bp" and rule != "bp")
    pick.check(layers)
    if rule != "bp":
        _try(_RULES[rule], layers.chosen, seed, options)  # nothing has changed yet

    if rule == "bp" and included is None and excluded is None:
        direct_hooks.remove(model)
    for module in layers.back:
        _change(module, "bp", {})
    for name, module in layers.chosen:
        stream = zlib.crc32(name_without_wrappers(name, model).encode())
        _change(module, rule, dict(options, seed=seed, stream=stream))
    if rule != "bp":
        watch(model, layers.chosen)
    if verbose:
        print(_summary(rule, layers))
    elif rule != "bp" and not layers.chosen:
        warnings.warn(f"no layer is under rule={rule!r}: {_summary(rule, layers)}", stacklevel=2)
    return model


def _check_options(rule: str, options: dict[str, Any]) -> None:
    if rule == "bp":
        if options:
            raise TypeError(f"options must be empty with rule='bp', got {sorted(options)}")
        return
    whole = {"dfa": direct_units.OPTIONS, "lls": lls_convert.OPTIONS}
    known = whole[rule] if rule in whole else _RULES[rule].options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"options of rule={rule!r} must be among {', '.join(known)}, got "
            f"{', '.join(unknown)}: all else of a layer stays as it is, its stream is a hash of its name"
        )
    if rule == "signed_init" and options.get("signs") not in ("formula", "weight"):
        raise ValueError(
            "signs must be 'formula' (for a network not yet trained: its weights take the signs of a "
            "formula) or 'weight' (weights stay, their signs are kept in one bit each) with "
            f"rule='signed_init', got {options.get('signs')!r}"
        )


# -- which layers --------------------------------------------------------------------------------------------------


class _Layers(NamedTuple):
    """What becomes of a model's layers."""

    chosen: list[NamedModule]  # to change
    left: list[tuple[str, nn.Module, str]]  # left alone, and why
    back: list[nn.Module]  # left alone, but of an earlier convert: the last layer


def _choose(model: nn.Module, pick: "_Picks", spare_last: bool) -> _Layers:
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    modules = list(model.named_modules())
    convertible = [m for _, m in modules if _plain_class(m) and not _never_called(m, parents.get(m))]
    last = convertible[-1] if spare_last and convertible and convertible[-1] is not model else None
    unconvertible = {m for _, m in modules}.difference(convertible)
    layers = _Layers([], [], [])
    for name, module in modules:
        if module in unconvertible:
            _check_parametrised(name, module)
            reason = _why_not(module, parents.get(module))
            if reason is None:
                continue
        elif not pick.included(name, module):
            reason = "not in include"
        elif pick.excluded(name, module):
            reason = "in exclude"
        elif module is last:
            reason = "the last layer (last_layer='bp')"
            layers.back.extend([module] if isinstance(module, FeedbackLayer) else [])
        else:
            _check_forward(name, module)
            layers.chosen.append((name, module))
            continue
        layers.left.append((name, module, reason))
    return layers


def _check_whole(model: nn.Module, pick: "_Picks", rule: str) -> None:
    """A layer that `fully_shard` has taken is of a class of torch's, and would count as a subclass, left alone."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not pick.included(name, module):
            continue
        if pick.excluded(name, module):
            continue
        if is_sharded_module(module) or rule == "signed_init" and is_sharded(module.weight):
            raise ValueError(
                f"model must be converted before fully_shard shards its layers, got {name or 'it'!r}, a "
                f"{type(module).__name__}{'' if is_sharded_module(module) else ' of sharded weights'}: convert first, "
                "then fully_shard"
            )


def _check_forward(name: str, module: nn.Module) -> None:
    if "forward" in vars(module):
        raise ValueError(
            f"layer {name!r} has a forward of its own, set on the instance, that convert does not "
            "know: undo it first (fuse_update's by .remove(); convert, then fuse), or exclude it"
        )


def _check_parametrised(name: str, module: nn.Module) -> None:
    if isinstance(module, FeedbackLayer) and type(module) not in _PLAIN:
        raise ValueError(
            f"layer {name!r} must be of a class that convert knows, got {type(module).__name__}, a subclass of a "
            "feedback layer: take off its parametrizations first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """nn.Linear or nn.Conv2d where convert can handle `module`, else None. Subclasses may do anything: left alone."""
    return type(module) if type(module) in (nn.Linear, nn.Conv2d) else _PLAIN.get(type(module))


def _never_called(module: nn.Module, parent: nn.Module | None) -> bool:
    """torchvision's Swin transformers multiply by the weights of two layers themselves, timm's BEiT, EVA-02 and Swin V2
    by that of qkv, to which they give a bias of their own; so may any parent."""
    if parent is None:
        return False
    if type(parent).__name__.startswith("ShiftedWindowAttention"):
        return module in (parent.qkv, parent.proj)
    child = next((name for name, m in parent._modules.items() if m is module), None)
    if child is not None and weight_alone_is_read(parent, child):
        return True
    return getattr(parent, "q_bias", None) is not None and module is getattr(parent, "qkv", None)


def _why_not(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module with a weight of its own, other than normalisation, stays as it is; None if it is of no interest."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention's in_proj is a bare parameter, read inside torch's fused function"
    if isinstance(parent, nn.MultiheadAttention) and isinstance(module, nn.Linear):
        return "attention's out_proj: its forward is never called, torch's fused function reads its weight"
    if _never_called(module, parent):
        return f"its forward is never called, {type(parent).__name__} reads its weight"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
            return "not yet initialised: run a batch through the model first"
        return f"a subclass of nn.{'Linear' if isinstance(module, nn.Linear) else 'Conv2d'} with its own behaviour"
    if type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "weight"):
        return "quantised: it has no gradient"
    matrices = [p for name, p in module.named_parameters(recurse=False) if name.startswith("weight") and p.dim() >= 2]
    return "no feedback rule for this kind of layer" if matrices else None


def _patterns(argument: str, value: Patterns | None) -> tuple[Pattern, ...] | None:
    """The argument as a tuple."""
    if value is None:
        return None
    patterns: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple, set)) else (value,)
    for pattern in patterns:
        if not isinstance(pattern, (str, type)) and not callable(pattern):
            raise TypeError(
                f"{argument} must hold name patterns, module classes or functions (name, module) -> bool, "
                f"got {type(pattern).__name__}"
            )
    return patterns


class _Picks:
    """What `include` and `exclude` pick. Every text and every class of theirs has to pick a module."""

    def __init__(self, model: nn.Module, include: tuple[Pattern, ...] | None, exclude: tuple[Pattern, ...] | None):
        modules = dict(model.named_modules(remove_duplicate=False))
        self.include, self.exclude = include, exclude
        self.found: dict[str, set[str]] = {}
        for argument, patterns in (("include", include), ("exclude", exclude)):
            for pattern in patterns or ():
                if isinstance(pattern, str):
                    self.found[pattern] = names.by_pattern(pattern, modules)
                    if not self.found[pattern]:
                        raise names.unmatched(argument, pattern, modules)
                elif isinstance(pattern, type) and not any(isinstance(m, pattern) for m in modules.values()):
                    kinds = sorted({type(m).__name__ for m in modules.values()})
                    raise ValueError(
                        f"{argument} must hold classes of modules of the model ({', '.join(kinds[:8])}), got "
                        f"{pattern.__name__}, of which it has none"
                    )

    def _matches(self, patterns: tuple[Pattern, ...], name: str, module: nn.Module) -> bool:
        for pattern in patterns:
            if isinstance(pattern, str):
                matches = name in self.found[pattern]
            else:
                matches = isinstance(module, pattern) if isinstance(pattern, type) else pattern(name, module)
            if matches:
                return True
        return False

    def included(self, name: str, module: nn.Module) -> bool:
        return self.include is None or self._matches(self.include, name, module)

    def excluded(self, name: str, module: nn.Module) -> bool:
        return self.exclude is not None and self._matches(self.exclude, name, module)

    def check(self, layers: _Layers) -> None:
        """`include` picks at least one layer that could change."""
        if self.include and not layers.chosen and all(reason == "not in include" for *_, reason in layers.left):
            could = ", ".join(name for name, _, _ in layers.left) or "none"
            raise ValueError(f"include must pick a layer that convert can change ({could}), got none of them")


# -- trying and changing -------------------------------------------------------------------------------------------


def _try(rule: _Rule, chosen: list[NamedModule], seed: int, options: dict[str, Any]) -> None:
    """Build layers of one weight with the options: what is wrong with them raises before the model changes."""
    options = {name: value for name, value in options.items() if name != "signs"}  # no constructor's
    classes = {_plain_class(module) for _, module in chosen}
    for plain, sizes in ((nn.Linear, (1, 1)), (nn.Conv2d, (1, 1, 1))):
        if plain in classes:
            rule.layers[plain](*sizes, **rule.arguments, **options, seed=seed, device="cpu")


def _change(module: Any, rule: str, settings: dict[str, Any]) -> None:
    plain: Any = _plain_class(module)
    if isinstance(module, FeedbackLayer):
        module.clear_rule()
    if rule == "bp":
        module.__class__ = plain
    else:
        module.__class__ = _RULES[rule].layers[plain]
        module._set_rule(**settings, **_RULES[rule].arguments)


def _summary(rule: str, layers: _Layers) -> str:
    chosen, left = layers.chosen, layers.left
    lines = [f"{rule}: {len(chosen)} layer{'' if len(chosen) == 1 else 's'} converted"]
    if rule == "brsf":
        lines[0] += ", redrawn by lgkernels.nn.redraw_after(optimizer, model)"
    lines += [f"  {name or '(model)'}  {type(module).__name__}({module.extra_repr()})" for name, module in chosen]
    if left:
        lines += ["left alone"] + [
            f"  {name or '(model)'}  {type(module).__name__}: {reason}" for name, module, reason in left
        ]
    return "\n".join(lines)
