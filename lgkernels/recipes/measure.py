"""What a training step costs: time, side by side for all rules, and peak memory."""

import contextlib
import gc
import os
import statistics
import sys
import time

import torch


def step_times(steps, device, *, budget=8.0, rounds=12):
    """Median seconds of each callable in `steps` (name -> callable), taken in turn so that all meet the same noise."""

    def timed(step):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for step in steps.values():
        for _ in range(2):  # optimizer state, caches
            timed(step)
    times = {name: [] for name in steps}
    end = time.perf_counter() + budget * len(steps)
    for taken in range(rounds):
        if taken >= 3 and time.perf_counter() > end:
            break
        for name, step in steps.items():
            times[name].append(timed(step))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step, device):
    """Bytes that one call of `step` has allocated at its worst moment, beyond what was there before it."""
    gc.collect()  # what cycles of an earlier step hold would else be freed within this one, and counted as less
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def state_bytes(trainer):
    """Bytes of parameters, buffers, and the optimizers' state, offsets included."""
    tensors = {id(t): t for block in trainer.blocks for t in (*block.parameters(), *block.buffers())}
    for optimizer in filter(None, trainer.optimizers):
        tensors |= {
            id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        }
        for _, offset in getattr(optimizer, "offsets", list)():
            tensors[id(offset)] = offset
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextlib.contextmanager
def _quiet():
    """The profiler's native code writes its start, stop and hints to standard error: drop that."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
