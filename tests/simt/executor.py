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
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
ORDERS = ("ascending", "descending", "shuffled")
SANITIZERS = "address,undefined"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLGK_SIMT")


def _sources():
    return sorted((ROOT / "csrc/cuda").glob("*.cu")) + [ROOT / "csrc/cuda_bindings.cpp", HERE / "module.cpp"]


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


def build(sanitizers=""):
    """Path of the module, built into build/simt/<hash of sources and flags> unless it lies there already."""
    import pybind11
    flags, checks = list(_FLAGS), []
    if sanitizers:
        checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
    sources = _sources()
    digest = hashlib.sha256(repr((flags, checks, sys.version, pybind11.__version__)).encode())
    for path in sources + [*sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc/include/lgk").glob("*.h"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build/simt" / digest.hexdigest()[:16]
    module = folder / ("lgk_simt" + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{path}" for path in (ROOT / "csrc/include", HERE, pybind11.get_include(),
                                        sysconfig.get_paths()["include"])]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, commands = [f"{scratch}/{source.name}.o" for source in sources], []
        for source, out in zip(sources, objects):
            own = checks if source.name != "cuda_bindings.cpp" else []  # no kernel there, and half of the build's time
            commands.append([compiler(), *flags, *own, *include, "-x", "c++", "-c", str(source), "-o", out])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run([compiler(), *flags, *checks, "-shared", *objects, "-o", f"{scratch}/module.so"])
        os.replace(f"{scratch}/module.so", module)  # another process may be building the same
    return module


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


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


@functools.lru_cache(maxsize=None)
def backend(family):
    return _OnExecutor(family)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
