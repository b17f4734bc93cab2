"""The door of every op: what native code will trust is checked there, whoever calls it.

Each family has calls in `tests/<family>/doors.py`: DOORS = {op: arguments that it accepts}. Here one tensor after the
other, those in lists too, is replaced by one that does not fit, and must be refused. What is no misfit is told there in
FREE = {(op, tensor): {changes of `misshapen` that it may undergo alone}}.
"""

import importlib
from pathlib import Path

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.core import dispatch, trust

for _family in dispatch.families():
    importlib.import_module(f"lgkernels.ops.{_family}.op")
FAMILIES = sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/doors.py"))
MODULES = {family: importlib.import_module(f"tests.{family}.doors") for family in FAMILIES}
DOORS = {(family, op): arguments for family, module in MODULES.items() for op, arguments in module.DOORS.items()}
FREE = {key: changes for module in MODULES.values() for key, changes in getattr(module, "FREE", {}).items()}

OURS = "lgkernels::"


def _implementations(op):
    """The library's choice, and plain torch where the op has it."""
    return ["auto", *({"torch"} & set(dispatch.backends(trust.OPS[op].group)))]


TRIED = [(*key, impl) for key in DOORS for impl in _implementations(key[1])]


def accepted(op, arguments, impl="auto"):
    return getattr(torch.ops.lgkernels, op)(*arguments, impl)


def places(op, arguments):
    """(place, name, tensor) of every tensor among the arguments; the first sets device and dtype."""
    names = [a.name for a in getattr(torch.ops.lgkernels, op).default._schema.arguments]
    for i, argument in enumerate(arguments):
        for j, tensor in enumerate(argument if isinstance(argument, list) else [argument]):
            if isinstance(tensor, torch.Tensor):
                yield (i, j), names[i], tensor


def copied(argument):
    if isinstance(argument, list):
        return [copied(a) for a in argument]
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def replaced(arguments, place, tensor):
    """Copies of the arguments, with `tensor` itself in one place."""
    arguments, (i, j) = [copied(a) for a in arguments], place
    if isinstance(arguments[i], list):
        arguments[i][j] = tensor
    else:
        arguments[i] = tensor
    return arguments


def misshapen(tensor):
    """{change: the tensor so changed}"""
    changes = {f"entry {d}": torch.cat([tensor, tensor.narrow(d, 0, 1)], d) for d in range(tensor.dim())}
    return {
        **changes,
        "one before": tensor[None],
        "one behind": tensor[..., None],
        **({"one less": tensor[0]} if tensor.dim() else {}),
    }


def test_every_op_of_a_kernel_family_is_here():
    """Ops with nothing but a reference take torch's own errors; all others are listed."""
    alone = {op for op in dispatch.registered_ops() if len(dispatch.backends(op)) == 1}
    defined = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if OURS in name}
    native = {op for op in defined if op not in trust.OPS or trust.OPS[op].group not in alone} - {
        "without_backward",
        "lls_basis",
    }  # the latter takes no tensor
    assert native == {op for _, op in DOORS}


def test_what_is_free_is_there():
    tried = {
        (op, name): set(misshapen(tensor))
        for (_, op), arguments in DOORS.items()
        for _, name, tensor in places(op, arguments)
    }
    assert not {key for key, changes in FREE.items() if not changes <= tried.get(key, set())}


@pytest.mark.parametrize("family, op, impl", TRIED)
def test_wrong_sizes(family, op, impl):
    """One entry more in any dimension, one dimension more or less."""
    arguments, tried = DOORS[family, op], 0
    accepted(op, [copied(a) for a in arguments], impl)
    for place, name, tensor in places(op, arguments):
        for change, other in misshapen(tensor).items():
            tried += 1
            if change in FREE.get((op, name), ()):
                accepted(op, replaced(arguments, place, other), impl)
                continue
            with pytest.raises((ValueError, TypeError), match="must"):
                accepted(op, replaced(arguments, place, other), impl)
    assert tried


def _is_list(argument):
    return isinstance(argument, list) and bool(argument) and isinstance(argument[0], torch.Tensor)


LISTS = [key for key in TRIED if any(map(_is_list, DOORS[key[:2]]))]


@pytest.mark.parametrize("family, op, impl", LISTS)
def test_lists_of_another_length(family, op, impl):
    """One tensor less than the other lists have: the checkpoint of a model with fewer layers."""
    arguments, tried = DOORS[family, op], 0
    for i, argument in enumerate(getattr(torch.ops.lgkernels, op).default._schema.arguments[:-1]):
        if _is_list(arguments[i]) and argument.name != "drive":  # which may be of the first layers alone
            own = [copied(a) for a in arguments]
            own[i].pop()
            tried += 1
            with pytest.raises((ValueError, TypeError), match="must"):
                accepted(op, own, impl)
    assert tried


@pytest.mark.parametrize("family, op, impl", [key for key in TRIED if "backward" in key[1]])
def test_saved_tensors_of_another_dtype_or_stride(family, op, impl):
    """A hook on saved tensors may give others back than it took: their values count, never their bytes."""
    arguments, tried = DOORS[family, op], 0

    def result(place, tensor):
        own = replaced(arguments, place, tensor)
        return accepted(op, own, impl), own[0]

    for place, name, tensor in list(places(op, arguments))[1:]:
        if not tensor.is_floating_point():
            continue
        rounded = tensor.bfloat16()
        expected = result(place, rounded.float())
        others = [rounded, rounded.double()]
        if tensor.dim():
            others.append(torch.stack([rounded.float()] * 2, -1)[..., 0])
        for other in others:
            tried += 1
            try:
                torch.testing.assert_close(result(place, other), expected, rtol=1e-2, atol=1e-2, check_dtype=False)
            except (TypeError, ValueError) as refused:
                assert name in str(refused)
    assert tried


@pytest.mark.parametrize("family, op", DOORS)
def test_another_device(family, op):
    """One tensor on another device than the rest. (An op of one tensor goes where it is: on the meta device no native
    code sees it.)"""
    arguments = DOORS[family, op]
    found = list(places(op, arguments))
    for place, _, tensor in found:
        moved = replaced(arguments, place, tensor.to("meta"))
        if len(found) == 1:
            assert accepted(op, moved).is_meta
            continue
        with pytest.raises(ValueError, match="must be on"):
            accepted(op, moved)
    assert found


@pytest.mark.parametrize("family, op", DOORS)
def test_another_device_behind_the_dispatcher(family, op):
    """Which sends a call with a tensor of the meta device elsewhere, and one with a CUDA tensor here."""
    arguments = DOORS[family, op]
    for place, _, tensor in list(places(op, arguments))[1:]:
        with pytest.raises(ValueError, match="must be on (cpu|meta) like"):
            trust.OPS[op].function.implementation(*replaced(arguments, place, tensor.to("meta")), "auto")


@pytest.mark.parametrize("family, op", DOORS)
def test_freed_memory(family, op):
    """A storage that was freed, as a sharded parameter's is."""
    arguments, tried = DOORS[family, op], 0
    for place, name, tensor in places(op, arguments):
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"\b{name} must have memory"):
            accepted(op, replaced(arguments, place, freed))
        tried += 1
    assert tried


class Elsewhere(torch.Tensor):
    """Its values lie elsewhere, as a DTensor's; it hands ops on to the kernels as it is."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Python)):
            return function(*arguments, **(options or {}))


class Own(torch.Tensor):
    """A subclass in name alone."""


@pytest.mark.parametrize("family, op", DOORS)
def test_a_tensor_subclass(family, op):
    arguments, tried = DOORS[family, op], 0
    for place, name, tensor in places(op, arguments):
        with pytest.raises(TypeError, match=rf"\b{name} must be a plain torch.Tensor, got Elsewhere"):
            accepted(op, replaced(arguments, place, Elsewhere(tensor)))
        accepted(op, replaced(arguments, place, tensor.clone().as_subclass(Own)))
        tried += 1
    assert tried


def _written(op):
    """Names of the arguments that the op writes to."""
    schema = getattr(torch.ops.lgkernels, op).default._schema
    return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}


@pytest.mark.parametrize("family, op, impl", [key for key in TRIED if _written(key[1])])
def test_what_is_written_to_does_not_overlap_itself(family, op, impl):
    """A tensor that `expand` made: torch's own operations in place refuse it."""
    arguments, tried = DOORS[family, op], 0
    for place, name, tensor in places(op, arguments):
        if name not in _written(op) or not tensor.numel() > 1:
            continue
        tried += 1
        with pytest.raises(ValueError, match=rf"\b{name}(\[\d\])? must have memory of its own for each element"):
            accepted(op, replaced(arguments, place, tensor.flatten()[0].expand(tensor.shape)), impl)
    assert tried


@pytest.mark.parametrize("impl", ["reference", "torch", "cpu"])
def test_no_graph_is_recorded_inside_of_an_op(impl):
    """A factor of each row's loss asks for a gradient, in a backward with `create_graph=True`: plain torch that writes
    into given memory would raise there, and what it recorded would be no rule of ours."""
    h, target = torch.randn(4, 3, 5, 5, requires_grad=True), torch.arange(4) % 3
    factors, weight = torch.ones(4, requires_grad=True), torch.randn(3, 3)
    loss = LF.local_cross_entropy(h, weight, None, target, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad((loss * factors).sum(), h, create_graph=True)
    (plain,) = torch.autograd.grad(LF.local_cross_entropy(h, weight, None, target, reduction="sum", impl=impl), h)
    assert torch.allclose(grad, plain, atol=1e-6)
