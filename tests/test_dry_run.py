"""bench/gpu_check.py without a GPU: a dry run of every kind of part; tests that crash, or are killed.

Triton's interpreter and the CPU executor stand in for a device (tests/support/stand_in.py).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import common, gpu_check, gpu_lines
from lgkernels.core import trust, verdicts
from tests.support import outcomes
from tests.support.once import made_once
from tests.test_verify import kept_in

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*arguments, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", **environment}
    for name in ("LGKERNELS_IMPL", "THP_MEM_ALLOC_ENABLE"):  # the second: set by the train command's tests
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# -- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu(tmp_path):
    done = run("bench.gpu_check", "--out", str(tmp_path))
    assert done.returncode == 2 and "gpu_check needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x", "--only", "build,nonsense"], "unknown part 'nonsense'; expected some of build,verify,test:"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_it_finds_its_parts():
    with_kernels = {path.parent.name for path in (ROOT / "lgkernels" / "ops").glob("*/cuda.py")} - {"common"}
    parts = set(gpu_check.find_parts())
    assert {f"test:{family}" for family in with_kernels} | {f"bench:{name}" for name in common.families()} < parts
    assert all(gpu_check.limit_of(part, 1000) < gpu_check.BUDGET for part in parts)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A run of each kind of part, small selections: its status, what it printed, its folder."""
    folder = made_once(tmp_path_factory, "dry", run_dry)
    return *json.loads((folder / "done.json").read_text()), folder


def run_dry(folder):
    folder.mkdir(exist_ok=True)
    parts = "build,verify,test:offset,alone,bench:offset,line:fused_update,sanitizer"
    chosen = ["-n", "2", "-k", "test_any_layout and dense-dense-dense or test_no_kernel", "--op", "feedback_pack_signs"]
    stand_in = dict(LGKERNELS_STAND_IN="cpu", TRITON_INTERPRET="1", LGKERNELS_CACHE_DIR=str(folder / "cache"))
    done = run("bench.gpu_check", "--out", str(folder / "out"), "--only", parts, *chosen, **stand_in)
    (folder / "done.json").write_text(json.dumps([done.returncode, done.stdout]))


def test_a_dry_run_has_an_outcome_of_every_part(dry):
    status, printed, folder = dry
    state = json.loads((folder / "out" / "gpu_check.json").read_text())
    for part in ("build", "verify", "test:offset", "alone", "bench:offset", "line:fused_update", "sanitizer"):
        assert state[part]["ok"], (part, state[part], printed[-3000:])
    assert status == 1, "the other parts are missing"
    assert {row["backend"]: row["verdict"] for row in state["verify"]["rows"]} == {"triton": "good", "cuda": "good"}
    assert state["sanitizer"]["counts"].keys() <= {"skipped", "passed"}
    assert state["proved"]["offset_sgd_"].keys() == {"triton", "cuda"}
    assert all(found["passed"] and not found["failed"] for found in state["proved"]["offset_sgd_"].values())
    assert "-n 2 " in (folder / "out" / "test.log").read_text()
    lines = state["line:fused_update"]["lines"]
    assert len(lines) == 2 and all(line["value"] > 0 for line in lines) and "at most 1.15" in printed


def test_lines():
    """A row on either side of every line; a case of other sizes, or without kernels of ours."""
    shape = dict(channels=9216, out_channels=4096, dtype="float32")
    weights = 3 * 4 * 9216 * 4096

    def rows(op, batch, *providers):
        return [
            dict(case=f"{op}{batch}", op=op, batch=batch, provider=name, role=role, backend=backend, **shape)
            | dict(median_ms=ms, peak_bytes=peak)
            for name, role, backend, ms, peak in providers
        ]

    def judged(family, *given):
        return [(line["value"], line["met"]) for line in gpu_lines.judged(family, rows(*given))]

    def step(ms, share, backend="cuda"):
        hooks = gpu_lines.HOOKS, "peer", None, 13.0, 0
        return judged("fused_update", "fused_update_step", 8, ("ours", "ours", backend, ms, share * weights), hooks)

    assert step(9.9, 0.14) == [(pytest.approx(9.9 / 13), True), (pytest.approx(1.14), True)]
    assert [met for _, met in step(10.1, 0.16)] == [False, False]
    assert step(1.0, 0.0, "torch") == [(None, False)] * 2
    floor = "two forwards", "floor", None, 4.0, 0
    sides = [("a", "ours", "triton", 5.1, 0), ("b", "ours", "cuda", 4.9, 0), ("c", "ours", "torch", 1.0, 0), floor]
    assert judged("zeroth_order", "zeroth_order_step", 2048, *sides) == [(pytest.approx(4.9 / 4), True)]
    assert judged("zeroth_order", "zeroth_order_step", 2048, sides[0], floor) == [(pytest.approx(5.1 / 4), False)]
    assert judged("zeroth_order", "zeroth_order_step", 512, *sides) == []


def test_what_comes_back_is_at_most_eight_files(dry):
    *_, folder = dry
    files = [path.name for path in (folder / "out").iterdir()]
    assert len(files) <= 8 and {"gpu_check.json", "tests.jsonl", "test.log", "bench.log"} < set(files)


def test_verdicts_are_kept_where_a_user_finds_them(dry):
    *_, folder = dry
    kept = {key: entry["state"] for key, entry in kept_in(folder / "cache").items()}
    assert {key.rpartition("/")[0] for key in kept} == {"feedback_pack_signs/triton", "feedback_pack_signs/cuda"}
    assert set(kept.values()) == {"good"}, "the ops' tests have not all run: they decide nothing yet"


# -- tests that pass, fail, crash, and are killed --------------------------------------------------------------------

TOY = """
import os, time
import pytest

pytestmark = pytest.mark.op("goodness")


def ran(name):
    with open("ran", "a") as file:
        print(name, file=file)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_passes(backend):
    ran("passes")


@pytest.mark.parametrize("backend", ["triton"])
def test_crashes(backend):
    ran("crashes")
    os._exit(7)


@pytest.mark.sanitizer
def test_checker():
    ran("checker")
    assert not "a race"


@pytest.mark.parametrize("backend", ["cuda"])
def test_takes_long(backend):
    ran("takes long")
    time.sleep(0 if os.path.exists("quick") else 300)


@pytest.mark.parametrize("backend", ["cuda"])
def test_z_comes_last(backend):
    ran("last")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "toys" / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "toys" / "test_gpu_it.py").write_text(TOY)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for name, value in dict(PYTHONPATH=str(ROOT), LGKERNELS_STAND_IN="cpu", TRITON_INTERPRET="1").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "out").mkdir()

    def part(kind="test", workers=1, limit=120.0, again=False):
        (tmp_path / "ran").write_text("")
        options = argparse.Namespace(workers=workers, k=None, op=None)
        state = gpu_check.tests(["toys"], kind, gpu_check.Run(tmp_path / "out", limit, options, again))
        return state, (tmp_path / "ran").read_text().splitlines()

    part.path = tmp_path / "out" / "tests.jsonl"
    part.quick = (tmp_path / "quick").touch
    return part


def states(path):
    return {name.rpartition("::")[2]: record["state"] for name, record in outcomes.read(path).items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_is_a_failure_of_its_own_test(toy, workers):
    toy.quick()
    state, ran = toy(workers=workers)
    assert not state["ok"] and state["counts"] == {"passed": 4, "failed": 1}
    assert states(toy.path)["test_crashes[triton]"] == "failed" and "last" in ran
    found = gpu_check.proved(toy.path)["goodness"]
    assert found["cuda"] == {"passed": 3, "failed": []}
    assert found["triton"]["failed"] == ["toys/test_gpu_it.py::test_crashes[triton]"]
    assert ran.count("crashes") == 1


def test_a_part_that_is_killed_loses_nothing(toy):
    lines = [
        {
            "test": f"toys/test_gpu_it.py::{name}",
            "ops": ["goodness"],
            "backend": backend,
            "kind": "test",
            "state": state,
        }
        for name, backend, state in (
            ("test_crashes[triton]", "triton", "skipped"),
            ("test_passes[triton]", "triton", "passed"),
        )
    ]
    for line in lines:
        outcomes.append(toy.path, line)
    state, ran = toy(limit=20.0)
    assert ran == ["passes", "takes long"], "what has passed is not run again"
    assert state["status"] is None and not state["ok"] and not state["ended"]
    assert states(toy.path)["test_passes[cuda]"] == "passed"
    assert states(toy.path)["test_takes_long[cuda]"] == "unfinished"
    toy.quick()
    state, ran = toy()
    assert ran == ["takes long", "last"] and state["ok"]


def test_sanitizers_decide_nothing(toy):
    state, ran = toy("sanitizer")
    assert ran == ["checker"] and state["ok"] and "a race" in state["tail"][0]
    assert gpu_check.proved(toy.path) == {}


def test_a_test_that_never_ends_has_failed(tmp_path):
    path = tmp_path / "tests.jsonl"
    for name, age in (("hangs", 400), ("began just now", 10)):
        outcomes.append(path, {"test": name, "state": "running", "at": time.time() - age})
    with open(path, "a") as file:
        file.write('{"test": "cut o')  # the machine went away
    gpu_check.settle(path, killed_after=500.0)
    assert states(path)["hangs"] == "failed" and states(path)["began just now"] == "unfinished"


# -- verdicts --------------------------------------------------------------------------------------------------------


def written(path, *tests):
    """Lines of tests of (ops, backend or None, state)."""
    for i, (ops, backend, state) in enumerate(tests):
        record = {
            "test": f"test {i}",
            "ops": ops.split(),
            "backend": backend,
            "kind": "test",
            "state": state,
            "why": "",
        }
        outcomes.append(path, record)
    return path


def test_a_failing_test_takes_off_its_own_op_alone(tmp_path):
    path = written(
        tmp_path / "tests.jsonl",
        ("lls_loss", "triton", "passed"),
        ("lls_loss lls_block", "cuda", "passed"),
        ("lls_block", "triton", "passed"),
        ("lls_block", "triton", "failed"),
        ("lls_loss", "reference", "failed"),
        ("toy", "cuda", "passed"),
        ("toy", "triton", "skipped"),
        ("other", "triton", "passed"),
        ("other", "cuda", "passed"),
        ("other", None, "failed"),
    )
    passed = {op: {b: not f["failed"] for b, f in backends.items()} for op, backends in gpu_check.proved(path).items()}
    assert passed == {
        "lls_loss": {"triton": True, "cuda": True},
        "lls_block": {"triton": False, "cuda": True},
        "toy": {"cuda": True},
        "other": {"triton": False, "cuda": False},
    }


@pytest.mark.parametrize("ended", [True, False])
def test_an_op_whose_tests_failed_is_off(tmp_path, monkeypatch, ended):
    """With its warning, whatever the trials of its specialisations have said."""
    import lgkernels.functional as LF
    from lgkernels.core import dispatch

    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(gpu_check, "STAND_IN", "cpu")
    dispatch._chosen.cache_clear()
    trust.forget_all()
    path = written(tmp_path / "t", ("goodness", "triton", "failed"), ("similarity", "triton", "passed"))
    state = {part: {"ended": ended} for part in gpu_check.PARTS}
    store = gpu_check.keep(state, path)
    assert store.state("goodness/triton")[0] == verdicts.BAD
    assert store.state("similarity/triton")[0] == (verdicts.GOOD if ended else None)
    try:
        with pytest.warns(
            UserWarning, match="goodness runs in plain torch on cpu.* 1 of its tests failed, test 0 first"
        ):
            LF.goodness_loss(torch.ones(64, 12), torch.arange(64) % 2 == 0, threshold=0.3)
    finally:
        trust.forget_all()
        dispatch._chosen.cache_clear()


# -- marks -----------------------------------------------------------------------------------------------------------


def test_every_gpu_test_names_its_op_and_every_gpu_kernel_has_a_test():
    from lgkernels.core import dispatch

    done = run("pytest", "--gpu", "--collect-only", "tests", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ops under test: "))
    tested = line.partition(": ")[2].split(", ")
    assert {op for op in dispatch.registered_ops() if "cuda" in dispatch.backends(op)} <= set(tested)


@pytest.mark.parametrize(
    "mark, fault",
    [("", "it has no mark op"), ("@pytest.mark.op('nonsense')\n", "its mark op names ['nonsense']; registered are [")],
)
def test_a_gpu_test_without_an_op_is_refused(tmp_path, mark, fault):
    path = tmp_path / "test_gpu_it.py"
    path.write_text(f"import pytest\n\n{mark}def test_it():\n    pass\n")
    done = run("pytest", "--collect-only", "-p", "tests.support.op_marks", "-p", "no:cacheprovider", str(path))
    assert done.returncode != 0 and f"test_it: {fault}" in done.stdout + done.stderr
