"""`cuda_graph=True` of the trainers, with a recorder in the place of torch's CUDA graphs.

The recorder notes what reaches the dispatcher while a step is captured, undoes what it did, and repeats it on the same
tensors at each replay, as a graph does. What a graph could not hold fails the test: a value that the host reads, a
tensor that moves to the CPU, a result whose size is in its values.
"""

import contextlib
import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lgkernels.nn as lnn
from lgkernels.core import checks, unit
from lgkernels.optim import OffsetSGD
from lgkernels.training import BackpropTrainer, BlockwiseTrainer, DirectTrainer, graph, refresh_trainer
from tests.support.tolerances import assert_bit_equal
from tests.training.test_trainers import lls_blocks, local_blocks

WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}


class Forbidden(TorchDispatchMode):
    """Raises where a step would wait for the device, and counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        assert name != "_to_copy" or (kwargs or {}).get("device") in (None, args[0].device), "a copy to another device"
        self.count += 1
        return function(*args, **(kwargs or {}))


class Recorder(Forbidden):
    """A CUDA graph of the CPU."""

    current = None

    def __init__(self):
        super().__init__()
        self.operations, self.replays, self.before = [], 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        for tensor in inputs:  # as it was, so that capturing runs nothing
            self.before.setdefault(tensor.untyped_storage().data_ptr(), (tensor, tensor.untyped_storage().clone()))
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def undo(self):
        for tensor, storage in self.before.values():
            tensor.untyped_storage().copy_(storage)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, noted in self.operations:
            result = function(*args, **kwargs)
            for own, new in zip(tree_flatten(noted)[0], tree_flatten(result)[0]):
                if isinstance(own, torch.Tensor) and own.data_ptr() != new.data_ptr():
                    own.data.copy_(new)


class Stream:
    """Of the CPU, whose work is done when it returns."""

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def capture(recorder, stream):
    gc.collect()
    with recorder:
        yield
    recorder.undo()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(graph, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # what the library reads where that costs nothing, on a CPU alone
    monkeypatch.setattr(unit, "_readable", lambda gradient: False)
    monkeypatch.setattr(checks, "class_indices", lambda *arguments: None)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def plain_blocks():
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)]


def batch(i, rows=5):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)


def offset_sgd(parameters):
    return OffsetSGD(parameters, 0.1, momentum=0.9)


TRAINERS = {
    "blockwise": lambda **options: BlockwiseTrainer(local_blocks(), sgd, **options),
    "blockwise, clipped": lambda **options: BlockwiseTrainer(local_blocks(), sgd, clip_grad_norm=0.1, **options),
    "backprop": lambda **options: BackpropTrainer(plain_blocks(), sgd, **options),
    "brsf": lambda **options: BackpropTrainer([lnn.convert(b, "brsf") for b in plain_blocks()], sgd, **options),
    **{
        rule: lambda rule=rule, **options: DirectTrainer(plain_blocks(), sgd, rule=rule, **options)
        for rule in ("dfa", "sdfa", "drtp", "shallow")
    },
    "offsets": lambda **options: BlockwiseTrainer(local_blocks(), offset_sgd, **options),
}


def weights(trainer):
    return [p for group in trainer.parameter_groups for p in group]


def same(ours, rival):
    for i, (a, b) in enumerate(zip(weights(ours), weights(rival))):
        assert_bit_equal(f"parameter {i}", a.detach(), b.detach())


@pytest.mark.parametrize("name", TRAINERS)
def test_replays_are_steps(name, monkeypatch):
    """Losses, outputs and weights of ordinary steps, bit for bit, and no tensor of one step is the next one's."""
    if name == "offsets":
        monkeypatch.setenv("LGKERNELS_IMPL", "reference")  # the recorder sees what goes through the dispatcher
    ours, rival = TRAINERS[name](cuda_graph=True), TRAINERS[name]()
    kept = []
    for i in range(8):
        losses, expected = ours.step(*batch(i)), rival.step(*batch(i))
        kept.append((losses, expected, ours.output, rival.output))
        same(ours, rival)
    for losses, expected, output, of_rival in kept:
        assert_bit_equal("losses", losses, expected)
        assert_bit_equal("output", output, of_rival)
    (recorded,) = ours.graphs.graphs.values()
    assert recorded.graph.replays == 8 - graph.WARM_UP and ours.steps == 8


def test_a_shape_has_a_graph_of_its_own_and_rare_ones_have_none():
    ours, rival = TRAINERS["blockwise"](cuda_graph=True), TRAINERS["blockwise"]()
    for i in range(14):
        rows = 3 if i % 5 == 4 else 5
        assert_bit_equal("losses", ours.step(*batch(i, rows)), rival.step(*batch(i, rows)))
    same(ours, rival)
    assert [key[0][0] for key in ours.graphs.graphs] == [(5, 6)]
    for i in range(4 * (graph.WARM_UP + 1)):
        ours.step(*batch(i, 6 + i // (graph.WARM_UP + 1)))
    assert len(ours.graphs.graphs) == graph.MOST


def change_lr(trainer):
    for optimizer in trainer.optimizers:
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = 0.01


def load(trainer):
    trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))


def refresh(trainer):
    refresh_trainer(trainer, batch(50, 16))


@pytest.mark.parametrize("change", [change_lr, load, refresh], ids=lambda change: change.__name__)
def test_what_a_graph_holds_is_recorded_anew_when_it_changes(change, monkeypatch):
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    ours, rival = TRAINERS["offsets"](cuda_graph=True), TRAINERS["offsets"]()
    for i in range(12):
        if i == 5:
            assert ours.graphs.graphs
            change(ours)
            change(rival)
        ours.step(*batch(i))
        assert bool(ours.graphs.graphs) == (3 <= i < 5 or i >= 8)
        rival.step(*batch(i))
        same(ours, rival)


def scheduled(lr, wanted):
    """Its learning rate halves at each step. torch's fused SGD reads a tensor where it runs."""
    return BackpropTrainer(
        plain_blocks(),
        lambda parameters: torch.optim.SGD(parameters, lr, momentum=0.9, fused=True),
        scheduler_factory=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i),
        cuda_graph=wanted,
    )


def test_a_schedule_that_writes_into_a_tensor_has_one_recording():
    ours, rival = scheduled(torch.tensor(0.1), True), scheduled(0.1, False)
    for i in range(8):
        for trainer in (ours, rival):
            trainer.step(*batch(i))
            trainer.scheduler_step()
        same(ours, rival)
    (recorded,) = ours.graphs.graphs.values()
    assert recorded.graph.replays == 8 - graph.WARM_UP


def test_a_schedule_of_numbers_is_warned_of_once():
    ours, rival = scheduled(0.1, True), scheduled(0.1, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(12):
            for trainer in (ours, rival):
                trainer.step(*batch(i))
                trainer.scheduler_step()
    same(ours, rival)
    (warning,) = (w for w in caught if "cuda_graph" in str(w.message))
    assert str(warning.message).startswith(
        "cuda_graph=True records nothing: optimizers[0].param_groups[0]['lr'] has changed 3 times, each time before"
    )
    assert warning.filename == __file__ and not ours.graphs.graphs


@pytest.mark.filterwarnings("error")
def test_a_schedule_of_epochs_is_not_warned_of():
    trainer = scheduled(0.1, True)
    for i in range(5 * (graph.WARM_UP + 2)):
        trainer.step(*batch(i))
        if i % (graph.WARM_UP + 2) == 0:
            trainer.scheduler_step()
    assert trainer.graphs.graphs


def test_a_tensor_on_another_device_is_a_number(monkeypatch):
    """What is read on the host when the step is recorded holds for its replays."""
    lr = torch.tensor(0.1)
    trainer = scheduled(lr, True)
    trainer.graphs.device = torch.device("cuda", 0)  # where the parameters would be
    first = trainer.graphs._fixed_now()
    lr.fill_(0.05)
    trainer.graphs.fixed = first
    assert trainer.graphs._changed(trainer.graphs._fixed_now()) == (0, 0, "lr")


def layouts(trainer, x, target):
    """Layout, alignment and history of what the steps run on, ordinary ones and the recorded one."""
    seen, step = [], trainer._step

    def noted(x, target, last):
        seen.append([(t.stride(), t.data_ptr() % 16, t.requires_grad) for t in (x, target)])
        return step(x, target, last)

    trainer._step = noted
    for _ in range(graph.WARM_UP + 2):
        trainer.step(x, target)
    return seen


def test_a_step_warms_up_on_what_it_is_recorded_with():
    wide = torch.randn(31, requires_grad=True)
    for x in (wide[1:].view(5, 6), wide[:30].view(5, 6), torch.randn(6).expand(5, 6)):
        seen = layouts(TRAINERS["backprop"](cuda_graph=True), x, torch.arange(6)[1:] % 3)
        assert len(seen) == graph.WARM_UP + 1 and all(one == seen[-1] for one in seen)


@pytest.mark.parametrize("name", [*TRAINERS, "lls"])
def test_a_step_waits_for_nothing_and_keeps_nothing(name, monkeypatch):
    """By counting: the same operations in each step, and as many tensors alive after it as before."""
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    if name == "lls":
        trainer, x = BlockwiseTrainer(lls_blocks(), sgd), torch.randn(6, 1, 8, 8)
    else:
        trainer, x = TRAINERS[name](), torch.randn(6, 6)
    target, counts, alive = torch.arange(6) % 3, [], []
    gc.collect()
    gc.freeze()  # what other tests have left is not gone through and counted again and again
    for _ in range(graph.WARM_UP + 3):
        with Forbidden() as forbidden:
            trainer.step(x, target)
        gc.collect()
        counts.append(forbidden.count)
        alive.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
    assert len(set(counts[graph.WARM_UP :])) == len(set(alive[graph.WARM_UP :])) == 1


def test_a_step_that_waits_is_refused_by_name():
    class Waiting(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else super().forward(x)

    trainer = BackpropTrainer([nn.Sequential(Waiting(6, 3))], sgd, cuda_graph=True)
    for i in range(graph.WARM_UP):
        trainer.step(*batch(i))
    with pytest.raises(RuntimeError, match=r"cuda_graph=True: the step cannot be recorded \(AssertionError: .*waits"):
        trainer.step(*batch(9))
    assert not trainer.graphs.graphs and all(p.grad is None for p in weights(trainer))


class Doubled(nn.Linear):
    """Its loss has a hook that writes to the gradient."""

    def forward(self, x, target=None):
        out = super().forward(x)
        if target is None:
            return out
        loss = F.cross_entropy(out, target)
        loss.register_hook(lambda gradient: gradient.mul_(2))
        return out.detach(), loss


def test_a_hook_that_writes_to_the_gradient_of_a_loss():
    """At each replay it would double what the last one wrote."""
    trainer = BlockwiseTrainer([Doubled(6, 3)], sgd, cuda_graph=True)
    with pytest.raises(RuntimeError, match="the step cannot be recorded .*a hook writes to the gradient of a loss"):
        for i in range(graph.WARM_UP + 1):
            trainer.step(*batch(i))


def test_a_graph_has_a_unit_gradient_of_its_own():
    trainer = TRAINERS["blockwise"](cuda_graph=True)
    for i in range(graph.WARM_UP + 1):
        trainer.step(*batch(i))
    (recorded,) = trainer.graphs.graphs.values()
    unit.one(torch.device("cpu")).mul_(2)  # an eager step's hook
    assert recorded.unit.item() == 1.0 and unit.one(torch.device("cpu")).item() == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(accumulation_steps=2), "accumulation_steps must be 1 with cuda_graph=True, got 2: "),
        (dict(grad_scaler=torch.amp.GradScaler("cpu")), "grad_scaler must be None with cuda_graph=True, got a Grad"),
    ],
)
def test_what_cannot_be_recorded(options, message):
    with pytest.raises(ValueError, match=message):
        BlockwiseTrainer(local_blocks(), sgd, cuda_graph=True, **options)


def test_offsets_are_not_clipped_in_a_graph():
    with pytest.raises(ValueError, match="clip_grad_norm must be None with cuda_graph=True, got 1.0: optimizers with"):
        BlockwiseTrainer(local_blocks(), offset_sgd, cuda_graph=True, clip_grad_norm=1.0)


@pytest.mark.parametrize("kind", [BlockwiseTrainer, BackpropTrainer, DirectTrainer])
def test_a_cpu_has_no_graphs(kind, monkeypatch):
    monkeypatch.setattr(graph, "DEVICE_TYPES", {"cuda"})
    with pytest.raises(ValueError, match="cuda_graph must be False unless all parameters are on one CUDA device, got "):
        kind(plain_blocks(), sgd, cuda_graph=True)
    with pytest.raises(TypeError, match="cuda_graph must be"):
        kind(plain_blocks(), sgd, cuda_graph="yes")


def test_a_module_whose_mode_changes():
    """Nothing shows it: the graphs are dropped by hand."""
    ours, rival = (BlockwiseTrainer(local_blocks(), sgd, cuda_graph=wanted) for wanted in (True, False))
    for trainer in (ours, rival):
        trainer.blocks[1].p = 0.0
    for i in range(6):
        for trainer in (ours, rival):
            if i == 4:
                trainer.blocks[1].eval()
                if trainer is ours:
                    trainer.graphs.forget()
            trainer.step(*batch(i))
    same(ours, rival)
    assert not ours.graphs.graphs
