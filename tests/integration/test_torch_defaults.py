"""torch.set_default_dtype and torch.set_default_device are the user's: no result, and no address, depends on them."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import lgkernels
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.optim import OffsetSGD, ZerothOrder, fuse_update
from lgkernels.training import BlockwiseTrainer, DirectTrainer, EquilibriumTrainer

CPU = torch.device("cpu")
DEFAULTS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "meta device": torch.device("meta")}


@pytest.fixture(params=DEFAULTS)
def default(request):
    """Sets a default when called; torch's own come back at the end."""
    chosen = DEFAULTS[request.param]

    def set_default():
        if isinstance(chosen, torch.device):
            torch.set_default_device(chosen)
        else:
            torch.set_default_dtype(chosen)

    yield set_default
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.dtype == b.dtype and a.device == b.device == CPU
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
@pytest.mark.parametrize("op", dispatch.registered_ops())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op(op, backend, dtype, default):
    why_not = dispatch.unavailable(op, backend, CPU, dtype)
    if why_not:
        pytest.skip(why_not)
    case = importlib.import_module(dispatch.family(op) + ".selftest").CASES[op]
    expected = case(backend, CPU, dtype)
    default()
    same(case(backend, CPU, dtype), expected)


# -- what is built of them ---------------------------------------------------------------------------------------------


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def by_error(model, optimizer):
    """A step of one's own loop."""

    def step(x, target):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return model, step


def trainer(kind, blocks, **options):
    return nn.ModuleList(blocks), kind(blocks, sgd, **options).step


def lls():
    return trainer(
        BlockwiseTrainer,
        [
            lnn.LLSConvBlock(3, 8, 3, padding=1, num_classes=4, pool_size=2, modulation="matrix"),
            lnn.LLSHead(nn.Conv2d(8, 4, 3), num_classes=4, pool_size=2),
            nn.Flatten(),
            lnn.ClassifierBlock(nn.Linear(4 * 36, 4)),
        ],
    )


def local_losses():
    def convolution(channels):
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())

    return trainer(
        BlockwiseTrainer,
        [
            lnn.LocalClassifier(convolution(3), 8, 4),
            lnn.PredSimHead(convolution(8), (8, 8, 8), 4, decoder_dim=64),
            nn.Flatten(),
            lnn.ClassifierBlock(nn.Linear(8 * 64, 4)),
        ],
    )


def direct(rule):
    return trainer(
        DirectTrainer,
        [
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(8 * 16, 4),
        ],
        rule=rule,
    )


def converted(rule):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    model = lgkernels.convert(model, rule)
    return by_error(model, sgd(model.parameters()))


def offset():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return by_error(model, OffsetSGD(model.parameters(), lr=0.1, momentum=0.9))


def fused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    optimizer = sgd(model.parameters())
    fuse_update(model, optimizer, min_weights=1)
    return by_error(model, optimizer)


def zeroth_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
    optimizer = ZerothOrder(model, lr=0.01, members=3, ranked=True)
    return model, lambda x, target: optimizer.step(lambda: nn.functional.cross_entropy(model(x), target))


def equilibrium():
    net = lnn.EquilibriumMLP(192, [16], 4, steps=20)
    step = EquilibriumTrainer(net, sgd, points=2, beta=0.2, homeostasis=0.1).step
    return net, lambda x, target: step(x.flatten(1), target)


SET_UPS = {
    "lls": lls,
    "local losses": local_losses,
    **{rule: lambda rule=rule: direct(rule) for rule in ("dfa", "drtp")},
    **{f"converted, {rule}": lambda rule=rule: converted(rule) for rule in ("fa", "usf", "frsf", "brsf")},
    "offset": offset,
    "fused": fused,
    "zeroth order": zeroth_order,
    "equilibrium": equilibrium,
}


def trained(set_up, default):
    torch.manual_seed(0)
    x, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    model, step = SET_UPS[set_up]()
    default()
    for _ in range(2):
        step(x, target)
    return list(model.state_dict().values())


@pytest.mark.parametrize("set_up", SET_UPS)
def test_training_steps(set_up, default):
    expected = trained(set_up, lambda: None)
    same(trained(set_up, default), expected)


# -- the rule ----------------------------------------------------------------------------------------------------------

_WITH_DTYPE = {"empty", "zeros", "ones", "full", "tensor", "linspace", "rand", "randn", "eye"}
_MADE = _WITH_DTYPE | {"arange", "randint", "randperm"}


def unnamed(source):
    """(line, function, what it leaves to torch's defaults) of each tensor that is made."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MADE):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        wanted = {"device", "dtype"} if node.func.attr in _WITH_DTYPE else {"device"}
        if not named & {"out", None} and wanted - named:
            yield node.lineno, node.func.attr, sorted(wanted - named)


def test_a_tensor_left_to_the_defaults_is_found():
    assert list(unnamed("torch.empty(3, device=d)")) == [(1, "empty", ["dtype"])]
    assert list(unnamed("torch.arange(3)")) == [(1, "arange", ["device"])]
    assert not list(unnamed("torch.ones(3, dtype=t, device=d), torch.zeros(2, **made), x.new_empty(3)"))


def test_every_tensor_names_its_dtype_and_device():
    """Outside of the training command, whose process is its own."""
    package = Path(lgkernels.__file__).parent
    files = [path for path in package.rglob("*.py") if "recipes" not in path.parts]
    assert len(files) > 100
    found = [
        f"{path}:{line}: torch.{name} without {what}"
        for path in files
        for line, name, what in unnamed(path.read_text())
    ]
    assert not found, "\n".join(found)
