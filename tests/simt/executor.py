"""Builds and loads the CUDA kernels for the CPU executor (simt.h), and runs the CUDA backend on it.

`python -m tests.simt.executor [sanitizers]` builds and prints the module's path.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from filelock import FileLock  # torch requires it

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
FOLDER = ROOT / "build/simt"
ORDERS = ("ascending", "descending", "shuffled")
SANITIZERS = "address,undefined"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLGK_SIMT")


def compiler():
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def unavailable():
    """Why the executor cannot run here, or None."""
    if sys.platform != "linux":
        return "the executor needs Linux"
    if compiler() is None:
        return "no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _made(path, command):
    """`path`, written by `command` unless it lies there; of several processes that ask, one writes, the rest wait."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _run([*command, "-o", f"{path}.new"])
            os.replace(f"{path}.new", path)
    return path


def build(sanitizers=""):
    """Path of the module. What is compiled lies in build/simt under the hash of its sources and flags."""
    import pybind11

    checks = []
    if sanitizers:  # not optimised: their checks take the optimiser longer than they take the tests
        checks = ["-O0", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
    include = [f"-I{path}" for path in (ROOT / "csrc", HERE, pybind11.get_include(), sysconfig.get_paths()["include"])]
    common = hashlib.sha256(repr((compiler(), _FLAGS, sys.version, pybind11.__version__)).encode())
    for path in [*sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc").rglob("*.h"))]:
        common.update(path.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        own = checks if source.suffix == ".cu" else []  # the bindings have no kernel, and half of the build's time
        digest = common.copy()
        digest.update(repr(own).encode() + source.read_bytes())
        return _made(
            FOLDER / f"{source.parts[-3]}-{source.name}-{digest.hexdigest()[:16]}.o",
            [compiler(), *_FLAGS, *own, *include, "-x", "c++", "-c", str(source)],
        )

    # Bindings start first, because they take longest; of a function that both hold, the linker takes the kernels'.
    bindings = [*sorted((ROOT / "csrc").glob("*/cuda/*.cpp")), HERE / "module.cpp"]
    kernels = [*sorted((ROOT / "csrc").glob("*/cuda/*.cu")), HERE / "wrong_kernels.cu"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, bindings + kernels)]
    objects = objects[len(bindings) :] + objects[: len(bindings)]
    folder = FOLDER / hashlib.sha256(repr((objects, checks)).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return _made(
        folder / ("lgk_simt" + sysconfig.get_config_var("EXT_SUFFIX")),
        [compiler(), *_FLAGS, *checks, "-shared", *objects],
    )


@functools.lru_cache(maxsize=1)
def module():
    """The executor's module; LGK_SIMT_SANITIZE=1 takes the sanitizers' build (their runtime must be preloaded)."""
    path = build(SANITIZERS if os.environ.get("LGK_SIMT_SANITIZE") == "1" else "")
    spec = importlib.util.spec_from_file_location("lgk_simt", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class _OnExecutor:
    """A family's CUDA backend whose functions run on the executor, with CPU tensors."""

    def __init__(self, family):
        self._backend = importlib.import_module(f"lgkernels.ops.{family}.cuda")

    def __getattr__(self, name):
        value = getattr(self._backend, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def run(*args, **kwargs):
            from lgkernels.core import native

            native.override_cuda(module())
            try:
                return value(*args, **kwargs)
            finally:
                native.override_cuda(None)

        return run


@functools.cache
def backend(family):
    return _OnExecutor(family)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
