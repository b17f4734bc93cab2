"""What the cached launcher (ops/common/launch.py) starts, against what Triton would, in a process without
TRITON_INTERPRET: `python -m tests.support.launched`. It prints one JSON object, which tests/integration/test_launch.py
judges."""

import json
import sys
from collections import Counter
from unittest import mock

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.stand_in import Compiled, Driver, installed
from lgkernels.ops.common import launch
from tests.static import aot

CPU = torch.device("cpu")
INTS = (0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**40, 2**63, True, False)
FLOATS = (0.0, 1.0, 0.3, 1e300)


def recorded():
    """One launch `(kernel, programs, args, meta)` of each specialisation that the families' cases make."""
    found = {}

    def start(kernel, programs, device, args, meta):
        kinds = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
        found.setdefault(repr((kernel.__name__, kinds, meta)), (kernel, programs, args, meta))

    with mock.patch.object(launch, "start", start):
        for family in aot.families():
            family.cases()
    return list(found.values())


def others(value):
    """Arguments that might stand in the place of `value`, and must not be taken for it."""
    if isinstance(value, torch.Tensor):
        memory = torch.empty(64, dtype=torch.uint8)
        shifted = [memory[n:].view(torch.uint8) for n in (1, 4, 8, 16)]
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
        same = torch.empty(value.numel() + 4, dtype=value.dtype)
        return [same, same[1:], *shifted, *(torch.empty(8, dtype=d) for d in dtypes), torch.empty(0), None, 16, 1]
    if value is None:
        return [torch.empty(4), torch.empty(4)[1:], 0, 1, 0.5, None]
    return [*INTS, *FLOATS, None]


def constants(meta):
    """The same with one constant changed, in kind or in value."""
    for name, value in meta.items():
        if isinstance(value, bool):
            yield {**meta, name: not value}
            yield {**meta, name: int(value)}
        elif isinstance(value, int):
            yield {**meta, name: value * 2}
            if value in (0, 1):
                yield {**meta, name: bool(value)}
    yield dict(reversed(meta.items()))


class Watch:
    """Runs a launch, and counts those that Triton was asked for."""

    def __init__(self):
        self.asked, own = 0, JITFunction.run

        def run(kernel, *args, **options):
            self.asked += 1
            return own(kernel, *args, **options)

        self.patch = mock.patch.object(JITFunction, "run", run)

    def noted(self, function):
        Compiled.noted = []
        function()
        (entry,) = Compiled.noted
        return entry


def compare(watch, kernel, programs, args, meta):
    """Faults of two launches, the first and the remembered one."""
    own = watch.noted(lambda: kernel[(programs,)](*args, **meta))
    found = []
    for time in ("first", "second"):
        asked = watch.asked
        got = watch.noted(lambda: launch.launch(kernel, programs, CPU, *args, **meta))
        if got != own:
            found.append(f"{kernel.__name__} {time}: {got} instead of {own}")
        if time == "second" and watch.asked != asked:
            found.append(f"{kernel.__name__} is not remembered: {meta}")
    return found


def faults(launches, watch):
    """Every launch as it is; the first two of a kernel also with every argument and constant changed."""
    found, compared, seen = [], 0, Counter()
    for kernel, programs, args, meta in launches:
        found += compare(watch, kernel, programs, args, meta)
        seen[kernel.__name__] += 1
        if seen[kernel.__name__] > 2:
            continue
        changed = [args[:i] + (other,) + args[i + 1 :] for i in range(len(args)) for other in others(args[i])]
        for one in changed:
            found += compare(watch, kernel, programs, one, meta)
        for other in constants(meta):
            found += compare(watch, kernel, programs, args, other)
        compared += len(changed)
    return found[:20], compared


def asked_under(watch, launches, context):
    """How many of three launches, remembered before, Triton is asked for inside of `context`."""
    kernel, programs, args, meta = launches[0]
    for _ in range(2):
        launch.launch(kernel, programs, CPU, *args, **meta)
    asked = watch.asked
    with context(kernel):
        for _ in range(3):
            launch.launch(kernel, programs, CPU, *args, **meta)
    return watch.asked - asked


class _Added:
    def __init__(self, items, entry):
        self.items, self.entry = items, entry

    def __enter__(self):
        self.items.append(self.entry)

    def __exit__(self, *_):
        self.items.remove(self.entry)


def ignore(*_, **__):
    pass


CONTEXTS = {
    "nothing": lambda kernel: _Added([], None),
    "launch_enter_hook": lambda kernel: _Added(knobs.runtime.launch_enter_hook.calls, ignore),
    "launch_exit_hook": lambda kernel: _Added(knobs.runtime.launch_exit_hook.calls, ignore),
    "a hook that is set": lambda kernel: mock.patch.object(knobs.runtime, "launch_enter_hook", ignore, create=True),
    "pre_run_hooks": lambda kernel: _Added(kernel.pre_run_hooks, ignore),
    "debug": lambda kernel: mock.patch.object(kernel, "debug", True),
    "debug knob": lambda kernel: mock.patch.dict(knobs.runtime.__dict__, debug=True),
    "another version": lambda kernel: _unknown(),
}


def _unknown():
    """Compiled kernels lack what a launch needs."""
    launch._remembered.clear()
    return mock.patch.object(launch, "_PARTS", ("run", "no such part"))


class _Second:
    """torch.cuda.device of the stand-in."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.before, Driver.current = Driver.current, self.device.index

    def __exit__(self, *_):
        Driver.current = self.before


def on_two_devices(watch, launches):
    """Devices that one launch compiled for and Triton was asked on, each device twice."""
    kernel, programs, args, meta = launches[0]
    kernel.device_caches.clear()
    launch._remembered.clear()
    asked = []
    with mock.patch.object(torch.cuda, "device", _Second):
        for index in (1, 0, 1, 0):
            before = watch.asked
            launch.launch(kernel, programs, torch.device("cpu", index), *args, **meta)
            asked.append(watch.asked - before)
    return {"compiled": sorted(kernel.device_caches), "asked": asked, "current": Driver.current}


def python_calls(launches):
    """The most Python functions that a remembered launch calls, the stand-in's three included."""
    most, Compiled.noted = 0, None
    for kernel, programs, args, meta in launches:
        calls = []
        for _ in range(2):
            launch.launch(kernel, programs, CPU, *args, **meta)
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event) if event == "call" else None)
        launch.launch(kernel, programs, CPU, *args, **meta)
        sys.setprofile(None)
        most = max(most, len(calls))
    return most


def main():
    watch = Watch()
    with installed(), watch.patch:
        launches = recorded()
        found, compared = faults(launches, watch)
        result = {
            "kernels": sorted({kernel.__name__ for kernel, *_ in launches}),
            "launches": len(launches),
            "compared": compared,
            "faults": found,
            "asked": {name: asked_under(watch, launches, context) for name, context in CONTEXTS.items()},
            "calls": python_calls(launches),
            "devices": on_two_devices(watch, launches),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
