"""Two ranks on the CPU whose blocks are sharded by torch's fully_shard: trainers and optimizers learn what they learn
under DistributedDataParallel, or refuse by name."""

import contextlib
import copy
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lgkernels.nn as lnn
from lgkernels.optim import BatchManhattan, OffsetOptimizer, OffsetSGD, ZerothOrder, fuse_update
from lgkernels.training import (
    BackpropTrainer,
    BlockwiseTrainer,
    DirectTrainer,
    EquilibriumTrainer,
    ForwardGradientTrainer,
)

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="this torch has no fully_shard"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]
STEPS = 3


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def local_blocks():
    return [
        lnn.LLSConvBlock(1, 6, 3, padding=1, num_classes=3, pool_size=2, max_pool=True, modulation="vector"),
        nn.Flatten(),
        lnn.LLSLinearBlock(96, 12, num_classes=3, pool_size=12),
        lnn.ClassifierBlock(nn.Linear(12, 3)),
    ]


def heads():
    """Losses beside the block; the normalisation is torch's own."""
    block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return [
        lnn.LocalClassifier(block, 4, 3),
        lnn.PredSimHead(nn.Sequential(nn.Conv2d(4, 4, 3, 2), nn.ReLU()), (4, 3, 3), 3),
        nn.Flatten(),
        lnn.ClassifierBlock(nn.Linear(36, 3)),
    ]


def plain():
    return [
        nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(80, 12), nn.Tanh()),
        nn.Linear(12, 3),
    ]


def converted(rule):
    return lambda: list(lnn.convert(nn.Sequential(*plain()), rule))


CASES = {  # name: (trainer, blocks, optimizer, arguments)
    "local losses": (BlockwiseTrainer, local_blocks, sgd, {}),
    "accumulated": (BlockwiseTrainer, local_blocks, sgd, dict(accumulation_steps=2)),
    "clipped": (BlockwiseTrainer, heads, sgd, dict(clip_grad_norm=0.1)),
    "usf": (BackpropTrainer, converted("usf"), sgd, {}),
    "fa": (BackpropTrainer, converted("fa"), lambda p: BatchManhattan(p, 0.01, 0.9, 1e-3), {}),
    "brsf": (BackpropTrainer, converted("brsf"), lambda p: BatchManhattan(p, 0.01, no_sign_change=True), {}),
    "dfa": (DirectTrainer, plain, sgd, dict(rule="dfa")),
    "drtp": (DirectTrainer, plain, lambda p: torch.optim.Adam(p, 0.01), dict(rule="drtp")),
}


def shard(block, mesh):
    fsdp.fully_shard(block, mesh=mesh)
    return block


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(rank, case, wrap):
    """Weights after some steps on this rank's data."""
    kind, make, optimizer, arguments = CASES[case]
    torch.manual_seed(0)
    blocks = [wrap(block) if list(block.parameters()) else block for block in make()]
    before = [whole(p).detach().clone() for block in blocks for p in block.parameters()]
    trainer = kind(blocks, optimizer, **arguments)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS * arguments.get("accumulation_steps", 1)):
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        trainer.step(x, y)
    assert trainer.eval().predict(torch.ones(2, 1, 8, 8)).shape == (2, 3)
    trainer.train().step(x, y)  # the weights that the evaluation has gathered are those of the step
    trainer.zero_grad()
    after = [whole(p).detach() for block in blocks for p in block.parameters()]
    moved = [not torch.equal(*pair) for pair in zip(before, after)]
    return torch.cat([t.flatten() for t in after]), moved


def worker(rank, folder):
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        stack.callback(dist.destroy_process_group)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        runs = {
            case: [train(rank, case, wrap) for wrap in (lambda b: shard(b, mesh), DistributedDataParallel)]
            for case in CASES
        }
        torch.save(runs, os.path.join(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_sharded_blocks_learn_as_under_ddp(case, runs):
    for run in runs:
        (sharded, moved), (expected, moved_there) = run[case]
        torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-5)
        assert moved == moved_there and sum(moved) > 2
    assert torch.equal(runs[0][case][0][0], runs[1][case][0][0])


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def mixer():
    from tests.forward_gradient.calls import MODULES

    return copy.deepcopy(MODULES["ForwardGradientTrainer"].arguments["model"])


MLP = dict(steps=3, angle=90)
REFUSED = {
    "OffsetSGD": (lambda m: OffsetSGD(m.parameters(), 0.1), lambda: nn.Linear(4, 3)),
    "OffsetOptimizer": (lambda m: OffsetOptimizer(sgd(m.parameters())), lambda: nn.Linear(4, 3)),
    "ZerothOrder": (lambda m: ZerothOrder(m, 0.1), lambda: nn.Linear(4, 3)),
    "EquilibriumTrainer": (
        lambda m: EquilibriumTrainer(m, sgd),
        lambda: lnn.EquilibriumMLP(4, (6,), 5, num_classes=2, **MLP),
    ),
    "ForwardGradientTrainer": (lambda m: ForwardGradientTrainer(m, sgd), mixer),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_parameters_says_so(name, mesh):
    make, model = REFUSED[name]
    make(model())
    message = rf"must hold whole parameters for {name}, got a DTensor of shape .*DistributedDataParallel"
    with pytest.raises(TypeError, match=message):
        make(shard(model(), mesh))


def test_a_group_that_is_added_is_looked_at_too(mesh):
    sharded = list(shard(nn.Linear(4, 3), mesh).parameters())
    for optimizer in (OffsetSGD([torch.ones(2)], 0.1), OffsetOptimizer(torch.optim.SGD([torch.ones(2)], 0.1))):
        with pytest.raises(TypeError, match="params must hold whole parameters"):
            optimizer.add_param_group({"params": sharded})


def test_fuse_update_says_so(mesh):
    model = shard(nn.Sequential(nn.Linear(4, 3)), mesh)
    with pytest.raises(ValueError, match="must not be wrapped in FSDP"):
        fuse_update(model, sgd(model.parameters()), min_weights=1)


RULES = {"fa": {}, "usf": {}, "frsf": {}, "brsf": {}, "signed_init": dict(signs="weight")}


@pytest.mark.parametrize("rule", RULES)
def test_convert_comes_before(rule, mesh):
    """A layer that is sharded itself is of a class of torch's: it would be left alone, and train by plain gradients."""
    model = nn.Sequential(*plain())
    for layer in (model[1][1], model[2]):
        shard(layer, mesh)
    with pytest.raises(ValueError, match=r"model must be converted before fully_shard .* a FSDPLinear: convert first"):
        lnn.convert(model, rule, verbose=False, **RULES[rule])
    assert lnn.convert(model, rule, verbose=False, exclude=lambda name, _: name in ("1.1", "2"), **RULES[rule])


def test_convert_of_signs_comes_before(mesh):
    model = shard(nn.Sequential(*plain()), mesh)
    with pytest.raises(ValueError, match=r"before fully_shard .* a Conv2d of sharded weights: convert first"):
        lnn.convert(model, "signed_init", signs="weight", verbose=False)


@pytest.mark.parametrize("each", [True, False], ids=["layers", "whole"])
def test_adapters_come_before_and_are_saved_whole(each, mesh, tmp_path):
    def mlp():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def sharded(model):
        for layer in model if each else ():
            if list(layer.parameters()):
                shard(layer, mesh)
        return shard(model, mesh)

    x = torch.randn(4, 6)
    model = sharded(lnn.adapt(mlp(), "lora", train_head=["2"], rank=2, verbose=False))
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    lnn.save_adapter(model, tmp_path / "adapter")
    expected = model(x)
    torch.testing.assert_close(lnn.load_adapter(mlp(), tmp_path / "adapter")(x), expected)
    with pytest.raises(TypeError, match="model must be merged before fully_shard .* save_adapter, load_adapter"):
        lnn.merge(model)
    with pytest.raises(TypeError, match="model must be adapted before fully_shard .* adapt first, then"):
        lnn.adapt(model, "lora", adapter_name="second", verbose=False)
    with pytest.raises(TypeError, match="model must be given its adapter before fully_shard"):
        lnn.load_adapter(sharded(mlp()), tmp_path / "adapter")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("rule", RULES)
def test_alignment_gathers(rule, mesh):
    model = lnn.convert(nn.Sequential(*plain()), rule, verbose=False, **RULES[rule])
    expected = lnn.alignment(model), lnn.weight_ratio(model)
    shard(model, mesh)
    assert (lnn.alignment(model), lnn.weight_ratio(model)) == expected


@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_that_is_sharded_after_the_optimizer(steps, mesh):
    model = nn.Linear(4, 3)
    optimizer = ZerothOrder(model, 0.1)

    def closure():
        return model(torch.ones(2, 4)).sum()

    for _ in range(steps):
        optimizer.step(closure)
    shard(model, mesh)
    with pytest.raises(
        RuntimeError, match="model must hold whole parameters for ZerothOrder, got one that fully_shard"
    ):
        optimizer.step(closure)


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer, DirectTrainer])
def test_blocks_that_are_sharded_too_late(kind, mesh):
    """The optimizers hold the former parameters, which nothing would reach: training would do nothing."""
    blocks = local_blocks() if kind is BlockwiseTrainer else plain()
    trainer = kind(blocks, sgd)
    shard(blocks[0], mesh)
    with pytest.raises(RuntimeError, match=re.escape("blocks must be sharded before the trainer is made, got one")):
        trainer.step(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)
