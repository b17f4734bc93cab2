"""What the families' files share: a case, its problem, a contestant with a role, inputs, tolerances.

A family is one file of bench/ that assigns `CASES`, {preset: [Case]}; nothing lists it. Each op of a family that is
measured is a `Problem` class, with all that belongs to it: title, baseline, inputs, contestants, exact results.
"""

import contextlib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import torch

from lgkernels.core import dispatch

FOLDER = Path(__file__).parent
PRESETS = ("smoke", "cpu", "gpu")  # tiny (CI); the shapes of the README's tables on a CPU; those of a GPU

Role = Literal[
    "ours",  # lgkernels
    "reference",  # lgkernels' definition in plain torch, where a kernel of ours runs beside it
    "lean",  # what an expert writes in plain torch
    "compiled",  # torch.compile of the lean version
    "eager",  # the formulas as published, by autograd
    "peer",  # another library, or torch's own fused kernel, for the same work
    "bp",  # the same layer or network with back-propagation
    "floor",  # a part of the work that none can do without
]
ROLES = get_args(Role)
# of a weight gradient alone, or with another weight for the input's gradient
convolution_backward = torch.ops.aten.convolution_backward.default
CACHE_BYTES = 256 * 2**20  # more than the last-level cache of any GPU


def families():
    """Names of the families: files of bench/ that assign `CASES`."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if re.search(r"^CASES\b", path.read_text(), re.MULTILINE))


def cases(preset, chosen=None):
    """All cases of a preset, or those of the chosen family."""
    modules = (importlib.import_module(f"bench.{name}") for name in families() if chosen in (None, name))
    return [case for module in modules for case in module.CASES.get(preset, [])]


@dataclass(frozen=True)
class Case:
    """One comparison: the problem's class and its sizes. A family with other sizes has a subclass."""

    problem: type
    batch: int
    channels: int = 0  # input channels of a block, features of a 2-D activation
    out_channels: int = 0
    size: int = 0  # height and width
    rule: str | None = None
    dtype: str = "float32"
    channels_last: bool = False

    @property
    def op(self):
        return self.problem.op

    def words(self):
        """What the name says between sizes and dtype."""
        return [self.rule] if self.rule else []

    def notes(self):
        """The same for the reports."""
        return self.words()

    @property
    def name(self):
        """Under which results are merged: it must not change."""
        sizes = "x".join(str(n) for n in (self.batch, self.channels, self.out_channels, self.size) if n)
        layout = ["channels_last"] * self.channels_last
        return "-".join([self.op, sizes, *self.words(), self.dtype, *layout])

    @property
    def label(self):
        sizes = ", ".join(str(n) for n in (self.batch, self.channels, self.out_channels, self.size) if n)
        notes = self.notes() + [self.dtype] * (self.dtype != "float32") + ["channels_last"] * self.channels_last
        return ", ".join([f"({sizes})", *notes])

    def row(self):
        """The case's part of a row of results."""
        sizes = {name: value for name, value in asdict(self).items() if name != "problem"}
        about = {"title": self.problem.title, "label": self.label, "registered_op": self.problem.registered_op}
        return {"case": self.name, "op": self.op, **about, **sizes, "baseline": self.baseline}

    @property
    def baseline(self):
        """Name of the contestant by whose time the others' are divided."""
        return self.problem.baseline

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Contestant:
    """`make()` returns what is timed: a function that returns results by name."""

    name: str
    role: Role
    make: Callable[[], Callable[[], dict | None]]
    variant: bool = False  # on other terms (a layout, a narrower dtype): in the full tables alone
    backend: str | None = None  # of lgkernels
    allocates_by_torch: bool = True  # else its memory is not known

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role of contestant {self.name!r} must be one of {ROLES}, got {self.role!r}")


class Problem:
    """A case on a device. Subclasses build their inputs in cached properties: the list of contestants costs nothing."""

    op: str  # its name in the results
    title: str
    baseline: str
    registered_op: str | None = None  # whose backends take part
    differentiable = False  # the input is
    bytes = 0  # that the op has to move, at least
    flops = 0

    def __init__(self, case, device):
        self.case, self.device = case, device
        self.shape = (case.batch, case.channels) + ((case.size, case.size) if case.size else ())
        self.input_bytes = math.prod(self.shape) * torch.finfo(case.torch_dtype).bits // 8

    def absent(self) -> dict[str, str]:
        """Contestants that could not take part here, and what they need: their tests are skipped with it."""
        return {}

    @property
    def footprint(self):
        """Bytes of inputs and parameters, which the copies must take out of the cache."""
        return self.input_bytes

    @property
    def copies(self):
        """On a GPU a contestant is timed over so many copies of the problem, one after the other."""
        if self.device.type == "cpu":
            return 1
        return min(16, max(2, math.ceil(CACHE_BYTES / self.footprint)))

    def contestants(self):
        raise NotImplementedError

    def truth(self):
        """Exact results by name; contestants' results of other names are not compared."""
        return {}

    @property
    def tolerance(self):
        """Relative error in norm, of a check before timing, not the tests': one value at the activation's kink, where
        rounding decides the slope, moves a weight gradient by up to 1 %."""
        return 2e-3 if self.case.dtype == "float32" else 5e-2

    def backends(self):
        """Backends of the registered op that can run here."""
        usable = partial(dispatch.unavailable, device=self.device, dtype=self.case.torch_dtype)
        return [b for b in dispatch.BACKENDS if usable(self.registered_op, b) is None]

    def ours(self, make, reference=True):
        """The backends as contestants; the reference takes part beside kernels only if `reference`."""
        found = self.backends()
        if not reference:
            found = [b for b in found if b != "reference"] or found
        return [
            Contestant(
                f"lgkernels {b}",
                "reference" if b == "reference" and len(found) > 1 else "ours",
                partial(make, b),
                backend=b,
            )
            for b in found
        ]

    @cached_property
    def input(self):
        """A normal tensor."""
        layout = torch.channels_last if self.case.channels_last and self.case.size else torch.contiguous_format
        first = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        first = first.to(self.device, self.case.torch_dtype).contiguous(memory_format=layout)
        return first.requires_grad_(self.differentiable)

    @cached_property
    def target(self):
        """Random class indices."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.case.classes, (self.case.batch,), generator=generator).to(self.device)

    def incoming(self, *shape):
        """A normal gradient of an output."""
        grad = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        return grad.to(self.device, self.case.torch_dtype)

    @staticmethod
    def compiled(function):
        return torch.compile(function, dynamic=False)

    def autocast(self):
        if self.case.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.case.torch_dtype, cache_enabled=False)


def contestants(problem, compiled):
    """Those of a problem, without torch.compile unless `compiled`."""
    return [c for c in problem.contestants() if compiled or c.role != "compiled"]
