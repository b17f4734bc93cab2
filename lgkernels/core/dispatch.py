"""Which backend runs an op: `impl=` argument, then `LGKERNELS_IMPL`, then a choice by device, dtype and evidence.

A backend of an op is a module of its family's package, named as the backend (`ops/lls/triton.py`), imported when first
used. On CUDA devices `auto` takes Triton, or CUDA C++ where the benches found that faster, once the kernels have proved
themselves there (core/trust.py); on a CPU the native module. Where no kernel runs it takes plain torch: the
lean version where the family has one (`torch.py`), else the definition (`reference.py`), float64's only backend.
"""

import importlib
import importlib.util
import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from . import environment, native, trust

PLAIN = ("reference", "torch")
BACKENDS = (*PLAIN, "cpu", "triton", "cuda")
IMPLEMENTATIONS = ("auto", *BACKENDS)
_FASTER = Path(__file__).with_name("faster.json")
_ops: dict[str, tuple[str, tuple[str, ...]]] = {}  # op: (package, backends)
_preferred: list[str] = []
_warned: set[str] = set()


def register(op: str, package: str, backends: Sequence[str] | None = None) -> None:
    """Declare an op of a family's package, and its backends where they are not all that have a file there."""
    if backends is None:
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])  # type: ignore[union-attr,index]
        backends = [name for name in BACKENDS if (folder / f"{name}.py").exists()]
    _ops[op] = package, tuple(backends)


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """Names of the families: the packages of `lgkernels.ops` that have an `op.py`."""
    folder = Path(__file__).parents[1] / "ops"
    return tuple(sorted(path.parent.name for path in folder.glob("*/op.py")))


def registered_ops() -> list[str]:
    """Names of the ops of all families."""
    for name in families():
        importlib.import_module(f"lgkernels.ops.{name}.op")
    return sorted(_ops)


def backends(op: str) -> tuple[str, ...]:
    """Names of the op's backends."""
    return _ops[op][1]


def family(op: str) -> str:
    """Package of the op's family."""
    return _ops[op][0]


def architecture(device: torch.device) -> str:
    """`"sm_86"` for a CUDA device, else the device type."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=1)
def faster() -> dict[str, dict[str, list[str]]]:
    """{op: {architecture: [backends, fastest first]}}, from the benches, written by `bench.report`."""
    return json.loads(_FASTER.read_text()) if _FASTER.exists() else {}


def kernels_for(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The GPU backend that `auto` would like to use, fastest first; None where there is none."""
    order = faster().get(op, {}).get(architecture(device), [])
    order = [*_preferred, *order, *(b for b in ("triton", "cuda") if b not in order)]
    usable = [b for b in order if unavailable(op, b, device, dtype) is None]
    wanted = (b for b in usable if b in _preferred or not trust.refusal(op, device, b))
    return next(wanted, usable[0] if usable else None)


def prefer(*backends: str) -> None:
    """From now on `auto` takes these first, whatever benches and tests say: for `verify`, which tries all."""
    _preferred[:] = backends
    _chosen.cache_clear()


def fallback(op: str) -> str:
    """Plain torch, as lean as the op has it."""
    return "torch" if "torch" in backends(op) else "reference"


def interpreting() -> bool:
    """True when Triton kernels run in its CPU interpreter."""
    return environment.value("TRITON_INTERPRET", "0") == "1"


def unavailable(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` can't run `op` here; None if it can."""
    if backend not in backends(op):
        return f"{op} has no {backend} backend"
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 is for the reference only"
    if backend == "torch":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on CPU tensors, got {device.type}"
        return None if native.native() else f"the native module is not there ({native.native_error()})"
    if backend == "triton":
        if device.type == "cuda" or interpreting():
            return environment.triton_fault()
        return f"Triton runs on CUDA tensors (on CPU only with TRITON_INTERPRET=1), got {device.type}"
    if native.cuda_entries() is None:
        return f"the native module has no CUDA kernels ({native.native_error() or 'built for CPU only'})"
    if device.type != native.cuda_device_type():
        return f"it runs on {native.cuda_device_type()} tensors, got {device.type}"
    return native.cuda_unusable(device) if device.type == "cuda" else None


def explain(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """`(backend, reason)` that `impl="auto"` uses for this op on this device and dtype."""
    device = torch.device(device)
    if dtype == torch.float64:
        return "reference", "float64 is for the reference only"
    if device.type in trust.DEVICE_TYPES:
        kernels = kernels_for(op, device, dtype)
        if kernels is None:
            whys = [unavailable(op, b, device, dtype) for b in trust.BACKENDS if b in backends(op)]
            return fallback(op), "; ".join([f"{op} has no kernels that can run here", *filter(None, whys)])
        if trust.policy() == "never":
            return fallback(op), "LGKERNELS_TRUST=never"
        refused = trust.refusal(op, device, kernels)
        if refused and kernels not in _preferred:
            return fallback(op), f"its kernels are off: {refused}"
        untried = trust.policy() == "always"
        if not untried and not trust.has_trial(op):
            return fallback(op), f"the {kernels} kernels have no trial"
        return kernels, "LGKERNELS_TRUST=always" if untried else "each specialisation once it has passed its trial here"
    if device.type == "cpu":
        why_not = unavailable(op, "cpu", device, dtype)
        return (fallback(op), why_not) if why_not else ("cpu", f"native C++ ({native.native().cpu_level()})")
    return fallback(op), f"no kernels for {device.type}"


def remedy(device: torch.device, dtype: torch.dtype) -> str:
    """What to do where no kernel runs."""
    if dtype == torch.float64:
        return "use float32, bfloat16 or float16"
    if device.type in trust.DEVICE_TYPES:
        if trust.policy() == "never":
            return "unset LGKERNELS_TRUST"
        again = "--force-reinstall " if "cannot be imported" in (environment.triton_fault() or "") else ""
        return f"`pip install {again}triton`, and see `python -m lgkernels verify`"
    if device.type == "cpu":
        return "install a C++ compiler, and lgkernels again (LGKERNELS_BUILD=cpu shows why it cannot be built)"
    return "use a CPU or a CUDA device"


def has_kernels(op: str, device: torch.device) -> bool:
    """Whether the op is meant to run on kernels there."""
    if device.type in trust.DEVICE_TYPES:
        return bool(set(trust.BACKENDS) & set(backends(op))) and trust.has_trial(op)
    return "cpu" in backends(op)


def said_fallback() -> None:
    """Somebody has said that no kernel runs here: no warning needs to say it again."""
    _warned.add("none")


def _warn_of_fallback(op: str, backend: str, why: str, device: torch.device, dtype: torch.dtype) -> None:
    """Once in a process, where an op that has kernels runs in plain torch and nobody asked for that."""
    if backend not in PLAIN or dtype == torch.float64 or not has_kernels(op, device):
        return
    refused = trust.refusal(op, device)
    key = op if refused else "none"
    if device.type not in ("cpu", *trust.DEVICE_TYPES) or key in _warned or trust.policy() == "never":
        return
    _warned.add(key)
    who = op if refused else "lgkernels"
    do = "`python -m lgkernels info` shows all verdicts" if refused else f"To do: {remedy(device, dtype)}"
    warnings.warn(f"{who} runs in plain torch on {device.type}: {why}. {do}", stacklevel=2)


@lru_cache(maxsize=256)
def _module(package: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{package}.{backend}")


@lru_cache(maxsize=1024)
def _chosen(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, _environment: tuple
) -> tuple[str, ModuleType]:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "auto":
        impl, why = explain(op, device, dtype)
        _warn_of_fallback(op, impl, why, device, dtype)
    why_not = unavailable(op, impl, device, dtype)
    if why_not:
        usable = [b for b in BACKENDS if unavailable(op, b, device, dtype) is None]
        raise ValueError(f"impl={impl!r} can't run {op} on {device.type} {dtype}: {why_not}; usable here: {usable}")
    return impl, _module(_ops[op][0], impl)


def _choice(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ModuleType]:
    if impl == "auto" and (given := environment.value("LGKERNELS_IMPL", "auto")) != "auto":
        if given not in IMPLEMENTATIONS:
            raise ValueError(f"LGKERNELS_IMPL must be one of {', '.join(IMPLEMENTATIONS)}, got {given!r}")
        impl = given
    return _chosen(op, impl, device, dtype, (interpreting(), trust.policy(), id(native.cuda_entries())))


def is_auto(impl: str) -> bool:
    """Whether the backend is the library's choice."""
    return impl == "auto" and environment.value("LGKERNELS_IMPL", "auto") == "auto"


def fallback_module(op: str) -> ModuleType:
    """The module of `fallback`."""
    return _module(_ops[op][0], fallback(op))


def reference_module(op: str) -> ModuleType:
    """The definition that every other backend is judged by."""
    return _module(_ops[op][0], "reference")


def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that runs `op`; ValueError if the one asked for can't."""
    return _choice(op, impl, device, dtype)[0]


def backend(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that runs `op` on tensors of this device and dtype."""
    return _choice(op, impl, device, dtype)[1]


def candidates(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> list[ModuleType]:
    """The modules that may run `op` there: the chosen one, and what runs in its place where it is not trusted."""
    try:
        chosen = backend(op, impl, device, dtype)
    except ValueError:
        return []
    untried = device.type in trust.DEVICE_TYPES and is_auto(impl)
    return list(dict.fromkeys([chosen, fallback_module(op)] if untried else [chosen]))
