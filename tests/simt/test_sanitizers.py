"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python of their own."""

import os
import re
import subprocess
import sys

import pytest

from tests.simt import executor

_TESTS = executor.ROOT / "tests"
FAMILIES = [str(path) for name in ("orders", "kernels") for path in sorted(_TESTS.glob(f"*/test_{name}.py"))]


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


def _unavailable():
    return executor.unavailable() or (None if _preload() else "the compiler has no AddressSanitizer runtime")


pytestmark = pytest.mark.skipif(_unavailable() is not None, reason=str(_unavailable()))


def run(*command):
    executor.build(executor.SANITIZERS)
    environment = {
        **os.environ,
        "LGK_SIMT_SANITIZE": "1",
        "LD_PRELOAD": _preload(),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=executor.ROOT, env=environment, capture_output=True, text=True
    )


def test_kernels_are_clean():
    result = run(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "tests/simt/test_executor.py",
        *FAMILIES,
        "-k",
        "cuda-simt or (simt and not sanitizers)",
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 300, result.stdout[-500:]


@pytest.mark.parametrize("beyond, clean", [(0, True), (1, False)])
def test_an_overflow_is_caught(beyond, clean):
    result = run(
        "-c",
        "import torch; from tests.simt import executor; out = torch.empty(32); "
        f"executor.module().overflow(out.data_ptr(), 32, {beyond}); print('finished')",
    )
    assert ("finished" in result.stdout) == clean, result.stdout + result.stderr
    assert ("heap-buffer-overflow" in result.stderr) != clean


def test_an_overflow_of_a_tensor_is_caught():
    result = run(
        "-c",
        "import torch; from tests.simt import executor; out = torch.empty(31); "
        "executor.module().overflow(out.data_ptr(), 32, 0); print('finished')",
    )
    assert "finished" not in result.stdout and "heap-buffer-overflow" in result.stderr, result.stdout + result.stderr
