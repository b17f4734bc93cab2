"""What runs, in words: one line for `train` and `info`, one warning where plain torch runs and nobody asked for it."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.core import advice, dispatch, native, trust, verdicts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LGKERNELS_IMPL", raising=False)
    monkeypatch.delenv("LGKERNELS_TRUST", raising=False)
    trust.forget_all()
    dispatch._chosen.cache_clear()
    yield
    trust.forget_all()
    dispatch._chosen.cache_clear()


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "there was no compiler"))


def loss():
    return LF.goodness_loss(torch.ones(8, 12), torch.arange(8) % 2 == 0)


def test_without_the_native_module_it_says_so_once(no_native):
    with pytest.warns(UserWarning, match="plain torch on cpu: the native module is not there .*To do: install a C"):
        loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss()
        LF.lls_loss(torch.ones(8, 12), torch.arange(8) % 3, num_classes=3, pool_size=12)


@pytest.mark.parametrize("who", ["nobody asked", "float64", "LGKERNELS_IMPL"])
def test_what_was_asked_for_is_no_fallback(no_native, who, monkeypatch):
    if who == "LGKERNELS_IMPL":
        monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if who == "float64":
            LF.goodness_loss(torch.ones(8, 12, dtype=torch.float64), torch.arange(8) % 2 == 0)
        elif who == "LGKERNELS_IMPL":
            loss()
        else:  # an op that has no kernels on a CPU
            LF.nt_xent_loss(torch.randn(8, 12))


def test_the_line_of_train(no_native):
    text = advice.line("cpu", torch.float32)
    assert text.startswith("kernels: none, plain torch runs: the native module is not there (there was no compiler).")
    assert "To do: install a C++ compiler" in text and "\n" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss()


def test_the_line_names_what_runs(monkeypatch):
    if native.native() is None:
        pytest.skip("the native module is not built")
    assert advice.line("cpu", torch.bfloat16).startswith("kernels: cpu (native C++")
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    assert advice.line("cpu", torch.float32) == "kernels: those of LGKERNELS_IMPL=reference"


def test_on_a_gpu_it_tells_how_the_trials_went(monkeypatch):
    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    assert advice.line("cpu", torch.float32).startswith("kernels: triton (each specialisation once it has passed")
    store = trust.store(CPU)
    store.note("goodness/triton/1", verdicts.GOOD, "goodness triton float32 (12,)")
    store.note("goodness_backward/triton/2", verdicts.GOOD, "goodness_backward triton float32 (12,)")
    store.note("goodness/triton/3", verdicts.BAD, "goodness triton float32 (13,)", "result 0: error 1")
    store.note("similarity/cuda", verdicts.BAD, "tests", "gpu_check: 2 of its tests failed")
    found = advice.evidence(CPU)
    assert found["goodness"] == "triton: 2 specialisations passed here, 1 failed: result 0: error 1"
    assert found["similarity"] == "cuda: off: gpu_check: 2 of its tests failed"
    assert "2 ops with kernels that failed here" in advice.line("cpu", torch.float32)
    monkeypatch.setenv("LGKERNELS_TRUST", "never")
    assert "LGKERNELS_TRUST=never. To do: unset LGKERNELS_TRUST" in advice.line("cpu", torch.float32)


def test_the_other_backend_takes_over_where_tests_have_failed(monkeypatch):
    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(dispatch, "unavailable", lambda op, backend, *_: None)
    trust.store(CPU).note("goodness/triton", verdicts.BAD, "tests", "they failed")
    assert dispatch.explain("goodness", CPU, torch.float32)[0] == "cuda"
    dispatch.prefer("triton")
    try:
        assert dispatch.explain("goodness", CPU, torch.float32)[0] == "triton", "verify tries all"
    finally:
        dispatch.prefer()


def test_what_another_process_has_noted_since_is_its_own():
    mine, theirs = verdicts.Verdicts(CPU), verdicts.Verdicts(CPU)
    theirs.note("a", verdicts.RUNNING, "a")
    mine.note("b", verdicts.GOOD, "b")  # has read that a runs
    theirs.note("a", verdicts.GOOD, "a")
    mine.note("c", verdicts.GOOD, "c")
    assert verdicts.Verdicts(CPU).state("a") == (verdicts.GOOD, "")


@pytest.mark.parametrize("raised", ["ImportError", "OSError", "RuntimeError"])
def test_a_triton_that_cannot_be_imported_is_not_usable(raised, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"raise {raised}('libtriton.so: undefined symbol')")
    program = """
        import torch
        import lgkernels.functional as LF
        from lgkernels.core import dispatch, verdicts
        loss = LF.goodness_loss(torch.ones(8, 12), torch.arange(8) % 2 == 0)
        print(dispatch.unavailable("goodness", "triton", loss.device, loss.dtype))
        print(verdicts.fingerprint(loss.device)["triton"])
    """
    stand_in = dict(LGKERNELS_STAND_IN="cpu", TRITON_INTERPRET="1", LGKERNELS_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **stand_in, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    why = f"triton is installed and cannot be imported ({raised}: libtriton.so: undefined symbol)"
    assert done.stdout.splitlines() == [why, "none"]
    assert f"runs in plain torch on cpu: goodness has no kernels that can run here; {why}" in done.stderr
    assert "To do: `pip install --force-reinstall triton`" in done.stderr


@pytest.mark.parametrize("is_there", [True, False])
def test_train_says_what_runs(is_there, monkeypatch, capsys):
    from lgkernels.recipes.session import Session

    if not is_there:
        monkeypatch.setattr(native, "_load", lambda: (None, "there was no compiler"))
    settings = SimpleNamespace(
        model="vgg8", epochs=1, batch_size=2, optimizer="adam", rules=[], device="cpu", amp="bf16", notes=list
    )
    Session(settings, SimpleNamespace(title="images"), Path("runs"), resume=False)._announce()
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("kernels: ")]
    assert ("none, plain torch runs: the native module is not there" in line) == (native.native() is None)


def test_info_shows_the_verdicts(monkeypatch):
    from lgkernels.core import diagnostics

    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    trust.store(CPU).note("goodness/triton/3", verdicts.BAD, "goodness triton float32 (13,)", "result 0: error 1")
    text = diagnostics.as_text(diagnostics.gather())
    assert f"tried on cpu, kept in {trust.store(CPU).path}" in text
    assert "triton: 1 failed: result 0: error 1" in text and "in short: cpu: kernels: triton" in text
    assert "python -m lgkernels verify --again repeats trials that failed, --forget drops all verdicts" in text
    assert "LGKERNELS_TRUST      (unset: first-use)" in text and "LGKERNELS_CACHE_DIR" in text
