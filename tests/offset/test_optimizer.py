"""BP-modified local loss: the property tests of the method (numbered as in the spec), and the optimizer's own."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
from lgkernels.optim import OffsetOptimizer, OffsetSGD, refresh_due
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal, assert_relative

D = torch.float64


class Net(nn.Module):
    """Two blocks with local classifiers, and the global classifier as the last block."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh()) for _ in range(2)
        )
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.last = nn.Linear(6, 4)
        self.double()

    def bp(self, x, y):
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.last(x), y)

    def local(self, x, y):
        for block, head in zip(self.blocks, self.heads):
            x = block(x)
            yield F.cross_entropy(head(x), y)
            x = x.detach()
        yield F.cross_entropy(self.last(x), y)


def sgd(net, **options):
    groups = [{"params": list(m.parameters())} for m in (*net.blocks, net.heads, net.last)]
    return OffsetSGD(groups, **{"lr": 0.1, "momentum": 0.9, **options})


def batch(seed, size=16):
    return randn(size, 6, seed=seed, dtype=D), targets(size, 4, seed=seed)


def local_step(net, optimizer, data):
    optimizer.zero_grad()
    for loss in net.local(*data):
        loss.backward()
    optimizer.step()


def gradients(net, losses):
    net.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.0), dict(weight_decay=0.1)])
def test_1_refreshed_at_every_step_on_its_own_batch_it_is_back_propagation(options):
    ours, plain = Net(), Net()
    optimizer, rival = (
        sgd(ours, **options),
        torch.optim.SGD(
            [p for m in (plain.blocks, plain.last) for p in m.parameters()], **{"lr": 0.1, "momentum": 0.9, **options}
        ),
    )
    for i in range(5):
        data = batch(i)
        optimizer.refresh(ours.bp, ours.local, data, bp_chunk=4, local_chunk=8)
        local_step(ours, optimizer, data)
        rival.zero_grad()
        plain.bp(*data).backward()
        rival.step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        if not name.startswith("heads"):
            assert_relative(name, p, q, 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_2_without_offset_scale_it_is_local_training(momentum):
    ours, plain = Net(), Net()
    optimizer = sgd(ours, offset_scale=0.0, momentum=momentum)
    rival = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum)
    optimizer.refresh(ours.bp, ours.local, batch(9))
    for i in range(5):
        local_step(ours, optimizer, batch(i))
        local_step(plain, rival, batch(i))
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert_relative("parameter", p, q, 1e-14)


@pytest.mark.parametrize("bp_chunk, local_chunk", [(1, 40), (7, 16), (8, 5), (40, 1)])
def test_3_chunks_change_nothing(bp_chunk, local_chunk):
    """With batch normalisation in evaluation."""
    net, data = Net(norm=True), batch(1, 40)
    offsets = []
    for chunks in ((40, 40), (bp_chunk, local_chunk)):
        optimizer = sgd(net)
        optimizer.refresh(
            net.bp, net.local, data, bp_chunk=chunks[0], local_chunk=chunks[1], model=net, batch_norm="eval"
        )
        offsets.append(optimizer.offsets())
    assert len(offsets[0]) == len(offsets[1]) > 6
    largest = max(o.abs().max() for _, o in offsets[0])
    for (_, a), (_, b) in zip(*offsets):
        assert (a - b).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("a, a_l, period", [(1.0, 1.0, 10), (1.0, 0.6, 100), (1.0, 0.3, 781), (0.7, 2.0, 781)])
def test_4_period_map_on_a_quadratic(a, a_l, period):
    """w(tau + K) = [1 - (1 - rho) a / a_l] w(tau), rho = (1 - lr a_l)^K, at momentum 0."""
    w, lr = nn.Parameter(torch.tensor([1.0], dtype=D)), 0.01
    optimizer, c = OffsetSGD([w], lr), 3.0
    bp, local = (lambda _: 0.5 * a * w.square().sum()), (lambda _: 0.5 * a_l * (w - c).square().sum())
    factor, expected = 1 - (1 - (1 - lr * a_l) ** period) * a / a_l, 1.0
    for _ in range(3):
        optimizer.refresh(bp, local, torch.zeros(1))
        for _ in range(period):
            optimizer.zero_grad()
            local(None).backward()
            optimizer.step()
        expected *= factor
        assert abs(w.item() - expected) <= 1e-12


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.7, 5.0])
def test_5_at_the_snapshot_the_step_follows_the_global_gradient(scale):
    """For every local_scale, with one of its own in each group."""
    net, data = Net(), batch(3)
    exact = gradients(net, [net.bp(*data)])
    optimizer = sgd(net, momentum=0.0, lr=1.0)
    for i, group in enumerate(optimizer.param_groups):
        group["local_scale"] = scale * (i + 1)
    optimizer.refresh(net.bp, net.local, data)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    local_step(net, optimizer, data)
    for name, p in net.named_parameters():
        if name in exact:
            assert ((before[name] - p) - exact[name]).abs().max() <= 1e-12, name


def test_6_refresh_leaves_everything_else_alone():
    """Weights, momentum, gradients, buffers, modes and random state, bit for bit, with dropout and batch norm."""
    net = Net(norm=True)
    net.blocks[0].append(nn.Dropout(0.5))
    optimizer = sgd(net)
    local_step(net, optimizer, batch(0))
    net.blocks[1].eval()
    before = copy.deepcopy(net.state_dict())
    momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    grads, modes = [p.grad for p in net.parameters()], [m.training for m in net.modules()]
    copies, state = [g.clone() for g in grads], torch.get_rng_state()
    for mode in ("train", "eval"):
        optimizer.refresh(net.bp, net.local, batch(1, 40), model=net, batch_norm=mode)
        assert optimizer.offsets()
        for name, value in net.state_dict().items():
            assert_bit_equal(name, value, before[name])
        for s, momentum in zip(optimizer.state.values(), momenta):
            assert_bit_equal("momentum", s["momentum_buffer"], momentum)
        for p, grad, value in zip(net.parameters(), grads, copies):
            assert p.grad is grad
            assert_bit_equal("gradient", p.grad, value)
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in net.modules()] == modes


def test_6_also_buffers_that_forward_replaces():
    class Peers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, dtype=D)
            self.register_buffer("running_mean", torch.zeros(4, dtype=D))
            self.register_buffer("seen", None)

        def forward(self, x):
            h = self.layer(x).relu()
            loss, self.running_mean = LF.peer_normalization_loss(h, self.running_mean)
            self.seen = torch.ones(1)
            return loss + h.square().mean()

    net, data = Peers(), batch(1)
    buffer = net.running_mean
    OffsetSGD(net.layer.parameters(), 0.1).refresh(lambda x, y: net(x), lambda x, y: net(x), data, model=net)
    assert net.running_mean is buffer and not buffer.any() and net.seen is None


def test_7_one_block_at_a_time():
    """A local closure that is a generator: its next block runs only after the backward of the one before."""
    net, order = Net(), []

    def local(x, y):
        for i, loss in enumerate(net.local(x, y)):
            order.append(("forward", i))
            loss.register_hook(lambda g, i=i: order.append(("backward", i)))
            yield loss

    sgd(net).refresh(net.bp, local, batch(1))
    assert order == [(k, i) for i in range(3) for k in ("forward", "backward")]


def test_8_no_offset_where_the_local_loss_is_the_global_one():
    net = Net()
    optimizer = sgd(net)
    optimizer.refresh(net.bp, net.local, batch(1), bp_chunk=8, local_chunk=8)
    offsets = {id(p): o for p, o in optimizer.offsets()}
    assert all(offsets[id(p)].abs().max() <= 1e-16 for p in net.last.parameters())
    assert all(offsets[id(p)].any() for p in net.blocks.parameters())
    assert all(id(p) not in offsets for p in net.heads.parameters())  # the global loss does not reach them


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_9_a_constant_offset_is_a_linear_tilt(momentum, alpha):
    ours, plain = Net(), Net()
    options = dict(lr=0.05, momentum=momentum, weight_decay=0.01)
    optimizer, rival = sgd(ours, offset_scale=alpha, **options), torch.optim.SGD(plain.parameters(), **options)
    optimizer.refresh(ours.bp, ours.local, batch(9))
    table = {id(p): o for p, o in optimizer.offsets()}
    tilt = [(q, table[id(p)]) for p, q in zip(ours.parameters(), plain.parameters()) if id(p) in table]
    for i in range(6):
        local_step(ours, optimizer, batch(i))
        rival.zero_grad()
        for loss in plain.local(*batch(i)):
            loss.backward()
        (alpha * sum((o * q).sum() for q, o in tilt)).backward()
        rival.step()
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert_relative("parameter", p, q, 1e-12)


@pytest.mark.parametrize("options", [dict(momentum=0.9, weight_decay=0.1), dict(local_scale=0.5, offset_scale=3.0)])
@pytest.mark.parametrize("max_norm", [0.02, 1e6])
def test_clipping_bounds_the_sum_of_gradient_and_offset(max_norm, options):
    """In the step itself; the wrapper and the kernels' optimizer agree with it written out."""
    nets = [Net(), Net(), Net()]
    coefficients = {k: options.pop(k, 1.0) for k in ("local_scale", "offset_scale")}
    optimizers = [sgd(nets[0], **{"momentum": 0.0, **options, **coefficients})]
    plain = [torch.optim.SGD(net.parameters(), **{"lr": 0.1, **options}) for net in nets[1:]]
    optimizers.append(OffsetOptimizer(plain[0], **coefficients))
    for net, optimizer in zip(nets, optimizers):
        optimizer.refresh(net.bp, net.local, batch(9))
    table = dict(zip(nets[2].parameters(), map(optimizers[0]._offset, nets[0].parameters())))
    for i in range(3):
        for net, optimizer in zip(nets, (*optimizers, plain[1])):
            optimizer.zero_grad()
            for loss in net.local(*batch(i)):
                loss.backward()
        for p, offset in table.items():
            p.grad *= coefficients["local_scale"]
            if offset is not None:
                p.grad += coefficients["offset_scale"] * offset
        norm = nn.utils.clip_grad_norm_(nets[2].parameters(), max_norm)
        assert 0.1 < norm < 1e3
        plain[1].step()
        for optimizer in optimizers:
            optimizer.step(max_norm=max_norm)
    for net in nets[:2]:
        for p, q in zip(net.parameters(), nets[2].parameters()):
            assert_relative("parameter", p, q, 1e-12)
    with pytest.raises(ValueError, match="max_norm must be greater than 0, got 0"):
        optimizers[0].step(max_norm=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_that_moves_in_memory(momentum):
    """Under the same tensor objects: what the step before noted of addresses and strides is void."""
    w, q = (nn.Parameter(torch.arange(4.0).reshape(2, 2)) for _ in range(2))
    ours, rival = OffsetSGD([w], 0.5, momentum), torch.optim.SGD([q], 0.5, momentum)

    grad = torch.arange(4.0).reshape(2, 2)  # at one address
    for change in ("nothing", "momentum_buffer", "strides"):
        for p, optimizer in ((w, ours), (q, rival)):
            if change == "momentum_buffer" and momentum:
                optimizer.state[p]["momentum_buffer"].data = torch.full((2, 2), 100.0)
            if change == "strides":
                p.data = p.data.t()
            p.grad = grad
            optimizer.step()
        assert torch.equal(w, q), change


@pytest.mark.parametrize("wrap", [False, True])
def test_state_dict_holds_the_offsets(wrap):
    def make(net):
        return OffsetOptimizer(torch.optim.Adam(net.parameters(), lr=0.01)) if wrap else sgd(net)

    nets = [Net(), Net()]
    first = make(nets[0])
    first.refresh(nets[0].bp, nets[0].local, batch(1))
    local_step(nets[0], first, batch(2))
    nets[1].load_state_dict(nets[0].state_dict())
    second = make(nets[1])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in zip(nets, (first, second)):
        local_step(net, optimizer, batch(3))
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert_bit_equal("parameter", p, q)
    assert len(second.offsets()) == len(first.offsets()) == 6


def test_estimated_offset_scale():
    """|b|^2 / (|b|^2 + tr S / B'): near 1 where the chunks agree, 0 without a signal, the formula in between."""
    w = nn.Parameter(torch.zeros(3, dtype=D))
    optimizer = OffsetSGD([w], 0.1)
    noise = randn(400, 3, seed=5, dtype=D)
    for shift, low, high in ((10.0, 0.99, 1.0), (0.0, 0.0, 0.9), (0.3, 0.5, 1.0)):
        optimizer.refresh(lambda x: (x * w).sum(1).mean(), None, noise + shift, bp_chunk=8, estimate_offset_scale=True)
        chunks = (noise + shift).reshape(50, 8, 3).mean(1)
        delta = chunks.mean(0)
        spread = (chunks.square().sum(1).mean() - delta.square().sum()) / 49
        signal = (delta.square().sum() - spread).clamp_min(0)
        assert abs(optimizer.param_groups[0]["offset_scale"] - (signal / (signal + spread)).item()) < 1e-9
        assert low <= optimizer.param_groups[0]["offset_scale"] <= high
        assert_relative("offset", optimizer.offsets()[0][1], delta, 1e-12)


def test_estimated_local_scale():
    """<E L', E l'> / |E l'|^2, and with it alpha; here the chunks' gradients are (x, 2 x + z) of random x and z."""
    w = nn.Parameter(torch.zeros(3, dtype=D))
    optimizer = OffsetSGD([w], 0.1, bp_coef=1.5)
    x, z = randn(400, 3, seed=5, dtype=D) + 0.5, randn(400, 3, seed=6, dtype=D)
    closures = (lambda x, z: (x * w).sum(1).mean(), lambda x, z: ((2 * x + z) * w).sum(1).mean())
    optimizer.refresh(*closures, (x, z), bp_chunk=8, estimate_local_scale=True, estimate_offset_scale=True)
    bp, local = (t.reshape(50, 8, 3).mean(1) for t in (x, 2 * x + z))

    def product(a, b):  # of the expectations: pairs of different chunks
        return ((a.sum(0) * b.sum(0)).sum() - (a * b).sum()) / (50 * 49)

    group, scale = optimizer.param_groups[0], product(bp, local) / product(local, local)
    assert abs(group["local_scale"] - scale) < 1e-9 and 0.3 < scale < 0.6
    difference = 1.5 * bp - scale * local
    signal = product(difference, difference)
    spread = difference.mean(0).square().sum() - signal
    assert abs(group["offset_scale"] - signal / (signal + spread)) < 1e-9
    assert_relative("offset", optimizer.offsets()[0][1], difference.mean(0), 1e-12)
    optimizer.refresh(closures[0], lambda x, z: -closures[1](x, z), (x, z), bp_chunk=8, estimate_local_scale=True)
    assert group["local_scale"] == 0.0  # a local loss that works against the global one


@pytest.mark.parametrize("estimates", [{}, dict(estimate_local_scale=True, estimate_offset_scale=True)])
def test_ranks_together_are_one_batch(estimates):
    """`average`, with one rank after the other in this process."""
    nets, (x, y), sent = [Net(), Net(), Net()], batch(3, 32), []
    optimizers = [sgd(net) for net in nets]

    def keep(tensors):
        sent.extend(t.clone() for t in tensors)
        return 1

    def join(tensors):
        for mine, theirs in zip(tensors, sent, strict=True):
            mine.add_(theirs).div_(2)
        return 2

    for i, (data, average) in enumerate((((x[:16], y[:16]), keep), ((x[16:], y[16:]), join), ((x, y), None))):
        optimizers[i].refresh(nets[i].bp, nets[i].local, data, bp_chunk=4, average=average, **estimates)
    _, ours, whole = optimizers
    for a, b in zip(ours.param_groups, whole.param_groups):
        assert a["local_scale"] == pytest.approx(b["local_scale"], rel=1e-9)
        assert a["offset_scale"] == pytest.approx(b["offset_scale"], rel=1e-9)
    for (_, a), (_, b) in zip(ours.offsets(), whole.offsets(), strict=True):
        assert (a - b).abs().max() <= 1e-12


def test_within_float16_autocast():
    """In float32: gradients below float16's range count."""
    net = Net().float()
    data = batch(1)[0].float(), batch(1)[1]
    offsets = []
    for half in (False, True):
        optimizer = sgd(net)
        with torch.autocast("cpu", torch.float16, enabled=half):
            optimizer.refresh(lambda x, y: 1e-7 * net.bp(x, y), None, data)
        offsets.append(optimizer.offsets())
    for (_, a), (_, b) in zip(*offsets, strict=True):
        assert a.any() and torch.equal(a, b)


def test_divergence_guard():
    w = nn.Parameter(torch.ones(3, dtype=D))
    optimizer = OffsetSGD([w], 0.1)
    refresh = lambda c: optimizer.refresh(lambda x: (c * x.sum() * w).sum(), None, torch.ones(4), max_growth=10)  # noqa: E731
    refresh(1.0)
    refresh(5.0)
    assert optimizer.offsets()
    with pytest.warns(UserWarning, match=r"param_groups\[0\]: the offset grew from .* dropped"):
        refresh(500.0)
    assert not optimizer.offsets()
    with pytest.raises(RuntimeError, match="an offset is not finite"):
        refresh(float("inf"))
    assert not optimizer.offsets() and w.grad is None


def test_divergence_guard_at_every_refresh():
    """Compared with the refresh before, whether that was dropped or not, also after a restart."""
    w, kept = nn.Parameter(torch.ones(3, dtype=D)), []
    optimizer = OffsetSGD([w], 0.1)
    for norm in (1.0, 100.0, 1e4, 1e6, 2e6, 1e8, 1e8):
        restarted = OffsetSGD([w], 0.1)
        restarted.load_state_dict(optimizer.state_dict())
        optimizer = restarted
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.refresh(lambda x: (norm * x.sum() * w).sum(), None, torch.ones(4), max_growth=4)
        kept.append(bool(optimizer.offsets()))
        assert kept[-1] == (not caught)
    assert kept == [True, False, False, False, True, False, True]


def test_a_tiny_local_scale():
    """1 / local_scale is no float32: the local part is lost in rounding, the offset is the global gradient."""
    w = nn.Parameter(torch.ones(2))
    optimizer = OffsetSGD([w], 0.1, local_scale=1e-39)
    optimizer.refresh(lambda x: (w * x).sum(), lambda x: w.square().sum(), torch.full((1,), 3.0))
    assert optimizer.offsets()[0][1].tolist() == [3.0, 3.0]


def test_when_to_refresh():
    assert [s for s in range(20) if refresh_due(s, 8)] == [0, 8, 16]
    assert [s for s in range(25) if refresh_due(s, 10, first_period=3)] == [0, 3, 13, 23]


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (lambda o: OffsetSGD([nn.Parameter(torch.ones(1))], -1.0), ValueError, "lr must be at least 0, got -1.0"),
        (
            lambda o: OffsetSGD([nn.Parameter(torch.ones(1))], 0.1, bp_coef="x"),
            TypeError,
            "bp_coef must be a number, got str",
        ),
        (lambda o: OffsetOptimizer(None), TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        (lambda o: o.refresh(None, None, torch.ones(4), bp_chunk=0), ValueError, "bp_chunk must be at least 1, got 0"),
        (
            lambda o: o.refresh(None, None, (torch.ones(4), torch.ones(3))),
            ValueError,
            "data must be tensors of one and the same length above 0, got lengths [4, 3]",
        ),
        (
            lambda o: OffsetSGD([nn.Parameter(torch.ones(1))], 0.1, local_scale=float("nan")),
            ValueError,
            "local_scale must be finite, got nan",
        ),
        (
            lambda o: OffsetSGD([{"params": [nn.Parameter(torch.ones(1))], "local_scale": "x"}], 0.1),
            TypeError,
            "param_groups[0]: local_scale must be a number, got str",
        ),
        (
            lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1}),
            ValueError,
            "param_groups[1]: lr must be at least 0, got -1",
        ),
        (
            lambda o: OffsetOptimizer(o).add_param_group({"params": [nn.Parameter(torch.ones(1))], "bp_coef": "x"}),
            TypeError,
            "param_groups[1]: bp_coef must be a number, got str",
        ),
        (
            lambda o: o.refresh(lambda x: x.sum(), None, torch.ones(4)),
            ValueError,
            "bp_closure must return a loss that depends on a parameter, got one without gradient: do not detach it or "
            "compute it under torch.no_grad, and freeze no parameter on its way",
        ),
        (
            lambda o: o.refresh(lambda x: x.sum(), None, torch.ones(16), estimate_offset_scale=True),
            ValueError,
            "bp_closure must return a loss that depends on a parameter, got one without gradient: do not detach it or "
            "compute it under torch.no_grad, and freeze no parameter on its way",
        ),
        (
            lambda o: torch.inference_mode(o.refresh)(None, None, torch.ones(4)),
            RuntimeError,
            "refresh takes gradients, which torch.inference_mode forbids: call it outside",
        ),
        (
            lambda o: OffsetSGD([nn.Parameter(torch.ones(1), requires_grad=False)], 0.1).refresh(
                None, None, torch.ones(4)
            ),
            ValueError,
            "param_groups must hold a parameter that requires a gradient to refresh its offset, got none: all are "
            "frozen",
        ),
        (
            lambda o: o.refresh(None, None, torch.ones(4), max_growth=0),
            ValueError,
            "max_growth must be greater than 0, got 0",
        ),
        (
            lambda o: o.refresh(None, None, torch.ones(4), batch_norm="frozen"),
            ValueError,
            "batch_norm must be one of 'train', 'eval', got 'frozen'",
        ),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error) as caught:
        bad(OffsetSGD([nn.Parameter(torch.ones(1))], 0.1))
    assert str(caught.value) == message


def test_a_parameter_of_another_size_at_the_same_address():
    """The next step must not run the last one's table of addresses and sizes."""
    memory, grads = torch.ones(20), torch.ones(20)
    p = nn.Parameter(memory[:10])
    optimizer = OffsetSGD([p], lr=0.1)
    for size, expected in ((10, 0.9), (5, 0.8), (20, None)):
        p.grad = None
        p.data = memory[:size]
        p.grad = grads[:size]
        optimizer.step()
        if expected is not None:
            torch.testing.assert_close(memory[:size], torch.full((size,), expected))
    torch.testing.assert_close(memory, torch.tensor([0.7] * 5 + [0.8] * 5 + [0.9] * 10))
