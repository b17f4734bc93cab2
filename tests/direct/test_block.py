"""The block of direct feedback: batch norm, activation and max-pool forward, and the pre-activation's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels import functional as LF  # noqa: F401  registers the ops
from lgkernels.random import RandomFeedback
from lgkernels.training import DirectTrainer, fused
from tests.conftest import running
from tests.support.tolerances import assert_relative

_ops = torch.ops.lgkernels
#        batch, channels, height, width, max_pool, slope, classes
SHAPES = [
    (7, 3, 1, 1, False, 0.01, 3),
    (2, 1, 2, 2, True, 0.0, 1),
    (3, 5, 7, 17, True, 0.01, 10),
    (9, 40, 4, 4, False, 0.3, 33),
    (5, 33, 8, 8, True, 0.01, 10),
    (2, 3, 33, 47, True, 0.0, 5),
    (17, 2, 64, 17, False, 0.0, 100),
]


def problem(batch, channels, height, width, max_pool, slope, classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    z = 2 * torch.randn(batch, channels, height, width, generator=generator, dtype=dtype) + 3
    gamma, beta = (torch.randn(channels, generator=generator, dtype=dtype) for _ in range(2))
    error = torch.randn(batch, classes, generator=generator, dtype=dtype)
    return z, gamma, beta, error, RandomFeedback(5, 1, "uniform", scale=0.25)


def written_out(z, gamma, beta, delta, slope, max_pool):
    """Output, running statistics, gradients of z, gamma, beta by autograd."""
    norm = nn.BatchNorm2d(z.shape[1]).to(z.dtype)
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
    z = z.detach().requires_grad_()
    out = F.leaky_relu(norm(z), slope)
    out = F.max_pool2d(out, 2) if max_pool else out
    gradients = torch.autograd.grad(out, (z, norm.weight, norm.bias), delta.view(out.shape))
    return out.detach(), norm.running_mean, norm.running_var, *gradients


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_against_autograd(name, shape, given):
    *_, slope, classes = shape
    max_pool = shape[4]
    z, gamma, beta, error, feedback = problem(*shape)
    neurons = shape[1] * (shape[2] // 2 * (shape[3] // 2) if max_pool else shape[2] * shape[3])
    delta = error.double() @ feedback.materialize((classes, neurons), dtype=torch.float64)
    truth = written_out(z.double(), gamma.double(), beta.double(), delta, slope, max_pool)
    with running(name) as impl:
        own, mean, var = z.clone(), torch.zeros_like(gamma), torch.ones_like(gamma)
        out, *saved = _ops.direct_forward(own, gamma, beta, mean, var, 0.1, 1e-5, slope, max_pool, impl)
        assert torch.equal(own, z)
        law = (feedback.law, feedback.scale, feedback.low)
        signal = (delta.float().view(out.shape), None, None) if given else (None, error, feedback.state)
        gradients = _ops.direct_backward_(own, *saved, gamma, beta, *signal, *law, slope, max_pool, impl)
    names = ("out", "running_mean", "running_var", "dz", "grad_gamma", "grad_beta")
    for what, mine, theirs in zip(names, (out, mean, var, own, *gradients), truth):
        assert_relative(what, mine, theirs, 1e-5)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_ties_and_nans_are_pooled_as_torch_does(impl):
    z = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 1.0]).view(2, 1, 2, 2)
    for gamma in (1.0, -1.0, 0.0):
        gamma, beta = torch.full((1,), gamma), torch.ones(1)
        delta = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        truth = written_out(z, gamma, beta, delta, 0.1, True)
        own = z.clone()
        out, *saved = _ops.direct_forward(own, gamma, beta, None, None, 0.1, 1e-5, 0.1, True, impl)
        gradients = _ops.direct_backward_(
            own, *saved, gamma, beta, delta, None, None, "uniform", 1.0, None, 0.1, True, impl
        )
        for mine, theirs in zip((out, own, *gradients), (truth[0], *truth[3:])):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_halves_are_rounded_last(name, shape, dtype):
    """Which position of a window is the largest, and the signs, are decided before anything is rounded to the half: so
    results differ from the definition's, where they do, by their own rounding."""
    *_, slope, classes = shape
    z, gamma, beta, error, feedback = problem(*shape)
    z, error = z.to(dtype) / 8, error.to(dtype)  # so many are equal after a rounding
    results = []
    for backend in (name, "reference"):
        with running(backend) as impl:
            own = z.clone()
            out, *saved = _ops.direct_forward(own, gamma, beta, None, None, 0.1, 1e-5, slope, shape[4], impl)
            signal = None, error, feedback.state, feedback.law, feedback.scale, feedback.low
            sums = _ops.direct_backward_(own, *saved, gamma, beta, *signal, slope, shape[4], impl)
            results.append((own, *sums))
    eps = torch.finfo(dtype).eps
    for what, rounding, mine, theirs in zip(("dz", "grad_gamma", "grad_beta"), (eps, 0, 0), *results):
        assert_relative(what, mine, theirs, rounding + 1e-5)


def test_sums_do_not_depend_on_the_threads():
    shape = (9, 40, 24, 24, True, 0.01, 10)
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            z, gamma, beta, error, feedback = problem(*shape)
            out, *saved = _ops.direct_forward(z, gamma, beta, None, None, 0.1, 1e-5, 0.01, True, "auto")
            law = (feedback.law, feedback.scale, feedback.low)
            results.append(
                (
                    out,
                    *_ops.direct_backward_(
                        z, *saved, gamma, beta, None, error, feedback.state, *law, 0.01, True, "auto"
                    ),
                    z,
                )
            )
        finally:
            torch.set_num_threads(before)
    for one, three in zip(*results):
        assert torch.equal(one, three)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_opcheck(impl):
    z, gamma, beta, error, feedback = problem(3, 5, 6, 6, True, 0.1, 4)
    arguments = (z, gamma, beta, torch.zeros(5), torch.ones(5), 0.1, 1e-5, 0.1, True, impl)
    torch.library.opcheck(_ops.direct_forward, arguments)
    _, mean, rstd = _ops.direct_forward(*arguments)
    torch.library.opcheck(
        _ops.direct_backward_,
        (z, mean, rstd, gamma, beta, None, error, feedback.state, "uniform", 0.25, None, 0.1, True, impl),
    )


# -- in the trainer ----------------------------------------------------------------------------------------------------


def blocks(change=lambda conv, norm: None):
    torch.manual_seed(3)
    made = [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.Sequential(
            nn.Conv2d(8, 6, 3, 1, 0, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU()
        ),
        nn.Flatten(),
        nn.Linear(6 * 9, 4),
    ]
    change(made[0][0], made[0][1])
    return made


def steps(made, rule, x, count=2):
    trainer = DirectTrainer(made, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), rule=rule)
    target = torch.arange(len(x)) % 4
    losses = [trainer.step(x, target) for _ in range(count)]
    return trainer, torch.cat([*losses, *(t.flatten() for block in made for t in block.state_dict().values())])


def _uncounted(conv, norm):
    norm.num_batches_tracked = None


@pytest.mark.parametrize("rule", ["dfa", "sdfa", "drtp", "uncounted"])
def test_trainer_steps_as_without_the_kernel(rule, monkeypatch):
    """uncounted: a batch norm converted from another library's, whose `num_batches_tracked` is None."""
    change = [_uncounted] if rule == "uncounted" else []
    rule = "dfa" if change else rule
    x, calls = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(1)), []
    monkeypatch.setattr(fused.direct, "block", lambda *a, own=fused.direct.block: calls.append(1) or own(*a))
    _, mine = steps(blocks(*change), rule, x)
    assert len(calls) == 4  # both blocks, the second behind a convolution that needs the gradient of its input
    monkeypatch.setattr(fused, "split", lambda modules: (modules, None))
    _, plain = steps(blocks(*change), rule, x)
    assert len(calls) == 4
    assert_relative(rule, mine, plain, 1e-5)


def _hook(conv, norm):
    conv.register_forward_hook(lambda module, inputs, output: output * 2)


def _frozen(conv, norm):
    norm.train = lambda mode=True: norm
    norm.training = False


def _channels_last(conv, norm):
    conv.to(memory_format=torch.channels_last)


def _another_backend(conv, norm):
    pass


@pytest.mark.parametrize("change", [_hook, _frozen, _channels_last, _another_backend])
def test_what_the_kernel_cannot_do_runs_as_written(change, monkeypatch):
    if change is _another_backend:
        monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    x, calls = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(1)), []
    monkeypatch.setattr(fused.direct, "block", lambda *a, own=fused.direct.block: calls.append(a[0]) or own(*a))
    _, mine = steps(blocks(change), "dfa", x, count=1)
    assert all(a.shape[1] != 3 for a in calls) and len(calls) == (change in (_hook, _frozen))
    monkeypatch.setattr(fused, "split", lambda modules: (modules, None))
    assert_relative("two steps", mine, steps(blocks(change), "dfa", x, count=1)[1], 1e-5)


def test_second_backward_raises():
    parameters = [t.requires_grad_() for t in (torch.randn(4, 3, 3, 3), torch.randn(4), torch.ones(4), torch.zeros(4))]
    out = fused.direct.block(
        torch.randn(2, 3, 5, 5),
        *parameters,
        (None, None),
        fused.direct.Signal(),
        ((1, 1), (1, 1), (1, 1), 1),
        0.1,
        1e-5,
        0.0,
        False,
    )
    out.sum().backward(retain_graph=True)
    assert torch.equal(parameters[1].grad, torch.zeros(4))  # the batch norm cancels the bias
    with pytest.raises(RuntimeError, match="one backward"):
        out.sum().backward()
