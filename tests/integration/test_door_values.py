"""The door of every op: layouts, dtypes and words that no kernel knows are refused by name, whoever calls it.

Made from the schemas and from the arguments that the ops accept, `tests/<family>/doors.py`.
"""

import warnings

import pytest
import torch

import lgkernels.nn as lnn
from lgkernels.core import dispatch, trust
from tests.integration.test_door import DOORS, copied

# Tensors that may be of another dtype as well, and of which.
ALSO = {("feedback_product", "weight"): torch.int32, ("feedback_matrix", "weight"): torch.int32}


def arguments_of(op):
    """(position, name, is a list) of every tensor argument."""
    schema = getattr(torch.ops.lgkernels, op).default._schema
    return [(i, a.name, "List" in str(a.type)) for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)]


def call(op, arguments, position, value):
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    given[position] = value
    return getattr(torch.ops.lgkernels, op)(*given, "auto")


def not_dense(tensor):
    floating = tensor.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # betas and deprecations of torch's layouts
        yield torch.nested.nested_tensor([tensor, tensor])
        yield torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged) if tensor.dim() else tensor.to_sparse()
        yield tensor.to_sparse()
        if tensor.dim():
            yield floating.to_mkldnn()
        yield torch.quantize_per_tensor(floating, 0.1, 0, torch.qint8)
        if tensor.dim() == 2:
            yield tensor.to_sparse_csr()


ALL = {key[1]: arguments for key, arguments in DOORS.items()}


@pytest.mark.parametrize("op", ALL)
def test_layouts(op):
    for i, name, several in arguments_of(op):
        tensor = torch.ones(3, 4) if not isinstance(ALL[op][i], torch.Tensor) else ALL[op][i]
        for other in not_dense(tensor):
            with pytest.raises(TypeError, match=rf"^{name} must be a (dense|plain torch)"):
                call(op, ALL[op], i, [other] if several else other)


@pytest.mark.parametrize("op", ["lora_linear", "lokr_linear", "contrastive", "info_nce", "peer_normalization"])
def test_layouts_of_ops_without_kernels(op):
    places = arguments_of(op)
    tensors = {i: torch.ones(3, 3) for i, _, _ in places}
    schema = getattr(torch.ops.lgkernels, op).default._schema
    numbers = {"float": 1.0, "int": 1, "bool": True}
    given = [tensors.get(i, numbers.get(str(a.type))) for i, a in enumerate(schema.arguments)][:-1]
    for i, name, _ in places:
        for other in not_dense(tensors[i]):
            with pytest.raises(TypeError, match=rf"^{name} must be a (dense|plain torch)"):
                call(op, given, i, other)


@pytest.mark.parametrize("op", ALL)
def test_dtypes(op):
    """Whole numbers for fractions and the other way round, complex numbers, bools."""
    for i, name, _ in arguments_of(op):
        tensor = ALL[op][i]
        if not isinstance(tensor, torch.Tensor):
            continue
        others = [torch.complex64, torch.float8_e4m3fn, torch.float32, torch.int64, torch.int32, torch.bool]
        integers = torch.int64, torch.int32
        for dtype in others:
            if dtype in (tensor.dtype, ALSO.get((op, name))) or name == "target" and dtype in integers:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be "):
                call(op, ALL[op], i, tensor.to(dtype))


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("op", ALL)
def test_words(op, impl):
    """The name of a law, of a reduction, of a loss, of a waveform."""
    schema = getattr(torch.ops.lgkernels, op).default._schema
    for i, argument in enumerate(schema.arguments[:-1]):
        if str(argument.type) == "str":
            given = [a.clone() if isinstance(a, torch.Tensor) else a for a in ALL[op]]
            given[i] = "no such word"
            with pytest.raises(ValueError, match=rf"^{argument.name} must be one of .*, got 'no such word'"):
                getattr(torch.ops.lgkernels, op)(*given, impl)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_sizes(impl):
    """Whole numbers that no call of the library gives an op: the result, or a refusal by name. (An error of native
    code has another class; a division by 0 there ends the process.)"""
    tried = 0
    for family, op in DOORS:
        if family == "equilibrium" or impl == "torch" and "torch" not in dispatch.backends(trust.OPS[op].group):
            continue  # the edges of a net are checked by what makes them
        schema = getattr(torch.ops.lgkernels, op).default._schema
        for i, argument in enumerate(schema.arguments[:-1]):
            for value in wrong_sizes(ALL[op][i]) if "int" in str(argument.type) else ():
                given = [copied(a) for a in ALL[op]]
                given[i] = value
                tried += 1
                try:
                    getattr(torch.ops.lgkernels, op)(*given, impl)
                except (ValueError, TypeError) as refused:
                    assert " must " in str(refused), (op, argument.name, value, refused)
                except RuntimeError as refused:
                    assert refused.__class__ is RuntimeError and argument.name in TORCHS, (op, argument.name, value)
    assert tried > 50


TORCHS = ("stride", "padding", "dilation", "groups")  # of a convolution, which torch itself refuses


def wrong_sizes(value):
    """Of a size, or of a list of sizes: 0, -1 and 1, and lists that are too short or too long."""
    if isinstance(value, list):
        changed = [value[:j] + [v] + value[j + 1 :] for j in range(len(value)) for v in (0, -1, 1)]
        return [*changed, [], value[:-1], value + [1]]
    return [0, -1, 1] if isinstance(value, int) and not isinstance(value, bool) else []


def test_the_statistics_of_a_block():
    """A buffer of whole numbers would be read as bytes of floats."""
    block = lnn.LLSConvBlock(3, 4, 3, num_classes=5, pool_size=2)
    block.norm.running_mean = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="running_mean must be one of float32, .*, got int64"):
        block(torch.ones(2, 3, 6, 6), torch.tensor([0, 1]))
