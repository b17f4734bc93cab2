"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python of their own."""

import re
import subprocess
import sys

import pytest

from tests.simt import executor
from tests.support import sanitized_native

_TESTS = executor.ROOT / "tests"
FAMILIES = [str(path) for name in ("orders", "kernels") for path in sorted(_TESTS.glob(f"*/test_{name}.py"))]


WHY_NOT = sanitized_native.unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def run(*command):
    executor.build(executor.SANITIZERS)
    environment = sanitized_native.environment(LGK_SIMT_SANITIZE="1")
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
