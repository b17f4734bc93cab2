"""Settling loops in CUDA graphs: recorded at the second call of a kind, replayed from then on.

A loop is some thousand launches, which Python starts one by one, and a graph starts all of them at once. It reads the
weights where they are: an update in place counts at the next replay, and other tensors in their place are another kind.
All else that goes in is copied to memory of its own; what comes out is cloned. A kind is that of the sizes, options,
weights and stream, and of torch's settings that choose kernels. The `MOST` graphs used last are kept; one whose weights
are gone is dropped at the next call.

As they are run: loops on a CPU, of few steps, or with a tolerance, which the host looks at in every step; all while
another graph is recorded on the stream, whose part they become, or where a gradient is wanted; and all of them where
LGKERNELS_GRAPHS is 0. The recording has a thread of its own, as tables of `core/kept.py` have, for the same reasons.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from ...core import environment, kept

MOST = 8  # graphs that are kept; each has the memory of a loop
FEW_STEPS = 4
DEVICE_TYPES = {"cuda"}  # tests put "cpu" here, and a recorder of their own into torch.cuda

_graphs: OrderedDict[tuple, "_Graph | None"] = OrderedDict()  # None: could not be recorded
_seen: OrderedDict[tuple, None] = OrderedDict()
_lock = threading.RLock()


class _Graph:
    """A recorded loop: the memory of what goes in, and of what comes out."""

    def __init__(self, loop: Callable, varying: list[Tensor], fixed: list[Tensor]) -> None:
        self.device = varying[0].device
        self.weights = [StorageWeakRef(w.untyped_storage()) for w in fixed]
        self.inputs = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in varying]
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # the libraries' handles of this thread
            loop(self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.results = loop(self.inputs)

    def replay(self, varying: list[Tensor]) -> Any:
        for own, tensor in zip(self.inputs, varying):
            own.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return tree_map(torch.clone, self.results)  # the next replay writes over its own


def run(
    function: Callable, state: list, drive: list, net: Any, target: Tensor | None, rest: tuple, options: Any
) -> Any:
    """`function(state, drive, net, target, *rest, options)`, a backend's settle or error."""
    if state[0].device.type not in DEVICE_TYPES:
        return function(state, drive, net, target, *rest, options)
    varying = [*state, *drive, *([] if target is None else [target])]
    fixed = [*net.weights, *net.biases, *(t for t in (net.readout, net.readout_bias) if t is not None)]
    if not _records(function, state, [*varying, *fixed], options):
        return function(state, drive, net, target, *rest, options)

    def loop(inputs: list[Tensor]) -> Any:
        first, second = len(state), len(state) + len(drive)
        goal = None if target is None else inputs[-1]
        return function(inputs[:first], inputs[first:second], net, goal, *rest, options)

    device = state[0].device
    key = (
        (function.__module__, function.__name__, device, torch.cuda.current_stream(device).cuda_stream),
        (repr((rest, options, net.edges, net.layers)), target is None, net.readout is None, len(net.biases)),
        tuple((t.shape, t.dtype) for t in varying),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in fixed),
        _settings(),
    )
    with _lock:
        _drop_orphans()
        if key not in _graphs and key not in _seen:  # an ordinary call: it compiles, and chooses algorithms
            _remember(_seen, key, None, 16 * MOST)
            return loop(varying)
        if key not in _graphs:
            _remember(_graphs, key, _recorded(loop, varying, fixed), MOST)
        _graphs.move_to_end(key)
        graph = _graphs[key]
        return loop(varying) if graph is None else graph.replay(varying)


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


def _settings() -> tuple:
    cudnn = torch.backends.cudnn
    return (
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _recorded(loop: Callable, varying: list[Tensor], fixed: list[Tensor]) -> _Graph | None:
    device = varying[0].device

    def record() -> _Graph:
        with torch.no_grad(), torch.cuda.device(device):
            return _Graph(loop, varying, fixed)

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(record).result()
    except Exception as error:
        warnings.warn(
            f"a settling loop of {tuple(varying[0].shape)} states cannot be recorded in a CUDA graph, and is started "
            f"step by step ({type(error).__name__}: {error}); LGKERNELS_GRAPHS=0 records none",
            stacklevel=2,
        )
        return None


def _remember(known: OrderedDict, key: tuple, value: Any, most: int) -> None:
    known[key] = value
    while len(known) > most:
        oldest = next(iter(known))
        if known is _graphs:
            _drop(oldest)
        else:
            del known[oldest]


def _drop(key: tuple) -> None:
    graph = _graphs.pop(key)
    if graph is not None:
        torch.cuda.synchronize(graph.device)  # its memory may be another's at once: no replay may be on its way


def _drop_orphans() -> None:
    for key, graph in list(_graphs.items()):
        if graph is not None and any(weight.expired() for weight in graph.weights):
            _drop(key)
