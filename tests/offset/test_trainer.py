"""BP-modified local losses through the block-wise trainer."""

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.optim import OffsetOptimizer, OffsetSGD
from lgkernels.training import BackpropTrainer, BlockwiseTrainer, refresh_trainer
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_relative


def blocks(norm=False):
    torch.manual_seed(3)
    make = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.Tanh())  # noqa: E731
    result = [
        lnn.LocalClassifier(make(3, 6), 6, 4),
        nn.MaxPool2d(2),
        lnn.PredSimHead(make(6, 8), (8, 3, 3), 4),
        nn.Flatten(),
        lnn.ClassifierBlock(nn.Linear(72, 4)),
    ]
    return [b.double() for b in result]


def batch(seed, size=16):
    return randn(size, 3, 6, 6, seed=seed, dtype=torch.float64), targets(size, 4, seed=seed)


def offset_sgd(parameters, **options):
    return OffsetSGD(parameters, 0.05, momentum=0.9, **options)


def test_refreshed_at_every_step_it_is_back_propagation():
    ours, plain = blocks(), blocks()
    trainer = BlockwiseTrainer(ours, offset_sgd)
    rival = BackpropTrainer(plain, lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9))
    for i in range(4):
        refresh_trainer(trainer, batch(i), bp_chunk=4)
        trainer.step(*batch(i))
        rival.step(*batch(i))
    compared = 0
    for a, b in zip(ours, plain):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            if name.startswith(("block", "module")):
                assert_relative(name, p, q, 1e-10)
                compared += 1
    assert compared == 6


def test_a_stale_offset_stays_nearer_to_back_propagation():
    """Refreshed every 5 steps only: the weights stay less than half as far from back-propagation's as local training's.
    The rate is small: what is left is the drift within a period, which grows with its square (with auxiliary heads)."""
    data, distance = batch(0, 64), {}
    rival = BackpropTrainer(blocks(), lambda p: torch.optim.SGD(p, 0.002))
    for _ in range(20):
        rival.step(*data)
    for scale in (0.0, 1.0):
        trainer = BlockwiseTrainer(blocks(), lambda p, scale=scale: OffsetSGD(p, 0.002, offset_scale=scale))
        for i in range(20):
            if i % 5 == 0:
                refresh_trainer(trainer, data)
            trainer.step(*data)
        distance[scale] = (
            sum(
                (p - q).square().sum().item()
                for a, b in zip(trainer.blocks, rival.blocks)
                for (name, p), q in zip(a.named_parameters(), b.parameters())
                if name.startswith("block")
            )
            ** 0.5
        )
    assert distance[1.0] < 0.5 * distance[0.0], distance


def test_refresh_touches_nothing_else():
    model = blocks(norm=True)
    trainer = BlockwiseTrainer(model, offset_sgd)
    trainer.step(*batch(0))
    before = [{k: v.clone() for k, v in b.state_dict().items()} for b in model]
    refresh_trainer(trainer, batch(1))
    for block, state in zip(model, before):
        for name, value in block.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("wrap", [False, True])
def test_clipping_counts_the_offset(wrap):
    def factory(parameters):
        return OffsetOptimizer(torch.optim.SGD(parameters, 1.0)) if wrap else OffsetSGD(parameters, 1.0)

    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    for options in (dict(), dict(grad_scaler=torch.amp.GradScaler("cpu")), dict(scheduler_factory=schedule)):
        trainer = BlockwiseTrainer(blocks(), factory, clip_grad_norm=1e-3, **options)
        refresh_trainer(trainer, batch(0))
        before = [p.detach().clone() for group in trainer.parameter_groups for p in group]
        for optimizer in filter(None, trainer.optimizers):
            for _, offset in optimizer.offsets():
                offset.fill_(5.0)
        trainer.step(*batch(1))
        moved = iter(before)
        for group in filter(None, trainer.parameter_groups):
            norm = torch.cat([(p - next(moved)).flatten() for p in group]).norm().item()
            assert norm == pytest.approx(1e-3, rel=1e-3)


def test_bad_use():
    trainer = BlockwiseTrainer(blocks(), lambda p: torch.optim.SGD(p, 0.1))
    with pytest.raises(TypeError, match="iterable of OffsetSGDs or OffsetOptimizers, got a list with SGD"):
        refresh_trainer(trainer, batch(0))
    trainer.eval()
    with pytest.raises(RuntimeError, match="needs training mode"):
        refresh_trainer(trainer, batch(0))
