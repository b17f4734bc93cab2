"""Values that a module owns and no state_dict holds: they go where the module goes, by value.

`to_empty` hands out new memory for every buffer, and a state_dict fills only what it has. So what is in none is copied,
or made anew from what the module knows, or stays on the meta device, where its first use raises. Averaging a model's
buffers (``AveragedModel(model, use_buffers=True)``) rounds integers as float32 does: :func:`verified` undoes that.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Carried(nn.Module):
    """A module whose non-persistent buffers keep their values through `to_empty`."""

    def known(self, name: str) -> torch.Tensor | None:
        """The value of a buffer whose memory was lost on the meta device, where the module knows it."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        names = [name for name in self._non_persistent_buffers_set if self._buffers.get(name) is not None]
        before: dict[str, Any] = {name: self._buffers[name] for name in names}
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._buffers[name]
            if new is old or new.is_meta:
                continue
            with torch.no_grad():
                value = self.known(name) if old.is_meta else old
                if value is None:
                    self._buffers[name] = old  # on the meta device, as its user will say
                else:
                    new.copy_(value)
        return result


def verified(feedback: Any) -> torch.Tensor:
    """The state of a RandomFeedback, looked at where something has written to it since the last time."""
    state = feedback.state
    if not torch.compiler.is_compiling() and type(state) is torch.Tensor and not state.is_inference():
        if (id(state), state._version) != getattr(feedback, "_looked_at", None):
            _verify(feedback, state)
            feedback._looked_at = id(state), state._version
    return state


@contextlib.contextmanager
def own_write(feedback: Any) -> Iterator[None]:
    """Inside, the module itself writes to its state: no look is needed after it, where none was before."""
    state = feedback.state
    if torch.compiler.is_compiling() or type(state) is not torch.Tensor or state.is_inference():
        yield
        return
    seen = (id(state), state._version) == getattr(feedback, "_looked_at", None)
    yield
    if seen:
        feedback._looked_at = id(state), state._version


def _verify(feedback: Any, state: torch.Tensor) -> None:
    """Raise unless `state` has the seed and the stream of `feedback`; undo an average of it.

    On other devices than the CPU a look waits for the device, so there is none in distributed training, which
    broadcasts all buffers at every step, nor while a CUDA graph is recorded.
    """
    if state.is_meta or torch._C._are_functorch_transforms_active():
        return
    if state.device.type != "cpu" and (
        torch.distributed.is_initialized() or state.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return
    exact = [feedback.seed, feedback.stream]
    words = state.tolist()[:2]
    if words == exact:
        return
    if not all(abs(a - b) <= abs(b) >> 20 for a, b in zip(words, exact)):
        raise ValueError(
            f"the state of a RandomFeedback must have its seed {exact[0]} and stream {exact[1]}, got {words}: give it "
            "others by set_state or nn.load_feedback_state"
        )
    with torch.no_grad():  # float32 has been at work
        state[:2] = torch.tensor(exact, device=state.device, dtype=torch.int64)
