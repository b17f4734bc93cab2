"""A new family is new files and at most three edited lines: a toy is added to a copy of the tree, and all commands find
it. What it had to edit elsewhere would be a fault of the structure.

The toy: y = factor * x, an op with four backends, a function, a module, a trainer, a rule, a bench case, tests.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simt import executor
from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[1]
NEW = {
    "lgkernels/ops/toy/__init__.py": "",
    "lgkernels/ops/toy/reference.py": '''
def scale(x, options):
    """y = factor * x."""
    return x * options.factor
''',
    "lgkernels/ops/toy/options.py": """
from typing import NamedTuple


class ToyOptions(NamedTuple):
    factor: float = 2.0
""",
    "lgkernels/ops/toy/op.py": """
import torch
from torch import Tensor

from ...core.ops import define
from .options import ToyOptions


@define(backends_of="toy_scale", package=__package__, fake=lambda x, options: torch.empty_like(x))
def toy_scale(kernels, x: Tensor, options: ToyOptions) -> Tensor:
    return kernels.scale(x, options)
""",
    "lgkernels/ops/toy/autograd.py": """
import torch

from ...core.autograd import apply, first_order_only
from . import op  # noqa: F401  registers the op

_ops = torch.ops.lgkernels


class _Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, options, impl):
        ctx.options, ctx.impl = options, impl
        return _ops.toy_scale(x, *options, impl)

    @staticmethod
    def backward(ctx, grad):
        return first_order_only("toy", _ops.toy_scale(grad.contiguous(), *ctx.options, ctx.impl), grad), None, None


def toy(x, options, impl):
    return apply(_Toy, "toy", x, options, impl)
""",
    "lgkernels/ops/toy/cpu.py": """
import torch

from ...core.native import cpu_entries

_C = cpu_entries()


def scale(x, options):
    own, out = x.float().contiguous(), torch.empty(x.shape, dtype=torch.float32)
    _C.toy_scale(options, own.data_ptr(), own.numel(), out.data_ptr())
    return out.to(x.dtype)
""",
    "lgkernels/ops/toy/triton.py": """
import torch
import triton
import triton.language as tl

from ..common.addressing import indices, program_id
from ..common.launch import block_count, launch
from ..common.rounding import rounded


@triton.jit
def toy_kernel(x, out, factor, size, BLOCK: tl.constexpr):
    i = indices(program_id(0), BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.cast(factor, tl.float32)
    tl.store(out + i, rounded(value, out.dtype.element_ty), mask=i < size)


def scale(x, options):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs = block_count(x.numel(), 256)
    launch(toy_kernel, programs, x.device, x.contiguous(), out, options.factor, x.numel(), BLOCK=256)
    return out
""",
    "lgkernels/ops/toy/cuda.py": """
import torch

from ..common.cuda import call


def scale(x, options):
    own, out = x.float().contiguous(), torch.empty(x.shape, dtype=torch.float32, device=x.device)
    call("toy_scale", x.device, options.factor, own.data_ptr(), own.numel(), out.data_ptr())
    return out.to(x.dtype)
""",
    "lgkernels/ops/toy/selftest.py": """
import torch

from . import autograd
from .options import ToyOptions


def toy(impl, device, dtype):
    x = torch.arange(6.0).to(device, dtype).requires_grad_()
    y = autograd.toy(x, ToyOptions(), impl)
    y.sum().backward()
    return [y.detach(), x.grad]


CASES = {"toy_scale": toy}
""",
    "csrc/toy/cpu/bindings.cpp": """
#include "common/cpu/bindings.h"

namespace lgk::cpu {

static int toy_scale(std::array<float, 1> options, const float* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = options[0] * x[i];
  return 0;
}

static void bind(py::module_& m) { define_kernel(m, "toy_scale", toy_scale); }

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
""",
    "csrc/toy/cuda/scale.cu": """
#include "common/cuda/launch.h"

namespace lgk::cuda {
namespace {

__global__ void scale_kernel(float factor, const float* x, int64_t size, float* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) out[i] = factor * x[i];
}

}  // namespace

int toy_scale(float factor, const float* x, int64_t size, float* out, void* stream) {
  const dim3 blocks(static_cast<unsigned>((size + 255) / 256));
  LGK_LAUNCH(scale_kernel, blocks, dim3(256), 0, stream, factor, x, size, out);
  return launch_status();
}

}  // namespace lgk::cuda
""",
    "csrc/toy/cuda/bindings.cpp": """
#include "common/bindings.h"

namespace lgk::cuda {

int toy_scale(float factor, const float* x, int64_t size, float* out, void* stream);

static void bind(py::module_& m) { define(m, "toy_scale", &toy_scale); }

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
""",
    "lgkernels/functional/toy.py": '''
"""A toy."""

import torch

from ..core import checks
from ..ops.toy import autograd as _toy
from ..ops.toy.options import ToyOptions

__all__ = ["toy"]


def toy(x: torch.Tensor, *, factor: float = 2.0, impl: str = "auto") -> torch.Tensor:
    """factor * x."""
    checks.floating("x", x)
    checks.number("factor", factor)
    checks.impl(impl)
    return _toy.toy(x, ToyOptions(factor), impl)
''',
    "lgkernels/nn/toy.py": '''
"""A toy."""

import torch

from .. import functional as LF

__all__ = ["Toy"]


class Toy(torch.nn.Module):
    """factor * x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LF.toy(x)
''',
    "lgkernels/training/toy.py": '''
"""A toy: back-propagation of half the loss."""

from typing import Any

from .backprop import BackpropTrainer

__all__ = ["ToyTrainer"]

UNIT_COSTS = {"toy": (3, 1.5)}


class ToyTrainer(BackpropTrainer):
    """Half the loss."""

    def __init__(self, blocks: Any, optimizer_factory: Any, **options: Any) -> None:
        super().__init__(blocks, optimizer_factory, **options)
        whole = self.loss
        self.loss = lambda output, target: whole(output, target) / 2
''',
    "lgkernels/recipes/rules/toy.py": '''
"""A toy: everything is doubled on the way in."""

from torch import nn

from ... import nn as lnn
from ...training.toy import ToyTrainer
from .. import models
from . import Rule


def build(task):
    return [nn.Sequential(lnn.Toy(), block) if i == 0 else block for i, block in enumerate(models.plain(*task.size))]


def trainer(blocks, optimizer_factory, task, **options):
    return ToyTrainer(blocks, optimizer_factory, **options)


RULES = (Rule("toy", build, trainer),)
''',
    "bench/toy.py": '''
"""A toy."""

import lgkernels.functional as LF

from .common import Case, Contestant, Problem


class Toy(Problem):
    op = registered_op = "toy_scale"
    title = "Toy"
    baseline = "floor"

    def contestants(self):
        x = self.input
        return [
            *self.ours(lambda impl: lambda: {"y": LF.toy(x, impl=impl)}),
            Contestant("floor", "floor", lambda: lambda: {"": x * 2}),
        ]

    def truth(self):
        return {"y": self.input.double() * 2}


CASES = {"smoke": [Case(Toy, 4, 6)]}
''',
    "tests/toy/__init__.py": "",
    "tests/toy/doors.py": """
from tests.support.problems import randn

DOORS = {"toy_scale": (randn(3, 4), 2.0)}
FREE = {("toy_scale", "x"): {"entry 0", "entry 1", "one before", "one behind", "one less"}}
""",
    "tests/toy/calls.py": """
from tests.support.calls import Call
from tests.support.problems import randn

CALLS = {"toy": Call(dict(x=randn(3, 4), factor=2.0), free={"x": ...}, any_sign=("factor",))}
MODULES = {"Toy": Call({})}
""",
    "tests/toy/aot.py": """
import torch

from lgkernels.ops.toy import triton as toy
from lgkernels.ops.toy.options import ToyOptions

MATRIX_KERNELS = set()
TABLES = {}


def cases():
    toy.scale(torch.empty(1000, 10), ToyOptions())
""",
    "tests/toy/sanitized.py": """
from lgkernels.ops.toy.options import ToyOptions
from tests.support.problems import randn


def run(kernels, device):
    return [kernels.scale(randn(257).to(device), ToyOptions())]
""",
    "tests/toy/test_kernels.py": """
from tests.conftest import backend_module
from tests.toy import sanitized


def test_scale(backend):
    [result] = sanitized.run(backend_module("toy", backend), "cpu")
    [expected] = sanitized.run(backend_module("toy", "reference"), "cpu")
    assert (result == expected).all()
""",
    "tests/toy/test_gpu_kernels.py": """
import pytest
import torch

import lgkernels.functional as LF
from tests.support.gpu import backend, on_the_device  # noqa: F401


@pytest.mark.op("toy_scale")
def test_toy(impl):
    assert (LF.toy(torch.ones(3, device="cuda"), impl=impl) == 2).all()
""",
}
EDITED = {  # one line each
    "lgkernels/functional/__init__.py": ("\n__all__", "from .toy import *"),
    "lgkernels/nn/__init__.py": ("\n__all__", "from .toy import *"),
    "README.md": ("| Local forward gradients", "| Toy | works | `functional.toy` |"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with the toy, and the native module built in it."""
    return made_once(tmp_path_factory, "new_family", make_tree)


def make_tree(folder):
    # mypy's cache comes along: what the toy does not touch need not be read again
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build", "runs", ".git", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    for name, text in NEW.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    for name, (before, line) in EDITED.items():
        text = (folder / name).read_text()
        assert text.count(before) == 1, name
        (folder / name).write_text(text.replace(before, f"{line}\n{before}"))
    if not executor.unavailable():  # what the executor is made of is compiled already, but for the toy
        executor.build()
        unfinished = shutil.ignore_patterns("*.new", "*.lock")  # another process may be compiling with sanitizers
        shutil.copytree(executor.FOLDER, folder / "build/simt", ignore=unfinished)
    # .ci/run keeps the objects of its own build
    launcher = (
        {"CMAKE_CXX_COMPILER_LAUNCHER": str(ROOT / ".ci/keep_objects")} if "LGKERNELS_OBJECTS" in os.environ else {}
    )
    run(folder, "setup.py", "-q", "build_ext", "--inplace", LGKERNELS_BUILD="cpu", **launcher)


def run(folder, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LGKERNELS_IMPL", "TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_only_names_are_edited():
    assert len(EDITED) <= 3 and not any((ROOT / name).exists() for name in NEW)


def test_selftest_finds_its_backends(tree):
    printed = run(tree, "-m", "lgkernels", "info", "--selftest", TRITON_INTERPRET="1")
    found = set(re.findall(r"PASS toy_scale +cpu +float32 +(\w+)", printed))
    assert found == {"reference", "cpu", "triton"}


def test_its_doors_and_calls_are_found(tree):
    static = ("tests/static/test_argument_checks.py", "tests/static/test_argument_checks_of_modules.py")
    tests = ("tests/integration/test_door.py", *static)
    printed = run(tree, "-m", "pytest", "-q", "-n", "0", *tests, "-k", "test_every or test_door and toy")
    assert int(re.search(r"\b(\d+) passed", printed)[1]) > 3, printed[-1000:]


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_its_files_are_clean(tree):
    files = [name for name in NEW if name.endswith(".py") and NEW[name]]
    run(tree, "-m", "ruff", "check", "--no-cache", "--ignore", "W391", *files)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_its_annotations_are_right(tree):
    run(tree, "-m", "mypy", "--cache-dir", str(tree / ".mypy_cache"))


@pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
def test_all_its_backends_are_run(tree):
    """The CUDA kernel by the executor; and what is run under checkers of memory is found."""
    printed = run(tree, "-m", "pytest", "-q", "-n", "0", "tests/toy/test_kernels.py", TRITON_INTERPRET="1")
    assert re.search(r"\b4 passed", printed), printed[-1000:]
    code = "from tests.support import sanitized; from tests.simt import test_sanitizers as checked; "
    printed = run(tree, "-c", code + "print(*sanitized.FAMILIES, *checked.FAMILIES)")
    assert "toy" in printed.split() and "tests/toy/test_kernels.py" in printed


FINDS = """
import lgkernels, torch
from bench import gpu_check
from lgkernels.training import planner
from tests.static import aot
print(planner.unit_costs())
print(lgkernels.plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), (2, 4)))
print("parts:", *gpu_check.PARTS)
print("aot:", *aot.FAMILIES)
aot.FAMILIES = ["toy"]
aot.main([86])
"""


def test_trainer_parts_and_kernel_are_found(tree):
    """By the planner, `gpu_check`, and the ahead-of-time gate, which compiles the kernel. In one process: it is torch's
    import that takes long."""
    printed = run(tree, "-c", FINDS)
    assert "'toy': (3, 1.5)" in printed and "BP-modified toy, 1 units" in printed
    named = {line.partition(": ")[0]: line.split()[1:] for line in printed.splitlines()}
    assert {"test:toy", "bench:toy"} <= set(named["parts"]) and "toy" in named["aot"]
    assert '"kernel": "toy_kernel"' in printed


def test_bench_finds_its_case(tree):
    printed = run(
        tree,
        "-m",
        "pytest",
        "bench",
        "-q",
        "--preset",
        "smoke",
        "--seconds",
        "0",
        "--min-rounds",
        "2",
        "--family",
        "toy",
    )
    assert re.search(r"\b3 passed", printed), printed[-1000:]  # our two backends, and the floor


def test_the_gpu_tests_are_collected(tree):
    printed = run(tree, "-m", "pytest", "--gpu", "--collect-only", "-q", "tests/toy")
    assert "test_toy[triton]" in printed


def test_train_finds_its_rule(tree, tmp_path):
    assert "toy" in run(tree, "-m", "lgkernels", "train", "--help")
    printed = run(
        tree, "-m", "lgkernels", "train", "--rule", "toy", "--epochs", "1", "--limit", "256", "--out", str(tmp_path)
    )
    assert re.search(r"^toy +\d+\.\d+ %", printed, re.MULTILINE)
