"""Which optimizers the fused step knows, and their step at the moment as numbers of the kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..ops.fused_update.options import UpdateRule
from . import fused_states
from .manhattan import BatchManhattan

_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raises for an optimizer, or an option of one, that has no fused step."""
    if type(optimizer) not in (torch.optim.SGD, *_ADAM) and not isinstance(optimizer, BatchManhattan):
        raise TypeError(
            "optimizer must be torch.optim.SGD, Adam, AdamW or lgkernels.optim.BatchManhattan, got "
            f"{type(optimizer).__name__}"
        )
    for option, why in (
        ("no_sign_change", "the fused pass does not hold signs"),
        ("differentiable", "the fused pass has no graph"),
        ("amsgrad", "the fused pass keeps no maximum of exp_avg_sq"),
        ("capturable", "the fused pass reads the number of the step on the host"),
    ):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"optimizer must not have {option}=True: {why}")


def check_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: Tensor, name: str, bits: int = 32
) -> None:
    """Raises where the weight of layer `name` has states that its next step cannot go on from."""
    state = optimizer.state.get(weight) or {}
    if type(optimizer) in _ADAM:
        keys: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq") if state else ()
    else:
        there = state.get("momentum_buffer") is not None or fused_states.is_held(state, "momentum_buffer")
        keys = ("momentum_buffer",) if float(group["momentum"]) and there else ()
    for key in keys:
        if fused_states.is_held(state, key):
            expected = fused_states.misfit(state, key, weight)
            if bits != 8:
                raise RuntimeError(
                    f"optimizer.state of the weight of layer {name!r} holds {key!r} in 8 bits: undo fuse_update with "
                    ".remove() and call fuse_update(..., state_bits=8), whose .remove() makes full states of them"
                )
            if expected is not None:
                raise RuntimeError(
                    f"optimizer.state of the weight of layer {name!r} must have {expected}: load the state of the same "
                    "model, or drop it with optimizer.state.pop(weight)"
                )
            continue
        value = state.get(key)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point():
            if value.numel() == 1 if key == "step" else _alike(value, weight):
                continue
        expected = "one number" if key == "step" else _described(weight)
        got = _described(value) if isinstance(value, Tensor) else "none" if value is None else checks.got(value)
        raise RuntimeError(
            f"optimizer.state of the weight of layer {name!r} must have {key!r}, a tensor of {expected}, got {got}: "
            "load the state of the same model, or drop it with optimizer.state.pop(weight)"
        )


def _alike(state: Tensor, weight: Tensor) -> bool:
    fits = weight.dtype != torch.float64 or state.dtype == torch.float64
    return state.shape == weight.shape and state.device == weight.device and fits


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {str(tensor.dtype)[6:]} on {tensor.device}"


def next_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: Tensor, counted: dict[str, Any], bits: int = 32
) -> tuple[list[Tensor | None], UpdateRule]:
    """The weight's states and the rule of its next step. The states are made where there are none, as the optimizer
    would, and its count of steps goes on. `counted` is the caller's, for what the count was.

    They are [first, second], in the weight's dtype, or of 8 bits [codes and absmax of first, of second]; None for each
    that the rule does not have.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    if type(optimizer) in _ADAM:
        group = {"decoupled_weight_decay": isinstance(optimizer, torch.optim.AdamW), **group}
        return _adam(group, optimizer.state[weight], weight, sign, counted, bits)
    momentum, fresh = float(group["momentum"]), 1.0 - float(group.get("dampening", 0.0))
    states: list[Tensor | None] = [None, None]
    if momentum:  # else the optimizer has no entry for the weight
        state = optimizer.state[weight]
        known = fused_states.is_held(state, "momentum_buffer") or state.get("momentum_buffer") is not None
        fresh = fresh if known else 1.0  # the first step: m = g
        if bits == 8:
            states = [*fused_states.hold(state, "momentum_buffer", weight), None, None]
        else:
            if not known:
                state["momentum_buffer"] = torch.zeros_like(weight)
            states = [state["momentum_buffer"], None]
    rule = UpdateRule(
        "manhattan" if isinstance(optimizer, BatchManhattan) else "sgd",
        float(group["lr"]),
        momentum,
        fresh,
        float(group["weight_decay"]),
        nesterov=bool(group.get("nesterov", False)),
        grad_scale=sign,
    )
    return states, rule


def _next_count(step: Tensor, counted: dict[str, Any]) -> float:
    """step + 1, in place. On another device (fused=True) it is read once, and while nobody else writes to it."""
    step += 1
    if step.device.type == "cpu":
        return float(step)
    tensor, version, value = counted.get("step", (None, 0, 0.0))
    known = tensor is step and version == step._version - 1
    counted["step"] = step, step._version, value + 1.0 if known else float(step)
    return counted["step"][2]


def _adam(
    group: dict[str, Any], state: dict[str, Any], weight: Tensor, sign: float, counted: dict[str, Any], bits: int
) -> tuple[list[Tensor | None], UpdateRule]:
    if not state:
        fused = group.get("fused")
        wide = torch.get_default_dtype() == torch.float64 and not fused
        dtype, device = torch.float64 if wide else torch.float32, weight.device if fused else "cpu"
        state["step"] = torch.zeros((), dtype=dtype, device=device)
        for key in ("exp_avg", "exp_avg_sq") if bits != 8 else ():
            state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    step, lr, decay = _next_count(state["step"], counted), float(group["lr"]), float(group["weight_decay"])
    (beta1, beta2), decoupled = map(float, group["betas"]), group["decoupled_weight_decay"]
    rule = UpdateRule(
        "adam",
        lr / (1.0 - beta1**step),
        beta1,
        1.0 - beta1,
        0.0 if decoupled else decay,
        keep=1.0 - lr * decay if decoupled else 1.0,
        beta2=beta2,
        eps=float(group["eps"]),
        root=math.sqrt(1.0 - beta2**step),
        grad_scale=sign,
    )
    if bits == 8:
        return [*fused_states.hold(state, "exp_avg", weight), *fused_states.hold(state, "exp_avg_sq", weight)], rule
    return [state["exp_avg"], state["exp_avg_sq"]], rule
