"""Batch Manhattan against the formula, and the rule that no weight changes its sign."""

import copy

import pytest
import torch

from lgkernels.optim import BatchManhattan


def written_out(weight, gradients, lr, momentum, decay):
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        g = torch.sign(gradient) + decay * weight
        buffer = momentum * buffer + g
        weight = weight - lr * buffer
    return weight


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(momentum, decay, dtype):
    weights = [torch.randn(4, 5, dtype=dtype), torch.randn(3, dtype=dtype)]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(3)]
    gradients[1][0][0] = 0.0
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = BatchManhattan(params, lr=0.01, momentum=momentum, weight_decay=decay)
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    for i, (p, w) in enumerate(zip(params, weights)):
        torch.testing.assert_close(p.detach(), written_out(w, [g[i] for g in gradients], 0.01, momentum, decay))


def test_gradient_scale_and_gradients_are_untouched():
    one, two = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    gradient = torch.randn(2, 3)
    for p, scale in ((one, 1.0), (two, 1e3)):
        p.grad = gradient * scale
        BatchManhattan([p], lr=0.1, weight_decay=0.01).step()
        assert torch.equal(p.grad, gradient * scale)
    assert torch.equal(one, two)


def test_parameters_without_a_gradient_stay():
    p = torch.nn.Parameter(torch.ones(2, 2))
    BatchManhattan([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_sign_change(dtype):
    weight = torch.nn.Parameter(torch.tensor([[0.5, 0.05, -0.05, 0.0, -0.5, 0.1, -0.1]], dtype=dtype))
    bias = torch.nn.Parameter(torch.tensor([0.05], dtype=dtype))
    weight.grad = torch.tensor([[1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=dtype)
    bias.grad = torch.ones(1, dtype=dtype)
    BatchManhattan([weight, bias], lr=0.1, no_sign_change=True).step()
    expected = torch.tensor([[0.4, 1e-10, -1e-10, 1e-10, -0.4, 1e-10, -1e-10]], dtype=dtype)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-2, atol=0)
    assert bias.item() < 0


def test_no_sign_change_over_many_steps():
    p = torch.nn.Parameter(torch.randn(20, 20))
    signs = p.detach().sign()
    optimizer = BatchManhattan([p], lr=0.2, momentum=0.9, weight_decay=0.1, no_sign_change=True)
    for _ in range(30):
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert torch.equal(p.detach().sign(), signs)
    free = torch.nn.Parameter(torch.randn(20, 20))
    signs, optimizer = free.detach().sign(), BatchManhattan([free], lr=0.2)
    for _ in range(30):
        free.grad = torch.randn_like(free)
        optimizer.step()
    assert not torch.equal(free.detach().sign(), signs)


def test_state_continues():
    def steps(optimizer, p, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    whole, first = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizers = [BatchManhattan([p], lr=0.1, momentum=0.9) for p in (whole, first)]
    for optimizer, p in zip(optimizers, (whole, first)):
        steps(optimizer, p, 3, seed=1)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = BatchManhattan([second], lr=5.0)
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    steps(optimizers[0], whole, 3, seed=2)
    steps(resumed, second, 3, seed=2)
    assert torch.equal(whole, second)


def test_closure_and_groups():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = BatchManhattan([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (a.sum() + b.sum()).square()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16.0
    assert torch.equal(a.detach(), torch.full((2,), 0.9)) and torch.equal(b.detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr=0.0), "lr must be greater than 0"),
        (dict(momentum=1.5), "momentum must lie in"),
        (dict(weight_decay=-1.0), "weight_decay must be at least 0, got -1.0"),
        (dict(lr=-1.0), "lr must be greater than 0"),
        (dict(weight_decay=float("nan")), "weight_decay must be finite, got nan"),
    ],
)
def test_bad_arguments(change, message):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        BatchManhattan([p], **{"lr": 0.1, **change})
    with pytest.raises(ValueError, match=message):  # of one group
        BatchManhattan([dict(params=[p], **change)], lr=0.1)


def test_half_weights_cannot_hold_their_sign():
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="float16 rounds to 0"):
        BatchManhattan([p], lr=0.1, no_sign_change=True)
    BatchManhattan([p], lr=0.1)


def test_sparse_gradients():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes dense gradients"):
        BatchManhattan(embedding.parameters(), lr=0.1).step()
