"""What torch does with gradients between the backward and the step gives the plain step's weights here too: several
backward passes, several uses of a weight, clipping, a GradScaler."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import fuse_update
from lgkernels.optim.fused_factors import Factors
from tests.fused_update.test_fused_update import OPTIMIZERS, assert_same_states, assert_same_weights, batch, network

KINDS = ["momentum", "adamw", "adamw, fused", "manhattan"]
CLOSE = dict(rtol=2e-5, atol=2e-6)


def both(model, kind="adamw", **options):
    """[(model, its optimizer)], plain and fused."""
    models = model, copy.deepcopy(model)
    pairs = [(m, OPTIMIZERS[kind](m.parameters())) for m in models]
    fuse_update(*pairs[1], **{"min_weights": 1, **options})
    return pairs


def loss_of(model, i=0, scale=1.0):
    return model(batch(i)).square().mean() * scale


def assert_same(pairs, **tolerance):
    (plain, one), (fused, two) = pairs
    assert_same_weights(plain, fused, **(tolerance or CLOSE))
    assert_same_states(one, two, **(tolerance or CLOSE))


# -- several gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running_sum", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind, running_sum):
    pairs = both(network(), kind, running_sum=running_sum)
    for model, optimizer in pairs:
        for step in range(3):
            optimizer.zero_grad()
            for i in range(step + 2):
                loss_of(model, 10 * step + i).backward()
            optimizer.step()
    assert_same(pairs)


def test_a_running_sum_is_kept_only_where_asked_for():
    for running_sum in (False, True):
        model, _ = both(network(), running_sum=running_sum)[1]
        for i in range(3):
            loss_of(model, i).backward()
        gradient = model[2].weight.grad
        assert isinstance(gradient, Factors)
        assert len(gradient.pairs) == (1 if running_sum else 3)
        assert (gradient.dense is not None) == running_sum


@pytest.mark.parametrize("running_sum", [False, True])
def test_a_layer_used_twice(running_sum):
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](self[0](x)))

    torch.manual_seed(0)
    pairs = both(Twice(nn.Linear(6, 6), nn.Linear(6, 3)), running_sum=running_sum)
    for model, optimizer in pairs:
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
    assert_same(pairs)


class Tied(nn.Module):
    """A tiny language model: embedding, layer, and the embedding's weight again in one or two heads."""

    def __init__(self, heads=1, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(11, 6, sparse=sparse), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 11, bias=False) for _ in range(heads))
        for head in self.heads:
            head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.middle(self.embedding(tokens)).tanh()
        return sum(head(hidden) * (i + 1) for i, head in enumerate(self.heads))

    def loss(self, seed):
        tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(seed))
        return F.cross_entropy(self(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


@pytest.mark.parametrize("running_sum", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_tied_weights(heads, running_sum):
    """The embedding's gradient comes in its own way, before or after the heads'."""
    pairs = both(Tied(heads), running_sum=running_sum)
    for model, optimizer in pairs:
        for step in range(3):
            optimizer.zero_grad()
            for i in range(step + 1):
                model.loss(10 * step + i).backward()
            optimizer.step()
    assert_same(pairs)


def test_one_of_two_layers_that_share_a_weight():
    pairs = both(Tied(2), include=["heads.1"])
    for model, optimizer in pairs:
        for i in range(2):
            optimizer.zero_grad()
            model.loss(i).backward()
            optimizer.step()
    assert_same(pairs)


def test_a_sparse_gradient_beside_it():
    _, (model, optimizer) = both(Tied(1, sparse=True), "plain", include=["heads.0"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="sparse"):
        model.loss(0).backward()
        optimizer.step()
    assert_same_weights(model, model.__class__(), rtol=0, atol=0)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_penalty_on_the_weight():
    pairs = both(network())
    for model, optimizer in pairs:
        for i in range(3):
            optimizer.zero_grad()
            (loss_of(model, i) + 0.1 * model[2].weight.square().sum()).backward()
            optimizer.step()
    assert_same(pairs)


@pytest.mark.parametrize("running_sum", [False, True])
@pytest.mark.parametrize("order", ["loss, penalty", "penalty, loss", "loss, penalty, loss", "penalty, loss, penalty"])
def test_a_penalty_in_a_backward_of_its_own(order, running_sum):
    pairs = both(network(), running_sum=running_sum)
    for model, optimizer in pairs:
        for i in range(3):
            optimizer.zero_grad()
            for part in order.split(", "):
                (loss_of(model, i) if part == "loss" else 0.1 * model[2].weight.abs().sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert_same(pairs)


def test_a_penalty_after_clipping():
    _, (model, _) = both(network(), include=["2"])
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="layer '2' got another gradient after the one before was clipped"):
        model[2].weight.abs().sum().backward()


@pytest.mark.parametrize("running_sum", [False, True])
@pytest.mark.parametrize("kind", ["plain", "adamw"])
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.double(),
        lambda m: m.to(torch.float64),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu"),
        lambda m: m.type(torch.double),
    ],
)
def test_a_model_that_is_converted_between_the_backward_and_the_step(convert, kind, running_sum):
    pairs = both(network(), kind, running_sum=running_sum)
    for model, optimizer in pairs:
        loss_of(model, 0).backward()
        (0.1 * model[2].weight.abs().sum()).backward()
        loss_of(model, 1).backward()
        convert(model)
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    dtype = pairs[0][0][0].weight.dtype
    assert isinstance(pairs[1][0][2].weight, nn.Parameter) and pairs[1][0][2].weight.dtype == dtype
    assert_same_weights(pairs[0][0], pairs[1][0], **(dict(rtol=2e-2, atol=2e-3) if dtype == torch.bfloat16 else CLOSE))


def test_a_conversion_keeps_what_is_known():
    """What was written to stays so, on another device too; entries there are none, in any dtype."""
    _, (model, optimizer) = both(network(), include=["0", "2"])
    x = batch(0)
    model(x).square().mean().backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.1)
    gradient = model[0].weight.grad
    with pytest.raises(RuntimeError, match="never formed"):
        gradient.double().sum()
    assert (gradient.double().low, gradient.double().high, gradient.dtype) == (-0.1, 0.1, torch.float32)
    assert gradient.type() == "torch.FloatTensor"
    assert gradient.pairs[0] is gradient.double().pairs[0]
    assert not gradient.pairs[0].on(torch.device("meta")).changed()
    x.zero_()
    assert gradient.pairs[0].on(torch.device("meta")).changed()
    model.double()
    with pytest.raises(RuntimeError, match="input of layer '0', .* was written to"):
        optimizer.step()


def test_nothing_is_left_of_a_backward_that_raised():
    pairs = both(Tied(1), include=["heads.0"])
    for model, optimizer in pairs:
        model.loss(0).backward()
        if model is pairs[1][0]:
            step = model.heads[0].forward.__self__.step
            step.aside = model.embedding.weight.grad  # as where the sum could not be taken
        optimizer.zero_grad()
        model.loss(1).backward()
        optimizer.step()
    assert_same(pairs)


def test_removed_or_dropped_nothing_holds_the_weight():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = fuse_update(model, optimizer, include=["2"])
    loss_of(model).backward()
    step = model[2].forward.__self__.step
    assert step.hooks
    handle.remove()
    assert step.accumulate is None and not step.hooks
    fuse_update(model, optimizer, include=["2"])
    loss_of(model).backward()
    optimizer.step()
    layer = weakref.ref(model[2])
    del model, optimizer, handle, step
    gc.collect()
    assert layer() is None


def test_no_way_to_the_weight():
    """As fuse_update's text says."""
    _, (model, _) = both(network(), include=["2"])
    with pytest.raises(RuntimeError, match="not have been used in the graph|does not require grad|None"):
        torch.autograd.grad(loss_of(model), model[2].weight)
    (zeros,) = torch.autograd.grad(loss_of(model), model[2].weight, materialize_grads=True)
    assert not zeros.any()


def test_factors_that_were_written_to_before_they_were_added():
    _, (model, optimizer) = both(nn.Linear(6, 4), running_sum=True)
    x = batch(0)
    model(x).sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="input of layer '', .* was written to"):
        model(batch(1)).sum().backward()


# -- clipping ----------------------------------------------------------------------------------------------------------

CLIPS = {
    "norm": lambda p: nn.utils.clip_grad_norm_(p, 0.05),
    "norm, foreach": lambda p: nn.utils.clip_grad_norm_(p, 0.05, foreach=True),
    "norm of each layer": lambda p: [nn.utils.clip_grad_norm_(q, 0.01) for q in p],
    "value": lambda p: nn.utils.clip_grad_value_(p, 0.002),
    "value, foreach": lambda p: nn.utils.clip_grad_value_(p, 0.002, foreach=True),
    "norm, value": lambda p: (nn.utils.clip_grad_norm_(p, 0.05), nn.utils.clip_grad_value_(p, 0.002)),
}


@pytest.mark.parametrize("running_sum", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", ["momentum", "adamw", "adamw, fused"])
def test_clipping(kind, clip, parts, running_sum):
    pairs = both(network(), kind, include=["0", "2"], running_sum=running_sum)
    norms = []
    for model, optimizer in pairs:
        for step in range(3):
            optimizer.zero_grad()
            for i in range(parts):
                loss_of(model, 10 * step + i).backward()
            norms.append(CLIPS[clip]([*model.parameters()]))
            optimizer.step()
    assert_same(pairs)
    if clip.startswith("norm") and "," not in clip:
        torch.testing.assert_close(norms[:3], norms[3:])


@pytest.mark.parametrize("m, n, k", [(3, 40, 50), (300, 40, 50), (1, 1, 1), (7, 600, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm(m, n, k, dtype):
    """By rows and by entries."""
    layer = nn.Linear(k, n, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    fuse_update(layer, optimizer, min_weights=1)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        layer(x).backward(grad)
    expected = (grad.double().t() @ x.double()).norm()
    torch.testing.assert_close(torch.linalg.vector_norm(layer.weight.grad).double(), expected, rtol=1e-5, atol=0)
    total = nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(layer.weight.grad).item(), 1e-3, rtol=1e-4, atol=0)


def test_bounds_of_different_sizes_are_refused_before_a_weight_moves():
    _, (model, optimizer) = both(network())
    before = copy.deepcopy(model.state_dict())
    loss_of(model).backward()
    model[4].weight.grad.clamp_(min=-1.0, max=2.0)
    with pytest.raises(RuntimeError, match=r"layer '4' was clipped to \[-1.0, 2.0\]"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_another_gradient_after_clipping():
    _, (model, _) = both(network(), include=["2"])
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="layer '2' got another gradient after the one before was clipped"):
        loss_of(model).backward()


# -- a GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw, foreach", "adamw, fused"])
def test_grad_scaler(kind, clip):
    """The second step of four overflows, and is skipped."""
    pairs = both(network(), kind, include=["0", "2"])
    scales = []
    for model, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i, float("inf") if i == 1 else 1.0)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:4] == scales[4:] and scales[0] != scales[1]
    assert_same(pairs)


def test_a_sum_that_may_overflow_is_skipped():
    _, (model, optimizer) = both(nn.Linear(6, 4), "momentum")
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(model(batch(0) * 1e20).sum() * 1e19).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and scaler.get_scale() == 0.5


# -- convolutions with a 1x1 kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_convolutions(kind, layout):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 10, 1), nn.ReLU(inplace=True), nn.Conv2d(10, 12, 1, 2)
    ).to(memory_format=layout)
    pairs = both(model, kind)
    for m, optimizer in pairs:
        for i in range(3):
            x = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(i)).to(memory_format=layout)
            optimizer.zero_grad()
            m(x).square().mean().backward()
            m(x[0]).square().mean().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.05)
            optimizer.step()
    assert_same(pairs)


def test_which_convolutions():
    convolutions = [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding="same"),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Conv1d(4, 4, 1),
    ]
    model = nn.Sequential(*convolutions)
    fused = fuse_update(model, torch.optim.AdamW(model.parameters()), min_weights=1)
    assert fused.layers == ["0", "1", "2"]
