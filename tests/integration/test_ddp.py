"""Two ranks on the CPU: block-wise training under DistributedDataParallel keeps their weights equal."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lgkernels.nn as lnn
from lgkernels.optim import OffsetSGD
from lgkernels.recipes import networks, rules
from lgkernels.training import BackpropTrainer, BlockwiseTrainer, refresh_trainer

STEPS = 4


def make_blocks():
    torch.manual_seed(0)
    return [
        lnn.LLSConvBlock(1, 6, 3, padding=1, num_classes=3, pool_size=2, max_pool=True, modulation="vector"),
        nn.Flatten(),
        lnn.LLSLinearBlock(96, 12, num_classes=3, pool_size=12),
        lnn.ClassifierBlock(nn.Linear(12, 3)),
    ]


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
    if rank == 0:  # an evaluation on one rank alone must not wait for the other
        trainer.bn_recalibrate([torch.randn(8, 1, 8, 8)])
        assert trainer.eval().predict(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    return torch.cat([p.detach().flatten() for block in blocks for p in block.parameters()])


def train_modified(rank, rule, options, wrap):
    """The same for a BP-modified rule: offsets of this rank's data, averaged; LoCo's units share parameters. In the
    last refresh rank 1's loss is out of bounds for a guard."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(networks.Part(nn.Conv2d(i, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh()) for i in (1, 6, 6)),
        networks.Part(nn.Flatten(), nn.Linear(6, 3)),
    )
    record = rules.get(rule)
    task = rules.Task(record, record.options(contrast="supcon"), num_classes=3, network=model)
    blocks = record.build(task._replace(example=torch.zeros(2, 1, 8, 8)))
    if wrap:
        blocks = [DistributedDataParallel(b) for b in blocks]
    trainer = BlockwiseTrainer(blocks, lambda p: OffsetSGD(p, lr=0.1, momentum=0.9))
    generator = torch.Generator().manual_seed(100 + rank)
    for step in range(STEPS):
        batch = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        if step % 2 == 0:
            factor = 30.0 if rank and step else 1.0
            refresh_trainer(trainer, batch, bp_chunk=4, loss=lambda *a, f=factor: f * F.cross_entropy(*a), **options)
        trainer.step(*batch)
    offsets = {p: offset for optimizer in trainer.optimizers for p, offset in optimizer.offsets()}
    assert "max_growth" not in options or not wrap or len(offsets) < len(list(model.parameters()))
    return torch.cat(
        [t.detach().flatten() for p in model.parameters() for t in (p, offsets.get(p, torch.zeros_like(p)))]
    )


CASES = {
    "local losses": (BlockwiseTrainer, 1),
    "accumulated": (BlockwiseTrainer, 2),
    "back-propagation": (BackpropTrainer, 1),
}
MODIFIED = {
    "loco": ("loco", {}),
    "predsim": ("predsim", {}),
    "guarded": ("predsim", dict(max_growth=3.0)),
    "estimated": ("predsim", dict(estimate_local_scale=True, estimate_offset_scale=True)),
}


def worker(rank, folder):
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        stack.callback(dist.destroy_process_group)
        runs = {name: [train(rank, *case, wrap) for wrap in (True, False)] for name, case in CASES.items()}
        for name, case in MODIFIED.items():
            runs[name] = [train_modified(rank, *case, wrap) for wrap in (True, False)]
        torch.save(runs, os.path.join(folder, f"{rank}.pt"))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_ranks_stay_equal(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in (*CASES, *MODIFIED):
        together, alone = zip(one[name], two[name])
        assert torch.equal(*together), name
        assert not torch.allclose(*alone, atol=1e-3), f"{name}: without an exchange the ranks should have drifted apart"
        assert not torch.allclose(together[0], alone[0], atol=1e-3), f"{name}: nothing was exchanged"
