"""The log of a zeroth-order optimizer, and weights from it."""

import bisect
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import checks, constructors
from ..nn.random_state import name_without_wrappers
from ..ops.zeroth_order import op as _op  # noqa: F401  registers the ops
from ..random import LAW_VERSION, VALUES_PER_CALL

__all__ = ["ZerothOrderLog", "replay"]

# Of noise with variance 1 by each law, exact in float32.
UNIT_SCALE = {"normal": 1.0, "sign": 1.0, "uniform": 1.7320507764816284, "uniform8": 1.7320507764816284}


class ZerothOrderRecord(NamedTuple):
    """One step: W <- keep * W + sum_m scalars[m] * Z_m, Z_m the noise of (seed, step, member m)."""

    seed: int
    step: int
    scalars: tuple[float, ...]
    keep: float


class ZerothOrderLog(Sequence):
    """What a :class:`ZerothOrder` has done: a sequence of named tuples (seed, step, scalars, keep), one for each step
    W <- keep W + sum_m scalars[m] Z_m, from which :func:`replay` makes the weights again.
    In bytes it takes 8 a step and 4 a member, beside the names of the parameters and, of those that some steps leave as
    they are (:meth:`moves`), the ranges of these steps.

    Args:
        seed (int): of the noise. law (str): its law. members (int): of each step.
        parameters (list of str): qualified names of what is tuned.

    Raises: ValueError, TypeError naming the argument.
    """

    def __init__(self, seed: int, law: str, members: int, parameters: list[str]) -> None:
        seed = checks.integer_between("seed", seed, -(2**63), 2**64)
        self.seed = seed - 2**64 if seed >= 2**63 else seed
        checks.choice("law", law, tuple(VALUES_PER_CALL))
        self.law, self.members = law, checks.positive_integer("members", members)
        constructors.instance("parameters", parameters, list, "a list of names")
        self.parameters = tuple(constructors.several("parameters", parameters, str, "names"))
        self.kept_rows: dict[str, int] = {}  # of embeddings: the row of padding_idx, which no step changes
        self._still: dict[str, list[list[int]]] = {}  # of a parameter: [first, end) of steps that do not move it
        self._records: list[tuple[int, float, tuple[float, ...]]] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        step, keep, scalars = self._records[index]
        return ZerothOrderRecord(self.seed, step, scalars, keep)

    def __iter__(self) -> Iterator[ZerothOrderRecord]:
        return (self[i] for i in range(len(self)))

    def add(self, step: int, keep: float, scalars: tuple[float, ...], still: Iterable[str] = ()) -> None:
        """One more step; the numbers are float32's. `still`: names of parameters that it does not move."""
        self._records.append((step, keep, scalars))
        for name in still:
            ranges = self._still.setdefault(name, [])
            if ranges and ranges[-1][1] == step:
                ranges[-1][1] = step + 1
            else:
                ranges.append([step, step + 1])

    def moves(self, name: str, step: int) -> bool:
        """If the step moves the parameter: no evaluation of it may have used that one."""
        ranges = self._still.get(name, ())
        place = bisect.bisect_right(ranges, step, key=lambda r: r[0])
        return not place or step >= ranges[place - 1][1]

    def to_bytes(self) -> bytes:
        """All of it: a line of JSON, then the records (step, keep, scalars) as little-endian words of 32 bits."""
        version = 2 if self._still else 1
        head: dict[str, Any] = dict(version=version, law_version=LAW_VERSION, seed=self.seed, law=self.law)
        head |= dict(members=self.members, **({"kept_rows": self.kept_rows} if self.kept_rows else {}))
        head |= {"still": self._still} if self._still else {}
        record = struct.Struct(f"<If{self.members}f")
        body = b"".join(record.pack(step, keep, *scalars) for step, keep, scalars in self._records)
        return json.dumps({**head, "parameters": self.parameters}).encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "ZerothOrderLog":
        """The log that :meth:`to_bytes` gave."""
        constructors.instance("data", data, bytes, "bytes of ZerothOrderLog.to_bytes")
        line, _, body = data.partition(b"\n")
        try:
            head = json.loads(line)
            versions = head["version"], head["law_version"]
            log = cls(head["seed"], head["law"], head["members"], head["parameters"])
            log.kept_rows = {name: int(row) for name, row in dict(head.get("kept_rows", {})).items()}
            log._still = {name: [[int(a), int(b)] for a, b in r] for name, r in dict(head.get("still", {})).items()}
            record = struct.Struct(f"<If{log.members}f")
            found = list(record.iter_unpack(body))
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"data must be bytes of ZerothOrderLog.to_bytes, got others: {error}") from None
        if versions not in ((1, LAW_VERSION), (2, LAW_VERSION)):
            raise ValueError(f"data must be of log version 1 or 2 and law version {LAW_VERSION}, got {versions}")
        for step, keep, *scalars in found:
            log.add(step, keep, tuple(scalars))
        return log


def stream_of(name: str) -> int:
    """The noise's stream of a parameter: by its name, wherever it stands."""
    return zlib.crc32(name.encode())


def as_matrix(parameter: Tensor) -> Tensor:
    """(first size, the others); a view where there is one."""
    own = parameter.detach()
    if own.dim() == 2:
        return own
    return own.reshape((own.shape[0], own.shape[1:].numel()) if own.dim() else (1, 1))


def update_(
    parameter: Tensor, factors: Tensor, states: Tensor, law: str, keep: float, impl: str, kept_row: int | None = None
) -> None:
    """W <- keep W + sum_i factors[i] Z_i, in place, any shape; one row of it may stay as it is."""
    row = None if kept_row is None else parameter.detach()[kept_row].clone()
    matrix = as_matrix(parameter)
    torch.ops.lgkernels.formula_update_(matrix, factors, None, states, law, UNIT_SCALE[law], None, keep, impl)
    if parameter.dim() != 2 and not parameter.is_contiguous():
        parameter.detach().copy_(matrix.view(parameter.shape))
    if row is not None:
        parameter.detach()[kept_row] = row


@torch.no_grad()
def replay(model: nn.Module, log: ZerothOrderLog, *, impl: str = "auto") -> nn.Module:
    """Take the steps of a log again: from the weights that the run began with to those that it ended with, to the bit.

    With the laws sign, uniform8 and uniform on any device and backend; with normal noise on the same backend.

    Args:
        model (nn.Module): as it was before the first step; its parameters are found by their names.
        log (ZerothOrderLog): of :class:`ZerothOrder`.
        impl (str): ``"auto"`` or a backend.

    Returns:
        nn.Module: the model.

    Raises: ValueError, TypeError naming the argument.

    Example:
        >>> import copy, torch
        >>> from lgkernels.optim import ZerothOrder, replay
        >>> model = torch.nn.Linear(3, 1)
        >>> start, x = copy.deepcopy(model), torch.ones(2, 3)
        >>> optimizer = ZerothOrder(model, lr=0.01, law="sign")
        >>> for _ in range(5):
        ...     loss = optimizer.step(lambda: model(x).square().mean())
        >>> replay(start, optimizer.log).weight.equal(model.weight)
        True
    """
    constructors.module("model", model)
    constructors.instance("log", log, ZerothOrderLog, "a lgkernels.optim.ZerothOrderLog")
    checks.impl(impl)
    named = {name_without_wrappers(name, model): p for name, p in model.named_parameters()}
    missing = [name for name in log.parameters if name not in named]
    if missing:
        raise ValueError(f"model must have the log's parameters, got none of the name {missing[0]!r}")
    records = list(log)
    for name in log.parameters:
        parameter, stream = named[name], stream_of(name)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        steps = [[log.seed, stream, r.step * log.members + m] for r in records for m in range(log.members)]
        states = torch.tensor(steps, dtype=torch.int64, device=parameter.device).view(-1, log.members, 3)
        factors = torch.tensor([r.scalars for r in records], dtype=wide, device=parameter.device)
        for record, factor, state in zip(records, factors, states):
            if log.moves(name, record.step):
                update_(parameter, factor, state, log.law, record.keep, impl, log.kept_rows.get(name))
    return model
