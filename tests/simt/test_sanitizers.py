"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python of their own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

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


def run(*command, **more):
    executor.build(executor.SANITIZERS)
    environment = {
        **os.environ,
        "LGK_SIMT_SANITIZE": "1",
        "LD_PRELOAD": _preload(),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **more,
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


@pytest.fixture(scope="module")
def native():
    """The CPU kernels with sanitizers; what is compiled stays in build/."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if cmake is None:
        pytest.skip("cmake is not installed")
    folder = executor.ROOT / "build/sanitized"
    for command in (
        [cmake, "-S", executor.ROOT, "-B", folder, f"-DLGK_SANITIZE={executor.SANITIZERS.replace(',', ';')}"]
        + [f"-DPython_EXECUTABLE={sys.executable}"],
        [cmake, "--build", folder, "--target", "_C", "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = folder.glob("_C.*.so")
    return str(path)


STATES = ["tests/integration/test_replaced_state.py", "tests/integration/test_door.py"]


@pytest.mark.parametrize("backend", ["cpu", "cuda-simt"])
def test_replaced_states_reach_no_kernel(backend, native):
    """What a user, a checkpoint or another library put in place of a parameter, a buffer or an optimizer's state."""
    command = "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "tests.support.native_at"
    files = STATES if backend == "cpu" else STATES[:1]
    result = run(*command, *files, "-k", f"{backend} or (test_door and not torch)", LGK_NATIVE=native)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 15, result.stdout[-500:]
