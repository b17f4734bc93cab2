"""The fallback `impl="torch"` against what an expert writes in plain torch (bench/rivals/lls.py): operations, bytes and
peak memory of a loss and of a block, forward and backward, at most 15 % more."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import lls as bench
from bench.rivals import lls as rivals
from lgkernels.ops.lls import autograd, op
from lgkernels.recipes.measure import peak_memory

MORE = 1.15
CASES = [case for preset in ("cpu", "gpu") for case in bench.CASES[preset] if case.problem in (bench.Loss, bench.Block)]
CASES = list(dict.fromkeys(dataclasses.replace(case, batch=case.batch // 2) for case in CASES))


def _bytes(tensor):
    """Of memory that is touched: an expanded dimension is no more of it."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride or n == 0]
    return tensor.element_size() * torch.Size(sizes).numel()


class Counter(TorchDispatchMode):
    """Calls that do work, neither views nor allocations; bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in func.__name__:
            read = args[1:] if func.overloadpacket is torch.ops.aten.copy_ else args  # keywords are written alone
            tensors = [t for t in tree_leaves((read, result)) if isinstance(t, torch.Tensor)]
            self.names.append(func.__name__)
            self.bytes += sum(map(_bytes, tensors))
        return result


@pytest.fixture
def opened(monkeypatch):
    """The ops as plain functions: a dispatch mode sees the calls inside."""
    names = "lls_loss_forward", "lls_loss_backward", "lls_block"
    functions = {name: getattr(op, name).implementation for name in names}
    monkeypatch.setattr(autograd, "_ops", SimpleNamespace(**functions))


def steps(case):
    """Ours by implementation, and theirs: functions of no arguments."""
    problem = case.problem(case, torch.device("cpu"))
    theirs = problem.lean(rivals.lean_loss if case.problem is bench.Loss else rivals.lean_block)
    return lambda impl: problem.library(impl), theirs


def counted(step):
    step()  # tables and caches
    with Counter() as counter:
        step()
    return counter


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operations_and_bytes(case, opened):
    ours, theirs = steps(case)
    mine, lean = counted(ours("torch")), counted(theirs)
    assert len(mine.names) <= MORE * len(lean.names), f"{mine.names}, lean {lean.names}"
    assert mine.bytes <= MORE * lean.bytes, f"{mine.bytes} bytes, lean {lean.bytes}"


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda case: case.name)
def test_the_definition_is_not_lean(case, opened):
    """So the counter counts."""
    ours, theirs = steps(case)
    definition, lean = counted(ours("reference")), counted(theirs)
    assert len(definition.names) > 2 * len(lean.names) and definition.bytes > 2 * lean.bytes


@pytest.mark.unpoisoned
@pytest.mark.parametrize("case", [case for case in CASES if case.problem is bench.Block], ids=lambda case: case.name)
def test_peak_memory(case):
    ours, theirs = steps(case)
    mine, lean = (peak_memory(step, torch.device("cpu")) for step in (ours("torch"), theirs))
    assert mine <= MORE * lean, f"{mine} bytes, lean {lean}"
