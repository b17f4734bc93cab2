"""Shared fixtures: the backends, poisoned allocations, seeds.

A backend is a module with the functions of a family's `reference.py`. The environment variable
LGKERNELS_TEST_BACKENDS (comma separated) names those that must be there: a missing one then fails instead of skipping.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda-simt")
MODULES = {"cuda-simt": "cuda"}  # of a backend by another name than its own
OPS = Path(importlib.util.find_spec("lgkernels").origin).parent / "ops"
REQUIRED = tuple(filter(None, os.environ.get("LGKERNELS_TEST_BACKENDS", "").split(",")))


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and only those")


@pytest.hookimpl(tryfirst=True)  # before xdist reads its options
def pytest_cmdline_main(config):
    """The whole suite runs on all cores (`-n 0`: in one process); files that are named, and --gpu, in one process."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker comes by here too: it must not start workers of its own
        return
    option = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not option.gpu and not option.usepdb
    if not (whole and getattr(option, "numprocesses", 0) is None):  # 0: xdist is not there
        return
    option.numprocesses, option.dist = "auto", "worksteal"
    option.maxprocesses = option.maxprocesses or 8  # of about 1 GB each
    if hasattr(option, "benchmark_disable"):
        option.benchmark_disable = True  # pytest-benchmark would warn that it does this
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # they share the cores: a thread that waits must not spin


def pytest_ignore_collect(collection_path, config):
    """With --gpu the files test_gpu*.py alone, without it all others: Triton either compiles or interprets."""
    if collection_path.suffix in (".py", ".md") and collection_path.name != "__init__.py":
        return collection_path.name.startswith("test_gpu") != config.getoption("--gpu") or None


def pytest_configure(config):
    config.addinivalue_line("markers", "op(*names): the registered ops for which a GPU test speaks")
    config.addinivalue_line("markers", "alone: a GPU test that needs the device's memory for itself")
    config.addinivalue_line("markers", "sanitizer: a GPU test whose finding decides about no op")
    if config.getoption("--gpu"):
        from tests.support import op_marks

        config.pluginmanager.register(op_marks)
        stand_in = os.environ.get("LGKERNELS_STAND_IN")
        if not torch.cuda.is_available() and not stand_in and not config.option.collectonly:
            raise pytest.UsageError("--gpu needs a CUDA device, and torch.cuda.is_available() is False")
    else:  # Triton reads the switch when a kernel is decorated
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    config.addinivalue_line("markers", "only(where): of a test's parameters, those for which `where` is true")
    config.addinivalue_line("markers", "unpoisoned: torch.empty is left as it is (for tests that compile)")


def _makes_sense(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    family, name = OPS / item.path.parent.name, params.get("backend")
    if family.is_dir() and name in BACKENDS and not (family / f"{MODULES.get(name, name)}.py").exists():
        return False
    for mark in item.iter_markers("only"):
        where = mark.kwargs["where"]
        names = inspect.signature(where).parameters
        if names.keys() <= params.keys() and not where(**{name: params[name] for name in names}):
            return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """What a test's mark `only` leaves out, or a backend that the family has not got, is not made at all: a skip says
    that something is missing here."""
    made = yield
    return [item for item in made if _makes_sense(item)] if isinstance(made, list) else made


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The collector of garbage need not go through 20,000 tests again and again: that takes a second each time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()
    gc.freeze()


def _programs(case):
    """About how many programs a kernel is launched with."""
    channels = case.get("C", case.get("cout", 1))
    pool = case.get("P", case.get("pool_size", 1)) ** (1 if "N" in case or "features" in case else 2)
    return case.get("B", 1) * channels * pool


def pytest_collection_modifyitems(config, items):
    """The Triton interpreter takes milliseconds a program: its large cases run with LGKERNELS_TEST_ALL=1 only."""
    if os.environ.get("LGKERNELS_TEST_ALL") == "1" or os.environ.get("TRITON_INTERPRET") != "1":
        return

    def is_long(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return (
            params.get("backend") == "triton"
            and isinstance(params.get("case"), dict)
            and _programs(params["case"]) > 300
        )

    dropped = [item for item in items if is_long(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not is_long(item)]


def pytest_report_header():
    lines = [f"{name}: {unavailable(name) or 'runs'}" for name in BACKENDS]
    return ["backends: " + "; ".join(lines), f"torch threads: {torch.get_num_threads()}"]


@functools.cache
def unavailable(name):
    """Why a backend cannot run here, or None."""
    if name == "cpu":
        from lgkernels.core.native import native, native_error

        if native() is None:
            return f"the native module is not built ({native_error()})"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "cuda-simt":
        try:
            from tests.simt import executor
        except ImportError as error:
            return f"the CPU executor for CUDA kernels is not there ({error})"
        return executor.unavailable()
    return None


@functools.cache
def backend_module(family, name):
    """The module that implements `family` on `name`."""
    return importlib.import_module(f"lgkernels.ops.{family}.{MODULES.get(name, name)}")


@contextlib.contextmanager
def running(name):
    """Inside, the backend `name` runs on CPU tensors: yields the value of `impl=` that selects it."""
    reason = unavailable(name)
    if reason:
        (pytest.fail if name in REQUIRED else pytest.skip)(f"{name}: {reason}")
    if name != "cuda-simt":
        yield name
        return
    from lgkernels.core import native
    from tests.simt import executor

    native.override_cuda(executor.module())
    try:
        yield "cuda"
    finally:
        native.override_cuda(None)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Name of a backend, which runs here during the test."""
    with running(request.param):
        yield request.param


@pytest.fixture
def impl(backend):
    """The value of `impl=` that selects `backend`."""
    return MODULES.get(backend, backend)


@pytest.fixture(autouse=True)
def seeded():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # without a device torch.manual_seed keeps three stack traces a call, which takes longer than a small test
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once():
    """Triton's interpreter replaces the functions of its language at each launch, until its end, and again at each call
    of a function inside: half of its time. Here a call whose module sees no more of the language leaves it out."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace, seen = interpreter._patch_lang, set()  # what has been replaced since the launch; empty outside of one

    def replace_once(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules in seen:
            return None  # a call: nobody restores after it
        scope, is_launch = replace(function), not seen
        if scope is None:
            return None  # Triton 3.5, which restores nothing
        seen.add(modules)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (seen.clear(), restore())
        return scope

    interpreter._patch_lang = replace_once


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("lgkernels"):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max - 3)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Memory that lgkernels takes uninitialised holds nan, so an output byte that no kernel writes shows."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    # torch lists its functions when a default device or the compiler is first used (the compiler anew after a process
    # group was made): not while some are replaced. Imported here, because the compiler imports Triton, after
    # pytest_configure has chosen the interpreter.
    import torch._dynamo

    torch.utils._device._device_constructors()
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch._dynamo.trace_rules.get_tensor_method()
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
