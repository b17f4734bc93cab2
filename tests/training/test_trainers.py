"""What BlockwiseTrainer and BackpropTrainer promise beside the rule itself."""

import contextlib
import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lgkernels.nn as lnn
from lgkernels.training import BackpropTrainer, BlockwiseTrainer, DirectTrainer


class LocalBlock(nn.Module):
    """Linear, tanh and a linear classifier of its own: no batch normalisation, so that batches add up."""

    def __init__(self, inputs, outputs, classes=3):
        super().__init__()
        self.layer, self.head = nn.Linear(inputs, outputs), nn.Linear(outputs, classes)

    def forward(self, x, target=None):
        out = self.layer(x).tanh()
        if target is None or not self.training:
            return out
        return out.detach(), F.cross_entropy(self.head(out), target)


def local_blocks():
    torch.manual_seed(3)
    return [LocalBlock(6, 8), nn.Dropout(0.0), LocalBlock(8, 8), lnn.ClassifierBlock(nn.Linear(8, 3))]


def lls_blocks(channels=4):
    torch.manual_seed(3)
    return [
        lnn.LLSConvBlock(1, channels, 3, padding=1, num_classes=3, pool_size=2, max_pool=True),
        nn.Flatten(),
        lnn.LLSLinearBlock(channels * 16, 12, num_classes=3, pool_size=12, modulation="matrix"),
        lnn.ClassifierBlock(nn.Linear(12, 3)),
    ]


def batch(size=8, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *(shape or (6,)), generator=generator), torch.arange(size) % 3


def images(size=8, seed=0):
    return batch(size, 1, 8, 8, seed=seed)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def weights(trainer):
    return {
        f"{i}.{name}": p.detach().clone()
        for i, block in enumerate(trainer.blocks)
        for name, p in block.state_dict().items()
    }


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def written_out(blocks, x, target, steps, clip=None):
    """The same training as a plain loop."""
    trained = [block for block in blocks if list(block.parameters())]
    optimizers = {block: sgd(block.parameters()) for block in trained}
    for _ in range(steps):
        h = x
        for block in blocks:
            if block not in optimizers:
                h = block(h)
                continue
            h, loss = block(h.detach(), target)
            optimizers[block].zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(block.parameters(), clip)
            optimizers[block].step()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("make, data", [(local_blocks, batch), (lls_blocks, images)])
def test_step_is_the_plain_loop(make, data, clip):
    x, target = data()
    blocks = make()
    expected = copy.deepcopy(blocks)
    trainer = BlockwiseTrainer(blocks, sgd, clip_grad_norm=clip)
    for _ in range(3):
        losses = trainer.step(x, target)
    written_out(expected, x, target, 3, clip)
    assert_equal(weights(trainer), weights(BlockwiseTrainer(expected, sgd)))
    assert losses.shape == (3,) and not losses.requires_grad
    assert trainer.output.shape == (8, 3) and not trainer.output.requires_grad
    assert all(p.grad is None for block in blocks for p in block.parameters())
    assert trainer.steps == 3


def test_clipping_is_for_each_block():
    x, target = batch()
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm())
            super().step(closure)

    BlockwiseTrainer(local_blocks(), lambda p: Recorder(p, lr=0.1), clip_grad_norm=1e-3).step(x, target)
    assert len(seen) == 3
    torch.testing.assert_close(torch.stack(seen), torch.full((3,), 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer])
def test_accumulation_is_the_big_batch(kind):
    x, target = batch(12)
    whole, parts = kind(local_blocks(), sgd), kind(local_blocks(), sgd, accumulation_steps=3)
    before = weights(parts)
    for _ in range(2):
        total = whole.step(x, target)
        small = []
        for i in range(3):
            small.append(parts.step(x[4 * i : 4 * i + 4], target[4 * i : 4 * i + 4]))
            if i < 2 and parts.steps == 0:
                assert_equal(before, weights(parts))
        torch.testing.assert_close(torch.stack(small).mean(0), total)
    assert parts.steps == whole.steps == 2
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-5, atol=1e-6)


def test_backprop_is_the_plain_loop():
    x, target = images()
    blocks = lls_blocks()[:1] + [nn.Flatten(), lnn.ClassifierBlock(nn.Linear(64, 3))]
    expected = copy.deepcopy(blocks)
    trainer = BackpropTrainer(blocks, sgd)
    model = nn.Sequential(*expected)
    optimizer = sgd(model.parameters())
    for _ in range(3):
        losses = trainer.step(x, target)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert torch.equal(losses, loss.detach().reshape(1))
    assert_equal(weights(trainer), dict(model.state_dict()))


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer])
def test_no_step_waits_for_the_device(kind):
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            aten = torch.ops.aten
            assert function not in (aten._local_scalar_dense.default, aten.nonzero.default), function
            return function(*args, **(kwargs or {}))

    trainer = kind(local_blocks(), lambda p: torch.optim.SGD(p, lr=0.1), clip_grad_norm=1.0)
    with NoSync():
        losses = trainer.step(*batch())
        with pytest.raises(AssertionError):
            losses[0].item()


def test_one_block_is_alive_at_a_time():
    alive = []

    class Watched(LocalBlock):
        def forward(self, x, target=None):
            assert all(reference() is None for reference in alive), "activations of an earlier block live on"
            assert all(p.grad is None for block in blocks for p in block.parameters()), "gradients of another block"
            hidden = self.layer(x)
            alive.append(weakref.ref(hidden))
            out = hidden.tanh()
            alive.append(weakref.ref(out))
            return out, F.cross_entropy(self.head(out), target)

    blocks = [Watched(6, 8), Watched(8, 8), Watched(8, 8)]
    BlockwiseTrainer(blocks, sgd).step(*batch())
    assert len(alive) == 6 and all(reference() is None for reference in alive)


def test_schedules():
    schedules = torch.optim.lr_scheduler
    trainer = BlockwiseTrainer(local_blocks(), sgd, scheduler_factory=lambda o: schedules.StepLR(o, 1, 0.5))
    trainer.step(*batch())
    trainer.scheduler_step()
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers if o] == [0.05] * 3
    plateau = BlockwiseTrainer(
        local_blocks(), sgd, scheduler_factory=lambda o: schedules.ReduceLROnPlateau(o, factor=0.1, patience=0)
    )
    for metric in (1.0, 2.0, 3.0):
        plateau.scheduler_step(metric)
    assert plateau.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer])
def test_grad_scaler(kind):
    x, target = batch()
    plain, scaled = (
        kind(local_blocks(), sgd, clip_grad_norm=0.5, grad_scaler=scaler)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0))
    )
    for _ in range(2):
        torch.testing.assert_close(scaled.step(x, target), plain.step(x, target))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(scaled)[name], tensor)
    before = weights(scaled)
    scaled.step(torch.full_like(x, float("inf")), target)
    assert_equal(before, weights(scaled))
    assert scaled.grad_scaler.get_scale() == 512.0


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer])
def test_autocast_over_several_steps_sees_the_new_weights(kind):
    x, target = batch()
    around, each = kind(local_blocks(), sgd), kind(local_blocks(), sgd)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            around.step(x, target)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            each.step(x, target)
    assert_equal(weights(around), weights(each))


def test_recalibration():
    blocks = lls_blocks()
    trainer = BlockwiseTrainer(blocks, sgd).eval()
    norm = blocks[0].norm
    frozen = {k: v for k, v in weights(trainer).items() if "running" not in k and "tracked" not in k}
    data = [images(64, seed=i) for i in range(60)]
    expected_mean, expected_var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
    for x, _ in data:
        z = blocks[0].layer(x).detach()
        expected_mean.lerp_(z.mean((0, 2, 3)), 0.1)
        expected_var.lerp_(z.var((0, 2, 3)), 0.1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(norm.running_mean, expected_mean)
    trainer.bn_recalibrate(data)
    torch.testing.assert_close(norm.running_mean, expected_mean)
    torch.testing.assert_close(norm.running_var, expected_var)
    assert_equal(frozen, {k: v for k, v in weights(trainer).items() if k in frozen})
    assert not trainer.training and not any(m.training for block in blocks for m in block.modules())
    trainer.bn_recalibrate(x for x, _ in data[:1])


def test_schedule_free_modes():
    schedulefree = pytest.importorskip("schedulefree")
    trainer = BlockwiseTrainer(lls_blocks(), lambda p: schedulefree.AdamWScheduleFree(p, lr=5e-3))
    for i in range(3):
        trainer.step(*images(seed=i))
    training = weights(trainer)
    trainer.eval()
    assert not torch.equal(weights(trainer)["0.layer.weight"], training["0.layer.weight"])
    with pytest.raises(RuntimeError, match="call trainer.train"):
        trainer.step(*images())
    trainer.train()
    torch.testing.assert_close(weights(trainer)["0.layer.weight"], training["0.layer.weight"])
    trainer.step(*images())


def schedule_free(parameters):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=5e-3)


@pytest.mark.parametrize("factory", [sgd, torch.optim.AdamW, schedule_free])
@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer])
def test_state_continues_bit_for_bit(kind, factory):
    def trainer():
        blocks = lls_blocks() if kind is BlockwiseTrainer else local_blocks()
        return kind(
            blocks,
            factory,
            scheduler_factory=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2),
        )

    def advance(t, steps):
        for i in steps:
            t.step(*(images(seed=i) if kind is BlockwiseTrainer else batch(seed=i)))
            t.scheduler_step()

    whole, first = trainer(), trainer()
    advance(whole, range(6))
    advance(first, range(3))
    state = copy.deepcopy(first.state_dict())
    second = trainer()
    second.step(*(images(seed=77) if kind is BlockwiseTrainer else batch(seed=77)))
    second.load_state_dict(state)
    assert second.steps == 3
    advance(second, range(3, 6))
    assert_equal(weights(whole), weights(second))


def test_frozen_modules_are_transforms():
    blocks = local_blocks()
    stem = nn.Linear(6, 6).requires_grad_(False)
    before = stem.weight.clone()
    trainer = BlockwiseTrainer([stem, *blocks], sgd)
    assert trainer.step(*batch()).shape == (3,)
    assert torch.equal(stem.weight, before)


def test_predict_is_the_network():
    blocks = lls_blocks()
    trainer = BlockwiseTrainer(blocks, sgd)
    trainer.step(*images())
    trainer.eval()
    with torch.no_grad():
        expected = nn.Sequential(*blocks)(images()[0])
    assert torch.equal(trainer.predict(images()[0]), expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(accumulation_steps=0), ValueError, "accumulation_steps"),
        (dict(accumulation_steps=1.5), (TypeError, ValueError), "accumulation_steps"),
        (dict(clip_grad_norm=-1.0), ValueError, "clip_grad_norm"),
        (
            dict(blocks=[]),
            ValueError,
            "blocks must be an iterable of at least one of torch.nn.Modules, got an empty list",
        ),
        (dict(blocks=[nn.Flatten()]), ValueError, "at least one parameter"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"blocks": local_blocks(), **change}
    with pytest.raises(error, match=message):
        BlockwiseTrainer(arguments.pop("blocks"), sgd, **arguments)


def test_block_that_returns_no_loss():
    class Plain(nn.Linear):
        def forward(self, x, target=None):
            return super().forward(x)

    with pytest.raises(TypeError, match=r"blocks\[1\] \(Plain\) must return \(output, loss\)"):
        BlockwiseTrainer([nn.Flatten(), Plain(6, 3)], sgd).step(*batch())


class Skips(nn.Linear):
    """Layer drop: hands on its input at every second call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 2 else super().forward(x)


@pytest.mark.parametrize("head", ["LLSHead", "PredSimHead"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_block_without_a_gradient_at_a_step(head, scaled):
    torch.manual_seed(0)
    make = {
        "LLSHead": lambda b: lnn.LLSHead(b, num_classes=3, pool_size=8),
        "PredSimHead": lambda b: lnn.PredSimHead(b, (8,), 3, sim_head="identity"),
    }
    blocks = [lnn.LocalClassifier(nn.Linear(8, 8), 8, 3), make[head](Skips(8, 8)), lnn.ClassifierBlock(nn.Linear(8, 3))]
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    trainer = BlockwiseTrainer(blocks, lambda p: torch.optim.SGD(p, 0.1), grad_scaler=scaler, clip_grad_norm=1.0)
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    skipped, last = blocks[1].block.weight, blocks[2].module.weight
    for step in range(4):
        before = skipped.detach().clone(), last.detach().clone()
        warned = pytest.warns(UserWarning, match=r"blocks\[1\] \(LLSHead\): its loss needs no gradient at this step")
        with warned if head == "LLSHead" and not step else contextlib.nullcontext():
            trainer.step(x, y)
        assert torch.equal(before[0], skipped) == (step % 2 == 0) and not torch.equal(before[1], last)


@pytest.mark.parametrize(
    "trainer",
    [
        lambda blocks, **k: BlockwiseTrainer([lnn.ClassifierBlock(b) for b in blocks], **k),
        lambda blocks, **k: BackpropTrainer(blocks, **k),
        lambda blocks, **k: DirectTrainer(blocks, **k),
    ],
    ids=["blockwise", "backprop", "direct"],
)
def test_factories_that_forget_return(trainer):
    blocks = [nn.Linear(4, 4), nn.Linear(4, 2)]
    with pytest.raises(TypeError, match="optimizer_factory must return an optimizer .* got NoneType: its `return` is"):
        trainer(blocks, optimizer_factory=lambda p: None)
    with pytest.raises(TypeError, match="optimizer_factory must return an optimizer .* got list"):
        trainer(blocks, optimizer_factory=list)
    with pytest.raises(ValueError, match="an optimizer of the parameters that it is given, got one that holds none of"):
        trainer(blocks, optimizer_factory=lambda _: torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1))
    with pytest.raises(TypeError, match="whose step\\(\\) needs no closure, got LBFGS"):
        trainer(blocks, optimizer_factory=torch.optim.LBFGS)
    sgd = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    with pytest.raises(TypeError, match="scheduler_factory must return a learning-rate schedule"):
        trainer(blocks, optimizer_factory=sgd, scheduler_factory=lambda o: None)


@pytest.mark.parametrize("block", [nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 3))])
def test_a_block_that_takes_no_target(block):
    with pytest.raises(
        TypeError, match=r"blocks\[0\] .* must return \(output, loss\) for \(x, target\) in training, got"
    ):
        BlockwiseTrainer([block], sgd).step(torch.ones(2, 8), torch.tensor([0, 2]))


def test_state_in_the_middle_of_an_accumulation():
    trainer = BlockwiseTrainer(local_blocks(), sgd, accumulation_steps=2)
    trainer.step(*batch())
    with pytest.raises(RuntimeError, match="1 of 2 batches"):
        trainer.state_dict()
    trainer.zero_grad()
    before = weights(trainer)
    state = trainer.state_dict()
    trainer.step(*batch())
    assert_equal(before, weights(trainer))
    with pytest.raises(ValueError, match="optimizers"):
        BackpropTrainer(local_blocks(), sgd).load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        trainer.load_state_dict({**state, "version": 99})
    with contextlib.suppress(RuntimeError):
        trainer.load_state_dict(state)
    assert trainer.accumulated == 0
