"""The random feedback of a model: as data for a checkpoint, and drawn anew after each step for brSF."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core import checks, constructors
from ..random import LAW_VERSION, RandomFeedback
from .feedback_layer import FeedbackLayer

__all__ = ["feedback_state", "load_feedback_state", "redraw_after"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def name_without_wrappers(name: str, root: nn.Module) -> str:
    """A layer's name without the parts that wrappers add: it draws the same numbers inside a wrapper and outside."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    wrapped = isinstance(root, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return ".".join(parts[1:] if wrapped and parts[:1] == ["module"] else parts)


def _holders(model: nn.Module) -> dict[str, Any]:
    """{name: module} of everything in the model that has feedback of its own to remember."""
    constructors.module("model", model)
    return {
        name_without_wrappers(name, model): module
        for name, module in model.named_modules()
        if isinstance(module, RandomFeedback) or getattr(module, "frozen_signs", None) is not None
    }


def feedback_state(model: nn.Module) -> dict[str, Any]:
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
    feedback: dict[str, dict[str, Any]] = {}
    for name, holder in _holders(model).items():
        if isinstance(holder, RandomFeedback):
            seed, stream, step = holder.verified().tolist()
            feedback[name] = dict(
                seed=seed, stream=stream, step=step, law=holder.law, scale=holder.scale, low=holder.low
            )
        else:
            feedback[name] = {"frozen_signs": holder.frozen_signs.cpu().clone()}
    return {"law_version": LAW_VERSION, "feedback": feedback}


def load_feedback_state(model: nn.Module, state: dict[str, Any] | None) -> None:
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
        got = f"a dict of {list(state)}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must be a dict from feedback_state, got {got}")
    saved = state["feedback"]
    if not isinstance(saved, dict) or not all(isinstance(entry, dict) for entry in saved.values()):
        raise TypeError("state must hold a dict of dicts under 'feedback', got something else")
    # version 1 rounded values with a `low` other than 0 twice, and is the same but for those
    same = state["law_version"] == 1 and not any(entry.get("low") for entry in saved.values())
    if state["law_version"] != LAW_VERSION and not same:
        raise ValueError(
            f"state must have law version {LAW_VERSION}, got {state['law_version']}: its random matrices "
            "are made by another formula"
        )
    if set(saved) != set(holders):
        raise ValueError(
            f"state must have the model's feedbacks; only in state: {sorted(set(saved) - set(holders))}, "
            f"only in the model: {sorted(set(holders) - set(saved))}"
        )
    for name, holder in holders.items():
        _check_saved(name, holder, saved[name])
    for name, holder in holders.items():
        got = saved[name]
        if isinstance(holder, RandomFeedback):
            holder.set_state(got["seed"], got["stream"], got["step"])
        else:
            holder.frozen_signs = got["frozen_signs"].to(holder.weight.device, copy=True)  # may be on the meta device


def _check_saved(name: str, holder: Any, got: dict[str, Any]) -> None:
    expected = _kind(holder)
    differing = [key for key in expected if key not in got or _value(got[key]) != _value(expected[key])]
    if differing:
        raise ValueError(
            f"state must have the model's feedback at {name!r}, got {differing[0]}="
            f"{_value(got.get(differing[0]))}, the model has {_value(expected[differing[0]])}"
        )
    needed = ("seed", "stream", "step") if isinstance(holder, RandomFeedback) else ("frozen_signs",)
    if missing := [key for key in needed if key not in got]:
        raise ValueError(f"state must have {', '.join(needed)} at {name!r}, got none of {', '.join(missing)}")
    if isinstance(holder, RandomFeedback):
        for key in needed:  # before any state changes
            checks.integer_between(f"state at {name!r}: {key}", got[key], -(2**63), 2**63)


def _kind(holder: Any) -> dict[str, Any]:
    """What a saved feedback must agree with."""
    if isinstance(holder, RandomFeedback):
        return dict(law=holder.law, scale=holder.scale, low=holder.low)
    return {"frozen_signs": holder.frozen_signs}


def _value(saved: Any) -> Any:
    """What of a saved entry is compared: of signs the shape."""
    return tuple(saved.shape) if isinstance(saved, torch.Tensor) else saved


def redraw_after(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
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
    constructors.optimizer("optimizer", optimizer)
    constructors.module("model", model)
    layers = [m for m in model.modules() if isinstance(m, FeedbackLayer) and m.rule == "brsf"]
    if not layers:
        raise ValueError("model must have layers with rule 'brsf', got none: convert(model, 'brsf') first")

    def redraw(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # a GradScaler's, where the optimizer's kernel skips the step
        for layer in layers:
            # it may have been converted again since
            if isinstance(layer, FeedbackLayer) and layer.rule == "brsf" and layer.feedback is not None:
                layer.feedback.advance(skipped)

    return optimizer.register_step_post_hook(redraw)
