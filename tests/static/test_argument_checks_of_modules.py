"""Bad arguments of constructors, made from the signatures as tests/static/test_argument_checks.py does for functions:
every class of lgkernels.nn, lgkernels.optim and lgkernels.training, and every function there that is not in
lgkernels.functional.

They are refused when a thing is made, not when it is first used, and before anything changes. A family is covered by
MODULES of its tests/<family>/calls.py.
"""

import copy
import inspect
import typing

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lgkernels
from lgkernels import nn as lnn
from lgkernels import optim, training
from lgkernels.training.planner import plan
from lgkernels.training.trainer import Trainer
from tests.static.test_argument_checks import parameters, problem, wrong_values
from tests.support.calls import Call, all_calls

CALLS = all_calls("MODULES")
PUBLIC = {name: getattr(package, name) for package in (lnn, optim, training) for name in package.__all__} | {
    "plan": plan
}
NOT_MADE_BY_HAND = {"FusedUpdate", "CONVENTIONS"}  # what fuse_update returns; a dict
TESTED = {name: PUBLIC[name] for name in CALLS}

# What an argument may be beside what its annotation says, or because no value of its kind is wrong by itself.
ALSO_TAKEN = {
    ("convert", "include"): lambda v: isinstance(v, (str, tuple)),
    ("convert", "exclude"): lambda v: isinstance(v, (str, tuple)),
    ("set_adapter", "adapter_name"): lambda v: isinstance(v, tuple) and not v,
    ("adapt", "train_head"): lambda v: isinstance(v, tuple) and not v,
    ("fuse_update", "exclude"): lambda v: isinstance(v, tuple) and not v,
    ("split_blocks", "units"): lambda v: isinstance(v, tuple) and not v,
    ("split_blocks", "input"): lambda v: isinstance(v, Tensor),
    ("plan", "units"): lambda v: isinstance(v, (tuple, list)) and v in ((), [None]),
    ("plan", "memory"): lambda v: isinstance(v, float) and 0 < v,
}


def two_numbers(value):
    return np.ndim(value) == 1 and len(value) == 2 and all(type(n) is not bool for n in value)


for pair in (("InfoProUnit", "weights"), ("infopro_weights", "first"), ("infopro_weights", "last")):
    ALSO_TAKEN[pair] = lambda v: two_numbers(v) and not isinstance(v[0], str)


def kinds_of(hint):
    """A tuple or list counts as a sequence, for which other values are wrong."""
    return {typing.Sequence.__origin__ if kind in (tuple, list) else kind for kind in hint}


def arguments(function):
    """{name: kinds} of those with a name."""
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    return {name: kinds_of(parameters(function)[name][0]) for name in named}


def may_be(name, argument, kinds, value):
    number = isinstance(value, Tensor) and not is_lazy(value) and value.numel() == 1
    if number and kinds & {int, float}:  # taken as a number, or refused: see test_a_number_in_a_tensor below
        return True
    if argument == "bias" and (value is None or isinstance(value, np.bool_)):  # torch's layers take them
        return True
    comparable = isinstance(value, (str, tuple, list, float, Tensor, np.ndarray)) and not is_lazy(value)
    return (name, argument) in ALSO_TAKEN and comparable and bool(ALSO_TAKEN[name, argument](value))


def state_of(value):
    """What a refused call must leave alone of a module, or of modules."""
    if isinstance(value, (list, tuple)):
        return [state_of(v) for v in value]
    if not isinstance(value, nn.Module):
        return None
    return [
        (name, type(m), "forward" in vars(m), [(p.requires_grad, p.clone()) for p in m.parameters(recurse=False)])
        for name, m in value.named_modules()
    ]


def problems(name, function, call, argument):
    kinds = arguments(function)[argument]
    values = [v for v in wrong_values(kinds, argument in call.any_sign) if not may_be(name, argument, kinds, v)]
    values += [2**70, -(2**70)] if kinds & {int, float} == {int} and torch.device not in kinds else []
    found = []
    for value in values:
        given = copy.deepcopy(call.arguments)
        before = [state_of(v) for v in given.values()]
        found.append(problem(lambda **all_: function(**all_), given, argument, value))
        after = [state_of(v) for v in given.values()]
        if not found[-1] and str(before) != str(after):
            found.append(f"{argument}={value!r} is refused too late: something has changed")
    return [p for p in found if p]


def test_everything_public_has_a_valid_call():
    mine = {name for name, value in PUBLIC.items() if callable(value)} - NOT_MADE_BY_HAND
    assert mine == set(CALLS)
    assert set(lgkernels._FROM_NN) <= mine
    for name, call in CALLS.items():
        TESTED[name](**copy.deepcopy(call.arguments))


@pytest.mark.parametrize(
    "name, argument", [(name, argument) for name, function in TESTED.items() for argument in arguments(function)]
)
def test_wrong_values_are_refused(name, argument):
    found = problems(name, TESTED[name], CALLS[name], argument)
    assert not found, "\n".join([f"{len(found)} of {name}:", *found])


METHODS = {  # of every trainer: valid arguments
    "step": dict(x=torch.ones(2, 4), target=torch.tensor([0, 1])),
    "predict": dict(x=torch.ones(2, 4)),
    "train": dict(mode=True),
    "bn_recalibrate": dict(batches=[torch.ones(2, 4)]),
    "load_state_dict": dict(state={}),
}
TRAINERS = [name for name, kind in TESTED.items() if isinstance(kind, type) and issubclass(kind, Trainer)]


def methods_of(kind):
    """Those with other arguments where the call of a trainer says so."""
    return {**METHODS, **CALLS[kind].methods}


def trainer_of(kind):
    given = copy.deepcopy(CALLS[kind].arguments)
    if kind == "BlockwiseTrainer":  # whose blocks have a loss of their own
        given["blocks"] = [lnn.ClassifierBlock(block) for block in given["blocks"]]
    return TESTED[kind](**given)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    "method, argument", [(method, argument) for method, given in METHODS.items() for argument in given]
)
def test_methods_of_trainers(kind, method, argument):
    trainer = trainer_of(kind)
    function, given = getattr(trainer, method), {**methods_of(kind)[method]}
    if method == "load_state_dict":
        given["state"] = trainer.state_dict()
    function(**given)
    kinds = kinds_of(parameters(function)[argument][0])
    values = wrong_values(kinds, False)
    if method == "load_state_dict":
        values += [{**given["state"], "version": 2}] + [
            {key: value for key, value in given["state"].items() if key != name}
            for name in ("version", "steps", "blocks", "optimizers", "schedulers", "grad_scaler")
        ]
    may_be_ = (lambda v: isinstance(v, tuple) and not v) if method == "bn_recalibrate" else lambda v: False
    found = [problem(function, given, argument, value) for value in values if not may_be_(value)]
    assert not any(found), "\n".join(filter(None, found))


def test_all_methods_of_trainers_are_tested():
    """All that take an argument, but the metric of a schedule, which is torch's to judge."""
    public = {name: value for name, value in vars(Trainer).items() if name[0] != "_" and callable(value)}
    assert set(METHODS) == {n for n, v in public.items() if len(inspect.signature(v).parameters) > 1} - {
        "scheduler_step"
    }
    assert len(TRAINERS) >= 3


def test_a_constructor_without_checks_is_caught():
    class Unchecked(nn.Module):
        def __init__(self, block: nn.Module, n: int, flag: bool = False, *, loss: typing.Callable = len):
            super().__init__()
            self.block, self.n, self.flag, self.loss = block, n, flag, loss

    call = Call(dict(block=nn.Linear(2, 2), n=3))
    assert all(problems("Unchecked", Unchecked, call, argument) for argument in ("block", "n", "flag", "loss"))


def test_a_refusal_after_a_change_is_caught():
    def late(model: nn.Module, n: int):
        model.requires_grad_(False)
        if type(n) is not int or not 0 < n < 2**63:
            raise TypeError(f"n must be a positive int, got {n!r} ({type(n).__name__})")

    assert any("too late" in p for p in problems("late", late, Call(dict(model=nn.Linear(2, 2), n=3)), "n"))


@pytest.mark.parametrize("name", TESTED)
def test_numbers_of_numpy_are_taken(name):
    call = CALLS[name]
    for argument, (members, default) in parameters(TESTED[name]).items():
        value = call.arguments.get(argument, default)
        if type(value) is float or type(value) is int and members & {int, float}:
            number = np.float64(value) if type(value) is float else np.int64(value)
            TESTED[name](**copy.deepcopy(call.arguments) | {argument: number})


LAYERS = {
    "FeedbackAlignmentLinear": dict(bias=False, device="cpu", dtype=None),
    "SignSymmetricLinear": dict(in_features=np.int32(4), dtype=torch.bfloat16, device=torch.device("cpu")),
    "FeedbackAlignmentConv2d": dict(padding="same", padding_mode="circular", kernel_size=(3, 1), dilation=[1, 2]),
    "SignSymmetricConv2d": dict(stride=torch.Size((2, 1)), padding=(1, 0), kernel_size=np.int64(3), device="meta"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_torch_takes_is_taken(name):
    """And `state_dict` has the shapes of torch's layer."""
    given = CALLS[name].arguments | LAYERS[name]
    plain = (nn.Linear if name.endswith("Linear") else nn.Conv2d)(**given)
    layer = PUBLIC[name](**given)
    assert [(k, p.shape, p.dtype) for k, p in layer.state_dict().items()] == [
        (k, p.shape, p.dtype) for k, p in plain.state_dict().items()
    ]


@pytest.mark.parametrize("kind", ["OffsetSGD", "OffsetOptimizer"])
@pytest.mark.parametrize(
    "bound", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5)], ids=["0-d", "1-d", "numpy"]
)
def test_a_bound_on_the_norm_may_be_a_tensor(kind, bound):
    """As torch's clip_grad_norm_ takes it."""
    results = []
    for value in (0.5, bound):
        weight = nn.Parameter(torch.ones(3))
        sgd = torch.optim.SGD([weight], 0.1)
        optimizer = optim.OffsetSGD([weight], 0.1) if kind == "OffsetSGD" else optim.OffsetOptimizer(sgd)
        weight.grad = torch.full((3,), 2.0)
        optimizer.step(max_norm=value)
        results.append(weight.detach())
    assert torch.equal(*results) and not torch.equal(results[0], torch.full((3,), 0.8))


@pytest.mark.parametrize("kind", ["BlockwiseTrainer", "BackpropTrainer", "DirectTrainer"])
def test_a_trainer_bounds_the_norm_by_a_tensor(kind):
    trainer = PUBLIC[kind](**copy.deepcopy(CALLS[kind].arguments), clip_grad_norm=torch.tensor(0.5))
    assert trainer.clip_grad_norm == 0.5 and type(trainer.clip_grad_norm) is float
    with pytest.raises(TypeError, match="clip_grad_norm must be a number, got Tensor"):
        PUBLIC[kind](**copy.deepcopy(CALLS[kind].arguments), clip_grad_norm=torch.ones(2))


CONVERTED = {  # argument: where the constructor keeps it
    "LoRALinear": "alpha",
    "LocalClassifier": "label_smoothing",
    "PooledClassifier": "label_smoothing",
    "ForwardForwardLayer": "threshold",
    "PredSimHead": "beta",
    "LLSHead": "temperature",
}


@pytest.mark.parametrize("name, argument", CONVERTED.items())
def test_a_number_in_a_tensor(name, argument):
    """It is refused, or a plain number from the constructor on."""
    try:
        module = PUBLIC[name](**copy.deepcopy(CALLS[name].arguments) | {argument: torch.tensor(0.5)})
    except TypeError as error:
        assert str(error) == f"{argument} must be a number, got Tensor"
    else:
        assert type(getattr(module, argument)) is float


@pytest.mark.parametrize("name", TESTED)
def test_a_size_in_a_tensor_is_taken(name):
    """As torch's layers take it."""
    call = CALLS[name]
    for argument, (members, _) in parameters(TESTED[name]).items():
        value = call.arguments.get(argument)
        if type(value) is int and members == {int}:
            TESTED[name](**copy.deepcopy(call.arguments) | {argument: torch.tensor(value)})
