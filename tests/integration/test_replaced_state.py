"""State that a user, a checkpoint or another library can put in place of the right one: parameters, buffers, optimizer
states of another size, dtype, stride, device or class. The step is refused, or is the reference's step.
"""

import copy

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.optim import OffsetSGD, ZerothOrder, fuse_update
from lgkernels.training import BlockwiseTrainer, DirectTrainer, EquilibriumTrainer, ForwardGradientTrainer
from tests.forward_gradient import calls as forward_gradient
from tests.support.problems import randn, targets

X, Y = randn(6, 3, 8, 8), targets(6, 5)
FLAT = randn(6, 24)
LLS = dict(num_classes=5, pool_size=2)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


class Case:
    """`module`, whose state is replaced, `optimizer` or None, and `step()`, which trains once."""

    def __init__(self, module, step, optimizer=None):
        self.module, self.step, self.optimizer = module, step, optimizer


def loss_of(module, *arguments, optimizer=None):
    def step():
        result = module(*arguments)
        loss = result[1] if isinstance(result, tuple) else result.square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return Case(module, step, optimizer)


def conv(**options):
    return loss_of(lnn.LLSConvBlock(3, 6, 3, padding=1, **{**LLS, **options}), X, Y)


def trained(kind, blocks, **options):
    trainer = kind(blocks, sgd, **options)
    return Case(nn.ModuleList(blocks), lambda: trainer.step(X, Y))


def direct():
    end = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
    return trained(DirectTrainer, [end, nn.Flatten(), nn.Linear(96, 5)])


def head(make):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    return loss_of(make(block), X, Y)


def offset():
    layer = nn.Linear(24, 5)
    optimizer = OffsetSGD(layer.parameters(), 0.1, momentum=0.9)
    optimizer.refresh(lambda x: layer(x).square().mean(), lambda x: layer(x).abs().mean(), FLAT)
    case = loss_of(layer, FLAT, optimizer=optimizer)
    case.step()
    return case


def fused():
    model = nn.Sequential(nn.Linear(24, 9), nn.Linear(9, 5))
    optimizer = sgd(model.parameters())
    fuse_update(model, optimizer, min_weights=1)
    case = loss_of(model, FLAT, optimizer=optimizer)
    case.step()
    return case


def zeroth():
    layer = nn.Linear(24, 5)
    optimizer = ZerothOrder(layer, 0.1)
    return Case(layer, lambda: optimizer.step(lambda: layer(FLAT).square().mean()))


def equilibrium():
    net = lnn.EquilibriumMLP(24, (7,), 6, num_classes=5, steps=3, angle=90)
    trainer = EquilibriumTrainer(net, sgd, nudge_steps=2)
    return Case(net, lambda: trainer.step(FLAT.sigmoid(), Y))


def mixer():
    given = copy.deepcopy(forward_gradient.MODULES["ForwardGradientTrainer"].arguments)
    trainer = ForwardGradientTrainer(**given)
    size = trainer.model.image_size if hasattr(trainer.model, "image_size") else 4
    x = randn(3, 1, size, size)
    return Case(trainer.model, lambda: trainer.step(x, torch.tensor([0, 1, 1])))


CASES = {
    "lls conv": lambda: conv(),
    "lls vector": lambda: conv(modulation="vector", max_pool=True),
    "lls matrix": lambda: conv(modulation="matrix"),
    "lls reduced": lambda: conv(modulation="reduced", reduced_rows=3),
    "lls linear": lambda: loss_of(lnn.LLSLinearBlock(24, 8, modulation="vector", **LLS), FLAT, Y),
    "lls head": lambda: head(lambda block: lnn.LLSHead(block, modulation="matrix", **LLS)),
    "usf": lambda: loss_of(lnn.SignSymmetricLinear(24, 5), FLAT.clone().requires_grad_()),
    "frsf": lambda: loss_of(lnn.SignSymmetricConv2d(3, 5, 3, rule="frsf"), X.clone().requires_grad_()),
    "signed init": lambda: loss_of(lnn.SignSymmetricLinear(24, 5, rule="signed_init"), FLAT.clone().requires_grad_()),
    "packed": lambda: loss_of(
        lnn.SignSymmetricLinear(24, 5, packed_signs=True, sign_zero="plus"), FLAT.clone().requires_grad_()
    ),
    "fa": lambda: loss_of(lnn.FeedbackAlignmentConv2d(3, 5, 3, padding=1), X.clone().requires_grad_()),
    "local classifier": lambda: head(lambda block: lnn.LocalClassifier(block, 4, 5)),
    "pooled classifier": lambda: head(lambda block: lnn.PooledClassifier(block, 5, pool_size=2)),
    "predsim": lambda: head(lambda block: lnn.PredSimHead(block, (4, 6, 6), 5)),
    "direct": direct,
    "blockwise": lambda: trained(BlockwiseTrainer, [lnn.LLSConvBlock(3, 6, 3, padding=1, **LLS)]),
    "offset": offset,
    "fused update": fused,
    "zeroth order": zeroth,
    "equilibrium": equilibrium,
    "forward gradient": mixer,
}


DTYPES = ("float64", "float16", "bfloat16")


def wrong_states(tensor):
    """{what is wrong: a tensor}. Freed memory and other devices, at which torch's own functions crash or
    read what nothing has written (F.linear with a weight on the meta device), are test_door.py's."""
    flat = {
        "empty": tensor.new_empty(0),
        "a number": tensor.new_ones(()),
        "one dimension more": tensor[None],
        "strided": torch.stack([tensor, tensor], -1)[..., 0],
    }
    if tensor.dim():
        flat |= {
            "one row less": tensor[:-1].clone(),
            "one row more": torch.cat([tensor, tensor[:1]]),
            "a hundred rows": tensor[:1].repeat(100, *[1] * (tensor.dim() - 1)),
            "expanded": tensor[:1].expand(tensor.shape),
            "one column less": tensor[..., :-1].clone(),
        }
    if tensor.dim() == 2:
        flat["transposed"] = tensor.t().contiguous()
    if tensor.is_floating_point():
        flat |= {"float64": tensor.double(), "float16": tensor.half(), "bfloat16": tensor.bfloat16()}
    else:
        flat |= {"int32": tensor.int(), "float": tensor.float()}
    return flat


def slots(case):
    """(name, table, key) of every tensor that can be replaced."""
    for path, module in case.module.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield f"{path}.{key}", table, key
    if case.optimizer is not None:
        for i, state in enumerate(case.optimizer.state.values()):
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"state {i}.{key}", state, key


def put(table, key, tensor):
    old = table[key]
    if isinstance(old, nn.Parameter):
        with torch.no_grad():
            if tensor.shape != old.shape or tensor.dtype != old.dtype:
                tensor = nn.Parameter(tensor)  # a parameter of its own
            else:
                old.data = tensor  # the same one, elsewhere
                return
    table[key] = tensor


def outcome(name, slot, wrong, impl, monkeypatch):
    """The state after a step, or the error's class."""
    monkeypatch.setenv("LGKERNELS_IMPL", impl)
    torch.manual_seed(0)
    case = CASES[name]()
    (place,) = [place for place in slots(case) if place[0] == slot]
    put(*place[1:], wrong_states(place[1][place[2]].detach())[wrong])
    try:
        case.step()
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        return error
    gradients = [p.grad for p in case.module.parameters() if p.grad is not None]
    return [t.detach().float().clone() for t in (*case.module.state_dict().values(), *gradients)]


def all_slots(name):
    return [slot for slot, _, _ in slots(CASES[name]())]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.only(where=lambda backend: backend in ("cpu", "cuda-simt", "torch"))
def test_replaced_state(name, impl, monkeypatch):
    tried, wrong_ones = 0, []
    monkeypatch.setenv("LGKERNELS_IMPL", impl)
    torch.manual_seed(0)
    made = CASES[name]()
    for slot, table, key in list(slots(made)):
        for wrong in wrong_states(table[key].detach()):
            tried += 1
            found = outcome(name, slot, wrong, impl, monkeypatch)
            if isinstance(found, Exception):
                continue
            expected = outcome(name, slot, wrong, "torch", monkeypatch)
            if isinstance(expected, Exception) and wrong in DTYPES:
                continue  # the kernels convert, where torch's layers refuse: test_door.py
            if isinstance(expected, Exception):
                wrong_ones.append(f"{slot}, {wrong}: taken; without kernels {type(expected).__name__}: {expected}")
                continue
            for a, b in zip(found, expected, strict=True):
                if not torch.allclose(a, b, rtol=2e-2, atol=2e-2, equal_nan=True):
                    wrong_ones.append(f"{slot}, {wrong}: another step than without kernels, {(a - b).abs().max()}")
                    break
    assert tried and not wrong_ones, "\n".join(wrong_ones)
