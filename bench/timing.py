"""Timing in interleaved rounds, peak memory, and the ceilings of this machine."""

import gc
import math
import os
import platform
import re
import statistics
import time

import torch

from lgkernels.recipes import measure


def environment(device):
    """Name and versions of what was measured on."""
    info = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        info["triton"] = triton.__version__
    except ImportError:
        info["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            **info,
        }
    from lgkernels.core import measured, native

    module = native.native()
    return {
        "device": f"CPU {measured.processor()}, {torch.get_num_threads()} threads",
        "native": module.cpu_level() if module else None,
        **info,
    }


def slug(name):
    """File name of a device's results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").replace("-threads", "threads")


def huge_pages():
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"


def _sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CpuTimer:
    """Seconds of one call; short calls are repeated until the clock can see them."""

    def __init__(self, function):
        self.function, self.repeats = function, 1
        for _ in range(2):
            seconds = self()
        self.repeats = max(1, math.ceil(2e-3 / max(seconds, 1e-7)))

    def __call__(self):
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.function()
        return (time.perf_counter() - start) / self.repeats


class GraphTimer:
    """Seconds of one call, from the replay of a CUDA graph over all copies (of which none stays in the cache)."""

    def __init__(self, functions):
        self.copies, stream = len(functions), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in functions:  # compiles, plans and allocates before the capture
                for _ in range(3):
                    function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.keep = [function() for function in functions]
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.repeats = 1
        seconds = self() * self.copies
        self.repeats = min(100, max(1, math.ceil(2e-3 / max(seconds, 1e-7))))

    def __call__(self):
        self.start.record()
        for _ in range(self.repeats):
            self.graph.replay()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / self.repeats / self.copies


def timer(functions, device):
    """What times one call of these functions, copies of one; building it may raise (a graph that can't be captured)."""
    return GraphTimer(functions) if device.type == "cuda" else CpuTimer(functions[0])


def interleaved(timers, seconds, min_rounds=3, max_rounds=200):
    """{name: [seconds a call, one a round]}: rounds A B C, B C A, ..., so that drift meets all alike."""
    rounds = 0
    if seconds:
        start = time.perf_counter()
        for one in timers.values():
            one()
        rounds = int(seconds / (time.perf_counter() - start))
    samples, names = {name: [] for name in timers}, list(timers)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(min(max(rounds, min_rounds), max_rounds)):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name].append(timers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio(samples, baseline):
    """Median over the rounds of this provider's time divided by the baseline's in the same round."""
    return statistics.median(a / b for a, b in zip(samples, baseline))


def peak_memory(function, device):
    """Bytes that a call holds at its peak beyond what was there before it, when it is not the first one."""
    function()
    gc.collect()
    return measure.peak_memory(function, device)


def copy_bandwidth(device, megabytes):
    """Bytes a second, read plus written, of a large `copy_` into existing memory."""
    out, source = (torch.ones(megabytes * 2**18, device=device) for _ in range(2))
    samples = interleaved({"copy": timer([lambda: out.copy_(source)], device)}, 0.5, 5, 20)["copy"]
    return 2 * megabytes * 2**20 / statistics.median(samples)


def matmul_rate(device, dtype, size):
    """FLOP/s of a square library matmul."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    samples = interleaved({"mm": timer([lambda: torch.mm(a, b, out=out)], device)}, 0.5, 5, 20)["mm"]
    return 2 * size**3 / statistics.median(samples)


def ceilings(device, small=False):
    """What this machine can do at most: copying memory, and a library matmul."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    megabytes, size = (4, 128) if small else (1024, 8192) if device.type == "cuda" else (256, 1024)
    return {
        "copy_gb_s": copy_bandwidth(device, megabytes) / 1e9,
        "matmul_tflop_s": matmul_rate(device, dtype, size) / 1e12,
        "matmul_dtype": str(dtype)[6:],
    }
