"""A trainer's step, recorded in a CUDA graph and replayed: one launch from the host instead of hundreds."""

import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..core import unit
from ..optim.offset_refresh import Offsets

WARM_UP = 3  # ordinary steps before one is recorded: they compile, allocate, and try kernels that are new here
MOST = 4  # graphs that are kept; each has memory of its own
DEVICE_TYPES = {"cuda"}  # tests put "cpu" here, and a recorder of their own into torch.cuda
_NUMBERS = (int, float, bool, str, tuple, type(None))
_Fixed = dict[tuple, Any]  # what a graph holds, by (optimizer, parameter group, name)


def check(trainer: Any) -> None:
    """Raise where the trainer's step waits for the host, or is not the same each time."""

    def refuse(name: str, expected: str, got: object, why: str) -> None:
        raise ValueError(f"{name} must be {expected} with cuda_graph=True, got {got}: {why}")

    devices = {p.device for group in trainer.parameter_groups for p in group}
    if len(devices) != 1 or not {device.type for device in devices} <= DEVICE_TYPES:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"cuda_graph must be False unless all parameters are on one CUDA device, got True and {names}")
    if trainer.accumulation_steps != 1:
        refuse("accumulation_steps", "1", trainer.accumulation_steps, "a graph would write a gradient, not add to it")
    if trainer.grad_scaler is not None:
        refuse("grad_scaler", "None", "a GradScaler", "it reads on the host whether a step is to be left out")
    if any(isinstance(block, DistributedDataParallel) for block in trainer.blocks):
        refuse("blocks", "without DistributedDataParallel", "one", "what the ranks exchange is not recorded")
    if trainer.clip_grad_norm is not None and any(isinstance(o, Offsets) for o in trainer.optimizers):
        refuse("clip_grad_norm", "None", trainer.clip_grad_norm, "optimizers with offsets read the norm on the host")


def _copies(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Laid out and aligned as a graph's own inputs are, which chooses kernels; the caller's may lie elsewhere."""
    return [tensor.detach().clone() for tensor in tensors]


class _Graph:
    """A recorded step: its inputs, the graph, its losses and output."""

    def __init__(self, trainer: Any, x: torch.Tensor, target: torch.Tensor, stream: Any) -> None:
        self.x, self.target = _copies(x, target)
        self.graph = torch.cuda.CUDAGraph()
        with unit.own(x.device) as self.unit, torch.cuda.graph(self.graph, stream=stream):
            self.losses = trainer._step(self.x, self.target, True)
            self.output = trainer.output

    def replay(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.x.copy_(x, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        self.graph.replay()
        return self.losses.clone(), self.output.clone()  # the next replay writes over its own


class StepGraphs:
    """The graphs of a trainer, one for each shape of a batch.

    A graph holds what stands in Python when it is recorded: learning rates and other numbers of the optimizers, and
    which tensors their state and their offsets are. When one of those changes, all graphs are dropped, and after
    `WARM_UP` ordinary steps the step is recorded again. A number in a tensor on the parameters' device is read at
    every replay: a schedule that writes into it changes nothing here.
    """

    def __init__(self, trainer: Any) -> None:
        check(trainer)
        self.trainer = trainer
        self.stream: Any = None  # warm-up and recording run here: autograd binds parts of a backward to a stream
        self.device = trainer.parameter_groups[-1][0].device
        self.in_vain = 0  # changes since the last recording
        self.warned = False
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: the next steps are ordinary ones. For changes that nothing shows, as a module's mode."""
        self.graphs: dict[tuple, _Graph] = {}
        self.seen: dict[tuple, int] = {}
        self.fixed: _Fixed = {}

    def _fixed_now(self) -> _Fixed:
        found: _Fixed = {}
        for i, optimizer in enumerate(self.trainer.optimizers):
            if optimizer is None:
                continue
            found[i, -1, "state"] = optimizer.state
            found[i, -1, "offset_changes"] = getattr(optimizer, "offset_changes", 0)
            for j, group in enumerate(optimizer.param_groups):
                for name, value in group.items():
                    if name != "params":
                        found[i, j, name] = self._held(value)
        return found

    def _held(self, value: Any) -> Any:
        """What a graph holds of an optimizer's option: of a tensor elsewhere, its number at the recording."""
        elsewhere = isinstance(value, torch.Tensor) and value.numel() == 1 and value.device != self.device
        return value.item() if elsewhere else value

    def _changed(self, now: _Fixed) -> tuple | None:
        """Key of the first entry that is not as it was."""
        if now.keys() != self.fixed.keys():
            return next(iter(now.keys() ^ self.fixed.keys()))
        for key, a in now.items():
            b = self.fixed[key]
            if a is not b and not (type(a) is type(b) and isinstance(a, _NUMBERS) and a == b):
                return key
        return None

    def _begin_anew(self, now: _Fixed, key: tuple) -> None:
        self.in_vain = self.in_vain + 1 if self.fixed else 0
        self.forget()
        self.fixed = now
        if self.in_vain < WARM_UP or self.warned:
            return
        self.warned = True
        i, j, name = key
        where = f"optimizers[{i}].param_groups[{j}][{name!r}]" if j >= 0 else f"optimizers[{i}].{name}"
        warnings.warn(
            f"cuda_graph=True records nothing: {where} has changed {self.in_vain} times, each time before a step could "
            f"be recorded (after {WARM_UP} without a change), so all steps are ordinary ones. Give the optimizer a "
            "tensor on the parameters' device in place of the number, into which schedules write (lr=torch.tensor(0.1, "
            "device=...), with fused=True for torch's SGD, capturable=True for its Adam); or change it once an epoch",
            stacklevel=4,
        )

    def step(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One step of the trainer."""
        now = self._fixed_now()
        if (key := self._changed(now)) is not None:
            self._begin_anew(now, key)
        kind = x.device.type
        shape = (
            *((t.shape, t.stride(), t.dtype, t.device) for t in (x, target)),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        if shape not in self.graphs:
            if len(self.graphs) >= MOST or x.device != target.device:
                return self._ordinary(x, target)
            if self.seen.get(shape, 0) < WARM_UP:
                self.seen[shape] = self.seen.get(shape, 0) + 1
                return self._ordinary(*_copies(x, target))
            self.graphs[shape] = self._recorded(x, target)
            self.in_vain = 0
        losses, self.trainer.output = self.graphs[shape].replay(x, target)
        return losses

    def _ordinary(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            losses = self.trainer._step(x, target, True)
        current.wait_stream(self.stream)
        return losses

    def _recorded(self, x: torch.Tensor, target: torch.Tensor) -> _Graph:
        try:
            return _Graph(self.trainer, x, target, self.stream)
        except Exception as error:
            self.trainer.zero_grad()
            raise RuntimeError(
                f"cuda_graph=True: the step cannot be recorded ({type(error).__name__}: {error}). Optimizers of torch "
                "may want capturable=True, and blocks must not read values of tensors; else use cuda_graph=False"
            ) from error
