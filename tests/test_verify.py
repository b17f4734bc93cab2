"""`python -m lgkernels verify` on a CPU, with the interpreter and the CPU executor in the place of a GPU."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgkernels.core import dispatch, records, trust, verdicts, verify
from tests.simt import executor
from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*arguments, module="lgkernels", **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    for name in ("LGKERNELS_IMPL", "LGKERNELS_TRUST", "LGKERNELS_STAND_IN"):
        environment.pop(name, None)
    command = [sys.executable, "-m", module, "verify", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(done):
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return {(row["op"], row["backend"]): row for row in json.loads(done.stdout)["rows"]}


def kept_in(cache):
    (path,) = cache.glob("verdicts-*")
    head = json.loads(path.read_text().partition("\n")[0])
    return records.Records(path, head["about"], lambda *_: False).entries


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run over kernels of which one crashes, one never ends, one is wrong, and what it leaves in the cache."""
    if executor.unavailable():
        pytest.skip(executor.unavailable())
    folder = made_once(tmp_path_factory, "planted", run_planted)
    done = subprocess.CompletedProcess([], **json.loads((folder / "done.json").read_text()))
    return done, kept_in(folder), folder


def run_planted(cache):
    cache.mkdir(exist_ok=True)
    ops = ["goodness", "local_cross_entropy", "similarity", "feedback_pack_signs", "offset_sgd_"]
    done = run(
        *("--json", "--dtype", "float32", "--case", "tiny", "--limit", "25", "--jobs", "2", "--op", *ops),
        module="tests.support.stand_in",
        LGKERNELS_CACHE_DIR=str(cache),
        LGKERNELS_PLANT="goodness=crash,local_cross_entropy=hang,similarity=wrong",
    )
    said = dict(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)
    (cache / "done.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    "op, verdict, error",
    [
        ("goodness", "crashed", "signal 11"),
        ("local_cross_entropy", "hung", "no end within 25 s"),
        ("similarity", "bad", "similarity: result 0: error"),
    ],
)
def test_a_fault_fails_alone_and_is_not_tried_again(planted, op, verdict, error):
    done, kept, _ = planted
    row = rows(done)[op, "triton"]
    assert done.returncode == 1 and row["verdict"] == verdict and row["error"].startswith(error)
    noted = [entry for key, entry in kept.items() if key.startswith(f"{op}/triton")]
    assert [entry["state"] for entry in noted] == [verdicts.BAD] and "running" not in str(kept)
    assert rows(done)[op, "cuda"]["verdict"] == "good"


def test_what_passes_is_in_the_cache(planted):
    done, kept, _ = planted
    for backend in ("triton", "cuda"):
        assert rows(done)["feedback_pack_signs", backend]["verdict"] == "good"
        assert {entry["state"] for key, entry in kept.items() if key.startswith(f"feedback_pack_signs/{backend}")} == {
            "good"
        }


def test_progress_goes_to_stderr(planted):
    done, _, _ = planted
    assert "[##############################] 10/10, 3 failed" in done.stderr


def test_again_repeats_what_failed_and_nothing_else(planted, tmp_path):
    _, kept, shared = planted
    cache = shutil.copytree(shared, tmp_path / "cache")  # other test processes read the shared one
    done = run(
        *("--again", "--json", "--dtype", "float32", "--case", "tiny", "--op", "similarity", "--backend", "triton"),
        module="tests.support.stand_in",
        LGKERNELS_CACHE_DIR=str(cache),
    )
    assert "1 failed trials forgotten" in done.stderr and rows(done)["similarity", "triton"]["verdict"] == "good"
    now = kept_in(cache)
    changed = {key for key in now if now[key] != kept.get(key)}
    assert {key.rpartition("/")[0] for key in changed} <= {"similarity/triton", "similarity_backward/triton"}
    assert {now[key]["state"] for key in changed} == {"good"}


def test_again_leaves_what_gpu_tests_say(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path))
    dispatch.registered_ops()
    store = verdicts.Verdicts(CPU)
    bad = ("goodness/triton", "goodness/triton/1", "goodness_backward/cuda/2", "similarity/triton/3")
    for key in bad:
        store.note(key, verdicts.BAD, key, "wrong")
    store.note("goodness/triton/4", verdicts.GOOD, "right")
    verify.forget_failed(CPU, {"goodness"}, ["triton"])
    assert set(verdicts.Verdicts(CPU).known) == {*bad, "goodness/triton/4"} - {"goodness/triton/1"}
    assert "1 failed trials forgotten" in capsys.readouterr().err


def test_forget_removes_this_devices_verdicts(monkeypatch, tmp_path, capsys):
    from lgkernels.__main__ import main

    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path))
    (tmp_path / "verdicts-another.jsonl").write_text("")
    verdicts.Verdicts(CPU).note("goodness/triton", verdicts.BAD, "its tests", "wrong")
    assert main(["verify", "--forget"]) == 0
    assert "1 verdicts on cpu (cpu, " in capsys.readouterr().out
    assert not verdicts.Verdicts(CPU).known and (tmp_path / "verdicts-another.jsonl").exists()
    assert main(["verify", "--forget"]) == 0 and "0 verdicts on cpu" in capsys.readouterr().out


class Child:
    """In the place of a child that computes: `result` once it has been asked `times` times."""

    def __init__(self, task, result, times=1):
        self.task, self.ends, self.times, self.settled, self.killed = task, result, times, [], False
        self.process = self
        self.sentinel, writer = os.pipe()
        self.output = os.dup(self.sentinel)
        os.close(writer)  # readable from now on

    def left(self):
        return 10.0

    def result(self):
        self.times -= 1
        return self.ends if self.times <= 0 else None

    def settle(self, why):
        self.settled.append(why)

    def kill(self):
        self.killed = True

    def join(self):
        pass


def test_an_interrupted_case_has_no_verdict():
    made = {name: Child(name, ("good", "", 1.0), times) for name, times in (("quick", 1), ("slow", 1000))}
    results = verify._results(collections.deque(made), made.get, 2, float("inf"))
    assert next(results) == ("quick", ("good", "", 1.0))
    results.close()  # Ctrl-C
    assert made["slow"].killed and made["slow"].settled == [None] and not made["quick"].settled


@pytest.mark.parametrize("jobs, why", [(1, "crashed: signal 11"), (2, None)])
def test_a_crash_beside_others_is_not_yet_a_verdict(jobs, why):
    made = {"a": Child("a", ("crashed", "signal 11", 1.0))}
    assert len(list(verify._results(collections.deque(made), made.get, jobs, float("inf")))) == 1
    assert made["a"].settled == [why]


def test_after_its_budget_it_starts_no_case():
    (left,) = verify._results(collections.deque(["a"]), None, 1, 0.0)
    assert left[1][0] == "not tried"


def test_the_table():
    task = dict(op="goodness", backend="triton", dtype="float32", layout="contiguous", case="tiny")
    lines = [
        task | {"verdict": "good", "error": "", "ms": 3.2},
        task | {"verdict": "crashed", "error": "signal 11", "ms": 1},
    ]
    text = verify.as_text({"rows": lines, "absent": {"cuda": "not built"}, "off": {}, "file": None}).splitlines()
    assert text[0].split() == ["op", "backend", "dtype", "layout", "case", "verdict", "ms", "error"]
    assert text[2].split() == ["goodness", "triton", "float32", "contiguous", "tiny", "crashed", "1", "signal", "11"]
    assert text[4:] == [
        "1 good, 1 crashed",
        "not tried: cuda: not built",
        "verdicts: none kept: the cache directory cannot be written",
    ]


def test_without_a_gpu():
    done = run()
    assert done.returncode == 2 and "there is no CUDA device here" in done.stderr and not done.stdout


@pytest.mark.parametrize("option, value", [("--op", "nonsense"), ("--case", "nonsense")])
def test_names_that_do_not_exist(option, value, monkeypatch, capsys):
    from lgkernels.__main__ import main

    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    assert main(["verify", option, value]) == 2
    assert f"{option} must be some of " in capsys.readouterr().err


def test_full_says_what_a_wheel_lacks(tmp_path, capsys):
    assert verify.full(tmp_path, tmp_path) == 2
    assert "needs the tests and benches of a source checkout" in capsys.readouterr().err


def test_full_runs_gpu_check(tmp_path):
    done = run("--full", "--out", str(tmp_path / "out"), "--device", "cpu")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert verify.full(tmp_path / "out", ROOT) == 2, "gpu_check's own answer where there is no GPU"


def test_every_op_with_gpu_kernels_has_ordinary_cases():
    for op in dispatch.registered_ops():
        if "triton" in dispatch.backends(op):
            cases = verify.cases_of(op)
            assert verify.TINY in cases and len(cases) > 1, op
