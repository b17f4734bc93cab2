"""The door of every op: what native code will trust is checked there, whoever calls it.

Each family has calls in `tests/<family>/doors.py`: DOORS = {op: arguments that it accepts}. Here one tensor after the
other is replaced by one that does not fit, and must be refused.
"""

import importlib
from pathlib import Path

import pytest
import torch

from lgkernels.core import dispatch

for _family in dispatch.families():
    importlib.import_module(f"lgkernels.ops.{_family}.op")
FAMILIES = sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/doors.py"))
DOORS = {
    (family, op): arguments
    for family in FAMILIES
    for op, arguments in importlib.import_module(f"tests.{family}.doors").DOORS.items()
}

OURS = "lgkernels::"


# Sizes that a tensor sets by itself: (op, tensor, dimension).
FREE = {
    ("direct_backward_", "error", 1),
    ("lls_block", "weight", 2),
    ("lls_block", "weight", 3),
    ("local_cross_entropy_backward", "grad_logits", 1),
}


def accepted(op, arguments, impl):
    return getattr(torch.ops.lgkernels, op)(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments), impl)


def tensors(op, arguments):
    names = [a.name for a in getattr(torch.ops.lgkernels, op).default._schema.arguments]
    return [(i, names[i]) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]


def test_every_op_of_a_kernel_family_is_here():
    """Ops with nothing but a reference take torch's own errors; all others are listed."""
    alone = {op for op in dispatch.registered_ops() if len(dispatch.backends(op)) == 1}
    defined = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if OURS in name}
    native = {op for op in defined if op.removesuffix("_backward") not in alone} - {"without_backward"}
    assert native == {op for _, op in DOORS}


@pytest.mark.parametrize("family, op", DOORS)
def test_wrong_sizes(family, op):
    """One entry more in any dimension, one dimension more. (The first tensor sets the sizes that the others must have:
    changed alone, it is one of the others that no longer fits.)"""
    arguments = DOORS[family, op]
    accepted(op, arguments, "auto")
    for i, name in tensors(op, arguments)[1:]:
        tensor = arguments[i]
        for d in range(tensor.dim()):
            if (op, name, d) in FREE:
                continue
            longer = torch.cat([tensor, tensor.narrow(d, 0, 1)], d)
            with pytest.raises((ValueError, TypeError)):
                accepted(op, [*arguments[:i], longer, *arguments[i + 1 :]], "auto")


@pytest.mark.parametrize("family, op", [key for key in DOORS if "backward" in key[1]])
def test_saved_tensors_of_another_dtype_or_stride(family, op):
    """A hook on saved tensors may give others back than it took: their values count, never their bytes."""
    arguments = DOORS[family, op]

    def result(i, tensor):
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        own[i] = tensor
        return getattr(torch.ops.lgkernels, op)(*own, "auto"), own[0]

    for i, name in tensors(op, arguments)[1:]:
        tensor = arguments[i]
        if not tensor.is_floating_point():
            continue
        rounded = tensor.bfloat16()
        expected = result(i, rounded.float())
        others = [rounded, rounded.double()]
        if tensor.dim():
            others.append(torch.stack([rounded.float()] * 2, -1)[..., 0])
        for other in others:
            try:
                torch.testing.assert_close(result(i, other), expected, rtol=1e-2, atol=1e-2, check_dtype=False)
            except (TypeError, ValueError) as refused:
                assert name in str(refused)


@pytest.mark.parametrize("family, op", DOORS)
def test_other_memory(family, op):
    """On another device, or a storage that was freed (as a sharded parameter's is)."""
    arguments = DOORS[family, op]
    for i, name in tensors(op, arguments)[1:]:
        with pytest.raises(ValueError, match="must be on"):
            accepted(op, [*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :]], "auto")
        freed = arguments[i].clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"\b{name} must have memory"):
            getattr(torch.ops.lgkernels, op)(*arguments[:i], freed, *arguments[i + 1 :], "auto")
