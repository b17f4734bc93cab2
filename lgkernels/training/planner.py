"""Which ways of training a model fit into a given memory: counted on the meta device, nothing is allocated."""

import importlib
import os
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..core import checks, constructors
from . import partition, recognition
from .attention import KINDS, counted_attention

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "B": 1}


def unit_costs() -> dict[str, tuple[int, float]]:
    """{rule: (rows that a unit trains on for each sample, work relative to back-propagation)}: the `UNIT_COSTS` of the
    files of this folder."""
    package = __name__.rpartition(".")[0]
    files = [
        importlib.import_module(f"{package}.{name}") for _, name, _ in pkgutil.iter_modules([os.path.dirname(__file__)])
    ]
    return {rule: cost for file in files for rule, cost in getattr(file, "UNIT_COSTS", {}).items()}


def parse_memory(text: float | str) -> float:
    """Bytes of "8GB", "24GiB", or a number of bytes, above 0."""
    number: Any = text
    factor = 1.0
    if isinstance(text, str):
        unit = max((unit for unit in UNITS if text.endswith(unit)), key=len, default="")
        number, factor = text.removesuffix(unit), UNITS.get(unit, 1.0)
    if isinstance(number, (str, int, float, np.integer, np.floating)) and not isinstance(number, bool):
        try:
            if float(number) > 0:
                return float(number) * factor
        except (OverflowError, ValueError):
            pass
    raise ValueError(f"memory must be a number of bytes, or a text such as '8GB' or '24GiB', got {checks.got(text)}")


def bp_chunk(batch: int, bp_bytes: float, unit_bytes: float) -> int:
    """Largest offset mini-batch of which back-propagation keeps no more than the largest local unit does at `batch`."""
    return max(1, int(batch * unit_bytes / bp_bytes))


@dataclass
class Row:
    """One way to train: peak bytes (saved activations, weights, gradients, optimizer state), work relative to
    back-propagation, what it costs in exactness, and whether it fits."""

    name: str
    peak: float
    activations: float
    compute: float
    exactness: str
    fits: bool = True


@dataclass
class Plan:
    """What :func:`plan` returns: the memory that there is, and the ways to train; ``print`` shows a table."""

    memory: float
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.rows)
        lines = [f"{'':<{width}}  {'peak MB':>8}  {'saved MB':>8}  {'compute':>7}  fits  exactness"]
        lines += [
            f"{r.name:<{width}}  {r.peak / 1e6:8.0f}  {r.activations / 1e6:8.0f}  {r.compute:7.2f}  "
            f"{'yes' if r.fits else 'no':<4}  {r.exactness}"
            for r in self.rows
        ]
        return "\n".join([*lines, f"memory: {self.memory / 1e6:.0f} MB; without library workspace and allocator slack"])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _loss_bytes(output: torch.Tensor) -> int:
    """Of the cross entropy of tokens (B, T, classes), which is no small part: log-probabilities and their gradient."""
    return 2 * output.numel() * max(output.element_size(), 4) if output.dim() == 3 else 0


def _counts(name: str, value: Iterable[int | None]) -> list[int | None]:
    """Numbers of units; None where a model's own number is meant."""
    counts = constructors.several(name, value, (int, np.integer, type(None)), "ints or Nones", 0)
    return [n if n is None else constructors.size(name, n) for n in counts]


def plan(
    model: nn.Module,
    input: torch.Tensor | Sequence[int],
    memory: float | str = float("inf"),
    *,
    optimizer_state: int = 1,
    units: Iterable[int | None] = (4, 8, None),
    offset_batch: int = 320,
    period_samples: int = 50_000,
    attention: Literal["flash", "eager"] = "flash",
    path: str | Sequence[str] | None = None,
) -> Plan:
    """Peak memory of the ways to train `model` on `input`: back-propagation, with accumulation, with checkpointing, and
    local units by the rules of the trainers (:func:`unit_costs`), plain and BP-modified.

    Counts saved bytes (distinct storages that autograd keeps, without weights), weights, gradients, optimizer state and
    offsets. Not counted: workspaces of libraries, the allocator's slack, short-lived temporaries, the local losses'
    auxiliary heads, masks of a dropout inside attention, and a cache of keys and values (``use_cache``). Of a model of
    tokens, whose output is (B, T, classes), the cross entropy counts too: as many log-probabilities, and their
    gradient, with the output of every local unit.

    Args:
        model (nn.Module): what :func:`lgkernels.training.split_blocks` takes; may lie on the meta device.
        input (Tensor, or shape): the batch; only shape and dtype count. A shape is one of token ids for a model of
            ``transformers`` that takes them, else of float32 numbers.
        memory (float or str): what there is: bytes, "8GB", "24GiB".
        optimizer_state (int): values kept per trained parameter: SGD with momentum 1, Adam 2, plain SGD 0.
        units (sequence): numbers of local units to try, balanced by memory; None: as many as there are parts.
        offset_batch, period_samples (int): samples of a refresh of the BP-modified loss, and between two of them.
        attention (str): ``"flash"`` or ``"eager"``: what attention keeps.
        path (str, or several): the list of layers, as :func:`lgkernels.training.split_blocks` takes it.

    Returns:
        Plan: ``rows`` (name, peak, activations, compute, exactness, fits); ``print`` shows a table. A mini-batch that
        batch normalisation cannot train on, one value a channel, has no row.

    Raises: ValueError, TypeError naming the argument.

    Example:
        >>> import torch, lgkernels
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
        >>> table = lgkernels.plan(model, (32, 64), "295kB")
        >>> [row.name for row in table.rows if row.fits]
        ['local, 8 units']
    """
    constructors.module("model", model)
    memory = parse_memory(memory)
    optimizer_state = constructors.size("optimizer_state", optimizer_state, 0)
    units = _counts("units", units)
    offset_batch = constructors.size("offset_batch", offset_batch)
    period_samples = constructors.size("period_samples", period_samples)
    checks.choice("attention", attention, KINDS)
    if isinstance(input, torch.Tensor):
        checks.tensor("input", input)
        x = input.detach().to("meta")
    else:
        constructors.instance("input", input, (tuple, list), "a tensor, or the sizes of one")
        dtype = torch.long if getattr(model, "main_input_name", None) == "input_ids" else torch.float32
        x = torch.empty(checks.sizes("input", input, "a tensor, or the sizes of one"), dtype=dtype, device="meta")
    if not x.dim() or not len(x):
        raise ValueError(f"input must be a batch of at least one sample, got shape {checks.shape_of(x)}")
    make = recognition.maker(model, x, path)  # refuses what is another network than its parts
    model = partition.to_meta(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model must have a parameter that requires a gradient, got none: there is nothing to train")
    weights, gradient = _bytes(model.parameters()) + _bytes(model.buffers()), _bytes(trained)
    fixed = weights + gradient * optimizer_state
    parts, batch = make(model), len(x)
    norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    result = Plan(memory)

    def kept_by(size: int) -> int | None:
        """Bytes that back-propagation keeps of so many samples; None where batch normalisation refuses them."""
        try:
            kept, out = partition.saved_bytes(parts, torch.empty_like(x[:size]))
            return kept + _loss_bytes(out)
        except ValueError:
            if norm and size < batch:
                return None
            raise

    def add(name: str, activations: float, rest: float, compute: float, exactness: str) -> None:
        peak = activations + rest
        result.rows.append(Row(name, peak, activations, compute, exactness, peak <= memory))

    with counted_attention(attention):
        total, out = partition.saved_bytes(parts, x)
        loss = _loss_bytes(out)
        total += loss
        add("BP", total, fixed + gradient, 1.0, "exact")
        for micro in sorted({batch // 2, batch // 8, 1} - {0}, reverse=True):
            kept = kept_by(micro) if micro < batch else None
            if kept is not None:
                add(
                    f"BP, {micro} at a time",
                    kept,
                    fixed + gradient,
                    1.0,
                    f"batch statistics over {micro}" if norm else "exact",
                )
        each = partition.unit_bytes(parts, x)
        outputs = []  # what a checkpoint keeps: every part's input
        y = x
        for part in parts:
            outputs.append(_bytes([y]))
            y = partition.saved_bytes([part], y)[1]
        # a part's own input is among the checkpoints already
        each[-1] += loss
        kept = sum(outputs) + max(a - b for a, b in zip(each, outputs))
        add("BP, checkpointed", kept, fixed + gradient, 4 / 3, "exact")
        for count in dict.fromkeys(min(u or len(parts), len(parts)) for u in units):
            blocks = partition.cut(parts, count, input=x)
            unit = max(partition.unit_bytes(blocks, x)) + loss
            own = max(_bytes(p for p in block.parameters() if p.requires_grad) for block in blocks)
            for rule, (rows, work) in unit_costs().items():
                largest = rows * unit
                add(f"{rule}, {count} units", largest, fixed + own, work, "local losses")
                chunk = min(bp_chunk(batch, total, largest), batch)
                while (refresh := kept_by(chunk)) is None:
                    chunk += 1
                # while it refreshes, the offset is the only gradient
                peak = max(largest + own, refresh)
                add(
                    "BP-modified" + ("" if rule == "local" else f" {rule}") + f", {count} units",
                    peak - own,
                    fixed + gradient + own,
                    work + offset_batch / period_samples * (1 + work),
                    f"local losses, offset by BP ({chunk} at a time)",
                )
    return result


def plot(table: Plan, path: str) -> None:
    """A bar chart of peak memory: saved activations and the rest, with the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(table.rows) + 1))
    axes = figure.subplots()
    names = [r.name for r in table.rows]
    axes.barh(names, [r.activations / 1e6 for r in table.rows], label="saved activations")
    axes.barh(
        names,
        [(r.peak - r.activations) / 1e6 for r in table.rows],
        left=[r.activations / 1e6 for r in table.rows],
        label="weights, gradients, state",
    )
    if table.memory < float("inf"):
        axes.axvline(table.memory / 1e6, color="black", linestyle="--", label="memory")
    axes.invert_yaxis()
    axes.set_xlabel("peak MB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
