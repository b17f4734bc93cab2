"""`python -m lgkernels verify`: tries ahead what a first use would try (core/trust.py), each case in a child process.

Cases are found: for each op with GPU kernels the tiny case of its family's self-test and the `ORDINARY` ones beside it,
on each backend, in each dtype and layout. A child calls the op as a user does; the verdicts go into the user's cache. A
crash, or no end within the limit, ends the child alone, and is noted as a failure. `--full` runs bench/gpu_check.py.
"""

import collections
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

from . import dispatch, environment, measured, native, trust, verdicts

DTYPES = ("float32", "bfloat16", "float16")
TINY = "tiny"
FAILED = ("bad", "error", "crashed", "hung")
GOOD, UNDECIDED, NO_TRIAL, LEFT = "good", "undecided", "no trial", "not tried"
_ROOT = Path(__file__).resolve().parents[2]


class Task(NamedTuple):
    op: str
    backend: str
    dtype: str
    layout: str
    case: str


def add_arguments(parser):
    parser.add_argument("--device", type=torch.device, help="default: the first CUDA device")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="these ops alone")
    parser.add_argument("--backend", nargs="+", choices=trust.BACKENDS, default=trust.BACKENDS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help=f"these cases alone, as the table names them: {TINY}, ..."
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="children at once")
    parser.add_argument("--limit", type=float, default=180.0, metavar="SECONDS", help="of a case")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after so long")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--full", action="store_true", help="build, test and measure all: needs a source checkout")
    kinds.add_argument("--again", action="store_true", help="forget the trials that failed first, and try them again")
    kinds.add_argument(
        "--forget",
        action="store_true",
        help="only remove all verdicts on this device, and what was measured on this processor",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the results of --full")


def main(arguments):
    device = device_of(arguments.device)
    if arguments.forget and native.native():
        print(f"{measured.records().clear()} measurements of this processor removed")
    if device is None and arguments.forget:
        return 0
    if device is None:
        print(
            "verify tries GPU kernels, and there is no CUDA device here (torch.cuda.is_available() is False). "
            "On a CPU: python -m lgkernels info --selftest",
            file=sys.stderr,
        )
        return 2
    if arguments.full:
        return full(arguments.out.resolve(), _ROOT)
    if arguments.forget:
        return forget(device)
    try:
        tasks, absent = find(device, arguments)
    except ValueError as error:
        print(f"python -m lgkernels verify: error: {error}", file=sys.stderr)
        return 2
    if arguments.again:
        forget_failed(device, {task.op for task in tasks}, arguments.backend)
    rows = run(tasks, device, arguments.limit, arguments.jobs, arguments.budget)
    store = verdicts.Verdicts(device)
    report = {
        "device": str(device),
        "fingerprint": store.fingerprint,
        "file": str(store.path) if store.path.exists() else None,
        "absent": absent,
        "off": {op: why for op in {task.op: 0 for task in tasks} if (why := trust.refusal(op, device))},
        "rows": rows,
    }
    print(json.dumps(report, indent=1) if arguments.json else as_text(report))
    return 1 if any(row["verdict"] in FAILED for row in rows) else 0


def device_of(chosen):
    """The device to try on, or None where there is none."""
    if chosen is None:
        kinds = ["cuda"] if torch.cuda.is_available() else sorted(trust.DEVICE_TYPES - {"cuda"})
        chosen = torch.device(kinds[0]) if kinds else None
    if chosen is None or chosen.type not in trust.DEVICE_TYPES:
        return None
    if chosen.type == "cuda":
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            return None
        return torch.device("cuda", chosen.index or 0)
    return chosen


def full(out, root):
    """bench/gpu_check.py, which lies beside the package in a source checkout."""
    if not (root / "bench" / "gpu_check.py").exists() or not (root / "tests").is_dir():
        print(
            f"verify --full needs the tests and benches of a source checkout; {root / 'lgkernels'} is an installed "
            'package without them. In a clone: pip install -e ".[test,bench]" && python -m lgkernels verify --full. '
            "Without --full, verify works here",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "bench.gpu_check", "--out", str(out)], cwd=root).returncode


# -- verdicts that are dropped ------------------------------------------------------------------------------------


def forget(device):
    """All verdicts on the device, those of its GPU tests too."""
    store = verdicts.Verdicts(device)
    path, number = store.path, store.forget_all()
    if path is not None and path.exists():
        print(f"{path} cannot be removed", file=sys.stderr)
        return 1
    print(
        f"{number} verdicts on {device} ({store.fingerprint['gpu']}) removed: kernels are tried again at their next use"
    )
    return 0


def forget_failed(device, ops, backends):
    """Failed trials of these ops; what their GPU tests say stays."""
    store = verdicts.Verdicts(device)
    failed = []
    for key in list(store.known):
        name, backend, *specialisation = key.split("/")
        if specialisation and backend in backends and name in trust.OPS and trust.OPS[name].group in ops:
            failed += [key] * (store.state(key)[0] == verdicts.BAD)
    for key in failed:
        store.forget(key)
    print(
        f"{len(failed)} failed trials forgotten: a case of verify repeats them now, the next use those of other sizes",
        file=sys.stderr,
    )


# -- what there is to try -----------------------------------------------------------------------------------------


def cases_of(op):
    """{name: (layouts, function of (impl, device, dtype, layout))}."""
    module = importlib.import_module(dispatch.family(op) + ".selftest")
    tiny = module.CASES[op]
    found = {TINY: (("contiguous",), lambda impl, device, dtype, layout: tiny(impl, device, dtype))}
    return found | getattr(module, "ORDINARY", {}).get(op, {})


def find(device, arguments):
    """(tasks, {backend: why it cannot run here}); ValueError for names that do not exist."""
    ops = [op for op in dispatch.registered_ops() if set(dispatch.backends(op)) & set(trust.BACKENDS)]
    _require("--op", arguments.op, ops)
    ops = arguments.op or ops
    _require("--case", arguments.case, sorted({case for op in ops for case in cases_of(op)}))
    tasks, absent = [], {}
    for op in ops:
        for backend in [b for b in arguments.backend if b in dispatch.backends(op)]:
            for dtype in arguments.dtype:
                why_not = dispatch.unavailable(op, backend, device, getattr(torch, dtype))
                if why_not:
                    absent[backend] = why_not
                    continue
                for case, (layouts, _) in cases_of(op).items():
                    if arguments.case is None or case in arguments.case:
                        tasks += [Task(op, backend, dtype, layout, case) for layout in layouts]
    if not tasks:
        raise ValueError(f"no kernels to try on {device}: {absent or 'no such case'}")
    return tasks, absent


def _require(option, names, known):
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option} must be some of {', '.join(known)}, got {name!r}")


# -- a child ------------------------------------------------------------------------------------------------------


def _child(task, device, output, log):
    """Run a case as a user would, and send (verdict, error, milliseconds)."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)  # what compilers print, and what a crash says
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ["LGKERNELS_TRUST"] = "first-use"
    os.environ.pop("LGKERNELS_IMPL", None)
    dispatch.registered_ops()
    dispatch.prefer(task.backend)
    began, raised = time.perf_counter(), None
    try:
        _, function = cases_of(task.op)[task.case]
        function("auto", device, getattr(torch, task.dtype), task.layout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever a broken backend raises
        raised = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    output.send((*_verdict(task.backend, raised), 1e3 * (time.perf_counter() - began)))


def _verdict(backend, raised):
    decided = [found for key, found in trust.decided().items() if key.split("/")[1] == backend]
    wrong = [f"{what.partition(' ')[0]}: {why}" for what, state, why in decided if state == verdicts.BAD]
    if wrong:
        return "bad", "; ".join(dict.fromkeys(wrong))
    if raised:
        return "error", raised
    unsure = [why for _, state, why in decided if state is None]
    if unsure:
        return UNDECIDED, unsure[0]
    return (GOOD, "") if decided else (NO_TRIAL, "its kernels have no trial: auto takes plain torch")


# -- all of them --------------------------------------------------------------------------------------------------


class _Running:
    """A case in its child."""

    def __init__(self, context, task, device, limit, folder):
        self.task, self.device, self.limit, self.began = task, device, limit, time.monotonic()
        self.output, theirs = context.Pipe(duplex=False)
        handle, log = tempfile.mkstemp(dir=folder)
        os.close(handle)
        self.log = Path(log)
        self.process = context.Process(target=_child, args=(task, device, theirs, log), daemon=True)
        self.process.start()
        theirs.close()

    def left(self):
        return self.began + self.limit - time.monotonic()

    def result(self):
        """(verdict, error, milliseconds), or None while it runs."""
        with contextlib.suppress(EOFError):
            if self.output.poll():
                found = self.output.recv()
                self.process.join(max(self.left(), 1.0))
                self.process.kill()  # nothing, where it has ended
                return found
        self.process.join(0)
        spent = 1e3 * (time.monotonic() - self.began)
        if self.process.exitcode is not None:
            code = self.process.exitcode
            said = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            return "crashed", f"{how}: {said}" if said else how, spent
        if self.left() > 0:
            return None
        self.process.kill()
        self.process.join()
        return "hung", f"no end within {self.limit:g} s", spent

    def settle(self, why):
        """What was running when the child ended is bad; `why` None: to be tried again."""
        store = verdicts.Verdicts(self.device)
        for key, entry in list(store.known.items()):
            mine = entry.get("pid") == self.process.pid and entry.get("node") == platform.node()
            if entry.get("state") == verdicts.RUNNING and mine:
                if why is None:
                    store.forget(key)
                else:
                    store.note(key, verdicts.BAD, entry.get("what", ""), why)


def run(tasks, device, limit, jobs, budget=None):
    """The rows of all tasks. What crashes or hangs beside others is tried once more alone: they may have been it."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":  # torch is imported once; a child makes its own CUDA context
        context.set_forkserver_preload([__name__, *([] if environment.triton_fault() else ["triton"])])
    found, again, bar = {}, [], _Bar(len(tasks))
    until = time.monotonic() + budget if budget else float("inf")
    with tempfile.TemporaryDirectory() as folder:

        def start(task):
            return _Running(context, task, device, limit, folder)

        for task, result in _results(collections.deque(tasks), start, jobs, until):
            if result[0] in ("crashed", "hung") and jobs > 1:
                again.append(task)
                continue
            found[task] = result
            bar.advance(task, result)
        for task, result in _results(collections.deque(again), start, 1, until):
            found[task] = result
            bar.advance(task, result)
    bar.close()
    return [{**task._asdict(), **dict(zip(("verdict", "error", "ms"), found[task]))} for task in tasks]


def _results(waiting, start, jobs, until):
    """(task, result) of each as it ends. What is interrupted has no verdict."""
    running = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                if time.monotonic() > until:
                    yield waiting.popleft(), (LEFT, "no time left: run the same command again", 0.0)
                else:
                    running.append(start(waiting.popleft()))
            if not running:
                continue
            wait(
                [end for r in running for end in (r.output, r.process.sentinel)],
                max(0.0, min(r.left() for r in running)),
            )
            for one in list(running):
                result = one.result()
                if result is not None:
                    running.remove(one)
                    if result[0] in ("crashed", "hung"):
                        one.settle(f"{result[0]}: {result[1]}" if jobs == 1 else None)
                    yield one.task, result
    finally:
        for one in running:
            one.process.kill()
            one.process.join()
            one.settle(None)


class _Bar:
    """Progress on stderr: one line that is written over, or a line for each tenth where that is no terminal."""

    def __init__(self, total):
        self.total, self.done, self.failed, self.terminal = total, 0, 0, sys.stderr.isatty()

    def advance(self, task, result):
        self.done += 1
        self.failed += result[0] in FAILED
        filled = 30 * self.done // self.total
        text = f"[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}, {self.failed} failed"
        if self.terminal:
            now = f"{task.op} {task.backend} {task.dtype}"
            print(f"\r{text}  {now:<44.44}", end="", file=sys.stderr, flush=True)
        elif 10 * self.done // self.total > 10 * (self.done - 1) // self.total:
            print(text, file=sys.stderr, flush=True)

    def close(self):
        if self.terminal:
            print(file=sys.stderr)


def as_text(report):
    heads = ("op", "backend", "dtype", "layout", "case", "verdict", "ms", "error")
    cells = [[f"{row['ms']:.0f}" if head == "ms" else str(row[head]) for head in heads] for row in report["rows"]]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads) - 1)]
    lines = [
        "  ".join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[-1]]).rstrip()
        for line in [heads, *cells]
    ]
    counts = collections.Counter(row["verdict"] for row in report["rows"])
    lines += ["", ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())]
    lines += [f"not tried: {backend}: {why}" for backend, why in report["absent"].items()]
    lines += [f"off all the same: {op}: {why}" for op, why in report["off"].items()]
    lines.append(f"verdicts: {report['file'] or 'none kept: the cache directory cannot be written'}")
    return "\n".join(lines)
