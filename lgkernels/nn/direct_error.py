"""The error of :mod:`lgkernels.nn.direct_units` in the graph: from the output to the units that wait for it."""

import math
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import apply, first_order_only
from .direct import DirectFeedback

NAME = "convert(model, 'dfa')"  # in errors


class Call:
    """One forward pass: the outputs that wait for the error, and the error once it is known."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self.traced: list[DirectFeedback | None] = []  # the place of each where torch.compile traced its unit's end
        self.error: Any = None
        self.over = False  # whether the model's output is known
        self.tied = "a tensor that the model returns"  # what the error is that of, in words

    def wait(self, h: Tensor, place: DirectFeedback) -> None:
        traced = torch.compiler.is_compiling()
        self.traced.append(place if traced else None)
        self.waiting.append(h if traced else apply(_Place, NAME, h, place, self))


class _Place(torch.autograd.Function):
    """The identity; backward: the error's projection, whatever comes from above."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, place: DirectFeedback, call: Call) -> Tensor:
        ctx.place, ctx.call = place, call
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, unread: Tensor) -> Any:
        return ctx.place.signal(ctx.call.error, unread), None, None


class _Signal(torch.autograd.Function):
    """The model's output as it is; backward: hands its gradient, the error, to all that wait for it.

    The gradients of what waits are one zero, expanded: `_Place` makes them when its turn comes.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: Call, *waiting: Tensor) -> Tensor:
        ctx.call = call
        ctx.kinds = [(h.shape, h.dtype, h.device) for h in waiting]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        ctx.call.error = error.detach()
        passed = first_order_only(NAME, error, error)
        unread = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.kinds]
        return passed, None, *unread


class _Traced(torch.autograd.Function):
    """Both as one, for torch.compile, which traces no value that one backward hands to another: it orders the work."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, formulas: list[Any], *tensors: Tensor) -> Tensor:
        ctx.formulas = formulas
        ctx.kinds = [(h.shape, h.dtype) for h in tensors[: len(formulas)]]
        ctx.save_for_backward(*tensors[len(formulas) :])
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        rows, signals = error.reshape(-1, error.shape[-1]), []
        for (law, impl), (shape, dtype), state in zip(ctx.formulas, ctx.kinds, ctx.saved_tensors):
            columns = math.prod(shape[error.dim() - 1 :])
            made = torch.ops.lgkernels.feedback_product(
                rows.to(dtype), columns, None, None, state, *law, 1.0, False, impl
            )
            signals.append(made.view(shape))
        return error, None, *signals, *[None for _ in ctx.saved_tensors]


def tied_to(output: Tensor, call: Call) -> Tensor:
    """The output, whose gradient is the error of all that waits."""
    pairs = list(zip(call.waiting, call.traced))
    traced = [(h, place, *place._feedback(h.shape[output.dim() - 1 :])) for h, place in pairs if place is not None]
    if traced:
        call.error = ()  # known to the backward alone
        formulas = [((random.law, scale, random.low), place.impl) for _, place, random, scale in traced]
        tensors = [h for h, *_ in traced] + [random.state for *_, random, _ in traced]
        output = apply(_Traced, NAME, output, formulas, *tensors)
    placed = [h for h, place in pairs if place is None]
    return apply(_Signal, NAME, output, call, *placed) if placed else output
