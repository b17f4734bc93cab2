"""What the trainers share: optimizers, schedules, accumulation, modes, recalibration, state."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import checks, constructors
from ..core.unit import unit_gradient
from ..core.whole import require_whole
from ..nn.random_state import feedback_state, load_feedback_state
from ..optim.offset_refresh import Offsets
from . import sharded
from .graph import StepGraphs

STATE_VERSION = 1
_PARTS = ("blocks", "optimizers", "schedulers", "grad_scaler")  # of a state

Parameters = list[nn.Parameter]
OptimizerFactory = Callable[[Parameters], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]  # a learning-rate schedule
Self = TypeVar("Self", bound="Trainer")


def trainable(module: nn.Module) -> Parameters:
    """The parameters of `module` that want a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def bare(module: nn.Module) -> nn.Module:
    """`module` without its DistributedDataParallel wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _made(factory: OptimizerFactory, parameters: Parameters) -> Any:
    """The factory's optimizer: one that has `step` and `zero_grad`, as a function that forgets its `return` has not."""
    optimizer = factory(parameters)
    if not all(callable(getattr(optimizer, name, None)) for name in ("step", "zero_grad")):
        raise TypeError(
            f"optimizer_factory must return an optimizer (with step and zero_grad), got {type(optimizer).__name__}"
            + (": its `return` is missing" if optimizer is None else "")
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            "optimizer_factory must return an optimizer whose step() needs no closure, got "
            f"{type(optimizer).__name__}: a trainer gives it gradients, not a loss to call again"
        )
    groups = getattr(optimizer, "param_groups", None)
    if isinstance(groups, list) and groups:
        held, mine = {id(p) for group in groups for p in group["params"]}, list(map(id, parameters))
        if held.isdisjoint(mine):
            raise ValueError(
                "optimizer_factory must return an optimizer of the parameters that it is given, got one that holds "
                f"none of these {len(mine)}: nothing would be trained"
            )
    return optimizer


class Trainer:
    """Base of the trainers; one entry of `optimizers` for each of `parameter_groups`."""

    takes_sharded = False  # whether blocks may be sharded (fully_shard)

    def __init__(
        self,
        blocks: list[nn.Module],
        optimizer_factory: OptimizerFactory,
        parameter_groups: list[Parameters],
        *,
        scheduler_factory: SchedulerFactory | None,
        accumulation_steps: int,
        clip_grad_norm: float | None,
        grad_scaler: torch.amp.GradScaler | None,
        cuda_graph: bool = False,
    ) -> None:
        constructors.function("optimizer_factory", optimizer_factory)
        if scheduler_factory is not None:
            constructors.function("scheduler_factory", scheduler_factory)
        accumulation_steps = constructors.size("accumulation_steps", accumulation_steps)
        if clip_grad_norm is not None:
            clip_grad_norm = constructors.bound_on_norm("clip_grad_norm", clip_grad_norm)
        if grad_scaler is not None:
            constructors.instance("grad_scaler", grad_scaler, torch.amp.GradScaler, "a torch.amp.GradScaler")
        checks.boolean("cuda_graph", cuda_graph)
        if not any(parameter_groups):
            raise ValueError("blocks must hold at least one parameter that requires a gradient, got none")
        if not self.takes_sharded:
            for group in parameter_groups:
                require_whole("model", group, type(self).__name__)
        self._places = sharded.Places(blocks)
        self.blocks = blocks
        self.parameter_groups = parameter_groups
        self.optimizers = [_made(optimizer_factory, group) if group else None for group in parameter_groups]
        self.schedulers = [scheduler_factory(o) if scheduler_factory and o else None for o in self.optimizers]
        if scheduler_factory and any(
            o and not callable(getattr(s, "step", None)) for o, s in zip(self.optimizers, self.schedulers)
        ):
            raise TypeError("scheduler_factory must return a learning-rate schedule (with step), got one without")
        self.accumulation_steps, self.clip_grad_norm = accumulation_steps, clip_grad_norm
        self.grad_scaler = grad_scaler
        self.graphs = StepGraphs(self) if cuda_graph else None
        self.steps = 0  # optimizer steps taken
        self._without_graph: set[str] = set()  # the places that were warned about
        self.accumulated = 0  # batches whose gradients wait for the next one
        self.output: torch.Tensor | None = (
            None  # detached output of the last block for the last batch: logits, as a rule
        )
        self.train()

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Train on one batch; the optimizers step at every `accumulation_steps`-th call. Returns the losses.

        Args:
            x (Tensor): the batch; of a `BlockwiseTrainer` whose first block takes one (units of `split_blocks`) also a
                mapping of the model's arguments. target (Tensor): class indices, or what the blocks take.

        Returns:
            Tensor: one loss per trained block, detached, on the device: nothing waits for it.
        """
        if not self.training:
            raise RuntimeError("step() needs training mode: call trainer.train() after an evaluation")
        self._check_batch(x)
        checks.any_tensor("target", target)
        self._places.require_same()
        last = self.accumulated + 1 == self.accumulation_steps
        losses = self._step(x, target, last) if self.graphs is None else self.graphs.step(x, target)
        self.accumulated = 0 if last else self.accumulated + 1
        if last:
            self.steps += 1
            if self.grad_scaler is not None:
                self.grad_scaler.update()
            torch.clear_autocast_cache()  # it holds the old weights, should the caller's autocast span several steps
        return losses

    def _check_batch(self, x: Any) -> None:
        self._check_input(x)

    def _check_input(self, x: Any) -> None:
        checks.any_tensor("x", x)

    def _step(self, x: torch.Tensor, target: torch.Tensor, last: bool) -> torch.Tensor:
        raise NotImplementedError

    def _synchronised(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Ranks exchange gradients at the last batch of an accumulation only."""
        if not last and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self.accumulation_steps > 1:
            loss = loss / self.accumulation_steps
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def _no_graph(self, value: torch.Tensor, place: str) -> bool:
        """Whether a block hands on its input at this step (layer drop), so that there is nothing to differentiate."""
        if value.requires_grad:
            return False
        if place not in self._without_graph:
            self._without_graph.add(place)
            what = "its loss needs" if value.dim() == 0 else "its output needs"
            warnings.warn(
                f"{place}: {what} no gradient at this step, so the block learns nothing of it. A block that is skipped "
                "at some steps is fine; one that detaches its output never learns",
                stacklevel=2,
            )
        return True

    def _backward(self, loss: torch.Tensor, parameters: Sequence[torch.Tensor], place: str) -> None:
        if self._no_graph(loss, place):
            return
        loss = self._scaled(loss)
        # A backward runs in the dtypes that its forward chose, so the caller's autocast is off here.
        with torch.autocast(loss.device.type, enabled=False):
            sharded.backward(loss, unit_gradient(loss), parameters)

    def _update(self, optimizer: Any, parameters: Parameters) -> None:
        if optimizer is None:
            return  # it trains nothing
        if self.grad_scaler is not None and all(p.grad is None for p in parameters):
            return  # a GradScaler wants at least one gradient
        options: dict[str, float] = {}
        if self.clip_grad_norm is not None:
            if self.grad_scaler is not None:
                self.grad_scaler.unscale_(optimizer)
            if isinstance(optimizer, Offsets):
                options["max_norm"] = self.clip_grad_norm  # its step clips: the offset counts
            else:
                nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if self.grad_scaler is None:
            optimizer.step(**options)
        else:
            self.grad_scaler.step(optimizer, **options)
        optimizer.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Drop all gradients, those of an unfinished accumulation included."""
        for optimizer in filter(None, self.optimizers):
            optimizer.zero_grad(set_to_none=True)
        self.accumulated = 0

    def scheduler_step(self, metric: float | None = None) -> None:
        """Step every learning-rate schedule; `metric` for those that want one (ReduceLROnPlateau)."""
        for scheduler in filter(None, self.schedulers):
            scheduler.step() if metric is None else scheduler.step(metric)

    # -- modes and evaluation --------------------------------------------------------------------------------------

    def train(self: Self, mode: bool = True) -> Self:
        """Training mode of the blocks, and of the optimizers that have one (schedule-free). Returns self."""
        checks.boolean("mode", mode)
        self.training = mode
        for module in self.blocks:
            module.train(mode)
        for optimizer in filter(None, self.optimizers):
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()
        return self

    def eval(self: Self) -> Self:
        """Evaluation mode; a schedule-free optimizer puts its averaged weights in place. Returns self."""
        return self.train(False)

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the last block, in the present mode. Ranks may call it one by one: nothing is exchanged."""
        self._check_input(x)
        for module in self.blocks:
            x = bare(module)(x)
        return x

    def bn_recalibrate(self, batches: Iterable[Any]) -> None:
        """Re-estimate the running statistics of batch normalisation with the present weights.

        Runs the blocks in training mode, without labels and gradients, over `batches` (an iterable of inputs, or of
        tuples that start with the input; the authors of LLS use 50 training batches), then restores every module's
        mode. Call it in evaluation mode: a schedule-free optimizer evaluates other weights than it trained with, whose
        statistics nothing has seen yet.
        """
        expected = "tensors, or of tuples that start with one"
        constructors.iterable("batches", batches, expected)
        modes = [(m, m.training) for module in self.blocks for m in module.modules()]
        for module in self.blocks:
            module.train()
        try:
            for batch in batches:
                x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                constructors.item_of("batches", batches, x, torch.Tensor, expected)
                self.predict(x)
        finally:
            for module, mode in modes:
                module.training = mode

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Blocks, optimizers, schedules, gradient scaler, random feedback and step count, DDP wrappers taken off.

        Taken in training mode a schedule-free run goes on bit for bit (its evaluation mode rounds on the way back).
        """
        if self.accumulated:
            raise RuntimeError(
                f"state_dict() in the middle of an accumulation ({self.accumulated} of "
                f"{self.accumulation_steps} batches): finish it, or call zero_grad() to drop it"
            )
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "blocks": [bare(module).state_dict() for module in self.blocks],
            "optimizers": [o and o.state_dict() for o in self.optimizers],
            "schedulers": [s and s.state_dict() for s in self.schedulers],
            "grad_scaler": self.grad_scaler and self.grad_scaler.state_dict(),
            "feedback": feedback_state(self._model()),
        }

    def _model(self) -> nn.ModuleList:
        return nn.ModuleList(bare(module) for module in self.blocks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, for the same blocks and factories."""
        constructors.instance("state", state, dict, "a dict, that of state_dict()")
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state must have version {STATE_VERSION}, got a dict of version {state.get('version')!r}")
        if missing := [name for name in (*_PARTS, "steps") if name not in state]:
            raise ValueError(f"state must hold {', '.join(map(repr, missing))}, got a dict without")
        if feedback_state(self._model())["feedback"] or (state.get("feedback") or {}).get("feedback"):
            load_feedback_state(self._model(), state.get("feedback"))  # in no state_dict; raises without it
        parts: tuple[list[Any], ...] = self.blocks, self.optimizers, self.schedulers, [self.grad_scaler]
        for name, mine in zip(_PARTS, parts):
            theirs = state[name] if name != "grad_scaler" else [state[name]]
            if [t is None for t in theirs] != [m is None for m in mine]:
                raise ValueError(
                    f"state['{name}'] does not fit this trainer: it has "
                    f"{sum(t is not None for t in theirs)} of {len(theirs)}, the trainer "
                    f"{sum(m is not None for m in mine)} of {len(mine)}"
                )
            for m, t in zip(mine, theirs):
                if m is not None:
                    (bare(m) if name == "blocks" else m).load_state_dict(t)
        self.zero_grad()
        self.steps = state["steps"]
        self.train(self.training)
