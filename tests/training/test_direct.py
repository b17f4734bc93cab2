"""DFA, sDFA, DRTP: the vectors of the original code, and what DirectTrainer promises beside the rule."""
import contextlib
import copy
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lgkernels.nn as lnn
from lgkernels import functional as LF
from lgkernels.training import CONVENTIONS, BackpropTrainer, DirectTrainer
from tests.tolerances import assert_relative

GOLDEN = Path(__file__).parents[1] / "golden" / "feedback"
RULES = ("dfa", "sdfa", "drtp", "shallow")
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "none": nn.Identity}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# -- the original code's vectors ---------------------------------------------------------------------------------------

class Golden:
    def __init__(self, name, dtype):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            self.data = {key: file[key] for key in file}
        self.dtype = dtype
        self.layers = sorted(int(key.split("/")[1]) for key in self.data if key.startswith("kind/"))

    def __getitem__(self, key):
        tensor = torch.from_numpy(np.array(self.data[key]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def text(self, key):
        return str(self.data[key])

    def layer(self, i):
        weight, conv = self[f"W/{i}"], self.text(f"kind/{i}").lower() == "conv"
        layer = (nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], int(self.data[f"stride/{i}"]),
                           int(self.data[f"padding/{i}"])) if conv else nn.Linear(*weight.shape[::-1]))
        layer.to(self.dtype).load_state_dict({"weight": weight, "bias": self[f"b/{i}"]})
        return layer, conv

    def blocks(self, places):
        """Modules in order; a DirectFeedback with the stored B after each hidden activation (before the pool)."""
        blocks, flat = [], False
        for i in self.layers:
            layer, conv = self.layer(i)
            if not conv and not flat:
                blocks.append(nn.Flatten())
                flat = True
            if i == self.layers[-1]:
                blocks.append(nn.Sequential(layer, ACTIVATIONS[self.text("output_act")]()))
                continue
            act = ACTIVATIONS[self.text("conv_act" if conv else "hidden_act")]()
            blocks.append(nn.Sequential(layer, act))
            if places:
                blocks.append(lnn.DirectFeedback(feedback=self[f"B_direct/{i}"]))
            if conv:
                blocks.append(nn.MaxPool2d(2))
        return blocks

    def loss(self, output, target):
        if self.text("loss_fn") == "CE":
            return F.cross_entropy(output, target)
        return {"BCE": F.binary_cross_entropy, "MSE": F.mse_loss}[self.text("loss_fn")](
            output, F.one_hot(target, output.shape[1]).to(output.dtype))

    @property
    def error(self):
        return "probs_minus_onehot" if self.text("loss_fn") == "CE" else "output_minus_target"


class Kept(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(trainer):
    return [g for optimizer in trainer.optimizers if optimizer for g in optimizer.seen]


def feedback_alignment(golden):
    """The network with its layers under FA: B_fa(l) carries the error below layer l, the output layer's too."""
    blocks = golden.blocks(places=False)
    feedback = iter(golden.layers)

    class Linear(nn.Linear):
        def forward(self, x):
            return LF.feedback_linear(x, self.weight, self.bias, feedback=self.feedback)

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return LF.feedback_conv2d(x, self.weight, self.bias, self.stride, self.padding, feedback=self.feedback)

    for block in blocks:
        for module in block.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.feedback = golden[f"B_fa/{next(feedback)}"]
                module.__class__ = Linear if isinstance(module, nn.Linear) else Conv2d
    return blocks


@pytest.mark.parametrize("rule", ["BP", "FA", "DFA", "sDFA", "DRTP", "shallow"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["conv2_fc_ce", "conv_fc_bce", "conv_k5s1_fc_bce", "fc3_mse"])
def test_golden(name, dtype, rule, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    golden = Golden(name, dtype)
    if rule in ("BP", "FA"):
        blocks = golden.blocks(places=False) if rule == "BP" else feedback_alignment(golden)
        trainer = BackpropTrainer(blocks, lambda p: Kept(p, lr=1.0), loss=golden.loss)
    else:
        trainer = DirectTrainer(golden.blocks(places=True), lambda p: Kept(p, lr=1.0), rule=rule.lower(),
                                loss=golden.loss, error=golden.error, reduce="none")
    loss = trainer.step(golden["x"], golden["labels"])
    assert_relative("output", trainer.output, golden["output"], TOLERANCE[dtype])
    assert abs(loss.item() - float(golden["loss"])) < (1e-12 if dtype == torch.float64 else 2e-6)
    found = iter(gradients(trainer))
    for i in golden.layers:
        for part in ("W", "b"):
            expected = golden[f"{rule}/grad_{part}/{i}"]
            got = next(found)
            if rule == "shallow" and i != golden.layers[-1]:
                assert torch.equal(got, torch.zeros_like(got)) and not expected.any()
            else:
                assert_relative(f"{rule} grad_{part}/{i}", got, expected, TOLERANCE[dtype])
    assert next(found, None) is None


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "drtp"])
def test_float_targets_are_the_same(rule):
    golden = Golden("fc3_mse", torch.float32)
    trainers = [DirectTrainer(golden.blocks(places=True), lambda p: Kept(p, lr=1.0), rule=rule, loss=loss,
                              error=golden.error, reduce="none") for loss in (golden.loss, F.mse_loss)]
    trainers[0].step(golden["x"], golden["labels"])
    trainers[1].step(golden["x"], golden["targets"])
    for one, two in zip(*map(gradients, trainers)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# -- the rule written out ----------------------------------------------------------------------------------------------

def network(norm=False):
    torch.manual_seed(3)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), *middle, nn.Tanh(), nn.MaxPool2d(2)), nn.Flatten(),
            nn.Sequential(nn.Linear(24, 12), nn.Tanh()), nn.Linear(12, 3)]


def images(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 3


def kept(parameters):
    return Kept(parameters, lr=1.0)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def weights(trainer):
    return {f"{i}.{name}": p.detach().clone() for i, block in enumerate(trainer.blocks)
            for name, p in block.state_dict().items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def written_out(blocks, places, x, target, rule, error, factor):
    """Gradients by hooks on the ordinary graph of the whole network."""
    classes, signal, entered = 3, None, []
    h = x
    for block in blocks:
        if isinstance(block, lnn.DirectFeedback):
            entered.append(h)
            h = h.detach().requires_grad_()
        else:
            h = block(h)
    h.retain_grad()
    loss = F.cross_entropy(h, target)
    loss.backward()
    onehot = F.one_hot(target, classes).float()
    e = {"probs_minus_onehot": h.softmax(1) - onehot, "output_minus_target": h - onehot, "loss_grad": h.grad}[error]
    signal = {"dfa": e, "sdfa": e.sign(), "drtp": onehot, "shallow": 0 * e}[rule].detach() * factor
    for place, activation in zip(places, entered):
        activation.backward((signal @ place.matrix(classes, activation.shape[1:]).flatten(1)).view(activation.shape))
    return [p.grad for block in blocks for p in block.parameters()]


CASES = [("probs_minus_onehot", None, 1 / 8, "nokland", "uniform", True),
         ("probs_minus_onehot", "none", 1, "kaiming", "normal", False),
         ("output_minus_target", "mean", 1 / 8, "kaiming", "uniform", False),
         ("loss_grad", None, 1, "lighton", "uniform", False), ("loss_grad", "mean", 1 / 8, 0.3, "sign", False),
         ("probs_minus_onehot", "mean", 1 / 8, "lls", "uniform8", False)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("error, reduce, factor, init, law, norm", CASES)
def test_step_is_the_rule(rule, error, reduce, factor, init, law, norm):
    x, target = images()
    trainer = DirectTrainer(network(norm), kept, rule=rule, error=error, reduce=reduce, init=init, law=law, seed=7,
                            shared_slice=init == "lighton" and rule != "drtp")
    expected = copy.deepcopy(trainer.blocks)
    trainer.step(x, target)
    places = [b for b in trainer.blocks if isinstance(b, lnn.DirectFeedback)]
    assert len(places) == 3
    for got, wanted in zip(gradients(trainer), written_out(expected, places, x, target, rule, error, factor)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * max(wanted.abs().max().item(), 1e-4))


def test_conventions():
    """Laws of the published codes, and where the signal enters: N = 256 before the first pool, 24 after the second."""
    places = {}
    for name, convention in CONVENTIONS.items():
        trainer = DirectTrainer(network(), sgd, **convention)
        trainer.step(*images())
        places[name] = [b for b in trainer.blocks if isinstance(b, lnn.DirectFeedback)]
    shapes = (4, 8, 8), (6, 2, 2), (12,)
    for name, bound in (("nokland", lambda n: n**-0.5), ("kaiming", lambda n: (6 / n)**0.5),
                        ("lighton", lambda n: 1 / 16)):
        for place, shape in zip(places["chfrenkel" if name == "kaiming" else name], shapes):
            b, limit = place.matrix(40, shape), bound(np.prod(shape))
            assert 0.9 * limit < b.max() <= limit and -limit <= b.min() < -0.9 * limit
    lls = places["lls"][0].matrix(40, shapes[0])
    assert lls.min() >= 0 and 0.9e-4 < lls.max() <= 1e-4
    first, second = (place.matrix(3, shape).flatten(1) for place, shape in zip(places["lighton"][:2], shapes))
    assert torch.equal(first[:, :24], second)
    assert not torch.equal(*(p.matrix(3, (24,)) for p in places["nokland"][:2]))


@pytest.mark.parametrize("law", ["normal", "sign", "uniform8", "uniform"])
def test_laws_have_the_variance_of_the_init(law):
    b = lnn.DirectFeedback("kaiming", law=law).matrix(200, (150,))
    assert b.std().item() == pytest.approx((2 / 150)**0.5, rel=0.02)


# -- what the trainer promises -----------------------------------------------------------------------------------------

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
        DirectTrainer(blocks, sgd, rule=rule).step(torch.randn(6, 24), torch.arange(6) % 3)
        before = blocks[0][0].weight.detach().clone()
    assert seen == [False, True]


@pytest.mark.parametrize("rule", RULES)
def test_partial_batches(rule):
    trainer = DirectTrainer(network(), sgd, rule=rule)
    for size in (8, 5, 1):
        assert torch.isfinite(trainer.step(*images(size))).all()
    assert trainer.output.shape == (1, 3)


@pytest.mark.parametrize("error, reduce", [("probs_minus_onehot", "mean"), ("probs_minus_onehot", "none"),
                                           ("loss_grad", "none")])
@pytest.mark.parametrize("rule", RULES)
def test_accumulation_is_the_big_batch(rule, error, reduce):
    x, target = images(12)
    whole, parts = (DirectTrainer(network(), sgd, rule=rule, error=error, reduce=reduce, accumulation_steps=n)
                    for n in (1, 3))
    before = weights(parts)
    for _ in range(2):
        whole.step(x, target)
        for i in range(3):
            assert_equal(before, weights(parts))
            parts.step(x[4 * i:4 * i + 4], target[4 * i:4 * i + 4])
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
    plain, scaled = (DirectTrainer(network(), sgd, rule=rule, reduce=reduce, clip_grad_norm=0.5, grad_scaler=scaler)
                     for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)))
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
        return DirectTrainer(network(norm=True), sgd, rule=rule, seed=seed,
                             scheduler_factory=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))

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
    model = nn.Sequential(stem, lnn.DirectFeedback(stream=0), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                          lnn.DirectFeedback(stream=1), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
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
    expected, = torch.autograd.grad(blocks[0](x), blocks[0][0].weight, delta)
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


@pytest.mark.parametrize("change, error, message", [
    (dict(rule="fa"), ValueError, "rule must be one of 'dfa', 'sdfa', 'drtp', 'shallow', got 'fa'"),
    (dict(error="mse"), ValueError, "error must be one of"),
    (dict(reduce="sum"), ValueError, "reduce must be one of"),
    (dict(init="xavier"), ValueError, "init must be one of"),
    (dict(init=-1.0), ValueError, "init must be greater than 0"),
    (dict(law="cauchy"), ValueError, "law must be one of"),
    (dict(init="lls", law="sign"), ValueError, "law must be 'uniform' or 'uniform8' with init='lls'"),
    (dict(rule="drtp", shared_slice=True), ValueError, "shared_slice must be False with rule='drtp'"),
    (dict(blocks=[nn.Flatten()]), ValueError, "at least one parameter"),
    (dict(blocks=[torch.tanh, nn.Linear(2, 2)]), TypeError, "blocks must be nn.Modules, got builtin"),
    (dict(blocks=[nn.Sequential(nn.Linear(2, 2), lnn.DirectFeedback()), nn.Linear(2, 2)]), ValueError,
     "got one inside a Sequential"),
])
def test_bad_arguments(change, error, message):
    arguments = {"blocks": network(), **change}
    with pytest.raises(error, match=message):
        DirectTrainer(arguments.pop("blocks"), sgd, **arguments)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(feedback=torch.ones(3)), ValueError, r"feedback must be \(C, \*shape\) or \(C, N\), got shape \(3,\)"),
    (dict(feedback=torch.ones(3, 2, dtype=torch.int64)), TypeError, "feedback must be one of"),
    (dict(max_features=0), ValueError, "max_features must be at least 1"),
    (dict(seed="a"), TypeError, "seed must be an int")])
def test_bad_places(arguments, error, message):
    with pytest.raises(error, match=message):
        lnn.DirectFeedback(**arguments)


@pytest.mark.parametrize("rule, error", [("dfa", "probs_minus_onehot"), ("dfa", "loss_grad"), ("drtp", "loss_grad"),
                                         ("sdfa", "probs_minus_onehot")])
@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_ignored_targets_and_small_integers(rule, error, reduce):
    """Rows of target -100 have no part in a step, whatever the rule; targets may be of any integer dtype."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, -100, 2, 1, -100, 2])
    found = []
    for data, labels in ((x, target.to(torch.int8)), (x[target >= 0], target[target >= 0])):
        torch.manual_seed(1)
        blocks = [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
        trainer = DirectTrainer(blocks, lambda p: Kept(p, lr=1.0), rule=rule, error=error, reduce=reduce)
        found.append((trainer.step(data, labels), *gradients(trainer)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_signal_of_another_batch():
    with pytest.raises(ValueError, match=r"one row for each of the error's \(4,\), got shape \(5, 2\)"):
        lnn.DirectFeedback().signal(torch.ones(4, 3), torch.ones(5, 2))
