"""A trial of an op's kernels on the device that it is to run on, with small inputs like the caller's.

The inputs have the caller's dtypes, layouts, alignment and sizes, but the smallest batch that makes the kernels choose
the same blocks, and once more an odd batch, where their masks matter. Of a large layer other sizes are smaller too, if
no launch changes by that. Every tensor that the kernels write lies in
memory full of NaN between guard bands. A kernel passes if

- what it computes is near the float64 reference, on the same device: within `accuracy.bound`, where only float32 sums
  grow with their length (a half result that may be wrong by its own eps times sqrt(K) may be anything), and have the
  scale of their summands where these may cancel;
- a second run gives the same bits (weight gradients of torch's own library aside);
- its inputs are as they were, and no guard band was touched.

Values come from a generator of the trial's own: the global random state is neither read nor written.
"""

import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import cuts
from .accuracy import C, bound, largest

_GUARD = 256  # bytes before and after a tensor
_GUARD_BYTE, _POISON_BYTE = 0xA5, 0xFF  # all bits set are NaN in every floating dtype


FEWEST_ROWS = 8  # where the blocks allow: a mean over fewer may cancel
_MARGINAL = 4.0  # times the bound: within it, other values may be worse conditioned than the kernel is wrong
_ATTEMPTS = 3


class Fault(Exception):
    """What is wrong with a kernel."""

    def __init__(self, text: str, marginal: bool = False) -> None:
        super().__init__(text)
        self.marginal = marginal


class NotAsked(Exception):
    """The reference refuses the call as well: nothing is learned of the kernel."""


class Trial(NamedTuple):
    """What the trial of an op has to know beyond its arguments. Functions take the arguments by name, in a dict."""

    length: Callable[[dict], int]  # K of the bound: terms of the longest sum behind a result
    rows: tuple[str, ...] = ()  # tensors whose first size is the batch
    counts: tuple[str, ...] = ()  # numbers that are the batch, or lists of sizes that start with it
    sizes: Callable[[dict], Sequence[cuts.Size]] = lambda a: ()  # others that may be cut, in this order
    indices: dict[str, Callable[[dict], int]] = {}  # index tensors, and how many values an entry may have
    positive: tuple[str, ...] = ()  # tensors of variances and the like
    kept: tuple[str, ...] = ()  # tensors whose values are the caller's (a random state)
    mutates: tuple[str, ...] = ()  # tensors that are written: results as well
    codes: tuple[str, ...] = ()  # written integers that rounding may move by one
    library: tuple[int, ...] = ()  # places of results that torch's own library sums, in an order of its own
    plant: Callable[[dict], None] | None = None  # special cases, into the arguments
    rounding: str | None = None  # tensor in whose dtype values are rounded on the way
    per_row: bool = False  # rows of a result differ by orders of magnitude
    # A backend that gives the sizes of what the results add up, |a| + |b| for a - b: where summands cancel
    magnitudes: Any = None
    # Where the caller's sizes choose nothing: what does, and arguments of the trial's own
    kind: Callable[[dict], Any] | None = None
    example: Callable[[dict], dict] | None = None


# -- memory that shows what was written -------------------------------------------------------------------------------


class _Arena:
    """Tensors between guard bands."""

    def __init__(self) -> None:
        self.bands: list[Tensor] = []

    def tensor(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, misaligned: int = 0) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
        size = extent * dtype.itemsize
        memory = torch.full((2 * _GUARD + misaligned + size,), _POISON_BYTE, dtype=torch.uint8, device=device)
        start = _GUARD + misaligned
        for band in (memory[:start], memory[start + size :]):
            band.fill_(_GUARD_BYTE)
            self.bands.append(band)
        return torch.empty(0, dtype=dtype, device=device).set_(  # type: ignore[call-overload]
            memory.untyped_storage(), start // dtype.itemsize, tuple(shape), tuple(stride)
        )

    def untouched(self) -> bool:
        return not self.bands or bool(torch.stack([(band == _GUARD_BYTE).all() for band in self.bands]).all())


_NEW = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class _Poisoned(TorchDispatchMode):
    """Inside, tensors without values lie in the arena."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__()
        self.arena = arena

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in _NEW and result.numel():
            return self.arena.tensor(result.shape, result.stride(), result.dtype, result.device)
        return result


# -- inputs like the caller's -----------------------------------------------------------------------------------------


def _fill(tensor: Tensor, name: str, trial: Trial, arguments: dict, generator: torch.Generator) -> None:
    if name in trial.indices:
        high = min(max(trial.indices[name](arguments), 1), torch.iinfo(tensor.dtype).max)
        values = torch.randint(high, tensor.shape, generator=generator, device=tensor.device)
    elif tensor.dtype == torch.bool:
        values = torch.randint(2, tensor.shape, generator=generator, device=tensor.device)
    elif not tensor.dtype.is_floating_point:  # words of packed bits
        values = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator, device=tensor.device)
    else:
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        if name in trial.positive:
            values = values.abs().add_(0.1)
    tensor.copy_(values)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument: of one, of a list, none of anything else."""
    return [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]


def has_rows(trial: Trial, name: str, tensor: Tensor, batch: int) -> bool:
    """Whether the tensor's first size is the batch; one that is not needed has no entries at all."""
    return name in trial.rows and tensor.dim() > 0 and tensor.shape[0] == batch


def _batch(trial: Trial) -> cuts.Places:
    return [(name, 0) for name in (*trial.rows, *trial.counts)]


def batch_of(trial: Trial, arguments: dict) -> int:
    size = cuts.size_of(arguments, _batch(trial))
    return 1 if size is None else size


def with_batch(trial: Trial, arguments: dict, batch: int) -> dict:
    """The same call of fewer rows."""
    return cuts.resized(arguments, _batch(trial), batch, dense=False)


def inputs(trial: Trial, arguments: dict, arena: _Arena, seed: int) -> dict:
    """Arguments like these, of a trial's own."""
    made = dict(arguments)
    generators: dict[torch.device, torch.Generator] = {}

    def new(name: str, given: Tensor) -> Tensor:
        generator = generators.setdefault(given.device, torch.Generator(given.device).manual_seed(seed))
        tensor = arena.tensor(given.shape, given.stride(), given.dtype, given.device, given.data_ptr() % 16)
        if tensor.numel():
            # an expanded tensor is written through a view without the repeated entries
            view = tensor
            for dim, step in enumerate(view.stride()):
                view = view.narrow(dim, 0, 1) if step == 0 and view.shape[dim] > 1 else view
            _fill(view, name, trial, made, generator)
        return tensor

    for name, given in arguments.items():
        if name in trial.kept:
            made[name] = given if given is None else given.clone()
        elif isinstance(given, Tensor):
            made[name] = new(name, given)
        elif _tensors(given):
            made[name] = [new(name, one) for one in given]
    if trial.plant is not None:
        trial.plant(made)
    return made


# -- the trial --------------------------------------------------------------------------------------------------------


def _copies(arguments: dict, wide: bool = False) -> dict:
    """Copies of the tensors; `wide`: in float64, and dtypes as well."""

    def copied(value):
        if isinstance(value, Tensor):
            return value.double() if wide and value.dtype.is_floating_point else value.clone()
        if _tensors(value):
            return [copied(one) for one in value]
        return torch.float64 if wide and isinstance(value, torch.dtype) and value.is_floating_point else value

    return {name: copied(value) for name, value in arguments.items()}


def _results(function: Callable, pack: Callable, kernels: ModuleType, arguments: dict, trial: Trial) -> list[Tensor]:
    result = function(kernels, *pack(tuple(arguments.values())))
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    results = [tensor for one in results for tensor in _tensors(one)]
    return results + [tensor for name in trial.mutates for tensor in _tensors(arguments.get(name))]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _compare(name: str, got: Tensor, rival: Tensor, truth: Tensor, size: Tensor, length: int, trial: Trial, dtype):
    if got.shape != truth.shape or got.dtype != rival.dtype:
        raise Fault(f"{name} is {got.dtype} {tuple(got.shape)}, expected {rival.dtype} {tuple(truth.shape)}")
    if not got.numel():
        return
    if not got.dtype.is_floating_point:
        if (got.long() - truth.long()).abs().max() > (name in trial.codes):
            raise Fault(f"{name}: integers differ from the reference's")
        return
    got, rival, truth = got.double(), rival.double(), truth.double()
    special = ~torch.isfinite(truth)
    if not torch.equal(got[special].nan_to_num(nan=-7.0), truth[special].nan_to_num(nan=-7.0)):
        raise Fault(f"{name} lacks an inf or nan of the reference")
    got, rival, truth = (t.masked_fill(special, 0.0) for t in (got, rival, truth))
    finite = torch.isfinite(got)
    if not bool(finite.all()):
        raise Fault(f"{name}: {int((~finite).sum())} of {got.numel()} entries are nan or inf (not written, perhaps)")
    per_row = trial.per_row and truth.dim() > 1
    scale, error = largest(truth, per_row), (got - truth).abs()
    summed = torch.maximum(scale, largest(size.double().nan_to_num(0.0, 0.0), per_row))
    rounding = torch.finfo(dtype).eps
    allowed = bound(largest(rival - truth, per_row), summed, min(rounding, torch.finfo(torch.float32).eps), length)
    allowed = allowed + C * rounding * scale
    if not bool((error <= allowed).all()):
        text = f"{name}: error {float(error.max()):.2e}, allowed {float(allowed.max()):.2e} of {float(scale.max()):.2e}"
        raise Fault(text, marginal=bool((error <= _MARGINAL * allowed).all()))


def _once(function, pack, kernels, reference, arguments: dict, trial: Trial, seed: int) -> None:
    arena = _Arena()
    made = inputs(trial, arguments, arena, seed)
    written = [name for name in trial.mutates for _ in _tensors(made.get(name))]
    before = _copies(made)
    try:
        truths = _results(function, pack, reference, _copies(before, wide=True), trial)
        rivals = _results(function, pack, reference, _copies(before), trial)
        sizes = truths
        if trial.magnitudes is not None:
            sizes = _results(function, pack, trial.magnitudes, _copies(before, wide=True), trial)
    except (ValueError, TypeError) as error:
        raise NotAsked(str(error)) from None
    runs = []
    for _ in range(2):
        for name in set(written):
            for tensor, old in zip(_tensors(made[name]), _tensors(before[name])):
                tensor.copy_(old)
        with _Poisoned(arena):
            results = _results(function, pack, kernels, made, trial)
        runs.append([r.clone() for r in results])
    for name, value in made.items():
        pairs = zip(_tensors(value), _tensors(before[name])) if name not in trial.mutates else ()
        if not all(_same_bits(now, old) for now, old in pairs):
            raise Fault(f"it wrote to its input {name}")
    if not arena.untouched():
        raise Fault("it wrote outside of its results")
    names = [f"result {i}" for i in range(len(truths) - len(written))] + written
    rounding = made[trial.rounding].dtype if trial.rounding else None
    triples = zip(names, *runs, rivals, truths, sizes, strict=True)
    for place, (name, first, second, rival, truth, size) in enumerate(triples):
        dtype = rounding or (rival.dtype if rival.dtype.is_floating_point else torch.float32)
        _compare(name, first, rival, truth, size, trial.length(made), trial, dtype)
        if place not in trial.library and not _same_bits(first, second):
            raise Fault(f"{name}: two runs differ")


def check(
    function: Callable,
    pack: Callable,
    kernels: ModuleType,
    reference: ModuleType,
    arguments: dict,
    trial: Trial,
    name: str,
) -> None:
    """Raise Fault if anything is wrong with these kernels on inputs like the arguments; `name` chooses the values."""
    for attempt in range(_ATTEMPTS):
        try:
            seed = zlib.crc32(f"{name} {attempt}".encode())
            return _once(function, pack, kernels, reference, arguments, trial, seed)
        except Fault as fault:
            if not fault.marginal or attempt == _ATTEMPTS - 1:
                raise
