"""The sanitizers' runtime for a Python of its own, and the native module under AddressSanitizer and
UndefinedBehaviorSanitizer, as a plugin of pytest that puts it in place of the installed one:
`pytest -p tests.support.sanitized_native`."""

import importlib.util
import os
import subprocess
import sys

from filelock import FileLock  # torch requires it

from tests.simt import executor

FOLDER = executor.ROOT / "build/sanitized"


def _preload():
    """The sanitizer's runtime, which must come first in the process, and libstdc++, whose throw it wraps."""
    compiler = executor.compiler()
    libraries = (
        [
            subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        if compiler
        else []
    )
    return ":".join(libraries) if libraries and all(os.path.isabs(path) for path in libraries) else None


def unavailable():
    """Why no sanitizer can run here, or None."""
    return executor.unavailable() or (None if _preload() else "the compiler has no AddressSanitizer runtime")


def environment(**more):
    """Of a process in which the sanitizers run."""
    return {
        **os.environ,
        "LD_PRELOAD": _preload(),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **more,
    }


def build():
    """Path of the module, with kernels of the base instruction-set level alone: the checks before them are the same,
    and the wider ones take the compiler several times as long."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(executor.ROOT), "-B", str(FOLDER), "-G", "Ninja", "-DLGK_X86_LEVELS=OFF"]
    configure += ["-DLGK_SANITIZE=address;undefined", f"-DPython_EXECUTABLE={sys.executable}"]
    with FileLock(f"{FOLDER}.lock"):
        for command in (configure, ["cmake", "--build", str(FOLDER)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    (path,) = FOLDER.glob("_C*.so")
    return path


def install():
    """`lgkernels._C` is that module from here on."""
    import torch  # noqa: F401  # whose OpenMP pool it shares

    spec = importlib.util.spec_from_file_location("lgkernels._C", build())
    module = sys.modules["lgkernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def pytest_configure(config):
    install()


def pytest_report_header():
    return f"native module: {sys.modules['lgkernels._C'].__file__}"
