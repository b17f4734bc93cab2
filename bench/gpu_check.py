"""`python -m bench.gpu_check --out DIR`: one command for a machine with a GPU, within nine minutes a run.

Parts: build (the native module with CUDA kernels, in place), test (the GPU tests of the first family and of what
all share), test:feedback, test:local (the local losses and the step with an offset), bench:lls, bench:feedback and
bench:local (ceilings, then every case by CUDA-graph replay). Each part saves its outcome to DIR/gpu_check.json as it
ends; a second run does what is missing or has failed, `--only build,test,bench:lls` does those again. Benches go to
DIR/<device>.json, what passed the GPU tests to lgkernels/core/verified.json. A table comes last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from . import report, timing

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0  # seconds in all
LIMITS = {
    "build": 180.0,
    "test": 270.0,
    "test:feedback": 270.0,
    "test:local": 150.0,
    "bench:lls": 240.0,
    "bench:feedback": 180.0,
    "bench:local": 120.0,
}
BACKENDS = ("triton", "cuda")
OPS = {
    "test": ("lls_loss", "lls_block"),
    "test:feedback": (
        "feedback_product",
        "feedback_matrix",
        "feedback_rows",
        "feedback_pack_signs",
        "feedback_update_",
    ),
    "test:local": ("local_cross_entropy", "goodness", "similarity", "offset_sgd_"),
}


def run(command, limit, log, **environment):
    """(exit status, None if it ran out of time; last lines of its output), the whole output in `log`."""
    print("$", " ".join(command), flush=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too: they would disturb what comes next
            process.wait()
    tail = log.read_text(errors="replace").splitlines()[-15:]
    print("\n".join(tail), flush=True)
    return status, tail


def build(out, limit):
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    environment = (
        {}
        if "LGKERNELS_CUDA_ARCHS" in os.environ
        else {"LGKERNELS_CUDA_ARCHS": "90a" if capability == "90" else capability}
    )
    status, tail = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit,
        out / "build.log",
        LGKERNELS_BUILD="cuda",
        **environment,
    )
    return {"ok": status == 0, "status": status, "tail": tail}


def passed_backends(junit, ops):
    """{op of `ops`: [backends all of whose tests passed, of which at least one ran]}.

    The backend is one of a test's parameters, the op stands in its name (else the test speaks for all of them).
    """
    outcomes = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname')} {case.get('name')}"
        failed = case.find("failure") is not None or case.find("error") is not None
        if case.find("skipped") is not None:
            continue
        parameters = case.get("name").partition("[")[2].rstrip("]").split("-")
        for op in [op for op in ops if op in name] or ops:
            for backend in [backend for backend in BACKENDS if backend in parameters]:
                outcomes.setdefault((op, backend), []).append(not failed)
    return {op: [b for b in BACKENDS if outcomes.get((op, b)) and all(outcomes[op, b])] for op in ops}


def tests(name, selection):
    """The part that runs the GPU tests with `selection`, arguments of pytest."""

    def part(out, limit):
        file = name.replace(":", "_")
        junit = out / f"{file}.xml"
        junit.unlink(missing_ok=True)
        status, tail = run(
            [
                sys.executable,
                "-m",
                "pytest",
                "--gpu",
                "-q",
                "-p",
                "no:cacheprovider",
                *selection,
                f"--junitxml={junit}",
            ],
            limit,
            out / f"{file}.log",
        )
        passed = passed_backends(junit, OPS[name]) if junit.exists() else {}
        return {"ok": status == 0, "status": status, "tail": tail, "passed": passed}

    return part


def bench(family):
    """The part that times bench/bench_<family>.py."""

    def part(out, limit):
        environment = timing.environment(torch.device("cuda"))
        results = out / f"{report.slug(environment['device'])}.json"
        status, tail = run(
            [
                sys.executable,
                "-m",
                "pytest",
                f"bench/bench_{family}.py",
                "-q",
                "--preset",
                "gpu",
                "--seconds",
                "2",
                "-p",
                "no:cacheprovider",
                "--save",
                str(results),
            ],
            limit,
            out / f"bench_{family}.log",
        )
        return {"ok": status == 0, "status": status, "tail": tail, "results": results.name}

    return part


PARTS = {
    "build": build,
    "test": tests("test", ["-k", "not feedback and not local and not offset"]),
    "test:feedback": tests("test:feedback", ["-k", "feedback"]),
    "test:local": tests("test:local", ["-k", "local or offset"]),
    "bench:lls": bench("lls"),
    "bench:feedback": bench("feedback"),
    "bench:local": bench("local"),
}


def chosen(text):
    parts = text.split(",")
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part!r}; expected some of {','.join(PARTS)}")
    return parts


def _results(out, state):
    return out / next((part["results"] for part in state.values() if "results" in part), "none")


def table(out, state):
    lines = [
        f"{state['environment']['device']}, "
        + ", ".join(f"{k} {v}" for k, v in state["environment"].items() if k != "device")
    ]
    for name in PARTS:
        part = state.get(name)
        if part:
            how = "ok" if part["ok"] else "ran out of time" if part["status"] is None else f"FAILED ({part['status']})"
            lines.append(f"{name:14} {how:16} {part['seconds']:6.0f} s  {part['tail'][-1] if part['tail'] else ''}")
    results = _results(out, state)
    if results.exists():
        data = json.loads(results.read_text())
        lines.append("copy {copy_gb_s:.0f} GB/s, matmul {matmul_tflop_s:.0f} TFLOP/s".format(**data["ceilings"]))
        for name, rows in report.cases(data["rows"]).items():
            lines.append(name)
            lines += [
                f"  {provider:28} {row['median_ms']:9.4f} ms  {row['ratio']:6.2f} x {row['baseline']:6} "
                f"{row['peak_bytes'] / 1e6:8.0f} MB  " + report.rates(row)
                for provider, row in rows.items()
            ]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for results and logs")
    parser.add_argument("--only", type=chosen, metavar=",".join(PARTS), help="do these parts, done before or not")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu_check needs a CUDA device, and torch.cuda.is_available() is False. "
            "On a CPU: python -m pytest -q, and python -m pytest bench -q",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path, start = out / "gpu_check.json", time.monotonic()
    state = json.loads(path.read_text()) if path.exists() else {}
    state["environment"] = timing.environment(torch.device("cuda"))
    parts = options.only or [name for name in PARTS if not state.get(name, {"ok": False})["ok"]]
    for name in parts:
        left = BUDGET - (time.monotonic() - start)
        if left < 10:
            print(f"no time left for {name}: run the same command again", flush=True)
            continue
        began = time.monotonic()
        state[name] = PARTS[name](out, min(LIMITS[name], left))
        state[name]["seconds"] = time.monotonic() - began
        report.write_json(path, state)
    results = _results(out, state)
    if results.exists() and any(part in state for part in OPS):
        report.main([str(results), "--no-plots", "--quiet", "--verified", str(path)])
    print(table(out, state))
    return 0 if all(state.get(name, {"ok": False})["ok"] for name in PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
