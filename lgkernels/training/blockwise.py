"""Block-wise training: every block learns from its own loss, one after the other."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core import checks, constructors
from ..nn import model_input
from .trainer import OptimizerFactory, SchedulerFactory, Trainer, bare, trainable

__all__ = ["BlockwiseTrainer"]

# For `planner`: local classifiers and predsim; LoCo and GIM on two views; Forward-Forward on a right and a wrong label,
# and a forward pass without.
UNIT_COSTS = {"local": (1, 1.0), "two views": (2, 2.0), "forward-forward": (2, 7 / 3)}


def _check_takes_a_target(name: str, block: nn.Module) -> None:
    """A block that trains is called with two arguments; torch's own message names neither."""
    try:
        inspect.signature(block.forward).bind(None, None)
    except TypeError:
        raise TypeError(
            f"{name} ({type(block).__name__}) must return (output, loss) for (x, target) in training, got a forward "
            "that does not take both: wrap it in nn.LLSHead or nn.ClassifierBlock, or freeze it"
        ) from None
    except ValueError:  # no signature is known
        return


class BlockwiseTrainer(Trainer):
    """Forward a block, its loss, its gradients, its step, free them; the detached output goes on to the next.

    So at any time one block's activations and gradients exist. Gradients reach the parameters by
    ``loss.backward(inputs=...)``: blocks may be wrapped in DistributedDataParallel, or sharded by ``fully_shard``
    before the trainer is made, one by one.

    Args:
        blocks (iterable of nn.Module): in order. A module with parameters to train is a block: in training
            ``forward(x, target)`` returns ``(output, loss)``, without target the output
            (:class:`lgkernels.nn.LLSConvBlock`, :class:`lgkernels.nn.ClassifierBlock`, ...). Any other is a transform,
            applied as ``module(x)``. Blocks may share parameters (overlapping units): their gradients add up, and the
            last block that has them steps.
        optimizer_factory (callable): a block's list of parameters -> its optimizer.
        scheduler_factory (callable, optional): an optimizer -> its learning-rate schedule; see ``scheduler_step``.
        accumulation_steps (int): calls of ``step`` to one optimizer step; each loss is divided by it.
        clip_grad_norm (float, optional): bound on the gradient norm of each block, offsets added (`OffsetSGD`).
        grad_scaler (torch.amp.GradScaler, optional): for float16. Autocast is the caller's context around ``step``.
        cuda_graph (bool): record the step of each shape of a batch in a CUDA graph, after three ordinary steps, and
            replay it. Optimizers must be able to (``capturable=True`` for torch's Adam). A number of theirs that
            changes, a learning rate say, has the step recorded anew, so a schedule that goes on at every step wants a
            tensor: ``lr=torch.tensor(0.1, device="cuda")`` (with ``fused=True`` for torch's SGD). After a change that
            no optimizer shows, such as a frozen block, call ``trainer.graphs.forget()``.

    Raises: ValueError, TypeError naming the argument.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> from lgkernels.training import BlockwiseTrainer
        >>> _ = torch.manual_seed(0)
        >>> blocks = [lnn.LLSConvBlock(1, 8, 3, padding=1, num_classes=2, pool_size=2, max_pool=True),
        ...           torch.nn.Flatten(), lnn.ClassifierBlock(torch.nn.Linear(8 * 4 * 4, 2))]
        >>> trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01))
        >>> x, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
        >>> first = trainer.step(x, target)
        >>> for _ in range(20):
        ...     losses = trainer.step(x, target)
        >>> losses.shape, bool((losses < first).all())
        (torch.Size([2]), True)
    """

    takes_sharded = True

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        optimizer_factory: OptimizerFactory,
        *,
        scheduler_factory: SchedulerFactory | None = None,
        accumulation_steps: int = 1,
        clip_grad_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        cuda_graph: bool = False,
    ) -> None:
        blocks = constructors.modules("blocks", blocks)
        # a parameter of several blocks (LoCo's overlap) gathers all their gradients and steps with the last of them
        self.reached = [trainable(block) for block in blocks]
        last: dict[nn.Parameter, int] = {}
        for i, parameters in enumerate(self.reached):
            last |= dict.fromkeys(parameters, i)
        owned = [[p for p in parameters if last[p] == i] for i, parameters in enumerate(self.reached)]
        super().__init__(
            blocks,
            optimizer_factory,
            owned,
            scheduler_factory=scheduler_factory,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            grad_scaler=grad_scaler,
            cuda_graph=cuda_graph,
        )

    def _check_input(self, x: Any) -> None:
        """Units of a whole model may take a mapping of its arguments, a mask beside the tokens."""
        if self.graphs is not None or not isinstance(x, Mapping):
            checks.any_tensor("x", x)
        else:
            model_input.check(x)

    def _step(self, x: Any, target: torch.Tensor, last: bool) -> torch.Tensor:
        losses = []
        for i, (block, parameters, optimizer) in enumerate(zip(self.blocks, self.parameter_groups, self.optimizers)):
            if not self.reached[i]:
                with torch.no_grad():
                    x = block(x)
                continue
            with self._synchronised(block, last):
                try:
                    result = block(x, target)
                except TypeError:
                    _check_takes_a_target(f"blocks[{i}]", bare(block))
                    raise
                if not isinstance(result, tuple) or len(result) != 2:
                    raise TypeError(
                        f"blocks[{i}] ({type(block).__name__}) must return (output, loss) for (x, target) in training, "
                        f"got {type(result).__name__}: wrap it in nn.LLSHead or nn.ClassifierBlock, or freeze it"
                    )
                x, loss = result
                del result
                x = x.detach()  # what is left of the block's graph hangs on `loss` alone
                losses.append(loss.detach())
                self._backward(loss, self.reached[i], f"blocks[{i}] ({type(bare(block)).__name__})")
                del loss
            if last:
                self._update(optimizer, parameters)
        self.output = x
        return torch.stack(losses)
