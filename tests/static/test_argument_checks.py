"""Bad input, made from the signatures: every argument of every public function gets every kind of value that it is not
annotated with, and every tensor another shape, dtype, layout and device.

Each is refused by a ValueError or TypeError that names the argument, says what was expected and what was got: none is
taken, none reaches torch. Numbers of any kind that torch takes (Python's, NumPy's, a tensor of one) give one result.
A family is covered by its tests/<family>/calls.py.
"""

import inspect
import re
import types
import typing
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import UninitializedBuffer, UninitializedParameter
from torch.nn.parameter import is_lazy

import lgkernels.functional as LF
from lgkernels.core import dispatch
from lgkernels.optim import BatchManhattan, OffsetSGD
from lgkernels.random import RandomFeedback, random_matrix, random_rows
from tests.support.calls import Call, all_calls, flat

CALLS = all_calls()
STATE = torch.tensor([1, 2, 3])
FUNCTIONS = {name: (getattr(LF, name), call) for name, call in CALLS.items()} | {
    "RandomFeedback": (RandomFeedback, Call(dict(seed=1, stream=2, low=-0.5), any_sign=("seed", "low"))),
    "materialize": (RandomFeedback(1).materialize, Call(dict(shape=(2, 3)))),
    "set_state": (
        RandomFeedback(1).set_state,
        Call(dict(seed=1, stream=2, step=3), any_sign=("seed", "stream", "step")),
    ),
    "advance": (RandomFeedback(1).advance, Call(dict(skipped=torch.zeros(1)), dims={"skipped": (0, 2)})),
    "random_matrix": (random_matrix, Call(dict(state=STATE, rows=2, cols=3, low=-0.5), any_sign=("low",))),
    "random_rows": (
        random_rows,
        Call(dict(state=STATE, index=STATE, cols=3, low=-0.5), free={"index": (0,)}, any_sign=("low",)),
    ),
}
MAY_BE_ANY_DTYPE = {("advance", "skipped")}
MAY_BE_COMPLEX = {("softmax_pool2d", "x")}
HUGE = 10**400  # no float64 holds it


def parameters(function):
    """{name: (members of the annotation's union, default)}"""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)

    def members(hint):
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return {m for part in typing.get_args(hint) for m in members(part)}
        return {str} if typing.get_origin(hint) is typing.Literal else {typing.get_origin(hint) or hint}

    taken = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return {p.name: (members(hints[p.name]), p.default) for p in taken}


ARGUMENTS = [(name, argument) for name, (function, _) in FUNCTIONS.items() for argument in parameters(function)]


def wrong_values(kinds, any_sign):
    """Values of the kinds that the annotation does not name, and what no argument of a named kind may be."""
    number, sequence = kinds & {int, float}, any(k.__module__ == "collections.abc" for k in kinds if k is not None)
    wrong = [object(), b"text", [None], np.ones(2), {"a": 1}, "no such choice"]
    wrong += [] if complex in kinds else [1j]
    wrong += [] if type(None) in kinds else [None]
    wrong += [] if bool in kinds else [True]
    wrong += [] if number else [3]
    wrong += [0.5, float("nan"), float("inf")] if float not in kinds else [float("nan"), float("inf"), -float("inf")]
    wrong += [-1] if number and not any_sign else []
    wrong += [Fraction(1, 2), Decimal("0.5"), np.True_, HUGE, -HUGE, UninitializedParameter(), UninitializedBuffer()]
    wrong += [1e308, -1e308] if float in kinds else [2**70, -(2**70)]
    wrong += wrong_numbers(kinds) if number else [] if Tensor in kinds else [torch.tensor(1), torch.tensor(0.5)]
    wrong += [(), ("a", "b"), (0.5, 0.5), (True, True), (-1, -1), (2**70, 2**70)] if sequence else [(1, 1)]
    wrong += ["cuda:99", torch.device("cuda:99"), torch.device("hip")] if torch.device in kinds else []
    return wrong + ([torch.int64] if torch.dtype in kinds else [torch.float32])


def wrong_numbers(kinds):
    """Tensors that are no number, or of another kind, or whose gradient would be lost."""
    wrong = [torch.ones(2), torch.tensor([]), torch.tensor(True), torch.tensor(1j), torch.tensor(1).to("meta")]
    wrong += [] if Tensor in kinds else [torch.tensor(0.5, requires_grad=True)]
    return wrong + ([] if float in kinds else [torch.tensor(0.5)])


def wrong_tensors(valid):
    """Of another dtype, layout or type."""
    dtypes = [torch.complex64, torch.bool, torch.int64, torch.float32, torch.float8_e4m3fn]
    same = {torch.float32: [torch.float32], torch.bool: [torch.bool], torch.int64: [torch.int64]}[valid.dtype]
    for dtype in dtypes:
        if dtype not in same:
            yield valid.to(dtype)
    yield valid.to_sparse()
    yield valid.numpy()
    yield valid.tolist()
    yield torch.nested.nested_tensor([valid, valid])


def _is_complex(value):
    return isinstance(value, Tensor) and value.is_complex()


def wrong_shapes(valid, free, dims):
    """Each size one more and one less, a dimension more and one less; all but those that may be so."""
    for dim, size in enumerate(valid.shape):
        if dim not in free:
            yield torch.cat([valid, valid.narrow(dim, 0, 1)], dim)
            yield valid.narrow(dim, 0, size - 1)
    for other in ([valid[0]] if valid.dim() else []) + [valid.unsqueeze(0)]:
        if other.dim() not in dims:
            yield other


def said(value):
    """What a message may say of a value that it got."""
    words = [type(value).__name__]
    if isinstance(value, Tensor) and is_lazy(value):
        return words
    words += [f"{value.bit_length()} bits"] if isinstance(value, int) and abs(value) == HUGE else [repr(value)]
    if isinstance(value, Tensor):
        words += [str(value.dtype)[6:], str(value.layout), str(value.device)]
        words += ["nested"] if value.is_nested else [str(tuple(value.shape))]
    return words + [word for part in value for word in said(part)] if isinstance(value, (tuple, list)) else words


def problem(function, arguments, name, value, own=True):
    """Why `function` does not refuse `value` as its argument `name` as it should; None if it does. `own`: the message
    names this very argument, else any of them: which of two shapes is wrong is for the function to say."""
    shown = f"{name}={' '.join(repr(value).split())[:60]}"
    if isinstance(value, Tensor) and not is_lazy(value):
        shape = "nested" if value.is_nested else tuple(value.shape)
        shown = f"{name}=<{shape} {value.dtype} {value.layout} {value.device}>"
    try:
        function(**{**arguments, name: value})
    except (ValueError, TypeError) as error:
        message = str(error)
        parts = re.fullmatch(r"(\w+)\b.*? must .+, got (.+)", message, re.DOTALL)
        names = [name] if own else parameters(function)
        if type(error) in (ValueError, TypeError) and parts and parts[1] in names:
            if not own or any(word in parts[2] for word in said(value)):
                return None
        return f"{shown}: {type(error).__name__}: {message}"
    except Exception as error:
        return f"{shown}: {type(error).__name__}: {error}"
    return f"{shown} is taken"


def problems(name, function, call, argument):
    members, default = parameters(function)[argument]
    valid = call.arguments.get(argument, default)
    found = [
        problem(function, call.arguments, argument, value) for value in wrong_values(members, argument in call.any_sign)
    ]
    if not isinstance(valid, Tensor):
        return [p for p in found if p]
    if (name, argument) not in MAY_BE_ANY_DTYPE:
        others = [t for t in wrong_tensors(valid) if (name, argument) not in MAY_BE_COMPLEX or not _is_complex(t)]
        found += [problem(function, call.arguments, argument, value) for value in others]
    free, dims = call.free.get(argument, ()), call.dims.get(argument, ())
    if free is ...:
        free, dims = range(valid.dim() - 1), range(1, 9)
    found += [problem(function, call.arguments, argument, v, own=False) for v in wrong_shapes(valid, free, dims)]
    others = [v for other, v in call.arguments.items() if other != argument and isinstance(v, Tensor)]
    if others:
        found.append(problem(function, call.arguments, argument, valid.to("meta"), own=False))
        if RandomFeedback in members:
            elsewhere = RandomFeedback(0).to("meta")
            found.append(problem(function, call.arguments, argument, elsewhere, own=False))
    return [p for p in found if p]


def test_every_public_function_has_a_valid_call():
    assert sorted(CALLS) == sorted(LF.__all__)
    for name, (function, call) in FUNCTIONS.items():
        function(**call.arguments)
        kinds = {a: members for a, (members, _) in parameters(function).items()}
        tensors = {a for a, members in kinds.items() if Tensor in members and float not in members}
        assert tensors <= set(call.arguments), f"{name}: give the optional tensors too"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_wrong_values_are_refused(name, argument):
    found = problems(name, *FUNCTIONS[name], argument)
    assert not found, "\n".join([f"{len(found)} of {name}:", *found])


def outcome(function, arguments):
    """The results, or the message where the arguments are refused."""
    torch.manual_seed(0)
    try:
        result = function(**arguments)
    except ValueError as error:
        return str(error)
    return result.materialize((2, 3)) if isinstance(result, RandomFeedback) else result


def same_number(value):
    """`value` in NumPy's words and torch's; of integers, those whose sums and products wrap around early."""
    if isinstance(value, tuple):
        yield from zip(*map(same_number, value))
    elif isinstance(value, float):
        yield (np.float32 if float(np.float32(value)) == value else np.float64)(value)
        yield torch.tensor(value, dtype=torch.float64)
        yield torch.tensor([value], dtype=torch.float64)
    else:
        dtypes = [d for d in (np.int64, np.int8, np.uint8) if np.iinfo(d).min <= value <= np.iinfo(d).max]
        yield from [dtype(value) for dtype in dtypes]
        yield torch.tensor(value)
        yield torch.tensor([value], dtype=torch.int16)


def is_number(value, members):
    if isinstance(value, tuple):
        return all(type(n) is int for n in value) and bool(members & {int})
    return isinstance(value, float) or type(value) is int and bool(members & {int, float})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_numpy_and_torch_are_taken(name):
    """As Python's of the same value are: the call's own, and for integers 100 (of which 3 are too many for 8 bits)."""
    function, call = FUNCTIONS[name]
    for argument, (members, default) in parameters(function).items():
        value = call.arguments.get(argument, default)
        if not is_number(value, members):
            continue
        for python in [value, 100] if int in members else [value]:
            expected = outcome(function, {**call.arguments, argument: python})
            for number in same_number(python):
                result = outcome(function, {**call.arguments, argument: number})
                if isinstance(expected, str):
                    assert result == expected
                elif expected is not None:
                    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_empty_sizes_are_defined_or_refused(name):
    """Every size in turn is 0, wherever it stands: refused by name, or a finite result with finite gradients. A mean
    over an empty batch is nan, as torch's is."""
    function, call = FUNCTIONS[name]
    tensors = {k: v for k, v in call.arguments.items() if isinstance(v, Tensor)}
    batch = next((len(v) for v in tensors.values()), 0)
    for size in sorted({n for t in tensors.values() for n in t.shape}):
        arguments = {
            k: v.new_zeros([0 if n == size else n for n in v.shape]).requires_grad_(v.is_floating_point())
            for k, v in tensors.items()
        }
        numbers = {k: v for k, v in call.arguments.items() if k not in tensors}
        if "shape" in numbers:
            numbers["shape"] = tuple(0 if n == size else n for n in numbers["shape"])
        try:
            results = function(**numbers, **arguments)
        except ValueError as error:
            found = re.fullmatch(r"(\w+)\b.*? must .+, got .+", str(error), re.DOTALL)
            assert found and found[1] in parameters(function), error
            continue
        results = flat(results)
        for result in results:
            if result.requires_grad:
                result.sum().backward()
        grads = [t.grad for t in arguments.values() if t.grad is not None]
        if size != batch:
            assert all(bool(t.isfinite().all()) for t in (*results, *grads)), f"{name}, {size} -> 0"


@pytest.mark.parametrize("name", CALLS)
def test_float64_goes_with_float64_alone(name):
    """Float32 and halves mix where docstrings say so; a float64 among them would lose its digits."""
    function, call = FUNCTIONS[name]
    floats = [k for k, v in call.arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    floats = [argument for argument in floats if argument not in call.any_dtype]
    found = []
    for argument in floats if len(floats) > 1 else []:
        found.append(problem(function, call.arguments, argument, call.arguments[argument].double(), own=False))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(problem(function, call.arguments, argument, call.arguments[argument].double(), own=False))
    assert not any(found), found


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "impl" in parameters(FUNCTIONS[name][0])])
def test_impl_is_one_of_the_implementations(name):
    function, call = FUNCTIONS[name]
    for impl in dispatch.IMPLEMENTATIONS:
        try:
            function(**call.arguments, impl=impl)
        except ValueError as error:
            assert f"impl={impl!r} can't run " in str(error)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_function_without_checks_is_caught():
    def unchecked(x: Tensor, n: int, flag: bool = False):
        return x * n if flag else x

    call = Call(dict(x=torch.ones(2, 3), n=2))
    assert all(problems("unchecked", unchecked, call, argument) for argument in ("x", "n", "flag"))


@pytest.mark.parametrize("make", [OffsetSGD, BatchManhattan])
def test_optimizers_take_a_learning_rate_in_a_tensor(make):
    make([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
    with pytest.raises(TypeError, match="lr must be a number, got Tensor"):
        make([torch.nn.Parameter(torch.ones(2))], lr=torch.ones(2))
