"""The fused step's states of 8 bits where they lie: in the optimizer's `state`, beside its own entries.

In place of the entry `exp_avg`, `exp_avg_sq` or `momentum_buffer`, a tensor like the weight, there are two: its name
with `_codes` (uint8, the weight as a matrix (N, K)) and with `_absmax` (float32, (N, ceil(K / 256))), as
ops/fused_update/blocks.py defines them. The names differ, so that nobody takes codes for values.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.fused_update.blocks import blocks_of, decoded, encoded

CODES, ABSMAX = "_codes", "_absmax"
_KEYS = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}  # signed or not


def is_held(state: dict[str, Any], key: str) -> bool:
    return key + CODES in state


def hold(state: dict[str, Any], key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of the state `key`: zeros where there was none; one in full precision is rounded to them."""
    if not is_held(state, key):
        rows, columns = weight.flatten(1).shape
        full = state.pop(key, None)
        if full is None:
            codes = torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
            absmax = torch.zeros(rows, blocks_of(columns), device=weight.device, dtype=torch.float32)
        else:
            codes, absmax = encoded(full.flatten(1), _KEYS[key])
        state[key + CODES], state[key + ABSMAX] = codes, absmax
    return state[key + CODES], state[key + ABSMAX]


@torch.no_grad()
def release(state: dict[str, Any], weight: Tensor) -> None:
    """The plain optimizer's entries in place of codes, in the weight's dtype."""
    for key, signed in _KEYS.items():
        if is_held(state, key):
            values = decoded(state.pop(key + CODES), state.pop(key + ABSMAX), signed)
            state[key] = values.to(weight.dtype).view_as(weight)


def misfit(state: dict[str, Any], key: str, weight: Tensor) -> str | None:
    """What the entries of `key` should be, where they are something else."""
    rows, columns = weight.flatten(1).shape
    for name, dtype, shape in (
        (key + CODES, torch.uint8, (rows, columns)),
        (key + ABSMAX, torch.float32, (rows, blocks_of(columns))),
    ):
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape, tensor.device) != (
            dtype,
            shape,
            weight.device,
        ):
            return f"{name!r}, a tensor of shape {shape}, {str(dtype)[6:]} on {weight.device}"
    return None


# -- load_state_dict, which converts every tensor to the parameter's dtype --------------------------------------------


class _Kept:
    """A tensor that load_state_dict leaves as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _is_of_codes(name: Any, value: Any) -> bool:
    return isinstance(value, Tensor) and any(name in (key + CODES, key + ABSMAX) for key in _KEYS)


def before_load(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    states = {
        place: {name: _Kept(value) if _is_of_codes(name, value) else value for name, value in state.items()}
        if isinstance(state, dict)
        else state
        for place, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def after_load(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Kept):
                state[name] = value.tensor.to(parameter.device, copy=True)


def restore(state: dict[str, Any], weight: Tensor, layer: str) -> None:
    """Codes that were loaded before there was a fuse_update, and so in the weight's dtype, are codes again."""
    names = [key + ending for key in _KEYS for ending in (CODES, ABSMAX) if key + ending in state]
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if half and any(name.endswith(ABSMAX) and state[name].dtype == weight.dtype for name in names):
        raise ValueError(
            f"optimizer.state of the weight of layer {layer!r} holds 8-bit states that load_state_dict has rounded to "
            f"{str(weight.dtype)[6:]}: call fuse_update(..., state_bits=8) first and load the state after it"
        )
    for name in names:
        state[name] = state[name].to(torch.uint8 if name.endswith(CODES) else torch.float32)
