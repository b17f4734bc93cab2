"""Forward passes at perturbed weights: every function of torch that takes a tuned parameter gets it perturbed.

A parameter is perturbed where it is used, whoever uses it: linear layers, convolutions and embeddings by the family's
kernels, which write no perturbed weight, or a few rows of it at a time; any other function takes a perturbed copy,
which lives as long as it needs it. So do layers whose input is differentiated, or which a transform of torch.func
runs: torch's function knows how. The parameters themselves are never written to, so there is nothing to restore.

What half a weight's digits, or autocast's, cannot hold is kept where the function allows: see _WIDE.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..core import checks
from ..core.ops import without_autocast
from .zeroth_order_log import UNIT_SCALE, update_

# Functions that ask about a tensor, and not for its values.
_ASK = frozenset(
    "size dim ndimension numel nelement stride element_size storage_offset is_contiguous is_floating_point is_complex "
    "is_signed data_ptr get_device is_inference requires_grad_ is_shared has_names __len__ __hash__ is_same_size "
    "is_tensor _is_view is_pinned is_set_to is_distributed".split()
)

# Functions that autocast computes in half precision: of float32 weights too the perturbation is kept.
_PRODUCTS = frozenset(
    [getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)]
    + [F.linear]
    + [getattr(torch, name) for name in ("addmm", "matmul", "mm", "bmm", "baddbmm", "einsum")]
    + [getattr(Tensor, name) for name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm")]
)

# Functions that are computed in float32 where a half parameter is perturbed, which could not hold the perturbation (a
# normalisation's weight of 1 and an epsilon of 1e-3). None of them writes to an argument.
_WIDE = _PRODUCTS | frozenset(
    [F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm, torch.group_norm]
    + [getattr(torch, name) for name in ("mul", "add")]
    + [getattr(Tensor, name) for name in ("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__")]
)
_NORMS = _WIDE - _PRODUCTS - {torch.mul, torch.add, Tensor.mul, Tensor.add}  # in float32 under CUDA's autocast
_VMAP = torch._C._functorch.TransformType.Vmap
_HALVES = (torch.bfloat16, torch.float16)


class Perturbed(TorchFunctionMode):
    """Inside, tuned parameters are W + coefficient * Z; with `tangents` dual numbers W with the tangent Z.

    `named`: the parameters. `states`: {id of a parameter: (members, 3) random states}. `kept`: {id: a row that is not
    perturbed}. `met`: ids of the parameters that were used.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        states: dict[int, Tensor],
        member: int,
        coefficient: float,
        law: str,
        impl: str,
        tangents: bool,
        kept: dict[int, int],
    ) -> None:
        super().__init__()
        self.states, self.member, self.coefficient = states, member, coefficient
        self.law, self.impl, self.tangents, self.kept = law, impl, tangents, kept
        self.factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.met: set[int] = set()
        self.spans: dict[int, list[tuple[str, int, int]]] = {}  # by storage: name, first byte, end
        for name, p in named.items():
            if (storage := _storage(p)) is not None:
                self.spans.setdefault(storage, []).append((name, *_span(p)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ASK or name == "type" and len(args) == 1 and not kwargs:
            return func(*args, **kwargs)
        given = _tensors(args, kwargs)
        if name != "__get__":  # a view's shape, or a view of it
            for t in given:
                if id(t) not in self.states:
                    self._refuse_alias(t, name)
        used = [t for t in given if id(t) in self.states]
        if not used:
            return func(*args, **kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor) or result.data_ptr() != used[0].data_ptr():
                return result
        elif name == "__set__" or name.endswith("_") and not name.endswith("__") and any(t is args[0] for t in used):
            raise RuntimeError(f"closure must not write to a parameter that is tuned, got a call of {name}")
        self.met.update(map(id, used))
        if not self.tangents:
            own = self._own(func, self._differentiated(args, kwargs))
            done = None if own is None else own(*args, **kwargs)
            if done is None and func in _WIDE:
                done = self._widely(func, args, kwargs, used)
            if done is not None:
                return done
        elif any(level.key() != _VMAP for level in torch._C._functorch.get_interpreter_stack() or ()):
            raise RuntimeError(
                "closure must differentiate by torch.autograd.grad for estimator='forward-gradient', got a transform "
                "of torch.func, inside of which the derivative along the weights is lost: or use 'two-sided'"
            )
        perturbed = {id(t): self._copy(t) for t in used}
        return func(*_replaced(args, perturbed), **{k: _replaced((v,), perturbed)[0] for k, v in kwargs.items()})

    def _refuse_alias(self, tensor: Tensor, function: str) -> None:
        """Another tensor in a parameter's memory (a view from before, a parameter as a transform's argument): it holds
        W, not perturbed."""
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        spans = self.spans.get(_storage(tensor) or 0)
        if not spans:
            return
        first, end = _span(tensor)
        for name, its_first, its_end in spans:
            apart = isinstance(tensor, nn.Parameter) and first != its_first  # two that are interleaved
            if first < its_end and its_first < end and not apart:
                raise RuntimeError(
                    f"closure must use {name!r} itself, or views of it that it makes, got another tensor in its "
                    f"memory, in {function} (a view from before, or an argument of a transform of torch.func), which "
                    "cannot be perturbed: make it in the closure, or clone it to have the values of before"
                )

    # -- functions of the family's own, and those in float32; None: not this call ------------------------------------

    def _differentiated(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """If what a function gives has a derivative by an argument that is not tuned, or a transform of torch.func
        runs it."""
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return True
        return torch.is_grad_enabled() and any(
            t.requires_grad and id(t) not in self.states for t in _tensors(args, kwargs)
        )

    def _own(self, func: Any, differentiated: bool) -> Callable | None:
        if differentiated:  # the family's kernels have no derivative, nor a rule for transforms
            return self._embedding_of_a_copy if func is F.embedding else None
        if func is F.linear:
            return self._linear
        if func is torch.conv2d or func is torch.conv1d:
            return self._conv2d if func is torch.conv2d else self._conv1d
        if func is F.embedding:
            return self._embedding
        return self._batch_norm if func is F.batch_norm else None

    def _widely(self, func: Any, args: Any, kwargs: dict[str, Any], used: list[Tensor]) -> Any:
        """In float32, rounded once to the dtype that the function gives; what is not perturbed is rounded first, as
        autocast does."""
        given = [t for t in _tensors(args, kwargs) if t.is_floating_point()]
        device, halves = used[0].device, all(t.dtype in _HALVES for t in used)
        dtype = given[0].dtype if len({t.dtype for t in given}) == 1 else None
        casts = func in _PRODUCTS and checks.autocasts(device) and all(t.dtype != torch.float64 for t in given)
        if casts:
            dtype = torch.get_autocast_dtype(device.type)
        elif not halves or dtype is None and func in _PRODUCTS:
            return None
        own = {id(t): (t.to(dtype) if casts else t).float() for t in given if t.dtype != torch.float64}
        own |= {id(t): self._copy(t, torch.float32) for t in used}
        with without_autocast(device):
            result = func(*_replaced(args, own), **{k: _replaced((v,), own)[0] for k, v in kwargs.items()})
        wide = not casts and device.type == "cuda" and checks.autocasts(device) and func in _NORMS
        return result if dtype is None or wide else result.to(dtype)

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
            with torch._C._DisableFuncTorch():
                tangent = torch.zeros_like(parameter)
                one = torch.ones_like(self._factor(parameter))
                update_(tangent, one, self._state(parameter), self.law, 1.0, self.impl, self.kept.get(id(parameter)))
            return forward_ad.make_dual(parameter.detach(), tangent)
        with torch._C._DisableFuncTorch():  # a parameter is no argument of a transform: neither is its copy
            copy = parameter.detach().to(dtype or parameter.dtype, copy=True)
            row = self.kept.get(id(parameter))
            update_(copy, self._factor(parameter), self._state(parameter), self.law, 1.0, self.impl, row)
        return copy

    def _noise(self, weight: Tensor) -> tuple:
        """As the family's ops take it."""
        return None, self._state(weight), self.law, UNIT_SCALE[self.law], None

    def _operand(self, input: Any, weight: Any) -> Tensor | None:
        """The layer's input in the dtype that it is computed with; None where the kernels do not take it."""
        if id(weight) not in self.states or id(weight) in self.kept:  # an embedding's, used otherwise
            return None
        if type(input) is not Tensor or input.device != weight.device:
            return None
        if checks.autocasts(input.device) and input.dtype != torch.float64 and weight.dtype != torch.float64:
            return input.detach().to(torch.get_autocast_dtype(input.device.type))
        return input.detach() if input.dtype == weight.dtype else None

    def _bias(self, bias: Any) -> Any:
        return self._copy(bias, _wide(bias)) if bias is not None and id(bias) in self.states else bias

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        if id(weight) not in self.states:  # its bias alone is tuned
            y = F.linear(input, weight)
            return (y + self._bias(bias)).to(y.dtype)
        x = self._operand(input, weight)
        if x is None or not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            return None
        rows = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
        factor, noise = self._factor(x), self._noise(weight)
        y = torch.ops.lgkernels.perturbed_linear(rows, weight, self._bias(bias), factor, *noise, self.impl)
        return y.view(*x.shape[:-1], len(weight))

    def _conv2d(self, input: Any, weight: Any, *others: Any, **more: Any) -> Any:
        return self._convolution(input, weight, weight, *others, **more)

    def _conv1d(
        self,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        """One of height 1; the noise is the same matrix."""
        if type(input) is not Tensor or input.dim() not in (2, 3) or weight.dim() != 3:
            return None

        def two(value: Any, of_the_height: int) -> Any:
            return (
                value if isinstance(value, str) else (of_the_height, *(value if isinstance(value, tuple) else (value,)))
            )

        geometry = two(stride, 1), two(padding, 0), two(dilation, 1), groups
        y = self._convolution(input.unsqueeze(-2), weight, weight.detach().unsqueeze(2), bias, *geometry)
        return None if y is None else y.squeeze(-2)

    def _convolution(
        self,
        input: Any,
        parameter: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        x = self._operand(input, parameter)
        if x is None or weight.dim() != 4:
            return None
        try:
            x, geometry, batched = checks.conv2d(x, weight, None, stride, padding, dilation, groups)
        except (ValueError, TypeError):
            return None  # for torch to refuse
        factor, noise = self._factor(x), self._noise(parameter)
        y = torch.ops.lgkernels.perturbed_conv2d(
            x[None], weight, self._bias(bias), factor, *noise, *geometry, self.impl
        )
        return y[0] if batched else y[0, 0]

    def _embedding(
        self, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
    ) -> Any:
        """The rows that are looked up. A half result holds the perturbation on the average: see _unbiased."""
        if max_norm is not None or type(input) is not Tensor or id(weight) not in self.states:
            return None
        if weight.dim() != 2 or input.device != weight.device or input.dtype not in (torch.int64, torch.int32):
            return None
        y = torch.ops.lgkernels.perturbed_rows(
            weight, input.reshape(1, -1).long(), self._factor(weight), *self._noise(weight), True, self.impl
        )
        if y.dtype != weight.dtype:
            y = _unbiased(y[0], weight.dtype, self._state(weight), self.impl)
        y = y.view(*input.shape, weight.shape[1])
        row = self.kept.get(id(weight))
        return y if row is None else torch.where((input == row)[..., None], weight.detach()[row], y)

    def _embedding_of_a_copy(self, input: Any, weight: Any, *others: Any, **more: Any) -> Any:
        if id(weight) not in self.states or weight.dtype not in _HALVES:
            return None
        with torch._C._DisableFuncTorch():
            wide = self._copy(weight, torch.float32)
            table = _unbiased(wide, weight.dtype, self._state(weight), self.impl)
        return F.embedding(input, table, *others, **more)

    def _batch_norm(
        self, input: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *others: Any, **more: Any
    ) -> Any:
        """Of half parameters: the library's normalisation, then weight and bias in float32."""
        if type(input) is not Tensor or input.dtype not in _HALVES or input.dim() < 2:
            return None
        y = F.batch_norm(input, mean, var, None, None, *others, **more).float()
        shape = (-1,) + (1,) * (input.dim() - 2)
        for value, function in ((weight, y.mul_), (bias, y.add_)):
            if value is not None:
                own = self._copy(value, torch.float32) if id(value) in self.states else value.float()
                function(own.view(shape))
        return y.to(input.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _unbiased(value: Tensor, dtype: torch.dtype, states: Tensor, impl: str) -> Tensor:
    """A float32 matrix rounded to one of the two nearest halves, to the nearer with the greater probability: on the
    average it is `value`. The draw is a formula too, so that both sides of an estimate have the same."""
    draw, own = torch.zeros_like(value), states.clone()
    own[:, 0] ^= 0x5851F42D4C957F2D
    update_(draw, draw.new_ones(1), own, "uniform", 1.0, impl)
    near = value.to(dtype)
    error, bits = value - near.float(), near.view(torch.int16)
    # the other of the two: further from zero, or nearer to it; of zero, the smallest number of the error's sign
    other = bits + torch.where(error * near.float() > 0, 1, -1).to(torch.int16)
    smallest = torch.where(error > 0, 1, 1 - 2**15).to(torch.int16)
    far = torch.where(near == 0, smallest, other).view(dtype)
    chance = error / (far.float() - near.float())
    return torch.where((draw / (2 * UNIT_SCALE["uniform"]) + 0.5 < chance) & far.isfinite(), far, near)


def _storage(tensor: Tensor) -> int | None:
    """Where its memory is; None of what has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except RuntimeError:  # sparse ones
        return None


def _span(tensor: Tensor) -> tuple[int, int]:
    """Its first byte, and the one after its last."""
    first = tensor.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return first, first + (last + 1) * tensor.element_size() if tensor.numel() else first


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments, those in lists too, and in lists of lists."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += _tensors(value, {})
    return found


def _replaced(args: Any, by: dict[int, Tensor]) -> list[Any]:
    """The arguments with other tensors in the places of some."""
    return [type(v)(_replaced(v, by)) if type(v) in (list, tuple) else by.get(id(v), v) for v in args]
