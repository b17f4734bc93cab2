"""Which backend runs an op: `impl=` argument, then `LGKERNELS_IMPL`, then a choice by device, dtype and evidence.

A family registers its backends once: `register("lls_loss", reference="...", cpu="...", ...)`, module paths that
are imported when first used. On CUDA devices `auto` takes only what `core/verified.json` says has passed
the GPU tests: first on this architecture, then on any; else the reference.
"""

import importlib
import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path

import torch

from . import native

BACKENDS = ("reference", "cpu", "triton", "cuda")
IMPLEMENTATIONS = ("auto", *BACKENDS)
_VERIFIED = Path(__file__).with_name("verified.json")
_ops = {}


def register(op, **modules):
    """Declare an op and the module path of each of its backends."""
    _ops[op] = modules


def registered_ops():
    """Names of the registered ops. The families register on import of `lgkernels.functional`."""
    return sorted(_ops)


def architecture(device):
    """`"sm_86"` for a CUDA device, else the device type."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=1)
def verified():
    """{op: {architecture: [backends that passed the GPU tests, best first]}}, written by `bench.report`."""
    return json.loads(_VERIFIED.read_text()) if _VERIFIED.exists() else {}


def interpreting():
    """True when Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(op, backend, device, dtype):
    """Why `backend` can't run `op` here; None if it can."""
    if backend not in _ops[op]:
        return f"{op} has no {backend} backend"
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 is for the reference only"
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on CPU tensors, got {device.type}"
        return None if native.native() else f"the native module is not there ({native.native_error()})"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda" or interpreting():
            return None
        return f"Triton runs on CUDA tensors (on CPU only with TRITON_INTERPRET=1), got {device.type}"
    if native.cuda_entries() is None:
        return f"the native module has no CUDA kernels ({native.native_error() or 'built for CPU only'})"
    if device.type != native.cuda_device_type():
        return f"it runs on {native.cuda_device_type()} tensors, got {device.type}"
    return None


def explain(op, device, dtype):
    """`(backend, reason)` that `impl="auto"` uses for this op on this device and dtype."""
    device = torch.device(device)
    if dtype == torch.float64:
        return "reference", "float64 is for the reference only"
    if device.type == "cpu":
        why_not = unavailable(op, "cpu", device, dtype)
        return ("reference", why_not) if why_not else ("cpu", f"native C++ ({native.native().cpu_level()})")
    if device.type == "cuda":
        passed, here = verified().get(op, {}), architecture(device)
        for arch in [here] + sorted(set(passed) - {here}):
            for backend in passed.get(arch, []):
                if unavailable(op, backend, device, dtype) is None:
                    return backend, f"passed the GPU tests on {arch}"
        return "reference", f"no kernel of {op} has passed the GPU tests on any architecture yet"
    return "reference", f"no kernels for {device.type}"


@lru_cache(maxsize=1024)
def _choose(op, impl, device, dtype, _environment):
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "auto":
        return explain(op, device, dtype)[0]
    why_not = unavailable(op, impl, device, dtype)
    if why_not:
        usable = [b for b in BACKENDS if unavailable(op, b, device, dtype) is None]
        raise ValueError(f"impl={impl!r} can't run {op} on {device.type} {dtype}: {why_not}; usable here: {usable}")
    return impl


def choose(op, impl, device, dtype):
    """Name of the backend that runs `op`; ValueError if the one asked for can't."""
    if impl == "auto":
        impl = os.environ.get("LGKERNELS_IMPL", "auto")
    return _choose(op, impl, device, dtype, (interpreting(), id(native.cuda_entries())))


def backend(op, impl, device, dtype):
    """The module that runs `op` on tensors of this device and dtype."""
    return importlib.import_module(_ops[op][choose(op, impl, device, dtype)])
