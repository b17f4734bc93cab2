"""The fused AdamW on whole models: equal to torch's to rounding, without a weight gradient in memory."""

import copy

import pytest
import torch
from torch import nn

from lgkernels.optim import fuse_update
from lgkernels.recipes.measure import peak_memory
from tests.support.tolerances import assert_accurate


class Block(nn.Module):
    """Of a transformer, as GPT-2's without biases."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, width=64, depth=2, vocabulary=50):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.head.weight, std=0.05)

    def loss(self, step):
        tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step % 5))
        logits = self.head(self.blocks(self.embedding(tokens[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, steps=50):
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_of_a_transformer():
    """As near to the truth as torch's: float64 decides."""
    plain = Transformer()
    models = plain, copy.deepcopy(plain), copy.deepcopy(plain).double()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for m in models]
    fused = fuse_update(models[1], optimizers[1], min_weights=1)
    assert len(fused.layers) == 9
    losses = [train(m, o) for m, o in zip(models, optimizers)]
    assert losses[2][-1] < 0.7 * losses[2][0]
    assert abs(losses[1][-1] - losses[2][-1]) < 1e-3 * losses[2][-1]
    for (name, theirs), ours, truth in zip(plain.named_parameters(), models[1].parameters(), models[2].parameters()):
        # a chain of 50 steps, each with sums over the 64 rows of the batch
        assert_accurate(name, ours.detach(), theirs.detach(), truth.detach(), 50 * 64)
        for key in ("exp_avg", "exp_avg_sq"):
            entries = [o.state[p][key] for o, p in zip(optimizers, (theirs, ours, truth))]
            assert_accurate(f"{name}, {key}", entries[1], entries[0], entries[2], 50 * 64)
    states = [o.state_dict() for o in optimizers[:2]]
    assert [set(s) for s in states[0]["state"].values()] == [set(s) for s in states[1]["state"].values()]
    assert all(s["step"] == 50 for s in states[1]["state"].values())


def test_a_state_dict_of_either_goes_on_with_the_other():
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fused = fuse_update(model, optimizer, min_weights=1)
    train(model, optimizer, 4)
    twin = Transformer()
    twin.load_state_dict(model.state_dict())
    resumed = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fused.remove()
    for m, o in ((model, optimizer), (twin, resumed)):
        if m is twin:
            fuse_update(m, o, min_weights=1)
        train(m, o, 4)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("batch", [8, 512])
def test_a_step_holds_no_weight_gradient(batch):
    """By the profiler's count of memory: a step's peak above what lies there before it."""
    out, columns = 2048, 1024
    x, grad = torch.randn(batch, columns), torch.randn(batch, out)

    def peak(fuse):
        layer = nn.Linear(columns, out)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        if fuse:
            fuse_update(layer, optimizer, min_weights=1)

        def step():
            layer(x).backward(grad)
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the states
        return peak_memory(step, torch.device("cpu"))

    weight, small = 4 * out * columns, 4 * batch * (out + columns)
    assert peak(False) >= weight
    assert peak(True) < min(weight, 3 * small + 4 * batch * batch * 2 + 2**21)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_have_half_states(dtype):
    layers = [nn.Linear(40, 30).to(dtype) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01, eps=1e-4, fused=True) for layer in layers]
    fuse_update(layers[1], optimizers[1], min_weights=1)
    for layer, optimizer in zip(layers, optimizers):
        for i in range(5):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(i)
            layer(torch.randn(6, 40, generator=generator).to(dtype)).float().square().mean().backward()
            optimizer.step()
    states = [o.state[layer.weight] for o, layer in zip(optimizers, layers)]
    assert {k: (t.dtype, t.shape) for k, t in states[0].items()} == {
        k: (t.dtype, t.shape) for k, t in states[1].items()
    }
    torch.testing.assert_close(layers[1].weight, layers[0].weight, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_makes_what_the_optimizer_would(fused):
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            layers = [nn.Linear(4, 3, dtype=torch.float32) for _ in range(2)]
            optimizers = [torch.optim.Adam(layer.parameters(), fused=fused) for layer in layers]
            fuse_update(layers[1], optimizers[1], min_weights=1)
            for layer, optimizer in zip(layers, optimizers):
                layer(torch.ones(2, 4, dtype=torch.float32)).sum().backward()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        one, two = (o.state[layer.weight] for o, layer in zip(optimizers, layers))
        assert list(one) == list(two)
        assert all(one[k].dtype == two[k].dtype and one[k].device == two[k].device for k in one)
