"""State that users, checkpoints and other libraries put in place, with the CPU kernels under AddressSanitizer and
UndefinedBehaviorSanitizer, in a Python of their own."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.simt import executor
from tests.support import sanitized_native

FILES = [f"tests/integration/test_{name}.py" for name in ("replaced_state", "door", "door_values", "switches")]
WHY_NOT = sanitized_native.unavailable() or (None if shutil.which("cmake") else "no cmake")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def run(*command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=executor.ROOT,
        env=sanitized_native.environment(LGKERNELS_TEST_BACKENDS="cpu"),
        capture_output=True,
        text=True,
    )


def test_replaced_states_are_clean():
    plugins = [w for name in ("no:cacheprovider", "no:xdist", "tests.support.sanitized_native") for w in ("-p", name)]
    which = "not simt and not torch and not reference and not processor_has_not"
    result = run("-m", "pytest", "-x", *plugins, *FILES, "-k", which)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert f"native module: {sanitized_native.FOLDER}" in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 250, result.stdout[-500:]


BEHIND_THE_DOOR = """
from tests.support import sanitized_native
sanitized_native.install()
from lgkernels.core import trust
from lgkernels.ops.direct import cpu
from tests.integration.test_door import DOORS
op, arguments = trust.OPS["direct_forward"], list(DOORS["direct", "direct_forward"])
gamma = op.names.index("gamma")
arguments[gamma] = arguments[gamma][:{entries}].clone()
op.function(cpu, *op.pack(tuple(arguments[:len(op.names)])))
print("finished")
"""


@pytest.mark.parametrize("entries, clean", [("", True), (1, False)])
def test_what_a_door_would_let_through_is_caught(entries, clean):
    """An op without its door: all of gamma, and one entry of it."""
    result = run("-c", BEHIND_THE_DOOR.format(entries=entries))
    assert ("finished" in result.stdout) == clean, result.stdout + result.stderr
    assert ("heap-buffer-overflow" in result.stderr) != clean
