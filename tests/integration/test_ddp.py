"""Two ranks on the CPU: block-wise training under DistributedDataParallel keeps their weights equal."""
import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lgkernels.nn as lnn
from lgkernels.training import BackpropTrainer, BlockwiseTrainer

STEPS = 4


def make_blocks():
    torch.manual_seed(0)
    return [lnn.LLSConvBlock(1, 6, 3, padding=1, num_classes=3, pool_size=2, max_pool=True, modulation="vector"),
            nn.Flatten(), lnn.LLSLinearBlock(96, 12, num_classes=3, pool_size=12),
            lnn.ClassifierBlock(nn.Linear(12, 3))]


def plain_blocks():
    return [lnn.LLSConvBlock(1, 6, 3, padding=1, num_classes=3, pool_size=2, max_pool=True), *make_blocks()[1:]]


def train(rank, kind, accumulation, wrap):
    """Weights (no buffers: batch statistics are each rank's own) after some steps on this rank's data."""
    make = make_blocks if kind is BlockwiseTrainer else plain_blocks
    torch.manual_seed(0)
    blocks = make()
    if wrap:
        blocks = [DistributedDataParallel(b) if list(b.parameters()) else b for b in blocks]
    trainer = kind(blocks, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), accumulation_steps=accumulation)
    generator = torch.Generator().manual_seed(100 + rank)  # different data on each rank
    for _ in range(STEPS):
        trainer.step(torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator))
    return torch.cat([p.detach().flatten() for block in blocks for p in block.parameters()])


def worker(rank, folder, kind, accumulation):
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        stack.callback(dist.destroy_process_group)
        torch.save({"together": train(rank, kind, accumulation, True), "alone": train(rank, kind, accumulation, False)},
                   os.path.join(folder, f"{rank}.pt"))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
@pytest.mark.parametrize("kind, accumulation", [(BlockwiseTrainer, 1), (BlockwiseTrainer, 2), (BackpropTrainer, 1)])
def test_ranks_stay_equal(kind, accumulation, tmp_path):
    mp.spawn(worker, (str(tmp_path), kind, accumulation), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one["together"], two["together"])
    assert not torch.allclose(one["alone"], two["alone"], atol=1e-3), "without an exchange the ranks should have drifted apart"
    assert not torch.allclose(one["together"], one["alone"], atol=1e-3), "nothing was exchanged"
