"""BP-modified local losses in the block-wise trainer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ..core import constructors
from ..optim import refresh_offsets
from .blockwise import BlockwiseTrainer
from .trainer import bare

__all__ = ["refresh_trainer"]


def refresh_trainer(
    trainer: BlockwiseTrainer,
    data: Sequence[torch.Tensor],
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
    **options: Any,
) -> None:
    """Refresh the offsets of a :class:`BlockwiseTrainer` whose optimizers are `OffsetSGD` or `OffsetOptimizer`.

    The global loss is `loss` of the last block's output, all blocks called without target; the local part goes block by
    block, one block's graph at a time. Everything but the offsets stays bit-identical.

    Args:
        trainer (BlockwiseTrainer): in training mode.
        data (tuple): (x, target), the offset batch; under DistributedDataParallel each rank's own: offsets and
            estimates are those of all ranks' data.
        loss (callable): (output, target) -> scalar, mean over the batch.
        options: of :meth:`lgkernels.optim.OffsetSGD.refresh` but ``model`` and ``average``.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> from lgkernels.optim import OffsetSGD
        >>> from lgkernels.training import BlockwiseTrainer, refresh_trainer
        >>> blocks = [lnn.LocalClassifier(torch.nn.Linear(4, 8), 8, 2), lnn.ClassifierBlock(torch.nn.Linear(8, 2))]
        >>> trainer = BlockwiseTrainer(blocks, lambda parameters: OffsetSGD(parameters, 0.1, momentum=0.9))
        >>> refresh_trainer(trainer, (torch.randn(32, 4), torch.arange(32) % 2))
        >>> [len(optimizer.offsets()) for optimizer in trainer.optimizers]
        [2, 2]
    """
    constructors.instance("trainer", trainer, BlockwiseTrainer, "a BlockwiseTrainer")
    constructors.function("loss", loss)
    data = constructors.several("data", data, torch.Tensor, "two tensors, x and target", 2)
    if len(data) != 2:
        raise ValueError(f"data must be two tensors, x and target, got {len(data)}")
    if not trainer.training:
        raise RuntimeError("refresh_trainer needs training mode: call trainer.train() after an evaluation")
    blocks = [bare(block) for block in trainer.blocks]  # ranks exchange the offsets once, not every chunk's gradients

    def bp(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = block(x)
        return loss(x, target)

    def local(x: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
        for block, reached in zip(blocks, trainer.reached):
            if not reached:
                with torch.no_grad():
                    x = block(x)
                continue
            out, value = block(x, target)
            x = out.detach()
            del out
            yield value
            del value

    def average(tensors: list[torch.Tensor]) -> int:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
        return dist.get_world_size()

    parallel = any(isinstance(block, DistributedDataParallel) for block in trainer.blocks)
    optimizers: list[Any] = [optimizer for optimizer in trainer.optimizers if optimizer is not None]
    refresh_offsets(optimizers, bp, local, data, model=blocks, average=average if parallel else None, **options)
