"""A weight gradient dW = dy^T x that is kept as its factors, and what can be done with it without forming it.

It lies in `weight.grad`. Its norm, a factor, a bound of its entries and the check for infinities are known from the
factors, so `torch.nn.utils.clip_grad_norm_`, `clip_grad_value_` and a GradScaler work on it; whoever wants its entries
learns why there are none.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import float64
from ..core.ops import wide

_PART_ROWS = 256  # of the gradient that exist at once, where its norm needs its entries
HELP = (
    "clip_grad_norm_ (2-norm; before clip_grad_value_, not after it), clip_grad_value_ and a GradScaler work; "
    "zero_grad(set_to_none=False) and what else computes with gradients do not: leave it out, exclude the layer, or "
    "undo it with .remove()"
)


class Pair(NamedTuple):
    """dy (..., N) and x (..., K) of one use of the weight, with the versions that they had."""

    grad: Tensor
    x: Tensor
    versions: tuple[int, int]

    def changed(self) -> bool:
        return self.versions != (self.grad._version, self.x._version)

    def on(self, device: torch.device) -> "Pair":
        if self.grad.device == device:
            return self
        grad, x = self.grad.to(device), self.x.to(device)
        return Pair(grad, x, (-1, -1) if self.changed() else (grad._version, x._version))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def joined(pairs: Sequence[Pair], weight: Tensor) -> tuple[Tensor, Tensor]:
    """dy (M, N) and x (M, K) of all uses together; M is 0 where there are none."""
    if not pairs:
        rows, columns = weight.flatten(1).shape
        return weight.new_empty(0, rows), weight.new_empty(0, columns)
    if len(pairs) == 1:
        return _rows(pairs[0].grad), _rows(pairs[0].x)
    return torch.cat([_rows(p.grad) for p in pairs]), torch.cat([_rows(p.x) for p in pairs])


def squared_norm(grad: Tensor, x: Tensor, dense: Tensor | None) -> Tensor:
    """||grad^T x + dense||^2, in float64 where the device has it: by the products of rows with rows, M^2 (N + K)
    multiply-adds, or where the sum itself costs less (M N K), by its entries, some rows at a time."""
    (m, n), k = grad.shape, x.shape[1]
    grad, x = wide(grad), wide(x)
    dtype = torch.float32 if float64.lacks(grad.device) else torch.float64
    if dense is None and m * (n + k) <= n * k:
        return (grad @ grad.t()).mul_(x @ x.t()).sum(dtype=dtype).clamp_min_(0)
    total = torch.zeros((), dtype=dtype, device=grad.device)
    for start in range(0, n, _PART_ROWS):
        part = grad[:, start : start + _PART_ROWS].t() @ x
        if dense is not None:
            part += dense[start : start + _PART_ROWS]
        total += torch.linalg.vector_norm(part, dtype=dtype).square()
    return total


class Factors(torch.Tensor):
    """Lies in `weight.grad` for clip(scale * (dy^T x + dense), low, high). One element of memory."""

    weight: Tensor
    pairs: list[Pair]
    dense: Tensor | None  # a running sum, or what another use of the weight left
    scales: list[Any]  # numbers and tensors of one, whose product is the scale
    low: float
    high: float

    @classmethod
    def of(cls, weight: Tensor) -> "Factors":
        made: Any = weight.new_zeros(()).expand_as(weight).as_subclass(cls)
        made.weight, made.pairs, made.dense = weight, [], None
        made.scales, made.low, made.high = [], -math.inf, math.inf
        return made

    @property
    def touched(self) -> bool:
        """Whether it was scaled or clipped since the backward."""
        return bool(self.scales) or (self.low, self.high) != (-math.inf, math.inf)

    @property
    def clip_value(self) -> float:
        return self.high if self.low == -self.high else math.nan

    @property
    def scale(self) -> float:
        return math.prod(map(float, self.scales))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dy, x, dense) as matrices."""
        return *joined(self.pairs, self.weight), None if self.dense is None else self.dense.flatten(1)

    def _take(self, other: "Factors") -> None:
        self.pairs, self.dense, self.scales = other.pairs, other.dense, other.scales
        self.low, self.high = other.low, other.high

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("__get__", "__set__"):  # dtype, shape, is_sparse, ...
            with torch._C.DisableTorchFunctionSubclass():
                value = function(*args, **kwargs)
            if _name(function) == "data" and len(args) == 2 and isinstance(args[1], Factors):  # Module.to() ends so
                args[0]._take(args[1])
            if not isinstance(value, torch.Tensor):
                return value  # else it is .data, .T, ...: its numbers are nobody's gradient
        if function in _KNOWN:
            result = _KNOWN[function](*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise RuntimeError(
            f"the gradient of a fused layer's weight was asked for ({_name(function)}), but it is never formed: {HELP}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return "factors of a gradient (fuse_update)"


def _name(function: Any) -> Any:
    """Of a torch function, or of the attribute that a getter or setter is for."""
    name = getattr(function, "__name__", function)
    return getattr(getattr(function, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


# -- what is known from the factors -----------------------------------------------------------------------------------


def _norm(gradient: Factors, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if ord != 2 or dim is not None or keepdim or (gradient.low, gradient.high) != (-math.inf, math.inf):
        return NotImplemented
    norm = squared_norm(*gradient.matrices()).sqrt()
    for scale in gradient.scales:
        norm = norm * abs(scale)
    return norm.to(dtype or gradient.dtype)


def _multiply(gradient: Factors, factor: Any) -> Any:
    if (gradient.low, gradient.high) != (-math.inf, math.inf):
        return NotImplemented
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return NotImplemented
    gradient.scales.append(factor.detach() if isinstance(factor, Tensor) else factor)
    return gradient


def _clamp(gradient: Factors, low: Any = None, high: Any = None, **named: Any) -> Any:
    low, high = named.get("min", low), named.get("max", high)
    gradient.low = gradient.low if low is None else max(gradient.low, float(low))
    gradient.high = gradient.high if high is None else min(gradient.high, float(high))
    return gradient


def _infinite(gradient: Factors) -> Tensor:
    """Whether an entry of the gradient may be inf or nan: no sum of M products is larger than M max|dy| max|x|."""
    grad, x, dense = gradient.matrices()
    largest = partial(torch.linalg.vector_norm, ord=math.inf, dtype=torch.float32)
    bound = torch.zeros((), device=gradient.device, dtype=torch.float32)
    if grad.numel() and x.numel():
        bound = len(grad) * largest(grad) * largest(x)
    if dense is not None and dense.numel():
        bound = bound + largest(dense)
    return ~torch.isfinite(bound)


def _check_and_unscale(gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler's pass over all gradients of a dtype."""
    own = [g for g in gradients if isinstance(g, Factors)]
    plain = [g for g in gradients if not isinstance(g, Factors)]
    if plain:
        torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)
    for gradient in own:
        _multiply(gradient, inverse_scale.clone())
        found_inf.copy_(torch.maximum(found_inf, _infinite(gradient).to(found_inf)))


def _each(function: Callable) -> Callable:
    """The same for a list of gradients (`torch._foreach_...`), those that are formed as well."""

    def of_list(gradients: Sequence[Tensor], *args: Any) -> Any:
        results = [function(g, *args) for g in gradients]
        return NotImplemented if any(r is NotImplemented for r in results) else results

    return of_list


def _either(known: Callable, plain: Callable) -> Callable:
    return lambda g, *args: known(g, *args) if isinstance(g, Factors) else plain(g, *args)


def _kind(method: Callable) -> Callable:
    """Of the tensor, not of its numbers."""

    def ask(gradient: Factors, *args: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return method(gradient, *args)

    return ask


def _conversion(method: Callable) -> Callable:
    """To another dtype or device, as `Module.to()`, `double()` and `cuda()` convert a gradient after its parameter. The
    factors keep their dtypes, which no kernel asks for."""

    def convert(gradient: Factors, *args: Any, **named: Any) -> Any:
        named.pop("memory_format", None)
        like = method(gradient.weight.new_zeros(()), *args, **named)
        if not isinstance(like, Tensor):
            return like  # type(): a name
        made: Any = like.expand_as(gradient.weight).as_subclass(Factors)
        made.weight, made.pairs = gradient.weight, [pair.on(like.device) for pair in gradient.pairs]
        made.dense = None if gradient.dense is None else gradient.dense.to(like)
        made.scales = [s.to(like.device) if isinstance(s, Tensor) else s for s in gradient.scales]
        made.low, made.high = gradient.low, gradient.high
        return made

    return convert


_CONVERSIONS = ("to", "type", "double", "float", "half", "bfloat16", "cuda", "cpu")
_QUESTIONS = (  # of Module.to()
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.dim),
    torch._has_compatible_shallow_copy_type,
)
_KNOWN: dict[Any, Callable] = {
    **{getattr(torch.Tensor, name): _conversion(getattr(torch.Tensor, name)) for name in _CONVERSIONS},
    **{ask: _kind(ask) for ask in _QUESTIONS},
    torch.linalg.vector_norm: _norm,
    torch.Tensor.mul_: _multiply,
    torch.Tensor.clamp_: _clamp,
    torch._amp_foreach_non_finite_check_and_unscale_: _check_and_unscale,
    torch._foreach_norm: _each(_either(_norm, torch.linalg.vector_norm)),
    torch._foreach_mul_: _each(_either(_multiply, torch.Tensor.mul_)),
    torch._foreach_clamp_min_: _each(_either(_clamp, torch.Tensor.clamp_min_)),
    torch._foreach_clamp_max_: _each(_either(lambda g, high: _clamp(g, None, high), torch.Tensor.clamp_max_)),
}
