"""`python -m bench.gpu_check --out DIR`: one command for a machine with a GPU, within nine minutes a run.

Parts: build (the native module with CUDA kernels, in place), verify (`python -m lgkernels verify`: every case of every
op, into the user's verdict cache), test:<family> for each folder of tests/ with GPU tests, alone (their tests that need
the whole memory), bench:<family> for each family's file in bench/, line:<family> (whether its rows meet
bench/gpu_lines.py; the bench runs first where it has not), sanitizer (NVIDIA's, over all kernels; what it finds
is reported and decides nothing). A second run does what is missing or has failed, `--only build,test:lls` does those
again. All that has to come back lies in DIR, at most 8 files: gpu_check.json (state, verdicts), tests.jsonl (what
became of each test, a line as it ends: a run that is killed loses nothing), the benches' <device>.json, and a log for
each kind of part. An op whose tests failed on a backend is switched off on this machine, on that backend.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lgkernels.core import trust, verdicts
from tests.support import outcomes

from . import common, gpu_lines, report, timing

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0  # seconds in all
LIMITS = {
    "build": 400.0,
    "verify": 500.0,
    "test": 500.0,
    "alone": 300.0,
    "bench": 300.0,
    "line": 300.0,
    "sanitizer": 500.0,
}
NO_TESTS = 5  # pytest's status where nothing was collected: a family without cases for a GPU
CHOICES = {"test": "not alone and not sanitizer", "alone": "alone", "sanitizer": "sanitizer"}  # by marks
STAND_IN = os.environ.get("LGKERNELS_STAND_IN")  # "cpu": a dry run


class Run(NamedTuple):
    """What a part is told."""

    out: Path
    limit: float  # seconds
    options: argparse.Namespace
    again: bool = False  # all of its tests, those that have passed too


def device():
    return torch.device(STAND_IN or "cuda")


def run(command, limit, log, **environment):
    """(exit status, None if it ran out of time; its output), which is appended to `log`."""
    print("$", " ".join(command), flush=True)
    with open(log, "a") as file:
        print("$", *command, file=file, flush=True)
        start = file.tell()
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
    with open(log, errors="replace") as file:
        file.seek(start)
        text = file.read()
    print("\n".join(text.splitlines()[-15:]), flush=True)
    return status, text


def outcome(status, text, ok):
    return {"ok": ok, "status": status, "tail": text.splitlines()[-15:]}


def pytest(*arguments):
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


# -- parts: functions of a Run, which return the part's outcome -------------------------------------------------------


def build(this):
    environment = {"LGKERNELS_BUILD": "none" if STAND_IN else "cuda"}
    if "LGKERNELS_CUDA_ARCHS" not in os.environ and not STAND_IN:
        capability = "{}{}".format(*torch.cuda.get_device_capability())
        environment["LGKERNELS_CUDA_ARCHS"] = "90a" if capability == "90" else capability
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, text = run(command, this.limit, this.out / "build.log", **environment)
    return outcome(status, text, status == 0)


def verify(this):
    module = "tests.support.stand_in" if STAND_IN else "lgkernels"
    chosen = ["--op", *this.options.op] if this.options.op else []
    chosen += ["--budget", str(max(this.limit - 120.0, this.limit / 2)), "--limit", "100"]  # ends before it is killed
    command = [sys.executable, "-m", module, "verify", "--json", *(["--case", "tiny"] if STAND_IN else []), *chosen]
    status, text = run(command, this.limit, this.out / "verify.log")
    rows = json.loads(text[text.index("\n{\n") :])["rows"] if status in (0, 1) and "\n{\n" in text else []
    tail = ["{op} {backend} {dtype} {layout} {case}: {verdict} {error}".format(**row) for row in rows]
    found = Counter(row["verdict"] for row in rows)
    summary = ", ".join(f"{number} {verdict}" for verdict, number in found.items())
    return outcome(status, "\n".join([*tail, summary]), status == 0 and not found["not tried"]) | {"rows": rows}


def tests(folders, kind, this):
    """The tests of a kind in these folders. One whose process ended under it has failed; the others go on."""
    path, until = this.out / "tests.jsonl", time.monotonic() + this.limit
    log = this.out / ("sanitizer.log" if kind == "sanitizer" else "test.log")
    workers = 1 if kind == "alone" or not importlib.util.find_spec("xdist") else this.options.workers
    workers = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-p", "no:xdist"]
    chosen = ["-k", this.options.k] if this.options.k else []
    for name, record in outcomes.read(path).items():
        if _lies_in(name, folders, kind, record) and (this.again or record["state"] == outcomes.FAILED):
            outcomes.append(path, {**record, "state": outcomes.UNFINISHED, "why": "to be run again"})
    status, text = None, "no time left"
    while (left := until - time.monotonic()) > 0:
        before = _lines(path)
        plugin = ["-p", "tests.support.outcomes", "--outcomes", str(path), "--known", str(before)]
        command = pytest("--gpu", *folders, "-m", CHOICES[kind], *workers, *chosen, *plugin)
        with tempfile.TemporaryDirectory() as cache:  # a trial that is killed must not count as a crash
            status, text = run(command, left, log, LGKERNELS_CACHE_DIR=cache)
        settle(path, this.limit if status is None else None)
        if status in (0, 1, None, NO_TESTS) or _lines(path) == before:
            break  # else a crash of the only process: another runs what it left
    mine = [r for name, r in outcomes.read(path).items() if _lies_in(name, folders, kind, r)]
    counts = Counter(r["state"] for r in mine)
    ended = status in (0, 1, NO_TESTS) and not counts["unfinished"]
    tail = [f"{r['test']}: {r['why']}" for r in mine if r["state"] == outcomes.FAILED]
    tail.append(", ".join(f"{number} {state}" for state, number in sorted(counts.items())) or "no tests")
    ok = ended and (kind == "sanitizer" or not counts["failed"])
    return outcome(status, "\n".join(tail), ok) | {"ended": ended, "counts": counts}


def _lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def _lies_in(test, folders, kind, record):
    return record["kind"] == kind and any(test.startswith((f"{folder}/", f"{folder}::")) for folder in folders)


def settle(path, killed_after=None):
    """End the tests that were running when their process ended: it crashed, or was killed for lack of time."""
    outcomes.end_line(path)
    for record in outcomes.read(path).values():
        if record["state"] != outcomes.RUNNING:
            continue
        state, why = outcomes.FAILED, "its process ended in the middle"
        if killed_after is not None:
            spent = time.time() - record["at"]
            state, why = outcomes.UNFINISHED, "the part ran out of time"
            if spent > max(120.0, 0.75 * killed_after):
                state, why = outcomes.FAILED, f"no end within {spent:.0f} s"
        outcomes.append(path, {**record, "state": state, "why": why})


def bench(family, this):
    results = this.out / f"{report.slug(timing.environment(device())['device'])}.json"
    tiny = ["--preset", "smoke", "--seconds", "0", "--min-rounds", "2", "--no-compile"]
    sizes = tiny if STAND_IN else ["--preset", "gpu", "--seconds", "2"]
    command = pytest("bench", "--family", family, *sizes, "--save", str(results))
    with tempfile.TemporaryDirectory() as cache:
        status, text = run(command, this.limit, this.out / "bench.log", LGKERNELS_CACHE_DIR=cache)
    if results.exists():
        report.write_faster([report.read(results)])
    return outcome(status, text, status in (0, NO_TESTS)) | {"results": results.name}


def line(family, this):
    """Whether the family's rows meet the lines asked of a GPU; a dry run shows that each of them finds its numbers."""
    path, made = this.out / f"{report.slug(timing.environment(device())['device'])}.json", None
    found = gpu_lines.judged(family, report.read(path)["rows"], bool(STAND_IN)) if path.exists() else []
    if not found:
        made = bench(family, this)
        if path.exists():
            found = gpu_lines.judged(family, report.read(path)["rows"], bool(STAND_IN))
    ok = bool(found) and all(f["value"] is not None if STAND_IN else f["met"] for f in found)
    status = made["status"] if made else 0 if ok else 1
    return outcome(status, "\n".join(gpu_lines.words(found) or ["no rows"]), ok) | {"lines": found}


def find_parts():
    """{name: part}, in the order in which they run."""
    tested = sorted({f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_gpu*.py")})
    return {
        "build": build,
        "verify": verify,
        **{f"test:{Path(folder).name}": partial(tests, [folder], "test") for folder in tested},
        "alone": partial(tests, tested, "alone"),
        **{f"bench:{family}": partial(bench, family) for family in common.families()},
        **{f"line:{family}": partial(line, family) for family in gpu_lines.FAMILIES},
        "sanitizer": partial(tests, tested, "sanitizer"),
    }


PARTS = find_parts()


# -- what the tests have proved ---------------------------------------------------------------------------------------


def proved(path):
    """{op: {backend: {"passed": number of tests, "failed": [tests]}}}, for backends of which at least one test ran.

    A test names its ops by a mark, and its backend, if it has one, by a parameter. Without a backend it speaks for all
    backends that ran, and can only take them off. Sanitizers do not decide.
    """
    found, failures = {}, []
    for record in outcomes.read(path).values():
        if record["kind"] == "sanitizer" or record["state"] not in (outcomes.PASSED, outcomes.FAILED):
            continue
        wrong = record["state"] == outcomes.FAILED
        named = [record["backend"]] if record["backend"] else []
        if wrong:
            failures.append((record, named or trust.BACKENDS))
        for op in record["ops"]:
            for backend in set(named) & set(trust.BACKENDS):
                one = found.setdefault(op, {}).setdefault(backend, {"passed": 0, "failed": []})
                one["passed"] += not wrong
    for record, backends in failures:
        for op in record["ops"]:
            for backend in set(backends) & set(found.get(op, {})):
                found[op][backend]["failed"].append(record["test"])
    return found


def keep(state, path):
    """Into the user's verdict cache: off where a test failed, as soon as it has; on once all have ended."""
    store = verdicts.Verdicts(device())
    done = all(state.get(part, {}).get("ended") for part in PARTS if part == "alone" or part.startswith("test:"))
    for op, backends in proved(path).items():
        for backend, found in backends.items():
            what, failed = f"the GPU tests of {op} on {backend}", found["failed"]
            if failed:
                why = f"gpu_check: {len(failed)} of its tests failed, {failed[0]} first"
                store.note(trust.whole(op, backend), verdicts.BAD, what, why)
            elif done:
                why = f"gpu_check: {found['passed']} tests passed"
                store.note(trust.whole(op, backend), verdicts.GOOD, what, why)
    return store


# -- the command ------------------------------------------------------------------------------------------------------


def chosen(text):
    parts = text.split(",")
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part!r}; expected some of {','.join(PARTS)}")
    return parts


def results_of(out, state):
    return out / next((p["results"] for p in state.values() if isinstance(p, dict) and "results" in p), "none")


def table(out, state):
    versions = ", ".join(f"{k} {v}" for k, v in state["environment"].items() if k != "device")
    lines = [f"{state['environment']['device']}, {versions}"]
    for name in PARTS:
        part = state.get(name)
        if part:
            how = "ok" if part["ok"] else "ran out of time" if part["status"] is None else f"FAILED ({part['status']})"
            lines.append(f"{name:16} {how:16} {part['seconds']:6.0f} s  {part['tail'][-1] if part['tail'] else ''}")
    for op, backends in state["proved"].items():
        for backend, found in backends.items():
            failed = found["failed"]
            said = f"FAILED: {len(failed)} tests, {failed[0]} first" if failed else f"{found['passed']} tests passed"
            lines.append(f"{op:20} {backend:8} {said}")
    results = results_of(out, state)
    if results.exists():
        data = report.read(results)
        lines.append("copy {copy_gb_s:.0f} GB/s, matmul {matmul_tflop_s:.2f} TFLOP/s".format(**data["ceilings"]))
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


def _is_done(state, part):
    return state.get(part, {"ok": False})["ok"]


def of_this_machine(state, tested):
    """What the state says of this machine; parts from before another GPU, driver, version or source are dropped."""
    now = verdicts.fingerprint(device())
    if state.get("fingerprint", now) != now:
        print("the machine or the sources have changed since the last run: tests are run anew", flush=True)
        tested.unlink(missing_ok=True)
        for name in [name for name in state if name in PARTS and not name.startswith(("build", "bench", "line"))]:
            del state[name]
    return {"fingerprint": now, "environment": timing.environment(device())}


def parser():
    result = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    result.add_argument("--out", required=True, type=Path, help="folder for results and logs")
    result.add_argument("--only", type=chosen, metavar=",".join(PARTS), help="do these parts, done before or not")
    result.add_argument(
        "-n",
        "--workers",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="test processes (default: 12, or all cores)",
    )
    result.add_argument("-k", metavar="EXPRESSION", help="of the tests those alone, as pytest's -k")
    result.add_argument("--op", nargs="+", metavar="NAME", help="verify these ops alone")
    result.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help="of this run (default: %(default)g)"
    )
    return result


def main(arguments=None):
    options = parser().parse_args(arguments)
    if not STAND_IN and not torch.cuda.is_available():
        print(
            "gpu_check needs a CUDA device, and torch.cuda.is_available() is False. "
            "On a CPU: python -m pytest -q, and python -m pytest bench -q",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path, tested, start = out / "gpu_check.json", out / "tests.jsonl", time.monotonic()
    state = json.loads(path.read_text()) if path.exists() else {}
    settle(tested, options.budget)  # of a run that was killed

    def do(name):
        left = options.budget - (time.monotonic() - start)
        if left < min(30.0, options.budget / 2):
            print(f"no time left for {name}: run the same command again", flush=True)
            return
        began = time.monotonic()
        state[name] = PARTS[name](Run(out, limit_of(name, left), options, bool(options.only)))
        state[name]["seconds"] = time.monotonic() - began
        report.write_json(path, state)

    if "build" in (options.only or ["build"] * (not _is_done(state, "build"))):
        do("build")
    state.update(of_this_machine(state, tested))  # with the native module that the tests will load
    for name in options.only or PARTS:
        if name != "build" and (options.only or not _is_done(state, name)):
            do(name)
    store = keep(state, tested)
    state["proved"], state["verdicts"] = proved(tested), store.known
    report.write_json(path, state)
    print(table(out, state))
    print(f"verdicts: {store.path}")
    return 0 if all(_is_done(state, name) for name in PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
