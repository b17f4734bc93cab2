"""`fuse_update(..., state_bits=8)` on whole models: training, memory, state dicts, what the plain optimizer is left."""

import copy

import pytest
import torch
from torch import nn

from lgkernels.ops.fused_update.blocks import blocks_of, decoded, encoded
from lgkernels.optim import BatchManhattan, fuse_update
from tests.fused_update.test_adamw import Transformer, train
from tests.support.tolerances import assert_bit_equal

SGD = dict(lr=0.05, momentum=0.9)
MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, **SGD, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, **SGD, nesterov=True, maximize=True),
    "manhattan": lambda p: BatchManhattan(p, lr=0.001, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def layers(count=2, dtype=torch.float32):
    torch.manual_seed(1)
    first = nn.Linear(300, 7, dtype=dtype)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def step(layer, optimizer, seed):
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)).to(layer.weight.dtype)
    optimizer.zero_grad()
    layer(x).float().square().sum().backward()
    optimizer.step()


def test_fifty_steps_of_a_transformer():
    """The loss follows that with states in full precision, which falls by far more than they differ."""
    plain = Transformer(width=128, depth=1)
    models = plain, copy.deepcopy(plain)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for m in models]
    fused = fuse_update(models[1], optimizers[1], min_weights=1, state_bits=8)
    losses = [train(m, o) for m, o in zip(models, optimizers)]
    fall = losses[0][0] - losses[0][-1]
    assert fall > 1.0 and max(abs(a - b) for a, b in zip(*losses)) < 0.05 * fall
    weights = list(dict.fromkeys(models[1].get_submodule(name).weight for name in fused.layers))
    held = [t for w in weights for key, t in optimizers[1].state[w].items() if key != "step"]
    size = sum(t.numel() * t.element_size() for t in held)
    assert size == sum(2 * w.numel() + 8 * w.shape[0] * blocks_of(w.shape[1]) for w in weights)
    assert all(set(optimizers[1].state[w]) & {"exp_avg", "exp_avg_sq"} == set() for w in weights)


@pytest.mark.parametrize("kind", MAKERS)
def test_steps(kind):
    """The first is torch's to rounding: a state that is 0 has no error. The next goes from rounded states."""
    plain, fused = layers()
    optimizers = [MAKERS[kind](layer.parameters()) for layer in (plain, fused)]
    fuse_update(fused, optimizers[1], include=[""], state_bits=8)
    step(plain, optimizers[0], 0), step(fused, optimizers[1], 0)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-4, atol=1e-6)
    states = [o.state.get(layer.weight, {}) for o, layer in zip(optimizers, (plain, fused))]
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        if states[0].get(key) is not None:
            signed = key != "exp_avg_sq"
            codes, absmax = encoded(states[0][key], signed)
            off = (states[1][key + "_codes"].int() - codes.int()).abs()
            assert off.max() <= 1 and off.float().mean() < 0.01
            torch.testing.assert_close(states[1][key + "_absmax"], absmax, rtol=1e-5, atol=0)
            states[0][key].copy_(decoded(states[1][key + "_codes"], states[1][key + "_absmax"], signed))
    before = plain.weight.detach().clone()
    step(plain, optimizers[0], 1), step(fused, optimizers[1], 1)
    moved = (plain.weight - before).abs().max().item()
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-4, atol=1e-3 * moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts(dtype):
    """One of 8 bits goes on bit for bit, also in a copy of model and optimizer; one in full precision is rounded."""
    layer, resumed, third, loaded_first = layers(4, dtype)
    optimizer, others = MAKERS["adamw"](layer.parameters()), []
    fuse_update(layer, optimizer, include=[""], state_bits=8)
    for seed in range(3):
        step(layer, optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {k: t.dtype for k, t in saved["state"][0].items()} == dict(
        step=torch.float32,
        **dict.fromkeys(("exp_avg_codes", "exp_avg_sq_codes"), torch.uint8),
        **dict.fromkeys(("exp_avg_absmax", "exp_avg_sq_absmax"), torch.float32),
    )
    resumed.load_state_dict(layer.state_dict())
    others = [(resumed, MAKERS["adamw"](resumed.parameters()))]
    fuse_update(*others[0], include=[""], state_bits=8)
    others[0][1].load_state_dict(saved)
    others.append(copy.deepcopy((layer, optimizer)))
    fuse_update(*others[1], include=[""], state_bits=8)
    loaded_first.load_state_dict(layer.state_dict())
    late = MAKERS["adamw"](loaded_first.parameters())
    late.load_state_dict(copy.deepcopy(saved))
    if dtype == torch.float32:
        others.append((loaded_first, late))
        fuse_update(*others[2], include=[""], state_bits=8)
    else:
        with pytest.raises(ValueError, match="8-bit states that load_state_dict has rounded to bfloat16"):
            fuse_update(loaded_first, late, include=[""], state_bits=8)
    step(layer, optimizer, 9)
    for other, own in others:
        step(other, own, 9)
        assert_bit_equal("weight", other.weight, layer.weight)
        for key, value in own.state[other.weight].items():
            assert_bit_equal(key, value, optimizer.state[layer.weight][key])
    full = MAKERS["adamw"](third.parameters())
    step(third, full, 0)
    expected = {k: encoded(full.state[third.weight][k], k == "exp_avg") for k in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(full.state_dict())
    optimizer.zero_grad()
    layer.weight.grad = torch.zeros_like(layer.weight)  # a gradient of the caller's own
    old = layer.weight.detach().clone()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert layer.weight.grad is None and not torch.equal(layer.weight, old) and state["step"] == 2
    for key, (codes, absmax) in expected.items():
        off = (state[f"{key}_codes"].int() - codes.int()).abs()  # a decay alone: the same codes, near ties excepted
        assert off.max() <= 1 and off.sum() <= 5
        # -1 is not among the values: the nearest is -0.993
        decay, rtol = (0.9, 7.1e-3) if key == "exp_avg" else (0.999, 1e-5)
        torch.testing.assert_close(state[f"{key}_absmax"], absmax * decay, rtol=rtol, atol=0)


def test_remove_leaves_full_states():
    layer, other = layers()
    optimizer = MAKERS["adamw"](layer.parameters())
    fused = fuse_update(layer, optimizer, include=[""], state_bits=8)
    step(layer, optimizer, 0)
    state = dict(optimizer.state[layer.weight])
    fused.remove()
    left = optimizer.state[layer.weight]
    assert set(left) == {"step", "exp_avg", "exp_avg_sq"}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert_bit_equal(key, left[key], decoded(state[f"{key}_codes"], state[f"{key}_absmax"], signed))
    plain = MAKERS["adamw"](other.parameters())
    other.load_state_dict(layer.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(layer, optimizer, seed), step(other, plain, seed)
    assert_bit_equal("weight", layer.weight, other.weight)
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_refusals():
    layer, _ = layers()
    optimizer = MAKERS["adamw"](layer.parameters())
    with pytest.raises(ValueError, match="state_bits must be 32 or 8, got 16"):
        fuse_update(layer, optimizer, include=[""], state_bits=16)
    fused = fuse_update(layer, optimizer, include=[""], state_bits=8)
    step(layer, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    codes = optimizer.state[layer.weight].pop("exp_avg_absmax")
    weight = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"must have 'exp_avg_absmax', a tensor of shape \(7, 2\), float32 on cpu"):
        step(layer, optimizer, 1)
    assert_bit_equal("weight", layer.weight, weight)
    optimizer.state[layer.weight]["exp_avg_absmax"] = codes
    step(layer, optimizer, 1)
    fused.remove()
    fuse_update(layer, optimizer, include=[""])
    step(layer, optimizer, 2)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="holds 'exp_avg' in 8 bits.*state_bits=8"):
        step(layer, optimizer, 3)


def test_a_found_infinity_skips_the_step():
    """With the factors of a backward, and with a gradient of the caller's own in their place."""
    for own, layer in zip((False, True), layers(), strict=True):
        optimizer = MAKERS["adam, fused"](layer.parameters())
        fuse_update(layer, optimizer, include=[""], state_bits=8)
        step(layer, optimizer, 0)
        scaler, weight = torch.amp.GradScaler("cpu", init_scale=4.0), layer.weight.detach().clone()
        for value in (float("inf"), 1.0):
            assert torch.equal(layer.weight, weight)
            optimizer.zero_grad()
            scaler.scale(layer(torch.full((5, 300), value)).sum()).backward()
            if own:
                layer.weight.grad = torch.full((7, 300), value)
            scaler.step(optimizer)
            scaler.update()
            assert layer.weight.grad is None
        assert not torch.equal(layer.weight, weight) and bool(layer.weight.isfinite().all())
