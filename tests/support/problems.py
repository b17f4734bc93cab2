"""Arguments for kernels, and the comparison of one backend's function with its family's reference."""

import torch

from tests.support.cases import generator
from tests.support.layouts import arrange
from tests.support.tolerances import assert_accurate, assert_bit_equal

DEVICE = "cpu"  # where the backend under test runs; with --gpu "cuda". The reference runs on the CPU.


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(size=shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def targets(batch, classes, seed=1):
    return torch.randint(0, max(classes, 1), (batch,), generator=generator(seed))


def preactivation(shape, dtype=torch.float32, layout="dense", seed=3):
    return arrange(randn(*shape, seed=seed, dtype=dtype), layout)


def _map(value, function):
    return function(value) if isinstance(value, torch.Tensor) else value


def _copy(tensor, device="cpu"):
    """A copy with the same strides, stride 0 included, and the same offset from alignment."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    storage = torch.as_strided(tensor.detach(), (tensor.storage_offset() + span,), (1,), 0).clone().to(device)
    return torch.as_strided(storage, tensor.shape, tensor.stride(), tensor.storage_offset())


def place(tensor):
    """`tensor` on DEVICE, in its layout (itself where it lies there)."""
    return tensor if tensor is None or tensor.device.type == DEVICE else _copy(tensor, DEVICE)


def _outputs(result):
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def check(
    module,
    name,
    arguments,
    keywords=(),
    *,
    inplace=(),
    length=1,
    per_row=False,
    reference_arguments=None,
    magnitudes=None,
    reference,
):
    """Run function `name` of `module`, of the reference, and of the float64 reference on the same arguments.

    `inplace` are positions of arguments that the function writes to: they are compared as outputs, all others must
    be unchanged bit for bit. `reference_arguments`, where given, replace `arguments` for the reference (packed basis).
    `magnitudes`, where given, makes from the float64 results the magnitudes of their summands, None where not needed.
    Returns the outputs of `module`.
    """
    keywords = dict(keywords)

    def run(source, values):
        values = [_map(v, lambda t: _copy(t, t.device)) if i in inplace else v for i, v in enumerate(values)]
        outputs = _outputs(getattr(source, name)(*values, **keywords))
        return outputs + tuple(values[i] for i in inplace if values[i] is not None)

    before = [_map(v, torch.clone) for v in arguments]
    placed = [_map(v, place) for v in arguments]
    got = run(module, placed)
    for i, (value, old) in enumerate(zip(placed, before)):
        if isinstance(value, torch.Tensor):
            assert_bit_equal(f"{name}: argument {i} was written to", value, old)
    definition = list(reference_arguments or arguments)
    same = run(reference, definition)
    truth = run(reference, [_map(v, lambda t: t.double() if t.is_floating_point() else t) for v in definition])
    assert len(got) == len(same), f"{name}: {len(got)} results, the reference has {len(same)}"
    sizes = magnitudes(*truth) if magnitudes else [None] * len(truth)
    for i, (ours, torchs, exact, size) in enumerate(zip(got, same, truth, sizes, strict=True)):
        assert_accurate(f"{name}[{i}]", ours, torchs, exact, length, per_row=per_row, magnitude=size)
    return got
