"""Which kernels `impl="auto"` may use on a GPU: those that have proved themselves there.

The first call of each specialisation (op, backend, dtypes, layouts, alignment, flags, block sizes) tries its kernels on
small inputs (`core/trial.py`) and keeps the verdict (`core/verdicts.py`); a kernel that fails gives one warning, and
the op runs in plain torch. LGKERNELS_TRUST: "first-use" (default), "always" (no trial), "never" (no kernel).
`python -m lgkernels verify` tries ahead (core/verify.py); an op whose GPU tests failed is off whatever its trials say.

Nothing is tried while a CUDA graph is captured: then the last verdict holds, or the fallback.
"""

import hashlib
import math
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cuts, dry, environment, tiles, trial, verdicts
from .kept import capturing

BACKENDS = ("triton", "cuda")  # whose kernels are tried
CHOICES = ("first-use", "always", "never")
# whose kernels need a trial. For tests: LGKERNELS_STAND_IN=cpu, where Triton's interpreter stands in for a driver
DEVICE_TYPES = {"cuda", *filter(None, [os.environ.get("LGKERNELS_STAND_IN")])}
_LARGEST_BATCH = 64  # of a trial whose launches cannot be foreseen
# Above which sizes are cut: elements of tensors, and the batch times all sizes that may be cut
_LARGE_TENSORS, _LARGE_PRODUCTS = 1 << 20, 1 << 26
_NO_MEMORY = "there was no memory for a trial"
OPS: dict[str, "Op"] = {}  # all that are defined
_lock = threading.RLock()
_stores: dict[torch.device, verdicts.Verdicts] = {}
_admitted: dict[tuple, bool] = {}
_decided: dict[str, tuple[str, str | None, str]] = {}
_warned: set[str] = set()


class Op(NamedTuple):
    """A registered op, as a trial needs it."""

    name: str
    function: Callable
    names: tuple[str, ...]  # of the flat arguments
    pack: Callable
    trial: trial.Trial | None  # None: its kernels are never trusted on a GPU
    group: str = ""  # name under which its backends are chosen


def policy() -> str:
    value = environment.value("LGKERNELS_TRUST", "first-use")
    if value not in CHOICES:
        raise ValueError(f"LGKERNELS_TRUST must be one of {', '.join(CHOICES)}, got {value!r}")
    return value


def store(device: torch.device) -> verdicts.Verdicts:
    if device not in _stores:
        _stores[device] = verdicts.Verdicts(device)
    return _stores[device]


def forget_all() -> None:
    """As a new process would begin."""
    _stores.clear()
    _admitted.clear()
    _decided.clear()
    _warned.clear()


def decided() -> dict[str, tuple[str, str | None, str]]:
    """{key: (what it is in words, verdict, why)} of all that this process has asked for."""
    return dict(_decided)


def whole(group: str, backend: str) -> str:
    """Key of all specialisations: BAD once a test of theirs has failed on this device."""
    return f"{group}/{backend}"


def has_trial(group: str) -> bool:
    """Whether the kernels of any op of the group can be tried."""
    return any(op.trial is not None for op in OPS.values() if op.group == group)


def refusal(group: str, device: torch.device, backend: str | None = None) -> str:
    """Why no specialisation of these kernels (None: of any that failed its tests) is used on this device; "": none."""
    if policy() != "first-use" or device.type not in DEVICE_TYPES:
        return ""
    for name in [backend] if backend else BACKENDS:
        state, why = store(device).state(whole(group, name))
        if state == verdicts.BAD:
            return f"{name}: {why}"
    return ""


def _after_fork() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- keys -------------------------------------------------------------------------------------------------------------


_VALUES = frozenset((int, float, bool, str, list, type(None)))  # for these torch need not be asked: no tensors


def _quick(op: Op, backend: str, arguments: tuple) -> tuple:
    """Of a call, exact in its sizes: what the memory of this process is asked by.

    This is looked up at every call. The fields of a tensor lie flat in the key, and the strides of a contiguous one
    are not asked for: its sizes say them.
    """
    if op.trial is not None and op.trial.kind is not None:
        return op.name, backend, _device(arguments), op.trial.kind(dict(zip(op.names, arguments)))
    key: list = [op.name, backend]
    device = None  # that of the first tensor: the op's door sees to it that all lie there
    for a in arguments:
        kind = type(a)
        if kind is Tensor or kind is Parameter or kind not in _VALUES and isinstance(a, Tensor):
            if device is None:
                key.append(device := a.get_device())
            key += a.dtype, a.shape, a.data_ptr() & 15, a.is_contiguous() or a.stride()
        elif kind is float:
            key.append(a if a == 0.0 or a == 1.0 else float)
        elif kind is list:
            key.append(tuple(a))
        else:
            key.append(a)
    return tuple(key)


def _device(arguments: tuple) -> torch.device:
    """Of the first tensor, in a list or not; else the one among the arguments."""
    flat = [a for argument in arguments for a in (argument if isinstance(argument, list) else (argument,))]
    tensors = (a.device for a in flat if isinstance(a, Tensor))
    return next(tensors, None) or next((a for a in flat if isinstance(a, torch.device)), torch.device("cpu"))


def _kind(value: Any) -> Any:
    """Numbers that a schedule changes are one kind but for 0 and 1."""
    return value if not isinstance(value, float) or value in (0.0, 1.0) else "a number"


def _layout(tensor: Tensor, has_rows: bool) -> tuple:
    """Sizes but the batch, strides, alignment."""
    sizes = tuple(tensor.shape[1:]) if has_rows else tuple(tensor.shape)
    stride = tuple(s for s, n in zip(tensor.stride(), tensor.shape) if n > 1)
    return str(tensor.dtype)[6:], sizes, stride, tensor.data_ptr() % 16


def _lasting(op: Op, backend: str, arguments: dict, blocks: str) -> tuple[str, str]:
    """`(key, what it is in words)` of a specialisation: what the file is asked by."""
    parts = []
    if op.trial.kind is not None:
        words = f"{op.name} {backend} {op.trial.kind(arguments)}"
        return f"{op.name}/{backend}/{hashlib.sha256(words.encode()).hexdigest()[:20]}", words
    batch = trial.batch_of(op.trial, arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((name, *_layout(value, trial.has_rows(op.trial, name, value, batch))))
        elif name not in op.trial.counts:
            parts.append((name, str(_kind(value))))
        elif isinstance(value, list):
            parts.append((name, str(value[1:])))
    digest = hashlib.sha256(repr((op.name, backend, parts, blocks)).encode()).hexdigest()[:20]
    dtypes = sorted({str(a.dtype)[6:] for a in arguments.values() if isinstance(a, Tensor)})
    sizes = " x ".join(
        str(tuple(a.shape[1:] if name in op.trial.rows else a.shape)).replace(" ", "")
        for name, a in arguments.items()
        if isinstance(a, Tensor) and a.dim() > 1
    )
    return f"{op.name}/{backend}/{digest}", f"{op.name} {backend} {', '.join(dtypes)} {sizes}"


def _on_meta(op: Op, kernels: ModuleType, arguments: dict, wide: bool = False) -> Callable[[], Any]:
    """A run of the op with tensors of these layouts and no memory; `wide`: in float64."""

    def meta(value):
        if isinstance(value, Tensor):
            dtype = torch.float64 if wide and value.dtype.is_floating_point else value.dtype
            return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")
        if isinstance(value, list):
            return [meta(one) for one in value]
        return torch.device("meta") if isinstance(value, torch.device) else value

    return lambda: op.function(kernels, *op.pack(tuple(map(meta, arguments.values()))))


def _launches(op: Op, kernels: ModuleType, arguments: dict, arch: int | str) -> tuple | None:
    """What a call launches; None where that cannot be foreseen."""
    try:
        return dry.launches(_on_meta(op, kernels, arguments), arch)
    except Exception:  # the backend reads an address, say
        return None


def _needed(op: Op, reference: ModuleType, arguments: dict) -> int:
    """Bytes of a trial: twice what the definition takes, for the results of others and copies; 0: not known."""
    try:
        return 2 * dry.peak(_on_meta(op, reference, arguments, wide=True))
    except Exception:  # the definition looks at values
        return 0


def foreseen(op: Op, backend: str, kernels: ModuleType, arguments: dict, device: torch.device) -> tuple | None:
    """What the call launches, None where that cannot be foreseen."""
    if op.trial.kind is not None or backend != "triton":
        return None
    return _launches(op, kernels, arguments, tiles.architecture(device))


def _rows_unforeseen(op: Op, arguments: dict) -> int:
    return min(tiles.power_of_two(trial.batch_of(op.trial, arguments)), _LARGEST_BATCH)


def small(op: Op, kernels: ModuleType, arguments: dict, found: tuple | None, device: torch.device) -> dict:
    """The call with the smallest batch whose launches are the same; where that is large, other sizes are cut too."""
    batch, arch = trial.batch_of(op.trial, arguments), tiles.architecture(device)
    if found is None:
        return trial.with_batch(op.trial, arguments, min(_rows_unforeseen(op, arguments), batch))

    def same(arguments):
        return _launches(op, kernels, arguments, arch) == found

    steps = [trial.FEWEST_ROWS << n for n in range(batch.bit_length())]
    fewer = [trial.with_batch(op.trial, arguments, rows) for rows in steps if rows < batch]
    arguments = cuts.first(fewer, same) or arguments
    blocks: dict[str, int] = {}
    for name, value in (pair for launch in found for pair in launch[1:]):
        if name.startswith("BLOCK"):
            blocks[name] = max(int(value), blocks.get(name, 1))
    for size in op.trial.sizes(arguments):
        rows = trial.batch_of(op.trial, arguments)
        sizes = [cuts.size_of(arguments, size.places) or 1 for size in op.trial.sizes(arguments)]
        elements = sum(map(cuts.elements, arguments.values())) + rows * max(sizes)
        if elements <= _LARGE_TENSORS and rows * math.prod(sizes) <= _LARGE_PRODUCTS:
            break
        arguments = cuts.first(cuts.smaller(arguments, size, blocks), same) or arguments
    return arguments


# -- admission --------------------------------------------------------------------------------------------------------


def _warn(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=4)


def admits(op: Op, backend: str, kernels: ModuleType, reference: ModuleType, arguments: tuple) -> bool:
    """Whether these kernels may run this call; they are tried first where nobody has."""
    if op.trial is None:
        return False
    quick = _quick(op, backend, arguments)
    verdict = _admitted.get(quick)
    if verdict is None:
        with _lock:
            verdict = _decide(op, backend, kernels, reference, arguments, quick)
    return verdict


def _decide(op, backend, kernels, reference, arguments, quick) -> bool:
    named = dict(zip(op.names, arguments))
    device = _device(arguments)
    if trial.batch_of(op.trial, named) == 0:
        return True  # nothing to launch a kernel over
    found = foreseen(op, backend, kernels, named, device)
    blocks = f"{_rows_unforeseen(op, named)} rows" if found is None else repr(sorted(set(found)))
    key, what = _lasting(op, backend, named, blocks)
    known = store(device)
    state, why = known.state(key)
    if state is None:
        if capturing(device):
            _warn(
                "capture",
                f"{op.name} runs in plain torch in this CUDA graph: its {backend} kernels have not been tried for "
                "these sizes. Run one step before the capture (as torch's documentation asks for), or "
                "`python -m lgkernels verify`",
            )
            return False
        try:
            tried = _prepared(op, kernels, reference, named, found, device)
        except torch.OutOfMemoryError as error:
            why = f"{_NO_MEMORY} ({str(error).splitlines()[0]})"
        else:
            state, why = _try(op, kernels, reference, tried, known, key, what)
    _decided[key] = what, state, why
    if state == verdicts.BAD:
        _warn(
            key,
            f"the {backend} kernels of {op.name} failed their trial on this device, so it runs in plain torch: {why} "
            f"({what}). `python -m lgkernels info` shows all verdicts, `python -m lgkernels verify --again` repeats "
            "trials that failed; LGKERNELS_TRUST=always uses kernels untried",
        )
    elif state is None and why:
        _warn(
            "memory",
            f"{op.name} runs in plain torch in this process: {why}. The next process tries its {backend} kernels again "
            f"({what})",
        )
    if state is not None or why:
        if len(_admitted) >= 4096:
            _admitted.clear()
        _admitted[quick] = state == verdicts.GOOD
    return state == verdicts.GOOD


def _free(device: torch.device) -> float:
    """Bytes that a trial may take."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _prepared(op: Op, kernels, reference, named: dict, found: tuple | None, device: torch.device) -> dict:
    """The arguments that those of the trial will be like; torch.OutOfMemoryError where these would not fit."""
    tried = op.trial.example(named) if op.trial.example else small(op, kernels, named, found, device)
    free = _free(device)
    needed = _needed(op, reference, tried) if free < math.inf else 0
    if needed > free:
        raise torch.OutOfMemoryError(f"it takes about {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} are free")
    return tried


def _try(op, kernels, reference, named, known, key, what) -> tuple[str | None, str]:
    """The verdict of a trial now, noted."""
    known.note(key, verdicts.RUNNING, what)
    state: str | None = None
    why, lasts = "", True
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(False)  # the float64 reference has no such form of every sum
        with torch.no_grad():
            batch = trial.batch_of(op.trial, named)
            for rows in (batch, batch - 1) if batch > 2 else (batch,):  # whole blocks, then one that masks cut
                given = trial.with_batch(op.trial, named, rows)
                trial.check(op.function, op.pack, kernels, reference, given, op.trial, key)
        state = verdicts.GOOD
    except trial.Fault as fault:
        state, why = verdicts.BAD, str(fault)
    except trial.NotAsked:
        lasts = False
    except torch.OutOfMemoryError:  # not again by this process, whose every call would end here
        why, lasts = _NO_MEMORY, False
    except Exception as error:
        # Of this process, perhaps (no compiler for Triton, say): the next tries again. But a kernel that broke the
        # device's context took the process with it.
        state, why = verdicts.BAD, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        lasts = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
        if "out of memory" in str(error):  # of the driver, say, for a kernel's stack
            state, why, lasts = None, f"{_NO_MEMORY} ({why})", False
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
        if state is not None and lasts:
            known.note(key, state, what, why)
        else:
            known.forget(key)
    return state, why
