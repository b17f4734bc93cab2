"""Forward passes at perturbed weights: every function of torch that takes a tuned parameter gets it perturbed.

A parameter is perturbed where it is used, whoever uses it: a linear layer's product is made by the family's kernel,
which writes no perturbed weight; any other function takes a perturbed copy, which lives as long as it needs it. The
parameters themselves are never written to, so there is nothing to restore.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..core import checks
from .zeroth_order_log import UNIT_SCALE, update_

# Functions that ask about a tensor, and not for its values.
_ASK = frozenset(
    "size dim ndimension numel nelement stride element_size storage_offset is_contiguous is_floating_point is_complex "
    "is_signed type data_ptr get_device is_inference requires_grad_ is_shared has_names __len__ __hash__ is_same_size "
    "is_tensor is_nonzero _is_view is_pinned is_set_to is_distributed".split()
)

# Functions that are computed in float32 where a half parameter is perturbed, which could not hold the perturbation (a
# normalisation's weight of 1 and an epsilon of 1e-3). None of them writes to an argument.
_WIDE = frozenset(
    [F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm, torch.group_norm]
    + [getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)]
    + [getattr(torch, name) for name in ("addmm", "matmul", "mm", "mul", "add")]
    + [getattr(Tensor, name) for name in ("matmul", "__matmul__", "__rmatmul__", "mm", "mul", "__mul__", "__rmul__")]
    + [getattr(Tensor, name) for name in ("add", "__add__", "__radd__")]
)
_HALVES = (torch.bfloat16, torch.float16)


class Perturbed(TorchFunctionMode):
    """Inside, tuned parameters are W + coefficient * Z; with `tangents` dual numbers W with the tangent Z.

    `states`: {id of a parameter: (members, 3) random states}. `met`: ids of the parameters that were used.
    """

    def __init__(
        self, states: dict[int, Tensor], member: int, coefficient: float, law: str, impl: str, tangents: bool = False
    ) -> None:
        super().__init__()
        self.states, self.member, self.coefficient = states, member, coefficient
        self.law, self.impl, self.tangents = law, impl, tangents
        self.factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [t for t in _tensors(args, kwargs) if id(t) in self.states]
        if not used:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ASK:
            return func(*args, **kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor) or result.data_ptr() != used[0].data_ptr():
                return result
        elif name == "__set__" or name.endswith("_") and not name.endswith("__") and any(t is args[0] for t in used):
            raise RuntimeError(f"closure must not write to a parameter that is tuned, got a call of {name}")
        self.met.update(map(id, used))
        if func is F.linear and not self.tangents:
            done = self._linear(*args, **kwargs)
            if done is not None:
                return done
        if func in _WIDE and not self.tangents and all(t.dtype in _HALVES for t in used):
            own = {id(t): t.float() for t in _tensors(args, kwargs) if t.dtype in _HALVES}
            own |= {id(t): self._copy(t, torch.float32) for t in used}
            wide = {k: _replaced((v,), own)[0] for k, v in kwargs.items()}
            result = func(*_replaced(args, own), **wide)
            dtypes = {t.dtype for t in _tensors(args, kwargs) if t.is_floating_point()}
            return result.to(used[0].dtype) if len(dtypes) == 1 else result
        perturbed = {id(t): self._copy(t) for t in used}
        return func(*_replaced(args, perturbed), **{k: _replaced((v,), perturbed)[0] for k, v in kwargs.items()})

    def _factor(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = like.device, dtype
        if key not in self.factors:
            self.factors[key] = torch.full((1,), self.coefficient, dtype=dtype, device=like.device)
        return self.factors[key]

    def _state(self, parameter: Tensor) -> Tensor:
        return self.states[id(parameter)][self.member : self.member + 1]

    def _copy(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter as it counts here, in memory of its own, in its dtype or another."""
        if self.tangents:
            tangent = torch.zeros_like(parameter)
            one = torch.ones_like(self._factor(parameter))
            update_(tangent, one, self._state(parameter), self.law, 1.0, self.impl)
            return forward_ad.make_dual(parameter.detach(), tangent)
        copy = parameter.detach().to(dtype or parameter.dtype, copy=True)
        update_(copy, self._factor(parameter), self._state(parameter), self.law, 1.0, self.impl)
        return copy

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        """The layer by the family's kernel; None where that does not take it."""
        if id(weight) not in self.states or type(input) is not Tensor or not input.dim():
            return None
        if weight.dim() != 2 or input.shape[-1] != weight.shape[1] or input.device != weight.device:
            return None  # for torch to refuse
        x = input
        if checks.autocasts(x.device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != weight.dtype:
            return None
        if bias is not None and id(bias) in self.states:
            bias = self._copy(bias)
        rows = x.shape[:-1].numel()
        y = torch.ops.lgkernels.perturbed_linear(
            x.detach().reshape(1, rows, x.shape[-1]),
            weight,
            bias,
            self._factor(x),
            None,
            self._state(weight),
            self.law,
            UNIT_SCALE[self.law],
            None,
            self.impl,
        )
        return y.view(*x.shape[:-1], len(weight))


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments, those in lists too."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _replaced(args: Any, by: dict[int, Tensor]) -> list[Any]:
    """The arguments with other tensors in the places of some."""
    return [type(v)(by.get(id(t), t) for t in v) if type(v) in (list, tuple) else by.get(id(v), v) for v in args]
