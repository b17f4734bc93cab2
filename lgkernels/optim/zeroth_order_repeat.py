"""What every evaluation of a zeroth-order step has to find as the first one did: random numbers, and buffers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Randomness:
    """torch's generators as they were, so that every evaluation draws the same numbers."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.cuda = sorted({device.index for device in devices if device.type == "cuda"})
        self.kept = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self.cuda]

    def again(self) -> None:
        torch.set_rng_state(self.kept[0])
        for i, state in zip(self.cuda, self.kept[1]):
            torch.cuda.set_rng_state(state, i)


Place = tuple[nn.Module, str]


class _Kept(NamedTuple):
    """A buffer as it was: the tensor, how often it had been written to, its values where they are kept."""

    buffer: Tensor
    version: int
    values: Tensor | None


class Buffers:
    """A model's buffers (batch norm's statistics): they move with the first of several evaluations, as in one forward,
    and every other one finds them as the first did.

    Which of them move shows in the first evaluation that there is, by their values; from then on the values of those,
    and of a normalisation in training, are kept during a step. Any other that is written to later for the first time is
    found, in that step, as the first evaluation has left it.
    """

    def __init__(self, model: nn.Module, moving: set[Place] | None) -> None:
        self.moving, self.before = moving, {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_inference():  # those count no writes
                    place = module, name
                    self.before[place] = _kept(buffer, moving is None or place in moving or _tracks(module))
        self.after: dict[Place, Tensor] | None = None

    def again(self) -> None:
        """Before every evaluation but the first."""
        if self.after is None:
            found = {p: k for p, k in self.before.items() if _moved(p, k)}
            self.moving = (self.moving or set()) | set(found)
            self.after = {place: _now(place).clone() for place in found}
            self.before = {p: k if k.values is not None else _kept(_now(p), True) for p, k in found.items()}
        for (module, name), kept in self.before.items():
            module._buffers[name] = kept.buffer
            assert kept.values is not None
            kept.buffer.copy_(kept.values)

    def end(self) -> set[Place]:
        """As the first evaluation left them. Returns where those are that have ever moved."""
        if self.after is None:
            return (self.moving or set()) | {p for p, k in self.before.items() if _moved(p, k)}
        for (module, name), values in self.after.items():
            module._buffers[name] = buffer = self.before[module, name].buffer
            buffer.copy_(values)
        return self.moving or set()


def _now(place: Place) -> Tensor:
    buffer = place[0]._buffers[place[1]]
    assert buffer is not None
    return buffer


def _kept(buffer: Tensor, values: bool) -> _Kept:
    return _Kept(buffer, buffer._version, buffer.clone() if values else None)


def _tracks(module: nn.Module) -> bool:
    """torch's normalisations do not count the writes to their statistics."""
    return module.training and isinstance(module, _NormBase) and module.track_running_stats


def _moved(place: Place, kept: _Kept) -> bool:
    now = place[0]._buffers.get(place[1])
    if now is None:
        return False  # taken away: nothing to put back
    if now is not kept.buffer or now._version != kept.version:
        return True
    return kept.values is not None and not torch.equal(now, kept.values)
