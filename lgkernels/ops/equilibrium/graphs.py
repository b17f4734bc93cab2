"""Settling loops in CUDA graphs: recorded at the second call of a kind, replayed from then on.

A loop is some thousand launches, which Python starts one by one, and a graph starts all of them at once. All that goes
in, weights too, is copied to memory of the graph's own before a replay, for a caller's tensor may be a temporary; what
comes out is cloned. A kind is that of the sizes, options and stream, and of torch's settings that choose kernels. At
most `MOST` graphs are kept. Then a new kind takes the place of one that `STALE` calls have not used, or gets no graph.

As they are run: loops on a CPU, of few steps, or with a tolerance, which the host looks at in every step; all while
another graph is recorded on the stream, whose part they become, or where a gradient is wanted; and all of them where
LGKERNELS_GRAPHS is 0, or torch's settings cannot be read. The recording has a thread of its own, as tables of
`core/kept.py` have, for the same reasons.

Captures of other threads on other streams cannot be seen. So nothing here waits for the whole device or empties the
cache, as `torch.cuda.graph` does at its start, and a recording is that of its thread alone ("thread_local"). Two things
stay: a graph that is dropped waits for its last replay and frees memory, which a capture elsewhere in the mode "global"
does not allow; and a thread that waits for the whole device while a loop is recorded gets an error of CUDA's.
LGKERNELS_GRAPHS=0 is for programs that do so.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...core import environment, kept

MOST = 8  # graphs that are kept; each has the memory of a loop, and of its weights
STALE = 256  # calls without a use after which a graph may go
FEW_STEPS = 4
DEVICE_TYPES = {"cuda"}  # tests put "cpu" here, and a recorder of their own into torch.cuda

_graphs: OrderedDict[tuple, "_Graph"] = OrderedDict()  # the one used last is last
_seen: OrderedDict[tuple, bool] = OrderedDict()  # whether it can be recorded, as far as is known
_lock = threading.RLock()
_calls = 0


class _Graph:
    """A recorded loop: the memory of what goes in, and of what comes out."""

    def __init__(self, loop: Callable, tensors: list[Tensor], caller: Any) -> None:
        self.device = tensors[0].device
        self.used = _calls
        self.done = torch.cuda.Event()
        first, own = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        with torch.cuda.stream(first):  # the libraries' handles of this thread
            self.inputs = [torch.zeros_like(t) for t in tensors]
            loop(self.inputs)
        own.wait_stream(first)
        caller.wait_stream(first)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(own):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.results = loop(self.inputs)
            finally:
                self.graph.capture_end()

    def replay(self, tensors: list[Tensor]) -> Any:
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        results = tree_map(torch.clone, self.results)  # the next replay writes over its own
        self.done.record(torch.cuda.current_stream(self.device))
        return results


def run(
    function: Callable, state: list, drive: list, net: Any, target: Tensor | None, rest: tuple, options: Any
) -> Any:
    """`function(state, drive, net, target, *rest, options)`, a backend's settle or error."""
    if state[0].device.type not in DEVICE_TYPES:
        return function(state, drive, net, target, *rest, options)
    given = state, drive, net.weights, net.biases, [net.readout], [net.readout_bias], [target]
    tensors = [t for part in given for t in part if t is not None]
    settings = _settings()
    if settings is None or not _records(function, state, tensors, options):
        return function(state, drive, net, target, *rest, options)

    def loop(inputs: list[Tensor]) -> Any:
        each = iter(inputs)
        own = [[None if t is None else next(each) for t in part] for part in given]
        weights = dict(weights=own[2], biases=own[3], readout=own[4][0], readout_bias=own[5][0])
        return function(own[0], own[1], net._replace(**weights), own[6][0], *rest, options)

    device = state[0].device
    key = (
        (function.__module__, function.__name__, device, torch.cuda.current_stream(device).cuda_stream),
        repr((rest, options, net.edges, net.layers)),
        tuple(tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in part) for part in given),
        settings,
    )
    with _lock:
        graph = _graph_of(key, loop, tensors)
        if graph is not None:
            return graph.replay(tensors)
    return function(state, drive, net, target, *rest, options)


def forget() -> None:
    """Drop all graphs."""
    with _lock:
        for key in list(_graphs):
            _drop(key)
        _seen.clear()


def _records(function: Callable, state: list, tensors: list[Tensor], options: Any) -> bool:
    device, backend = state[0].device, function.__module__.rpartition(".")[2]
    if options.tolerance is not None or options.steps < FEW_STEPS:
        return False
    if backend not in ("torch", "triton") and not (backend == "cuda" and state[0].dim() == 4):
        return False  # the definition, and loops that are one launch
    if environment.is_set("LGKERNELS_GRAPHS") and not environment.is_on("LGKERNELS_GRAPHS"):
        return False
    if not all(t.numel() for t in tensors):
        return False
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and not kept.capturing(device)


def _settings() -> tuple | None:
    """Those that choose kernels, None where they cannot be read. `allow_tf32` and `get_float32_matmul_precision` raise
    where the program has set `fp32_precision`, which is always readable."""
    backends: Any = torch.backends  # its stubs lack some of these
    cudnn = backends.cudnn
    try:
        return (
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
            (backends.fp32_precision, backends.cuda.matmul.fp32_precision),
            (cudnn.fp32_precision, cudnn.conv.fp32_precision),
            torch.are_deterministic_algorithms_enabled(),
        )
    except Exception:  # of whatever kind: a loop runs without a graph too
        return None


def _graph_of(key: tuple, loop: Callable, tensors: list[Tensor]) -> _Graph | None:
    """The kind's graph, recorded now if it may be; None: the call is an ordinary one."""
    global _calls
    _calls += 1
    if key not in _graphs:
        if key not in _seen:  # an ordinary call: it compiles, and chooses algorithms
            _seen[key] = True
            if len(_seen) > 16 * MOST:
                _seen.popitem(last=False)
            return None
        if not _seen[key] or not _room():
            return None
        made = _recorded(loop, tensors)
        if made is None:
            _seen[key] = False
            return None
        _graphs[key] = made
    _graphs.move_to_end(key)
    _graphs[key].used = _calls
    return _graphs[key]


def _recorded(loop: Callable, tensors: list[Tensor]) -> _Graph | None:
    device = tensors[0].device
    caller = torch.cuda.current_stream(device)

    def record() -> _Graph:
        with torch.no_grad(), torch.cuda.device(device):
            return _Graph(loop, tensors, caller)

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(record).result()
    except Exception as error:
        warnings.warn(
            f"a settling loop of {tuple(tensors[0].shape)} states cannot be recorded in a CUDA graph, and is started "
            f"step by step ({type(error).__name__}: {error}); LGKERNELS_GRAPHS=0 records none",
            stacklevel=2,
        )
        return None


def _room() -> bool:
    """Whether there is a place for one more graph. One in use keeps its place: more kinds in turn than there are places
    would otherwise record at each call."""
    if len(_graphs) >= MOST:
        oldest = next(iter(_graphs))
        if _calls - _graphs[oldest].used <= STALE:
            return False
        _drop(oldest)
    return True


def _drop(key: tuple) -> None:
    _graphs.pop(key).done.synchronize()  # its memory may be another's at once: no replay may be on its way
