"""What DirectTrainer promises beside the rule: memory, order, accumulation, clipping, autocast, DDP, checkpoints."""

import contextlib
import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lgkernels.nn as lnn
from lgkernels.training import BackpropTrainer, DirectTrainer
from tests.direct.common import RULES, assert_equal, gradients, images, kept, network, sgd, weights
from tests.support.tolerances import assert_relative


class Counting(TorchDispatchMode):
    """Input gradients of convolutions and products, and waits for the device."""

    def __init__(self):
        super().__init__()
        self.conv_dgrads = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert function not in (aten._local_scalar_dense.default, aten.nonzero.default), function
        self.conv_dgrads += function is aten.convolution_backward.default and args[-1][0]
        self.products += function in (aten.mm.default, aten.addmm.default, aten.bmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_no_input_gradient_and_no_wait(rule):
    trainer = DirectTrainer(network(), sgd, rule=rule, clip_grad_norm=1.0)
    trainer.step(*images())
    with Counting() as count:
        trainer.step(*images())
    assert count.conv_dgrads == 0
    with Counting() as backprop:
        BackpropTrainer(network(), sgd).step(*images())
    assert backprop.conv_dgrads == 1
    linear = 2 * 2  # forward and weight gradient of two linear layers; the projections are one op each
    assert count.products - linear <= (3 if rule in ("dfa", "sdfa") else 0)


def test_nothing_is_stored():
    trainer = DirectTrainer(network(), sgd)
    trainer.step(*images())
    places = [b for b in trainer.blocks if isinstance(b, lnn.DirectFeedback)]
    assert all(sum(t.numel() * t.element_size() for t in place.buffers()) == 24 for place in places)
    assert all(not place.state_dict() and not list(place.parameters()) for place in places)


def test_drtp_has_one_block_alive():
    alive = []

    class Watched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            assert not self.training or all(r() is None for r in alive), "activations of an earlier block live on"
            hidden = self.inner(x)
            out = hidden.tanh()
            alive.extend((weakref.ref(hidden), weakref.ref(out)))
            return out

    blocks = [Watched(nn.Linear(6, 8)), Watched(nn.Linear(8, 8)), nn.Linear(8, 3)]
    DirectTrainer(blocks, sgd, rule="drtp").step(torch.randn(6, 6), torch.arange(6) % 3)
    assert len(alive) == 4 and all(reference() is None for reference in alive)


def test_drtp_updates_before_the_next_block_runs():
    blocks = network()[-2:]
    seen = []
    before = blocks[0][0].weight.detach().clone()
    blocks[1].register_forward_pre_hook(lambda *_: seen.append(torch.equal(before, blocks[0][0].weight)))
    for rule in ("drtp", "dfa"):
        trainer = DirectTrainer(blocks, sgd, rule=rule)
        for _ in range(2):  # the first step tells how many classes there are, and updates after it
            before = blocks[0][0].weight.detach().clone()
            trainer.step(torch.randn(6, 24), torch.arange(6) % 3)
    assert seen == [True, False, True, True]


BAD_TARGETS = {
    "above": (torch.tensor([0, 1, 2, 7]), "got 7"),
    "negative": (torch.tensor([0, -1, 2, 1]), "got -1"),
    "uint64": (torch.tensor([0, 2**64 - 100, 2, 1], dtype=torch.uint64), "got 18446744073709551516"),
    "columns": (torch.rand(4, 5), "target must be (B, 3), one column per output, got shape (4, 5)"),
}


@pytest.mark.parametrize("target, message", BAD_TARGETS.values(), ids=BAD_TARGETS)
@pytest.mark.parametrize("before", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("rule", [*RULES, "bp"])
def test_a_bad_target_moves_nothing(rule, before, target, message):
    """Neither weights nor running statistics, and what follows is as if it had not been."""
    make = (lambda: BackpropTrainer(network(norm=True), sgd)) if rule == "bp" else None
    make = make or (lambda: DirectTrainer(network(norm=True), sgd, rule=rule))
    trainer, other = make(), make()
    for _ in range(before):
        trainer.step(*images())
        other.step(*images())
    with pytest.raises(ValueError) as caught:
        trainer.step(images(4)[0], target)
    said = str(caught.value)
    assert said.startswith("target must") and said.endswith(message)
    if before and message.startswith("got"):
        assert said.startswith("target must hold class indices in [0, 2] or ignore_index=-100, ")
    assert_equal(weights(trainer), weights(other))
    trainer.step(*images())
    other.step(*images())
    assert_equal(weights(trainer), weights(other))


@pytest.mark.parametrize("rule", RULES)
def test_a_block_that_is_skipped_at_some_steps(rule):
    class Skips(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x if self.calls % 2 else super().forward(x)

    for scaler in (None, torch.amp.GradScaler("cpu")):
        torch.manual_seed(0)
        blocks = [nn.Linear(4, 6), Skips(6, 6), nn.Linear(6, 3)]
        trainer = DirectTrainer(blocks, sgd, rule=rule, grad_scaler=scaler)
        before = blocks[1].weight.detach().clone()
        with pytest.warns(UserWarning, match="the block of Skips: its output needs no gradient at this step"):
            trainer.step(torch.randn(5, 4), torch.arange(5) % 3)
        assert torch.equal(before, blocks[1].weight)
        trainer.step(torch.randn(5, 4), torch.arange(5) % 3)
        assert torch.equal(before, blocks[1].weight) == (rule == "shallow")


@pytest.mark.parametrize("rule", RULES)
def test_partial_batches(rule):
    trainer = DirectTrainer(network(), sgd, rule=rule)
    for size in (8, 5, 1):
        assert torch.isfinite(trainer.step(*images(size))).all()
    assert trainer.output.shape == (1, 3)


@pytest.mark.parametrize(
    "error, reduce", [("probs_minus_onehot", "mean"), ("probs_minus_onehot", "none"), ("loss_grad", "none")]
)
@pytest.mark.parametrize("rule", RULES)
def test_accumulation_is_the_big_batch(rule, error, reduce):
    x, target = images(12)
    whole, parts = (
        DirectTrainer(network(), sgd, rule=rule, error=error, reduce=reduce, accumulation_steps=n) for n in (1, 3)
    )
    before = weights(parts)
    for _ in range(2):
        whole.step(x, target)
        for i in range(3):
            assert_equal(before, weights(parts))
            parts.step(x[4 * i : 4 * i + 4], target[4 * i : 4 * i + 4])
        before = weights(parts)
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(before[name], tensor, rtol=1e-4, atol=1e-6)


def test_clipping_is_for_each_block():
    x, target = images()
    trainer = DirectTrainer(network(), kept, reduce="none", clip_grad_norm=1e-3)
    trainer.step(x, target)
    norms = [torch.cat([g.flatten() for g in optimizer.seen]).norm() for optimizer in trainer.optimizers]
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_grad_scaler(rule, reduce):
    x, target = images()
    plain, scaled = (
        DirectTrainer(network(), sgd, rule=rule, reduce=reduce, clip_grad_norm=0.5, grad_scaler=scaler)
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0))
    )
    for _ in range(2):
        torch.testing.assert_close(scaled.step(x, target), plain.step(x, target))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(scaled)[name], tensor)
    before = weights(scaled)
    scaled.step(torch.full_like(x, float("nan")), target)
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(scaled)[name])
    assert scaled.grad_scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_autocast(rule, dtype):
    x, target = images(32)
    plain, half = (DirectTrainer(network(norm=True), kept, rule=rule) for _ in range(2))
    plain.step(x, target)
    with torch.autocast("cpu", dtype):
        half.step(x, target)
    for (i, want), got in zip(enumerate(gradients(plain)), gradients(half)):
        assert got.dtype == torch.float32
        if not (rule == "sdfa" or i == 3):  # a sign may flip; a bias before batch normalisation has no gradient
            assert_relative(f"gradient {i}", got, want, 0.1 if dtype == torch.bfloat16 else 0.05)


def test_autocast_over_several_steps_sees_the_new_weights():
    x, target = images()
    around, each = DirectTrainer(network(), sgd), DirectTrainer(network(), sgd)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            around.step(x, target)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            each.step(x, target)
    assert_equal(weights(around), weights(each))


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_state_continues_bit_for_bit(rule):
    def trainer(seed):
        return DirectTrainer(
            network(norm=True),
            sgd,
            rule=rule,
            seed=seed,
            scheduler_factory=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        )

    def advance(t, steps):
        for i in steps:
            t.step(*images(seed=i))
            t.scheduler_step()

    whole, first, second = trainer(5), trainer(5), trainer(6)
    advance(whole, range(6))
    advance(first, range(3))
    state = copy.deepcopy(first.state_dict())
    second.step(*images(seed=77))
    second.load_state_dict(state)
    assert second.steps == 3
    advance(second, range(3, 6))
    assert_equal(weights(whole), weights(second))


def test_resume_without_feedback_raises():
    trainer = DirectTrainer(network(), sgd)
    state = trainer.state_dict()
    del state["feedback"]
    before = weights(trainer)
    with pytest.raises(ValueError, match="resumed without it, the 3 random feedbacks"):
        DirectTrainer(network(), sgd).load_state_dict(state)
    assert_equal(before, weights(trainer))
    plain = BackpropTrainer(network(), sgd)
    old = plain.state_dict()
    del old["feedback"]  # of a trainer that has none: as checkpoints used to be
    plain.load_state_dict(old)


def test_brsf_is_redrawn_after_each_update():
    blocks = network()
    lnn.convert(nn.Sequential(*blocks), "brsf", verbose=False)
    trainer = BackpropTrainer(blocks, sgd, accumulation_steps=2)
    state = blocks[2][0].feedback.state
    for expected in (0, 1, 1, 2):
        trainer.step(*images())
        assert state[2].item() == expected
    saved = trainer.state_dict()
    other = network()
    lnn.convert(nn.Sequential(*other), "brsf", verbose=False)
    resumed = BackpropTrainer(other, sgd, accumulation_steps=2)
    resumed.load_state_dict(saved)
    assert other[2][0].feedback.state[2].item() == 2
    del saved["feedback"]
    with pytest.raises(ValueError, match="resumed without it"):
        resumed.load_state_dict(saved)


def test_places_of_ones_own():
    """A Sequential with places: a frozen block gets no signal, a block may hold several modules."""
    stem = nn.Linear(6, 8).requires_grad_(False)
    before = stem.weight.clone()
    model = nn.Sequential(
        stem,
        lnn.DirectFeedback(stream=0),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.Tanh(),
        lnn.DirectFeedback(stream=1),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    trainer = DirectTrainer(model, kept)
    assert [len(segment.parameters) for segment in trainer.segments] == [0, 4, 4]
    trainer.step(torch.randn(5, 6), torch.arange(5) % 3)
    assert trainer.optimizers[0] is None and torch.equal(before, stem.weight)
    assert all(g.abs().sum() > 0 for g in gradients(trainer))


def test_tokens():
    torch.manual_seed(0)
    place = lnn.DirectFeedback()
    blocks = [nn.Sequential(nn.Linear(5, 7), nn.Tanh()), place, nn.Linear(7, 3)]
    trainer = DirectTrainer(blocks, kept, loss=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()))
    x, target = torch.randn(4, 6, 5), torch.randint(0, 3, (4, 6))
    error = nn.Sequential(*blocks)(x).softmax(-1) - F.one_hot(target, 3)
    delta = (error / 24) @ place.matrix(3, (7,))
    (expected,) = torch.autograd.grad(blocks[0](x), blocks[0][0].weight, delta)
    trainer.step(x, target)
    torch.testing.assert_close(gradients(trainer)[0], expected)


def test_residual_block_is_one_block():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, x):
            return torch.tanh(x + self.inner(x))

    trainer = DirectTrainer([nn.Linear(6, 8), Residual(), Residual(), nn.Linear(8, 3)], sgd)
    assert [len(segment.parameters) for segment in trainer.segments] == [2, 4, 4, 2]
    trainer.step(torch.randn(5, 6), torch.arange(5) % 3)


@contextlib.contextmanager
def process_group(path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rule", RULES)
def test_blocks_in_ddp(rule, tmp_path):
    x, target = images(12)
    plain = DirectTrainer(network(), sgd, rule=rule, accumulation_steps=2)
    with process_group(tmp_path):
        wrapped = [nn.parallel.DistributedDataParallel(b) if list(b.parameters()) else b for b in network()]
        parallel = DirectTrainer(wrapped, sgd, rule=rule, accumulation_steps=2)
        for trainer in (plain, parallel):
            for i in range(4):
                trainer.step(x[i:], target[i:])
        state = parallel.state_dict()
    for one, two in zip(plain.state_dict()["blocks"], state["blocks"]):
        for name in one:
            torch.testing.assert_close(one[name], two[name])
    assert state["feedback"] == plain.state_dict()["feedback"]


def test_predict_and_recalibrate():
    trainer = DirectTrainer(network(norm=True), sgd)
    trainer.step(*images())
    trainer.eval()
    trainer.bn_recalibrate([images(seed=i)[0] for i in range(3)])
    with torch.no_grad():
        assert torch.equal(trainer.predict(images()[0]), nn.Sequential(*trainer.blocks)(images()[0]))
    with pytest.raises(RuntimeError, match="call trainer.train"):
        trainer.step(*images())


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "drtp"])
def test_it_learns(rule):
    torch.manual_seed(1)
    trainer = DirectTrainer(network(), lambda p: torch.optim.Adam(p, 0.01), rule=rule)
    x, target = images(96)
    x = x + 2 * F.one_hot(target, 3).float().repeat_interleave(22, 1)[:, :64].view(96, 1, 8, 8)
    first = trainer.step(x, target)
    for _ in range(100):
        last = trainer.step(x, target)
    assert last < 0.5 * first


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(rule="fa"), ValueError, "rule must be one of 'dfa', 'sdfa', 'drtp', 'shallow', got 'fa'"),
        (dict(error="mse"), ValueError, "error must be one of"),
        (dict(reduce="sum"), ValueError, "reduce must be one of"),
        (dict(init="xavier"), ValueError, "init must be one of"),
        (dict(init=-1.0), ValueError, "init must be greater than 0"),
        (dict(law="cauchy"), ValueError, "law must be one of"),
        (dict(init="lls", law="sign"), ValueError, "law must be 'uniform' or 'uniform8' with init='lls'"),
        (dict(rule="drtp", shared_slice=True), ValueError, "shared_slice must be False with rule='drtp'"),
        (dict(blocks=[nn.Flatten()]), ValueError, "at least one parameter"),
        (
            dict(blocks=[torch.tanh, nn.Linear(2, 2)]),
            TypeError,
            "blocks must be an iterable of torch.nn.Modules, got a list with builtin",
        ),
        (
            dict(blocks=[nn.Sequential(nn.Linear(2, 2), lnn.DirectFeedback()), nn.Linear(2, 2)]),
            ValueError,
            "got one inside a Sequential",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"blocks": network(), **change}
    with pytest.raises(error, match=message):
        DirectTrainer(arguments.pop("blocks"), sgd, **arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(feedback=torch.ones(3)), ValueError, r"feedback must be \(C, \*shape\) or \(C, N\), got shape \(3,\)"),
        (dict(feedback=torch.ones(3, 2, dtype=torch.int64)), TypeError, "feedback must be one of"),
        (dict(max_features=0), ValueError, "max_features must be at least 1"),
        (dict(seed="a"), TypeError, "seed must be an int"),
    ],
)
def test_bad_places(arguments, error, message):
    with pytest.raises(error, match=message):
        lnn.DirectFeedback(**arguments)


def test_signal_of_another_batch():
    with pytest.raises(ValueError, match=r"one row for each of the error's \(4,\), got shape \(5, 2\)"):
        lnn.DirectFeedback().signal(torch.ones(4, 3), torch.ones(5, 2))


def test_a_norm_of_another_width_is_torchs_error():
    blocks = [
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 10)),
    ]
    with pytest.raises((RuntimeError, ValueError), match="16"):
        DirectTrainer(blocks, sgd, rule="dfa").step(torch.randn(4, 3, 8, 8), torch.arange(4))


@pytest.mark.parametrize("pool", [True, False])
def test_relu_of_minus_infinity_is_zero(pool):
    blocks = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *[nn.MaxPool2d(2)] * pool),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 if pool else 8 * 64, 10)),
    ]
    with torch.no_grad():
        blocks[0][1].bias[3] = float("-inf")
    trainer = DirectTrainer(blocks, sgd, rule="dfa")
    trainer.step(torch.randn(4, 3, 8, 8), torch.arange(4))
    assert all(p.isfinite().all() for p in blocks[1].parameters())  # the output block's, behind that ReLU
