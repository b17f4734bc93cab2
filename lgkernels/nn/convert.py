"""Whole models under another feedback rule and back; their random state as data; brSF's redraw."""

import fnmatch
import zlib

import torch
from torch import nn

from ..core import checks
from ..random import LAW_VERSION, RandomFeedback
from .feedback import (
    FeedbackAlignmentConv2d,
    FeedbackAlignmentLinear,
    SignSymmetricConv2d,
    SignSymmetricLinear,
    _FeedbackLayer,
)

RULES = ("bp", "fa", "usf", "frsf", "brsf", "signed_init")
_CLASSES = {"fa": {nn.Linear: FeedbackAlignmentLinear, nn.Conv2d: FeedbackAlignmentConv2d}}
_CLASSES.update({rule: {nn.Linear: SignSymmetricLinear, nn.Conv2d: SignSymmetricConv2d} for rule in RULES[2:]})
_OPTIONS = dict.fromkeys(RULES[2:], ("scale", "law", "sign_zero", "packed_signs", "impl"))
_OPTIONS["signed_init"] += ("signs",)
_OPTIONS["fa"] = ("feedback_init", "law", "impl")
_PLAIN = {layer: plain for classes in _CLASSES.values() for plain, layer in classes.items()}
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _plain_class(module):
    """nn.Linear or nn.Conv2d where convert can handle `module`, else None. Subclasses may do anything: left alone."""
    return type(module) if type(module) in (nn.Linear, nn.Conv2d) else _PLAIN.get(type(module))


def _name(name, root):
    """A layer's name without the parts that wrappers add, so that it draws the same numbers inside and outside."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    wrapped = isinstance(root, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return ".".join(parts[1:] if wrapped and parts[:1] == ["module"] else parts)


def _matches(patterns, name, module):
    return any(
        isinstance(module, p)
        if isinstance(p, type)
        else fnmatch.fnmatchcase(name, p)
        if isinstance(p, str)
        else p(name, module)
        for p in patterns
    )


def _patterns(argument, patterns):
    if patterns is None:
        return None
    patterns = tuple(patterns) if isinstance(patterns, (list, tuple, set)) else (patterns,)
    for p in patterns:
        if not isinstance(p, (str, type)) and not callable(p):
            raise TypeError(
                f"{argument} must hold name patterns, module classes or functions (name, module) -> bool, "
                f"got {type(p).__name__}"
            )
    return patterns


def _never_called(module, parent):
    """torchvision's Swin transformers multiply by the weights of two layers themselves, timm's BEiT, EVA-02 and Swin V2
    by that of qkv, to which they give a bias of their own."""
    if type(parent).__name__.startswith("ShiftedWindowAttention"):
        return module in (parent.qkv, parent.proj)
    return getattr(parent, "q_bias", None) is not None and module is getattr(parent, "qkv", None)


def _why_not(module, parent):
    """Why a module with a weight of its own, other than normalisation, stays as it is; None if it is of no interest."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention's in_proj is a bare parameter, read inside torch's fused function"
    if isinstance(parent, nn.MultiheadAttention) and isinstance(module, nn.Linear):
        return "attention's out_proj: its forward is never called, torch's fused function reads its weight"
    if _never_called(module, parent):
        return "its forward is never called, this attention reads its weight"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
            return "not yet initialised: run a batch through the model first"
        return f"a subclass of nn.{'Linear' if isinstance(module, nn.Linear) else 'Conv2d'} with its own behaviour"
    if type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "weight"):
        return "quantised: it has no gradient"
    matrices = [p for name, p in module.named_parameters(recurse=False) if name.startswith("weight") and p.dim() >= 2]
    return "no feedback rule for this kind of layer" if matrices else None


def convert(model, rule, *, last_layer="bp", include=None, exclude=None, seed=0, verbose=True, **options):
    """Put every ``nn.Linear`` and ``nn.Conv2d`` of a model under a feedback rule, in place, and back.

    Each layer changes its class: the module, its parameters (bit for bit, but for signs="formula" below, and the same
    objects, so an optimizer goes on), hooks, device and dtype stay, as do shared modules and the ``state_dict``. A
    layer that is already converted changes its rule. The rest of the model (normalisation, attention's ``in_proj`` and
    ``out_proj``, other kinds of layers, subclasses) is left alone, and the printed summary says so.

    Args:
        model (nn.Module): the model, or a single layer.
        rule (str): ``"bp"`` (back to torch's own class), ``"fa"``, ``"usf"``, ``"frsf"``, ``"brsf"`` (add
            :func:`redraw_after`), ``"signed_init"`` (needs the option ``signs``: ``"formula"``, for a network not yet
            trained, changes the signs of the weights to those of F, a formula; ``"weight"`` leaves the weights as they
            are and stores their signs, one bit a weight).
        last_layer (str): ``"bp"`` gives the last Linear or Conv2d of the model, in order of registration, its exact
            gradient (worth 1.4 points for sign-symmetry, 5.5 for FA on CIFAR-10, by the reproduction of Xiao et al.);
            ``"convert"`` takes it too. A single layer as model is converted in any case. A model with several
            outputs has several last layers: `exclude` the others.
        include, exclude: shell patterns of qualified names (``"backbone.*"``), module classes, functions
            ``(name, module) -> bool``, or a list of those. Default: all.
        seed (int): of the random values. A layer's stream is a hash of its qualified name (CRC-32).
        verbose (bool): print what was converted, what was left alone and why.
        **options: of the rule's class, e.g. ``scale``, ``law``, ``sign_zero``, ``packed_signs``, ``impl``, or for FA
            ``feedback_init``.

    Returns:
        nn.Module: `model` itself.

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
    """
    checks.choice("rule", rule, RULES)
    checks.choice("last_layer", last_layer, ("bp", "convert"))
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if rule == "bp" and options:
        raise TypeError(f"options must be empty with rule='bp', got {sorted(options)}")
    unknown = sorted(set(options) - set(_OPTIONS.get(rule, options)))
    if unknown:
        raise TypeError(
            f"options of rule={rule!r} must be among {', '.join(_OPTIONS[rule])}, got "
            f"{', '.join(unknown)}: all else of a layer stays as it is, its stream is a hash of its name"
        )
    if rule == "signed_init" and options.get("signs") not in ("formula", "weight"):
        raise ValueError(
            "signs must be 'formula' (for a network not yet trained: its weights take the signs of a "
            "formula) or 'weight' (weights stay, their signs are kept in one bit each) with "
            f"rule='signed_init', got {options.get('signs')!r}"
        )
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if _plain_class(module) and not _never_called(module, parents.get(module))
    ]
    last = layers[-1][1] if layers and last_layer == "bp" and rule != "bp" and layers[-1][1] is not model else None
    chosen, left, back = [], [], []
    for name, module in model.named_modules():
        reason = None
        if _plain_class(module) is None or _never_called(module, parents.get(module)):
            reason = _why_not(module, parents.get(module))
        elif include is not None and not _matches(include, name, module):
            reason = "not in include"
        elif exclude is not None and _matches(exclude, name, module):
            reason = "in exclude"
        elif module is last:
            reason = "the last layer (last_layer='bp')"
            back = [module] if isinstance(module, _FeedbackLayer) else []  # of an earlier convert
        else:
            chosen.append((name, module))
        if reason is not None:
            left.append((name, module, reason))
        elif "forward" in vars(module) and _plain_class(module):
            raise ValueError(
                f"layer {name!r} has a forward of its own, set on the instance, that convert does not "
                "know: undo it first (fuse_update's by .remove(); convert, then fuse), or exclude it"
            )
    _try(rule, chosen, seed, options)
    for module in back:
        _change(module, "bp", {})
    for name, module in chosen:
        _change(module, rule, dict(options, seed=seed, stream=zlib.crc32(_name(name, model).encode())))
    if verbose:
        print(_summary(rule, chosen, left))
    return model


def _try(rule, chosen, seed, options):
    """The options on one-weight layers first: an error leaves the model as it was."""
    options = {name: value for name, value in options.items() if name != "signs"}
    options.update(seed=seed, device="cpu", **({} if rule == "fa" else {"rule": rule}))
    for plain, build in (
        (nn.Linear, lambda layer: layer(1, 1, **options)),
        (nn.Conv2d, lambda layer: layer(1, 1, 1, **options)),
    ):
        if rule != "bp" and any(_plain_class(module) is plain for _, module in chosen):
            build(_CLASSES[rule][plain])


def _change(module, rule, settings):
    plain = _plain_class(module)
    if isinstance(module, _FeedbackLayer):
        module.clear_rule()
    module.__class__ = plain if rule == "bp" else _CLASSES[rule][plain]
    if rule != "bp":
        module._set_rule(**settings, **({} if rule == "fa" else {"rule": rule}))


def _summary(rule, chosen, left):
    lines = [f"{rule}: {len(chosen)} layer{'' if len(chosen) == 1 else 's'} converted"]
    if rule == "brsf":
        lines[0] += ", redrawn by lgkernels.nn.redraw_after(optimizer, model)"
    lines += [f"  {name or '(model)'}  {type(module).__name__}({module.extra_repr()})" for name, module in chosen]
    if left:
        lines += ["left alone"] + [
            f"  {name or '(model)'}  {type(module).__name__}: {reason}" for name, module, reason in left
        ]
    return "\n".join(lines)


# -- random state -----------------------------------------------------------------------------------------------


def _holders(model):
    """(name, module) of everything in the model that has feedback of its own to remember."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {
        _name(name, model): module
        for name, module in model.named_modules()
        if isinstance(module, RandomFeedback) or getattr(module, "frozen_signs", None) is not None
    }


def feedback_state(model):
    """What a checkpoint needs beside the ``state_dict``: law version, and seed, stream, step and law of every
    :class:`lgkernels.random.RandomFeedback` in the model (the frozen signs of
    "signed_init" with signs="weight" as they are).

    Returns:
        dict: of plain Python values (and int32 tensors for those signs), for ``torch.save``.

    Example:
        >>> import lgkernels.nn as lnn
        >>> layer = lnn.FeedbackAlignmentLinear(3, 2, seed=5)
        >>> lnn.feedback_state(layer)["feedback"]["feedback"]["seed"]
        5
    """
    feedback = {}
    for name, holder in _holders(model).items():
        if isinstance(holder, RandomFeedback):
            seed, stream, step = holder.state.tolist()
            feedback[name] = dict(
                seed=seed, stream=stream, step=step, law=holder.law, scale=holder.scale, low=holder.low
            )
        else:
            feedback[name] = {"frozen_signs": holder.frozen_signs.cpu().clone()}
    return {"law_version": LAW_VERSION, "feedback": feedback}


def load_feedback_state(model, state):
    """Continue with the feedback of `state` (:func:`feedback_state`), on the model's devices.

    Raises:
        ValueError: if `state` is None or of another law version, or if the model's feedback differs from it in names,
            laws or shapes. The model is then as before.

    Example:
        >>> import lgkernels.nn as lnn
        >>> layer = lnn.FeedbackAlignmentLinear(3, 2)
        >>> lnn.load_feedback_state(layer, lnn.feedback_state(lnn.FeedbackAlignmentLinear(3, 2, seed=5)))
        >>> layer.feedback.state
        tensor([5, 0, 0])
    """
    holders = _holders(model)
    if state is None:
        raise ValueError(
            f"state must be a dict from feedback_state, got None: resumed without it, the {len(holders)} "
            "random feedbacks of this model would be others than those it was trained with"
        )
    if not isinstance(state, dict) or set(state) != {"law_version", "feedback"}:
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must be a dict from feedback_state, got {got}")
    if state["law_version"] != LAW_VERSION:
        raise ValueError(
            f"state must have law version {LAW_VERSION}, got {state['law_version']}: its random matrices "
            "are made by another formula"
        )
    saved = state["feedback"]
    if set(saved) != set(holders):
        raise ValueError(
            f"state must have the model's feedbacks; only in state: {sorted(set(saved) - set(holders))}, "
            f"only in the model: {sorted(set(holders) - set(saved))}"
        )
    for name, holder in holders.items():
        expected, got = (_kind(holder), saved[name])
        differing = [key for key in expected if key not in got or _value(got[key]) != _value(expected[key])]
        if differing:
            raise ValueError(
                f"state must have the model's feedback at {name!r}, got {differing[0]}="
                f"{_value(got.get(differing[0]))}, the model has {_value(expected[differing[0]])}"
            )
        needed = ("seed", "stream", "step") if isinstance(holder, RandomFeedback) else ("frozen_signs",)
        if missing := [key for key in needed if key not in got]:
            raise ValueError(f"state must have {', '.join(needed)} at {name!r}, got none of {', '.join(missing)}")
    for name, holder in holders.items():
        got = saved[name]
        if isinstance(holder, RandomFeedback):
            holder.set_state(got["seed"], got["stream"], got["step"])
        else:
            holder.frozen_signs.copy_(got["frozen_signs"])


def _kind(holder):
    """What a saved feedback must agree with."""
    if isinstance(holder, RandomFeedback):
        return dict(law=holder.law, scale=holder.scale, low=holder.low)
    return {"frozen_signs": holder.frozen_signs}


def _value(saved):
    """What of a saved entry is compared: of signs the shape."""
    return tuple(saved.shape) if isinstance(saved, torch.Tensor) else saved


# -- brSF ---------------------------------------------------------------------------------------------------------


def redraw_after(optimizer, model):
    """brSF: draw new magnitudes for the model's "brsf" layers after every step of `optimizer`.

    The step of each layer's random state is advanced on its device by a post-step hook, so accumulated gradients,
    repeated forwards and evaluation all see the F of their time, a GradScaler's skipped step draws nothing, and a
    replayed CUDA graph that holds the step draws too. Do it after converting; a backward must come before the step
    that follows its forward (autograd raises otherwise).

    Args:
        optimizer (torch.optim.Optimizer): one optimizer, the one that steps with every update.
        model (nn.Module): holds layers with rule "brsf".

    Returns:
        torch.utils.hooks.RemovableHandle: ``.remove()`` ends it.

    Raises:
        ValueError: if the model has no such layer. TypeError: if `optimizer` is none.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.SignSymmetricLinear(3, 2, rule="brsf")
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = lnn.redraw_after(optimizer, layer)
        >>> layer(torch.ones(1, 3)).sum().backward(); optimizer.step()
        >>> layer.feedback.state
        tensor([0, 0, 1])
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    layers = [m for m in model.modules() if isinstance(m, _FeedbackLayer) and m.rule == "brsf"]
    if not layers:
        raise ValueError("model must have layers with rule 'brsf', got none: convert(model, 'brsf') first")

    def redraw(optimizer, *_):
        skipped = getattr(optimizer, "found_inf", None)  # a GradScaler's, where the optimizer's kernel skips the step
        for layer in layers:
            if isinstance(layer, _FeedbackLayer) and layer.rule == "brsf":  # not converted again since
                layer.feedback.advance(skipped)

    return optimizer.register_step_post_hook(redraw)
