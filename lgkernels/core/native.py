"""The optional native module `lgkernels._C`, loaded at first use."""

import importlib.util
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch  # before _C, so that both share one OpenMP pool

_cuda_override = None  # tests put the executor build of the CUDA kernels here: it runs them on CPU tensors


LEVELS = ("default", "avx2", "avx512")  # instructions of the CPU kernels
MOST_THREADS = max(1024, os.cpu_count() or 1)  # the OpenMP runtime ends the process where it can start no more


@lru_cache(maxsize=1)
def _load():
    level = os.environ.get("LGKERNELS_CPU") or None
    if level not in (None, *LEVELS):
        raise ValueError(f"LGKERNELS_CPU must be one of {', '.join(LEVELS)}, got {level!r}")
    try:
        from lgkernels import _C
    except ImportError as error:
        if importlib.util.find_spec("lgkernels._C") is None:
            _warn_if_elsewhere(Path(__file__).resolve().parents[1], sys.path)
            return None, "built without the native module: there was no compiler, or LGKERNELS_BUILD=none"
        return None, str(error)
    if level not in (None, found := _C.cpu.cpu_level()):
        raise ValueError(f"LGKERNELS_CPU must be a level of this processor, which has {found}, got {level!r}")
    _warn_if_outdated(_C, Path(__file__).resolve().parents[2] / "csrc")
    # glibc returns free memory to the system above twice the largest block freed so far. A step's buffers (LLS's
    # pre-activation and output, a convolution's feedback weight) reach that together, and every step then pays
    # thousands of page faults (16 MB, 4 of 29 ms). Freeing once the largest block that glibc learns from, 32 MiB,
    # never touched, lifts the mark to 64 MiB.
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
    return _C, None


def _warn_if_elsewhere(package, search_path):
    """A tree that was not built hides an installed package that was; say so, or its kernels are missed in silence."""
    for folder in search_path:
        other = Path(folder).resolve() / "lgkernels"
        if other != package and any(other.glob("_C.*")):
            warnings.warn(
                f"lgkernels is imported from {package.parent}, which has no native module, and hides the one in "
                f"{other.parent}, which has: build this one with `pip install -e .`, or start Python in another folder",
                stacklevel=4,
            )
            return


def _sources(csrc, cuda):
    """The files that a build with or without CUDA reads (see CMakeLists.txt), and no editor's."""
    patterns = ["*.cpp", "*/*.h", "*/cpu/*.h", "*/cpu/*.cpp"]
    patterns += [f"*/cuda/*.{suffix}" for suffix in ("h", "cpp", "cu", "cuh") if cuda]
    return [path for pattern in patterns for path in csrc.glob(pattern) if not path.name.startswith(".")]


def _warn_if_outdated(module, csrc):
    """An editable install goes on with the old module after an update of the tree; say so before calls fail."""
    newest = max((path.stat().st_mtime for path in _sources(csrc, module.has_cuda)), default=0.0)
    if newest > os.stat(module.__file__).st_mtime:
        warnings.warn(
            "lgkernels._C is older than its sources in csrc/: build it again with "
            "`pip install -e .` (or `python setup.py build_ext --inplace`)",
            stacklevel=3,
        )


def native():
    """`lgkernels._C`, or None where the package was built without it."""
    return _load()[0]


def native_error():
    """Why `native()` is None: the import error's text; None where it loaded."""
    return _load()[1]


def cpu_entries():
    """The module that holds the CPU entry points, or None."""
    module = native()
    return module if module is None else module.cpu


def threads():
    """How many threads a CPU kernel may use: torch's number."""
    count = torch.get_num_threads()
    if count > MOST_THREADS:
        raise ValueError(f"the threads of torch must be at most {MOST_THREADS}, got {count}: torch.set_num_threads")
    return count


def cuda_entries():
    """The module that holds the CUDA entry points, or None."""
    if _cuda_override is not None:
        return _cuda_override
    module = native()
    return module.cuda if module is not None and module.has_cuda else None


def cuda_device_type():
    """Device type that `cuda_entries` takes: "cuda", or "cpu" under the tests' executor."""
    return "cuda" if _cuda_override is None else "cpu"


def version_text(number):
    """A CUDA version as its own functions give it, for people."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


@lru_cache(maxsize=16)
def _cuda_unusable(entries, index):
    runtime, driver = entries.cuda_runtime_version(), entries.cuda_driver_version()
    if not driver:
        return "there is no CUDA driver"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver serves CUDA {version_text(driver)}, the native kernels were built with "
            f"{version_text(runtime)}: update the driver"
        )
    status = entries.cuda_device_status(index)
    if status == 0:
        return None
    built = ", ".join(f"sm_{number // 10}" for number in entries.cuda_architectures())
    return f"the native kernels, built for {built}, do not run on it: {entries.cuda_error_string(status)}"


def cuda_unusable(device):
    """Why `cuda_entries` cannot run on a CUDA device; None if it can. Asked once a device."""
    if _cuda_override is not None:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_unusable(cuda_entries(), index)


def override_cuda(module):
    """Let `module` stand in for the CUDA entry points (None: no more). For tests."""
    global _cuda_override
    _cuda_override = module
