"""The bench runs: every case at a tiny size, and the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    for name in ("LGKERNELS_IMPL", "THP_MEM_ALLOC_ENABLE"):  # the second: set by the train command's tests
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def run_smoke(*arguments):
    tiny = "--preset", "smoke", "--seconds", "0", "--min-rounds", "2", "--no-compile"
    done = run("pytest", "bench", "-q", *tiny, "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return made_once(tmp_path_factory, "bench.json", lambda path: run_smoke("--save", str(path)))


# -- cases and contestants --------------------------------------------------------------------------------------------


def test_every_case_is_checked_and_timed(results):
    from bench import common

    rows = json.loads(results.read_text())["rows"]
    expected = {
        (case.name, contestant.name)
        for case in common.cases("smoke")
        for contestant in common.contestants(case.problem(case, torch.device("cpu")), compiled=False)
        if contestant.backend != "triton"
    }  # this process may interpret Triton, the bench's does not
    assert {(row["case"], row["provider"]) for row in rows} == expected
    assert {case.op for preset in common.PRESETS for case in common.cases(preset)} == {row["op"] for row in rows}
    for row in rows:
        assert row["median_ms"] > 0 and row["rounds"] == 2 and row["peak_bytes"] >= 0
        assert row["provider"] != row["baseline"] or row["ratio"] == 1.0


def test_every_folder_of_ops_has_a_file():
    from bench import common

    ops = {path.parent.name for path in (ROOT / "lgkernels" / "ops").glob("*/op.py")}
    assert ops <= set(common.families())
    for preset in common.PRESETS:
        of_families = [case for family in common.families() for case in common.cases(preset, family)]
        assert of_families == common.cases(preset)
    names = [case.name for case in common.cases("cpu")]
    assert len(set(names)) == len(names)


def test_a_file_with_cases_is_a_family(tmp_path, monkeypatch):
    from bench import common

    (tmp_path / "toy.py").write_text("CASES = {}\n")
    (tmp_path / "shared.py").write_text("def cases():\n    return CASES\n")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    assert common.families() == ["toy"]


def test_problems_name_registered_ops():
    from bench import common
    from lgkernels.core import dispatch

    for preset in common.PRESETS:
        for case in common.cases(preset):
            assert case.problem.registered_op in (None, *dispatch.registered_ops()), case.name
            problem = case.problem(case, torch.device("cpu"))
            assert case.baseline in [c.name for c in problem.contestants()], case.name


def test_on_a_gpu_no_cache_holds_what_is_timed():
    from bench import common

    for case in common.cases("gpu"):
        problem = case.problem(case, torch.device("cuda"))
        assert problem.copies >= 2 and (problem.copies == 16 or problem.copies * problem.footprint >= 2**28), case.name
    case = common.cases("gpu", "feedback")[0]
    one, other = (case.problem(case, torch.device("cpu")) for _ in range(2))
    assert one.copies == 1 and one.input.data_ptr() != other.input.data_ptr()


def test_a_contestant_has_a_role():
    from bench.common import Contestant

    with pytest.raises(TypeError, match="role"):
        Contestant("mine", make=lambda: None)
    with pytest.raises(ValueError, match=r"role of contestant 'mine' must be one of \('ours', .*\), got 'fast'"):
        Contestant("mine", "fast", lambda: None)


def test_wrong_results_are_not_timed():
    from bench.conftest import compare

    truth = {"grad": torch.ones(4)}
    compare({"grad": torch.ones(4), "other": torch.zeros(1)}, truth, 1e-4)
    with pytest.raises(AssertionError, match="grad: relative error 1.00e-03, allowed 1e-04"):
        compare({"grad": torch.full((4,), 1.001)}, truth, 1e-4)


def test_times_are_taken_in_one_process():
    """Whatever the repository's options say."""
    done = run_smoke("-k", "feedback_linear_call", "-n", "2", "--dist", "load")
    assert "bringing up nodes" not in done.stdout and "4 passed" in done.stdout


# -- the report -------------------------------------------------------------------------------------------------------


def test_report(results):
    from bench import report

    assert report.main([str(results)]) == 0
    text = results.with_suffix(".md").read_text()
    assert "SmallConv training step" in text and "## Where we lose" in text and "| floor |" in text
    assert "## Cost of a call of `lls_loss`, forward and backward" in text
    assert results.with_suffix(".svg").read_text().startswith("<?xml")


def row(provider, role, median_ms, peak_bytes=1000, **more):
    about = dict(case="a", op="lls_loss", title="`lls_loss`, forward and backward", label="(1, 2)", baseline="floor")
    here = dict(huge_pages=False, variant=False, backend=None, registered_op="lls_loss", ratio=median_ms)
    return {
        **about,
        **here,
        "provider": provider,
        "role": role,
        "median_ms": median_ms,
        "peak_bytes": peak_bytes,
        **more,
    }


def test_report_names_every_loss():
    from bench.report import losses

    rows = [
        row("mine", "ours", 2.0),
        row("mine, twice as fast with half the digits", "ours", 1.0, variant=True),
        row("definition", "reference", 0.5),
        row("limit", "floor", 1.0),
        row("theirs", "lean", 1.5, 2000),
    ]
    assert losses(rows) == ["`lls_loss`, forward and backward, (1, 2): theirs takes 1.5 ms, mine 2 ms."]
    rows[-1]["median_ms"] = 2.5
    assert losses(rows) == []
    rows[-1]["peak_bytes"] = None  # of a rival that does not allocate by torch
    assert not any(" MB" in loss for loss in losses(rows))
    rows[-1]["peak_bytes"] = 900
    assert losses(rows) == ["`lls_loss`, forward and backward, (1, 2): theirs takes 0.0009 MB, mine 0.001 MB."]


def test_devices_stand_side_by_side():
    from bench.report import summary

    rows = [
        row("a", "reference", 0.1),
        row("b", "ours", 2.0),
        row("c", "ours", 3.0),
        row("d", "peer", 4.0, 2000),
        row("e", "eager", 5.0),
        row("f", "bp", 6.0, 3000),
        row("g", "compiled", 7.0),
        row("h", "floor", 1.0),
    ]
    faster = [row("b", "ours", 2.0), row("g", "compiled", 1.5), row("g, half", "compiled", 1.0, variant=True)]
    other = [row("b", "ours", 4.0, case="b", label="(3, 4)"), row("i", "floor", 1.0, case="c")]
    one, two = (
        {"environment": {"device": d, "torch": "2"}, "rows": r} for d, r in (("D", rows), ("E", faster + other))
    )
    assert summary([one, two]).splitlines() == [
        "Time / baseline: ours; the fastest rival's. The faster in bold. D: torch 2; E: torch 2.",
        "",
        "| case | baseline | D | E | MB: lgkernels, eager, BP |",
        "| --- | --- | --- | --- | --- |",
        "| `lls_loss` (1, 2) | floor | **2.00** (2 ms); 4.00 d | 2.00 (2 ms); **1.50** g | 0.001, 0.002, 0.003 |",
        "| `lls_loss` (3, 4) | floor |  | **4.00** (4 ms) | 0.001 |",
    ]


def test_rows_of_an_older_bench_are_refused(tmp_path):
    from bench import report

    path = tmp_path / "old.json"
    path.write_text(json.dumps({"rows": [{"case": "a", "provider": "floor"}]}))
    with pytest.raises(ValueError, match="rows without a role"):
        report.main([str(path)])


def test_the_faster_backend_comes_first(tmp_path, monkeypatch):
    from bench import report

    monkeypatch.setattr(report, "FASTER", tmp_path / "faster.json")
    report.write_json(report.FASTER, {"lls_loss": {"sm_80": ["triton"]}, "toy": {"sm_90": ["triton"]}})
    rows = [
        row(f"lgkernels {backend}", "ours", time, backend=backend, case=case)
        for case, times in {"a": (3, 2), "b": (1, 1)}.items()
        for backend, time in zip(("triton", "cuda"), times)
    ]
    others = [
        row("lgkernels cpu", "ours", 0.1, backend="cpu"),
        row("half", "ours", 0.1, backend="triton", variant=True),
    ]
    report.write_faster([{"environment": {"capability": "sm_90"}, "rows": [*rows, *others]}])
    expected = {"lls_loss": {"sm_80": ["triton"], "sm_90": ["cuda", "triton"]}, "toy": {"sm_90": ["triton"]}}
    assert json.loads(report.FASTER.read_text()) == expected


def test_a_cpu_measures_no_order_of_gpu_backends(tmp_path, monkeypatch, results):
    from bench import report

    monkeypatch.setattr(report, "FASTER", tmp_path / "faster.json")
    assert report.main([str(results), "--no-plots", "--quiet", "--faster"]) == 0
    assert not report.FASTER.exists()
