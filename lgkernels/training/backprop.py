"""Back-propagation through the same blocks: the rival of every local rule."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core import constructors
from ..nn.random_state import redraw_after
from . import targets
from .trainer import OptimizerFactory, SchedulerFactory, Trainer, trainable

__all__ = ["BackpropTrainer"]


class BackpropTrainer(Trainer):
    """Trains the blocks as one network, by back-propagation of one loss, with one optimizer.

    Every block is called without target, so its local loss plays no part. All else, ``step`` included (it returns
    one loss, as a vector of length 1), is as :class:`BlockwiseTrainer`. So it trains by FA and sign-symmetry too, when
    the blocks are converted (:func:`lgkernels.nn.convert`); brSF's magnitudes are redrawn after each update.

    Args:
        blocks (iterable of nn.Module): applied in order as ``module(x)``.
        optimizer_factory (callable): the list of all parameters -> the optimizer.
        loss (callable): (logits, target) -> scalar. Default: cross entropy.
        scheduler_factory, accumulation_steps, clip_grad_norm, grad_scaler, cuda_graph: as `BlockwiseTrainer`.
    """

    takes_sharded = True

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        optimizer_factory: OptimizerFactory,
        *,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        scheduler_factory: SchedulerFactory | None = None,
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        cuda_graph: bool = False,
    ) -> None:
        blocks = constructors.modules("blocks", blocks)
        constructors.function("loss", loss)
        self.loss = loss
        self._classes: int | None = None  # of the output, known after the first step
        super().__init__(
            blocks,
            optimizer_factory,
            [list(dict.fromkeys(p for b in blocks for p in trainable(b)))],
            scheduler_factory=scheduler_factory,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            grad_scaler=grad_scaler,
            cuda_graph=cuda_graph,
        )
        model = nn.ModuleList(blocks)
        if any(getattr(module, "rule", None) == "brsf" for module in model.modules()):
            optimizer: Any = self.optimizers[0]  # never None: there are parameters
            redraw_after(optimizer, model)

    def _step(self, x: torch.Tensor, target: torch.Tensor, last: bool) -> torch.Tensor:
        if self.loss is not F.cross_entropy:
            return self._pass(x, target, last)
        if self._classes is not None:
            return self._pass(x, targets.checked(target, self._classes, self.loss), last)
        with targets.buffers_kept(self.blocks):
            return self._pass(x, target, last)

    def _pass(self, x: torch.Tensor, target: torch.Tensor, last: bool) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(self._synchronised(block, last))
            for block in self.blocks:
                x = block(x)
            if self.loss is F.cross_entropy and (classes := targets.classes(x, self.loss)) != self._classes:
                target, self._classes = targets.checked(target, classes, self.loss), classes
            loss = self.loss(x, target)
            self.output = x.detach()
            del x
            value = loss.detach().reshape(1)
            self._backward(loss, self.parameter_groups[0], "the network")
            del loss
        if last:
            self._update(self.optimizers[0], self.parameter_groups[0])
        return value
