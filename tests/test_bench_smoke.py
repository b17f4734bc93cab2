"""The bench suite runs: every case at a tiny size, the report, and the GPU command's answer where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    for name in ("LGKERNELS_IMPL", "THP_MEM_ALLOC_ENABLE"):  # the second: set by the train command's tests
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "cpu.json"
    done = run(
        "pytest",
        "bench",
        "-q",
        "--preset",
        "smoke",
        "--seconds",
        "0",
        "--min-rounds",
        "2",
        "--no-compile",
        "--save",
        str(path),
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return path


def test_every_case_is_checked_and_timed(results):
    from bench import providers
    from bench.shapes import PRESETS

    rows = json.loads(results.read_text())["rows"]
    cpu = torch.device("cpu")
    expected = {
        (case.name, name)
        for case in PRESETS["smoke"]
        for name in providers.names(case, cpu, False)
        if not name.startswith("lgkernels triton")
    }  # this process may interpret Triton, the bench's does not
    assert {(row["case"], row["provider"]) for row in rows} == expected
    assert {case.op for preset in PRESETS.values() for case in preset} == {row["op"] for row in rows}
    for row in rows:
        assert row["median_ms"] > 0 and row["rounds"] == 2 and row["peak_bytes"] >= 0
        assert row["provider"] != row["baseline"] or row["ratio"] == 1.0


def test_report(results):
    from bench import report

    assert report.main([str(results)]) == 0
    text = results.with_suffix(".md").read_text()
    assert "VGG8 training step" in text and "## Where we lose" in text and "| floor |" in text
    assert results.with_suffix(".svg").read_text().startswith("<?xml")


def test_report_names_every_loss():
    from bench.report import losses

    row = dict(
        case="a",
        op="lls_loss",
        batch=1,
        channels=2,
        out_channels=0,
        size=0,
        pool=2,
        classes=3,
        modulation=None,
        max_pool=False,
        dtype="float32",
        channels_last=False,
        peak_bytes=1000,
    )
    rows = [
        {**row, "provider": "lgkernels cpu", "median_ms": 2.0},
        {**row, "provider": "floor", "median_ms": 1.0},
        {**row, "provider": "lean torch", "median_ms": 1.5, "peak_bytes": 2000},
    ]
    assert losses(rows) == [
        "`lls_loss`, forward and backward, (1, 2), P=2, 3 classes: lean torch takes 1.5 ms, lgkernels cpu 2 ms."
    ]
    rows[2]["median_ms"] = 2.5
    assert losses(rows) == []


def test_wrong_results_are_not_timed():
    from bench.conftest import compare
    from bench.providers import Problem

    problem = Problem({}, "floor", {"grad": torch.ones(4)})
    compare({"grad": torch.ones(4), "other": torch.zeros(1)}, problem)
    with pytest.raises(AssertionError, match="grad: relative error 1.00e-03, allowed 1e-04"):
        compare({"grad": torch.full((4,), 1.001)}, problem)


def test_gpu_check_without_a_gpu(tmp_path):
    done = run("bench.gpu_check", "--out", str(tmp_path))
    assert done.returncode == 2 and "gpu_check needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x", "--only", "build,nonsense"], "unknown part 'nonsense'; expected some of build,test,"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_gpu_check_arguments(arguments, message, capsys):
    from bench import gpu_check

    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_gpu_check_reads_test_outcomes(tmp_path, monkeypatch):
    from bench import report
    from bench.gpu_check import OPS, passed_backends

    path = tmp_path / "tests.xml"
    path.write_text("""<testsuites><testsuite>
        <testcase classname="gpu.test_lls" name="test_lls_loss[triton-a]"/>
        <testcase classname="gpu.test_lls" name="test_lls_loss[cuda-a]"/>
        <testcase classname="gpu.test_lls" name="test_lls_block[triton-a]"/>
        <testcase classname="gpu.test_lls" name="test_lls_block[triton-b]"><failure/></testcase>
        <testcase classname="gpu.test_lls" name="test_lls_block[cuda-a]"><skipped/></testcase>
        <testcase classname="gpu.test_cuda_graph" name="test_lls_block"/>
        </testsuite></testsuites>""")
    passed = passed_backends(path, OPS["test"])
    assert passed == {"lls_loss": ["triton", "cuda"], "lls_block": []}
    path.write_text("""<testsuites><testsuite>
        <testcase classname="gpu.test_feedback_kernels_gpu" name="test_product[cuda-a]"/>
        <testcase classname="gpu.test_feedback_kernels_gpu" name="test_product[triton-a]"><error/></testcase>
        </testsuite></testsuites>""")
    feedback = passed_backends(path, OPS["test:feedback"])
    assert feedback == {op: ["cuda"] for op in OPS["test:feedback"]}

    monkeypatch.setattr(report, "VERIFIED", tmp_path / "verified.json")
    check = {
        "environment": {"capability": "sm_90"},
        "build": {},
        "test": {"passed": passed},
        "test:feedback": {"passed": feedback},
    }
    row = {"case": "a", "op": "lls_loss", "huge_pages": False}
    times = {"lgkernels triton": 3.0, "lgkernels cuda": 2.0, "floor": 1.0}
    report.write_verified(check, {"rows": [{**row, "provider": name, "median_ms": t} for name, t in times.items()]})
    assert json.loads(report.VERIFIED.read_text()) == {
        "lls_loss": {"sm_90": ["cuda", "triton"]},
        "lls_block": {"sm_90": []},
        **{op: {"sm_90": ["cuda"]} for op in OPS["test:feedback"]},
    }


def test_gpu_check_knows_every_op_that_has_a_gpu_kernel():
    import lgkernels.functional
    import lgkernels.optim  # noqa: F401
    from bench.gpu_check import OPS
    from lgkernels.core import dispatch

    checked = [op for ops in OPS.values() for op in ops]
    assert sorted(checked) == [op for op in dispatch.registered_ops() if "cuda" in dispatch.backends(op)]
