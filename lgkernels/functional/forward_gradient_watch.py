"""What forward mode would miss in silence, and what to say of an op that has no forward-mode derivative."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

__all__ = ["Watch", "no_forward_mode", "tensors"]

_WAYS_OUT = (  # what to do, by a part of the op's name
    (
        "attention",
        "run it with torch's math kernel, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which "
        "forward_gradient does where the module does not choose another itself",
    ),
    (
        "rnn",
        "unroll torch.nn.LSTMCell, GRUCell or RNNCell, or switch the fused kernels off around the module's call: "
        "torch.backends.mkldnn.flags(enabled=False) on CPU, torch.backends.cudnn.flags(enabled=False) on CUDA",
    ),
)
_OF_A_RULE = "its gradient is a rule of its own: train it by loss.backward(), or take torch's layer here"
_OTHERWISE = "write it in torch's ops that have one, or as an autograd.Function with a jvp"
_STOPS = (Tensor.detach, vars(torch._C.TensorBase)["data"].__get__, vars(torch._C.TensorBase)["grad"].__get__)
_OF_TORCH = ("aten", "prim", "prims")


class _NoForwardMode(NotImplementedError):
    """An op without a forward-mode derivative, by its name."""


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(tuple(values.values()))


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


class Watch(TorchFunctionMode):
    """Sees torch's functions be called: collects the parameters that are used outside of their layer, where the noise
    at its output does not speak for them, and refuses ops that drop tangents in silence, as those of torch.library do.

    names: of layers' parameters, by id. running: those of the layer that runs."""

    def __init__(self, names: Mapping[int, str], running: set[str]) -> None:
        super().__init__()
        self.names, self.running = names, running
        self.outside: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = {self.names[id(t)] for t in tensors((args, kwargs)) if id(t) in self.names}
        if used and func not in _STOPS and any(True for _ in tensors(result)):
            self.outside |= used - self.running
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            name = str(func)
            floating = [t for t in tensors(result) if t.is_floating_point()]
            if name.partition(".")[0] not in _OF_TORCH and floating and not any(map(_has_tangent, floating)):
                if any(map(_has_tangent, tensors((args, kwargs)))):
                    raise _NoForwardMode(name)
        return result


def no_forward_mode(error: Exception, modules: Mapping[nn.Module, str]) -> NotImplementedError | None:
    """For an error that says so: which op, in which of the modules, and what to do."""
    op, where = str(error), "function"
    if not isinstance(error, _NoForwardMode):
        if not re.search(r"forward (mode )?AD|\bjvp\b", op):
            return None
        found = re.search(r"forward AD with (?:aten::)?(\w+)", op)
        op = found[1] if found else "an op"
    ours, public, trace = op.startswith("lgkernels."), "", error.__traceback__
    while trace is not None:
        code, known, local = trace.tb_frame.f_code.co_name, trace.tb_frame.f_globals, trace.tb_frame.f_locals
        owner, function = local.get("self"), local.get("cls")
        if isinstance(owner, nn.Module) and owner in modules:
            where = f"{type(owner).__name__} {modules[owner]!r}" if modules[owner] else type(owner).__name__
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            op, ours = function.__name__, function.__module__.startswith("lgkernels.")
        if code in known.get("__all__", ()) and known["__name__"].startswith("lgkernels.functional."):
            public = code  # the last one
        elif code == "apply" and known["__name__"] == "lgkernels.core.autograd" and public in ("", "forward_gradient"):
            public = local["name"]  # of a module, which calls no public function
        trace = trace.tb_next
    way = next((way for part, way in _WAYS_OUT if part in op), _OTHERWISE)
    if ours:
        op, way = op if public in ("", "forward_gradient") else public, _OF_A_RULE
    return NotImplementedError(
        f"forward_gradient can't differentiate {op} in {where}: it has no forward-mode derivative. What to do: {way}; "
        "or detach its result, if no gradient is to go through it"
    )
