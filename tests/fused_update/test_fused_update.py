"""The fused step is the plain one; what cannot go with it says so."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from lgkernels.optim import BatchManhattan, fuse_update


def network(bias=True, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def batch(i, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(*(shape or (5,)), 6, generator=generator, dtype=dtype)


def train(model, optimizer, steps, *shape, start=0, dtype=torch.float32):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(i, *shape, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9


def assert_same_weights(one, two, **tolerance):
    for (name, p), q in zip(one.state_dict().items(), two.state_dict().values()):
        torch.testing.assert_close(p, q, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def assert_same_states(one, two, **tolerance):
    """Keys, dtypes, devices and values."""
    one, two = (o.state_dict() for o in (one, two))
    assert one["param_groups"] == two["param_groups"]
    torch.testing.assert_close(one["state"], two["state"], **tolerance)


OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, maximize=True, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-4),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), maximize=True, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), foreach=True),
    "manhattan": lambda p: BatchManhattan(p, lr=0.01, weight_decay=0.05),
    "manhattan, momentum": lambda p: BatchManhattan(p, lr=0.01, momentum=0.9, weight_decay=0.05),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_the_plain_step(kind, bias):
    plain, fused = network(bias), network(bias)
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in (plain, fused)]
    handle = fuse_update(fused, optimizers[1], include=["0", "2"])
    for shape in ((5,), (2, 3), (1,)):
        train(plain, optimizers[0], 2, *shape)
        train(fused, optimizers[1], 2, *shape)
        assert_same_weights(plain, fused, rtol=1e-5, atol=1e-6)
    assert handle.layers == ["0", "2"] and repr(handle) == "FusedUpdate(0, 2)"
    assert_same_states(*optimizers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_activations_in_place(shape):
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 8), nn.LeakyReLU(inplace=True))
    fused = copy.deepcopy(plain)
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in (plain, fused)]
    fuse_update(fused, optimizers[1], min_weights=1)
    for m, optimizer in zip((plain, fused), optimizers):
        train(m, optimizer, 3, *shape)
    assert_same_weights(plain, fused)


def test_float64_in_the_reference(monkeypatch):
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    plain, fused = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizers = [OPTIMIZERS["nesterov"](m.parameters()) for m in (plain, fused)]
    fuse_update(fused, optimizers[1], min_weights=1)
    train(plain, optimizers[0], 4, dtype=torch.float64)
    train(fused, optimizers[1], 4, dtype=torch.float64)
    assert_same_weights(plain, fused, rtol=1e-12, atol=1e-12)


def test_no_weight_gradient_is_made():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse_update(model, optimizer, include=["0", "2"])
    seen, hooks = [], []
    for name in ("0", "2", "4"):
        weight = model.get_submodule(name).weight
        hooks.append(weight.register_hook(lambda g, n=name: seen.append((n, g))))
    model(batch(0)).square().mean().backward()
    assert [name for name, gradient in seen if gradient is not None] == ["4"]
    for hook in hooks:
        hook.remove()
    optimizer.step()
    optimizer.zero_grad()


def test_input_gradient_uses_the_weight_before_the_update():
    model = nn.Linear(6, 4)
    old = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    fuse_update(model, optimizer, min_weights=1)
    x = batch(0).requires_grad_()
    y = model(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ old)
    assert torch.equal(model.weight.detach(), old)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), old - 10 * gradient.t() @ x.detach())


def test_momentum_goes_on_between_plain_and_fused():
    whole, switching = network(), network()
    optimizers = [OPTIMIZERS["nesterov"](m.parameters()) for m in (whole, switching)]
    train(whole, optimizers[0], 9)
    train(switching, optimizers[1], 3)
    handle = fuse_update(switching, optimizers[1], include=["0", "2"])
    train(switching, optimizers[1], 3, start=3)
    handle.remove()
    assert "forward" not in vars(switching[0]) and handle.layers == []
    state = copy.deepcopy(optimizers[1].state_dict())
    resumed = OPTIMIZERS["nesterov"](switching.parameters())
    resumed.load_state_dict(state)
    train(switching, resumed, 3, start=6)
    assert_same_weights(whole, switching, rtol=1e-5, atol=1e-6)


def test_a_loaded_optimizer_state_rules_from_then_on():
    """load_state_dict makes new parameter groups."""
    plain = network()
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, model)]
    fuse_update(model, optimizers[1], min_weights=1)
    for m, optimizer in zip((plain, model), optimizers):
        train(m, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0].update(lr=0.03, weight_decay=0.2)
        optimizer.load_state_dict(state)
        train(m, optimizer, 2, start=2)
    assert_same_weights(plain, model)


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copied_model_is_plain(copied):
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse_update(model, optimizer, min_weights=1)
    twin = copied(model)
    assert all(layer.forward.__self__.step is None for layer in twin if isinstance(layer, nn.Linear))
    for m in (twin, plain):
        train(m, torch.optim.SGD(m.parameters(), lr=0.1), 2)
    assert_same_weights(twin, plain, rtol=0, atol=0)
    again = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert fuse_update(twin, again, min_weights=1).layers == ["0", "2", "4"]
    for m, o in ((twin, again), (plain, torch.optim.SGD(plain.parameters(), lr=0.1))):
        train(m, o, 2, start=2)
    assert_same_weights(twin, plain)
    train(model, optimizer, 1)  # and the first goes on


def test_a_weight_that_left_the_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse_update(model, optimizer, include=["2"])
    optimizer.param_groups[0]["params"] = [model[0].weight]
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match="the weight of layer '2' is no longer in the optimizer"):
        optimizer.step()


def test_evaluation_and_no_grad_are_plain():
    model = network()
    expected = model(batch(0)).detach()
    before = copy.deepcopy(model.state_dict())
    fuse_update(model, torch.optim.SGD(model.parameters(), lr=0.1), include=["0"])
    with torch.no_grad():
        assert torch.equal(model(batch(0)), expected)
    assert torch.equal(model.eval()(batch(0)).detach(), expected)
    assert_same_weights(model, _with(before), rtol=0, atol=0)


def _with(state):
    model = network()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    plain, fused = network(), network()
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in (plain, fused)]
    fuse_update(fused, optimizers[1], include=["0", "2"])
    for model, optimizer in zip((plain, fused), optimizers):
        for i in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(batch(i)).float().square().mean()
            loss.backward()
            optimizer.step()
    assert_same_weights(plain, fused, rtol=0, atol=4e-3)


def test_large_layers_are_found():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 4), nn.Conv2d(64, 128, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fuse_update(model, optimizer, min_weights=64 * 128).layers == ["1"]
    assert inspect.signature(fuse_update).parameters["min_weights"].default == 2**20


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fused():
    """(model, optimizer, handle); at the end no weight has moved."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    yield model, optimizer, fuse_update(model, optimizer, include=["2"])
    now = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    assert_same_weights(_with(now), _with(before), rtol=0, atol=0)


def loss_of(model, i=0):
    return model(batch(i)).square().mean()


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, x, retain: torch.autograd.grad(loss, x, retain_graph=retain),
        lambda loss, x, retain: loss.backward(inputs=[x], retain_graph=retain),
    ],
)
def test_a_gradient_of_the_input_alone_moves_no_weight(ask):
    plain, mine = network(), network()
    optimizers = [OPTIMIZERS["plain"](m.parameters()) for m in (plain, mine)]
    fuse_update(mine, optimizers[1], include=["0", "2"])
    for model, optimizer in zip((plain, mine), optimizers):
        x = batch(0).requires_grad_()
        ask(model(x).square().mean(), x, False)
        optimizer.step()
        if model is mine:
            assert_same_weights(mine, network(), rtol=0, atol=0)
        loss = model(x).square().mean()
        ask(loss, x, True)
        loss.backward()  # the same graph, now for the weights too
        optimizer.step()
    assert not torch.equal(mine[2].weight, network()[2].weight)
    assert_same_weights(plain, mine, rtol=1e-5, atol=1e-6)


def test_a_graph_of_the_backward():
    model = network()
    fuse_update(model, torch.optim.SGD(model.parameters(), lr=0.1), include=["0"])
    x = batch(0).requires_grad_()
    with pytest.raises(RuntimeError, match="layer '0' met a backward with create_graph=True"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_zero_grad_drops_the_gradient():
    plain, mine = network(), network()
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in (plain, mine)]
    fuse_update(mine, optimizers[1], include=["0", "2"])
    for model, optimizer in zip((plain, mine), optimizers):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, 1).backward()  # say it was not finite
        optimizer.zero_grad()
        optimizer.step()
        loss_of(model, 2).backward()
        optimizer.step()
    assert_same_weights(plain, mine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: nn.utils.clip_grad_norm_(p, 1.0, norm_type=1),
        lambda p: nn.utils.clip_grad_norm_(p, 1.0, norm_type=float("inf"), foreach=True),
        lambda p: (nn.utils.clip_grad_value_(p, 1.0), nn.utils.clip_grad_norm_(p, 1.0)),
        lambda p: [q.grad.mul_(q) for q in p],
        lambda p: [q.grad.add_(1.0) for q in p],
        lambda p: torch.stack([q.grad.sum() for q in p]),
    ],
)
def test_what_needs_the_entries(fused, use):
    model, _, _ = fused
    loss_of(model).backward()
    with pytest.raises(
        RuntimeError, match="is never formed: clip_grad_norm_ .*; before clip_grad_value_, not after it.* work"
    ):
        use([model[2].weight])


@pytest.mark.parametrize("look", [lambda g: g.data.norm(), lambda g: g.data, lambda g: g.T, lambda g: g.detach()])
def test_looking_at_the_gradient(fused, look):
    """The old way of clipping, p.grad.data.norm(), would read a zero."""
    model, _, _ = fused
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"was asked for \((data|T|detach)\), but it is never formed"):
        look(model[2].weight.grad)
    assert model[2].weight.grad.shape == model[2].weight.shape and model[2].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_the_weight(register):
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = getattr(model[2].weight, register)(lambda g: None)
    with pytest.raises(ValueError, match="weight of layer '2' has hooks for its gradient"):
        fuse_update(model, optimizer, include=["0", "2"])
    hook.remove()
    fuse_update(model, optimizer, include=["0", "2"])
    hook = getattr(model[2].weight, register)(lambda g: None)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="weight of layer '2' has hooks for its gradient"):
        optimizer.step()
    assert_same_weights(model, _with(before), rtol=0, atol=0)
    hook.remove()
    optimizer.step()
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_zero_grad_not_to_none(fused):
    model, optimizer, _ = fused
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="never formed"):
        optimizer.zero_grad(set_to_none=False)


def test_closure(fused):
    model, optimizer, _ = fused

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"optimizer.step\(\) must have no closure"):
        optimizer.step(closure)


def test_factors_that_were_written_to():
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    fuse_update(layer, optimizer, min_weights=1)
    x = batch(0)
    layer(x).sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="input of layer '', .* was written to"):
        optimizer.step()
    assert torch.equal(layer.weight.detach(), before)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group, fused):
    model, optimizer, _ = fused
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="layer '2' runs inside DistributedDataParallel"):
        loss_of(wrapped)
    other = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(ValueError, match="must not be wrapped in DistributedDataParallel"):
        fuse_update(other, torch.optim.SGD(other.parameters(), lr=0.1), min_weights=1)


def test_fully_sharded(process_group, fused):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model, optimizer, _ = fused
    fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="not the parameter that fuse_update found"):
        loss_of(model)
    other = network()
    fsdp.fully_shard(other, mesh=mesh)
    with pytest.raises(ValueError, match="must not be wrapped in FSDP"):
        fuse_update(other, torch.optim.SGD(other.parameters(), lr=0.1), min_weights=1)


def test_compile(fused):
    model, _, _ = fused
    with pytest.raises(Exception, match="not for torch.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(batch(0))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(model=3), TypeError, "model must be a torch.nn.Module, got int"),
        (dict(optimizer=torch.optim.NAdam), TypeError, "optimizer must be torch.optim.SGD, Adam, .*, got NAdam"),
        (dict(optimizer=lambda p: torch.optim.Adam(p, amsgrad=True)), ValueError, "not have amsgrad=True"),
        (dict(optimizer=lambda p: torch.optim.AdamW(p, capturable=True)), ValueError, "not have capturable=True"),
        (dict(running_sum=1), TypeError, "running_sum"),
        (dict(optimizer=lambda p: BatchManhattan(p, 0.1, no_sign_change=True)), ValueError, "no_sign_change"),
        (dict(include=["1"]), ValueError, r"include must name linear layers of model \(0, 2, 4\), got '1'"),
        (dict(exclude=["x"]), ValueError, "got 'x'"),
        (dict(), ValueError, "no linear layer to fuse: none of at least min_weights=1048576"),
        (
            dict(optimizer=lambda p: torch.optim.SGD(list(p)[:1], 0.1), include=["4"]),
            ValueError,
            "layer '4' is not among the optimizer's parameters",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = arguments.pop("model", None) or network()
    make = arguments.pop("optimizer", lambda p: torch.optim.SGD(p, 0.1))
    optimizer = make(model.parameters() if isinstance(model, nn.Module) else network().parameters())
    with pytest.raises(error, match=message):
        fuse_update(model, optimizer, **arguments)


def test_fused_twice(fused):
    model, optimizer, handle = fused
    with pytest.raises(ValueError, match="layer '2' has a forward of its own"):
        fuse_update(model, optimizer, include=["2"])
    handle.remove()
    fuse_update(model, optimizer, include=["2"])
    loss_of(model).backward()


def test_a_torch_without_the_number_of_its_backward(monkeypatch):
    monkeypatch.setattr("lgkernels.optim.fused._current_backward", None)
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="fuse_update needs torch._C._current_graph_task_id, which this torch"):
        fuse_update(layer, torch.optim.SGD(layer.parameters(), lr=0.1), include=[""])
