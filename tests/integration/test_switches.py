"""Switches with impossible values are refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lgkernels.__main__ as command
import lgkernels.functional as LF
from lgkernels.core import environment, native
from tests.conftest import running

X, Y = torch.ones(2, 4), torch.tensor([0, 1])
CALL = (
    "import torch, lgkernels.functional as LF; "
    "LF.lls_loss(torch.ones(2, 4), torch.tensor([0, 1]), num_classes=3, pool_size=4, impl='cpu')"
)


def loss(**options):
    return LF.lls_loss(X, Y, num_classes=3, pool_size=4, **options)


@pytest.mark.parametrize("name", ["LGKERNELS_IMPL", "LGKERNELS_TRUST"])
def test_words(name, monkeypatch):
    monkeypatch.setenv(name, "bogus")
    with pytest.raises(ValueError, match=rf"{name} must be one of .*, got 'bogus'"):
        loss()


@pytest.mark.parametrize("value", ["yes", "2", "", "true"])
def test_on_or_off(value, monkeypatch):
    monkeypatch.setenv("LGKERNELS_CHECK", value)
    with pytest.raises(ValueError, match=f"LGKERNELS_CHECK must be 0 or 1, got {value!r}"):
        environment.is_on("LGKERNELS_CHECK")
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("LGKERNELS_CHECK", value)
        assert environment.is_on("LGKERNELS_CHECK") is expected
    monkeypatch.delenv("LGKERNELS_CHECK")
    assert not environment.is_on("LGKERNELS_CHECK")


def _run(**variables):
    return subprocess.run([sys.executable, "-c", CALL], env={**os.environ, **variables}, capture_output=True, text=True)


def test_a_level_that_there_is_not():
    with running("cpu"):
        done = _run(LGKERNELS_CPU="bogus")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: LGKERNELS_CPU must be one of default, avx2, avx512, got 'bogus'\n")
    assert _run(LGKERNELS_CPU="default").returncode == 0


def test_a_level_that_the_processor_has_not(monkeypatch):
    with running("cpu"):
        found = native.native().cpu.cpu_level()
    other = next(level for level in native.LEVELS if level != found)
    monkeypatch.setenv("LGKERNELS_CPU", other)
    with pytest.raises(ValueError, match=f"must be a level of this processor, which has {found}, got '{other}'"):
        native._load.__wrapped__()


def test_more_threads_than_a_process_can_have():
    """OpenMP's runtime would end the process, or the kernels' stacks would overflow."""
    with running("cpu"):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(100_000)
            with pytest.raises(ValueError, match="threads of torch must be at most .*, got 100000: torch.set_num_thr"):
                loss(impl="cpu")
        finally:
            torch.set_num_threads(before)
        assert loss(impl="cpu").isfinite()


def test_every_backend_asks_there():
    """For its number of threads."""
    ops = Path(native.__file__).resolve().parents[1] / "ops"
    files = list(ops.rglob("*.py"))
    assert len(files) > 50 and not [path for path in files if "get_num_threads" in path.read_text()]


@pytest.mark.parametrize("name", ["IMPL", "TRUST", "CHECK", "GRAPHS"])
def test_every_command_checks_all(name, monkeypatch, capsys):
    """Also those switches that it would not read."""
    monkeypatch.setenv(f"LGKERNELS_{name}", "maybe")
    for line in (["info"], ["plan", "--model", "resnet50"], ["train"], ["verify"]):
        assert command.main(line) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith(f"python -m lgkernels {line[0]}: error: LGKERNELS_{name} must be ")
        assert err.endswith(", got 'maybe'\n") and err.count("\n") == 1


def test_a_command_checks_the_processors_level():
    with running("cpu"):
        line = [sys.executable, "-m", "lgkernels", "info"]
        done = subprocess.run(line, env={**os.environ, "LGKERNELS_CPU": "bogus"}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    said = "LGKERNELS_CPU must be one of default, avx2, avx512, got 'bogus'"
    assert done.stderr == f"python -m lgkernels info: error: {said}\n"
