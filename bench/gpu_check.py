"""`python -m bench.gpu_check --out DIR`: one command for a machine with a GPU, within nine minutes a run.

Parts: build (the native module with CUDA kernels, in place), test:<family> for each folder of tests/ with GPU tests,
bench:<family> for each family's file in bench/ (ceilings, then every case by CUDA-graph replay). Each part saves its
outcome to DIR/gpu_check.json as it ends; a second run does what is missing or has failed, `--only build,test:lls` does
those again. Benches go to DIR/<device>.json, what passed the GPU tests to lgkernels/core/verified.json: a failing test
takes off the ops of its mark `op` alone, on its own backend. A table comes last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import torch

from . import common, report, timing

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0  # seconds in all
LIMITS = {"build": 180.0, "test": 270.0, "bench": 240.0}  # of one part
BACKENDS = ("triton", "cuda")
NO_TESTS = 5  # pytest's status where nothing was collected: a family without cases for a GPU


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


def pytest(*arguments):
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


# -- parts: functions of the folder for results and of a time limit, which return the part's outcome ----------------


def build(out, limit):
    environment = {"LGKERNELS_BUILD": "cuda"}
    if "LGKERNELS_CUDA_ARCHS" not in os.environ:
        capability = "{}{}".format(*torch.cuda.get_device_capability())
        environment["LGKERNELS_CUDA_ARCHS"] = "90a" if capability == "90" else capability
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, tail = run(command, limit, out / "build.log", **environment)
    return {"ok": status == 0, "status": status, "tail": tail}


def test(family, out, limit):
    junit = out / f"test_{family}.xml"
    junit.unlink(missing_ok=True)
    command = pytest("--gpu", f"tests/{family}", f"--junitxml={junit}")
    status, tail = run(command, limit, out / f"test_{family}.log")
    outcomes = outcomes_of(junit) if junit.exists() else {}
    return {"ok": status == 0, "status": status, "tail": tail, "outcomes": outcomes}


def bench(family, out, limit):
    environment = timing.environment(torch.device("cuda"))
    results = out / f"{report.slug(environment['device'])}.json"
    command = pytest("bench", "--family", family, "--preset", "gpu", "--seconds", "2", "--save", str(results))
    status, tail = run(command, limit, out / f"bench_{family}.log")
    return {"ok": status in (0, NO_TESTS), "status": status, "tail": tail, "results": results.name}


def find_parts():
    """{name: part}, in the order in which they run."""
    tested = sorted({path.parent.name for path in (ROOT / "tests").glob("*/test_gpu*.py")})
    return {
        "build": build,
        **{f"test:{family}": partial(test, family) for family in tested},
        **{f"bench:{family}": partial(bench, family) for family in common.families()},
    }


PARTS = find_parts()


def outcomes_of(junit):
    """{op: {backend: whether every test of it passed}}, for the backends of which at least one test ran.

    A test names its ops, and its backend if it has one, in properties (tests/support/op_marks.py). Without a backend it
    speaks for all backends that ran, and can only take them off.
    """
    ran, failed = {}, set()
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        properties = [(p.get("name"), p.get("value")) for p in case.iter("property")]
        ops = [value for name, value in properties if name == "op"]
        backends = [value for name, value in properties if name == "backend"]
        if case.find("failure") is not None or case.find("error") is not None:
            failed.update((op, backend) for op in ops for backend in backends or BACKENDS)
        for op in ops:
            ran.setdefault(op, set()).update(set(backends) & set(BACKENDS))
    return {op: {b: (op, b) not in failed for b in BACKENDS if b in backends} for op, backends in ran.items()}


# -- the command ----------------------------------------------------------------------------------------------------


def chosen(text):
    parts = text.split(",")
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part!r}; expected some of {','.join(PARTS)}")
    return parts


def results_of(out, state):
    return out / next((part["results"] for part in state.values() if "results" in part), "none")


def table(out, state):
    versions = ", ".join(f"{k} {v}" for k, v in state["environment"].items() if k != "device")
    lines = [f"{state['environment']['device']}, {versions}"]
    for name in PARTS:
        part = state.get(name)
        if part:
            how = "ok" if part["ok"] else "ran out of time" if part["status"] is None else f"FAILED ({part['status']})"
            lines.append(f"{name:16} {how:16} {part['seconds']:6.0f} s  {part['tail'][-1] if part['tail'] else ''}")
    results = results_of(out, state)
    if results.exists():
        data = report.read(results)
        lines.append("copy {copy_gb_s:.0f} GB/s, matmul {matmul_tflop_s:.0f} TFLOP/s".format(**data["ceilings"]))
        for name, rows in report.cases(data["rows"]).items():
            lines.append(name)
            lines += [
                f"  {provider:28} {row['median_ms']:9.4f} ms  {row['ratio']:6.2f} x {row['baseline']:6} "
                f"{row['peak_bytes'] / 1e6:8.0f} MB  " + report.rates(row)
                for provider, row in rows.items()
            ]
    return "\n".join(lines)


def limit_of(part, left):
    return min(LIMITS[part.partition(":")[0]], left)


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
        state[name] = PARTS[name](out, limit_of(name, left))
        state[name]["seconds"] = time.monotonic() - began
        report.write_json(path, state)
    results = results_of(out, state)
    if results.exists() and any(part.get("outcomes") for part in state.values()):
        report.main([str(results), "--no-plots", "--quiet", "--verified", str(path)])
    print(table(out, state))
    return 0 if all(state.get(name, {"ok": False})["ok"] for name in PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
