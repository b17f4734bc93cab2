"""BP-modified local losses: the rules of `local_loss` with offsets, which back-propagation refreshes every period.

This family is made of another's rules, which is what the method is: Ren, Li (ICLR 2025).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as lnn
from ...optim import OffsetOptimizer, OffsetSGD, refresh_due
from ...training import BlockwiseTrainer, partition, planner, refresh_trainer
from .. import measure
from ..options import UsageError, flag, option, positive
from . import Column, Measures, Task, local_loss
from .local_loss import UnitOptions

ORDER = 50

_PAPER = {
    "augment": "none",
    "image_size": 224,
    "epochs": 30,
    "batch_size": 64,
    "lr": 1e-3,
    "optimizer": "sgd",
    "offset_batch": 320,
    "offset_chunk": 8,
}
PRESETS = {  # the paper's set-ups; units and overlap are not in its text
    "bpm-resnet50": {**_PAPER, "model": "resnet50"},
    "bpm-resnet50-lokr": {**_PAPER, "model": "resnet50", "adapter": "lokr"},
    "bpm-vit-b-16-lora": {**_PAPER, "model": "vit-b-16", "adapter": "lora"},
}


@dataclass(frozen=True)
class OffsetOptions(UnitOptions):
    """Of the offsets."""

    offset_batch: int = option(320, "samples of a refresh")
    offset_chunk: int | None = option(
        None, "samples that it back-propagates at once (the paper: 8); default: as many as one unit's memory holds"
    )
    period: int | None = option(None, "steps between two refreshes of the offsets; default: an epoch")
    first_period: int | None = option(None, "an extra short period at the start; default: 50 with an adapter")
    local_scale: str = option(
        "1", "lambda, the factor of the local gradient: a number, or auto: estimated at each refresh"
    )
    offset_scale: str = option("1", "alpha, the factor of the offset: a number, or auto")
    offset_growth: float | None = option(None, "drop an offset that has grown by more than this factor in a period")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "period", "first_period", "offset_batch", "offset_chunk", "offset_growth")
        for name in ("local_scale", "offset_scale"):
            self._check_scale(name)

    def _check_scale(self, name: str) -> None:
        value, batch, chunk = getattr(self, name), self.offset_batch, self.offset_chunk
        try:
            fits = value == "auto" or math.isfinite(float(value))
        except ValueError:
            fits = False
        if not fits:
            raise UsageError(f"{flag(name)} must be a number or auto, got {value!r}")
        if value == "auto" and (batch < 2 or chunk and (batch % chunk or batch == chunk)):
            raise UsageError(
                f"{flag(name)} auto needs an --offset-batch of at least two whole chunks, got "
                f"{batch} in chunks of {chunk or 1}"
            )

    @property
    def scales(self) -> dict[str, float]:
        """The factors at the start."""
        given = {"local_scale": self.local_scale, "offset_scale": self.offset_scale}
        return {name: 1.0 if value == "auto" else float(value) for name, value in given.items()}


def check_optimizer(settings: Any, options: OffsetOptions) -> None:
    if settings.optimizer == "adamw-schedule-free":
        modified = ", ".join(rule.name for rule in settings.rules if issubclass(rule.options, OffsetOptions))
        raise UsageError(f"--optimizer adamw-schedule-free takes no offsets ({modified}): use sgd, adam or adamw")


# -- the trainer ---------------------------------------------------------------------------------------------------


def trainer(blocks: list[nn.Module], optimizer_factory: Callable, task: Task, **others: Any) -> BlockwiseTrainer:
    """Its `offset_chunk` is the number of samples that a refresh back-propagates at once."""
    assert task.example is not None
    options = task.options

    def factory(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = optimizer_factory(parameters)
        if type(optimizer) is torch.optim.SGD:
            lr, momentum, decay = (optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay"))
            return OffsetSGD(parameters, lr, momentum, decay, **options.scales)
        return OffsetOptimizer(optimizer, **options.scales)

    result = BlockwiseTrainer(blocks, factory, **others)
    for group in result.optimizers[-1].param_groups:  # its local loss is the global one: nothing to correct
        group.update(local_scale=1.0, offset_scale=0.0)
    chunk = options.offset_chunk or planner.bp_chunk(len(task.example), *_bp_and_unit_bytes(blocks, task.example))
    if "auto" in (options.local_scale, options.offset_scale) and not options.offset_chunk:
        chunk = whole_chunk(options.offset_batch, chunk)
    result.offset_chunk = chunk
    return result


def whole_chunk(batch: int, limit: int) -> int:
    """The largest chunk up to `limit` that cuts `batch` samples into two or more of equal size."""
    return max((n for n in range(1, limit + 1) if batch % n == 0 and batch > n), default=1)


def _bp_and_unit_bytes(blocks: list[nn.Module], x: Tensor) -> tuple[int, int]:
    """What back-propagation through all units keeps, and the largest unit alone; counted without running either."""
    units = [
        *(block.block if isinstance(block, lnn.PredSimHead) else block.unit for block in blocks[:-1]),
        blocks[-1].module,
    ]
    x, units = x.to("meta"), list(partition.to_meta(nn.ModuleList(units)))
    return partition.saved_bytes(units, x)[0], max(partition.unit_bytes(units, x))


# -- refreshes -----------------------------------------------------------------------------------------------------


def due(run: Any) -> bool:
    """Whether the next step of `run` (`loop.Run`) begins a period."""
    first = run.options.first_period
    if first is None and run.settings.adapter:
        first = min(50, run.batches)  # factors of 0 hide the others from the first refresh
    return refresh_due(run.trainer.steps, run.options.period or run.batches, first)


def refresh(run: Any, order: Tensor, start: int) -> None:
    """Refresh the offsets on the epoch's batches from `start` on."""
    options, batch_size = run.options, run.settings.batch_size
    count = -(-options.offset_batch // batch_size)
    batches = [run.batch_at(order, (start + i) % run.batches) for i in range(count)]
    data = tuple(torch.cat(tensors)[: options.offset_batch] for tensors in zip(*batches))
    # float16 without its scaling would lose small gradients: rare enough a pass for float32
    with contextlib.nullcontext() if run.settings.amp == "fp16" else run.autocast():
        refresh_trainer(
            run.trainer,
            data,
            bp_chunk=run.trainer.offset_chunk,
            local_chunk=batch_size,
            estimate_local_scale=options.local_scale == "auto",
            estimate_offset_scale=options.offset_scale == "auto",
            max_growth=options.offset_growth,
        )


def before_step(run: Any, order: Tensor) -> None:
    if due(run):
        refresh(run, order, run.batch)


# -- what a refresh costs ------------------------------------------------------------------------------------------


def measures_at_end(probe: Any, history: list[dict], figures: dict[str, Any]) -> dict[str, Any]:
    """The refreshes' share of memory and time, and what the formula of their work gives."""
    order = torch.arange(len(probe.dataset.train[1]))
    x, target = probe.batch_at(order, 0)
    bp = probe.beside("bp")
    bp_seconds = measure.step_times({"bp": lambda: bp.step(x, target)}, probe.device, budget=3.0)["bp"]
    peak = measure.peak_memory(lambda: refresh(probe, order, 0), probe.device)
    spent = sum(record["refresh_seconds"] for record in history)
    local_seconds, samples = figures["ms_per_step"] / 1e3, len(order)
    return {
        "peak_step_bytes": max(figures["peak_step_bytes"], peak),
        "state_bytes": measure.state_bytes(probe.trainer),
        "refresh_overhead": spent / (figures["train_seconds"] - spent),
        "refresh_overhead_formula": formula(probe.settings, probe.options, bp_seconds, local_seconds, samples),
    }


def formula(settings: Any, options: OffsetOptions, bp_seconds: float, local_seconds: float, samples: int) -> float:
    """Work of the refreshes relative to that of local training: B' (BP + local) / (period samples x local)."""
    period = (options.period or samples // settings.batch_size) * settings.batch_size
    return options.offset_batch * (bp_seconds + local_seconds) / (period * local_seconds)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


MEASURES = Measures(
    epoch=lambda run: {"refresh_seconds": run.refresh_seconds},
    end=measures_at_end,
    columns=(
        Column(
            "refresh",
            "refresh_overhead",
            _percent,
            "refresh: time of the offsets' refreshes relative to the other training time; formula: the same by\n"
            "B' (BP + local) / (period x local), B' the offset batch, from one step's time of each",
        ),
        Column("formula", "refresh_overhead_formula", _percent),
    ),
)
RULES = tuple(
    dataclasses.replace(
        rule,
        name=f"{rule.name}-bpm",
        options=OffsetOptions,
        trainer=trainer,
        check=check_optimizer,
        before_step=before_step,
        measures=MEASURES,
    )
    for rule in local_loss.RULES
)
