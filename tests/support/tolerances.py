"""The one place that says how far a kernel may be from the truth. No reruns, no looser copies elsewhere.

    err(kernel, truth) <= 1.5 * err(torch, truth) + C * eps(dtype) * sqrt(K) * scale

by lgkernels/core/accuracy.py, which says what each of them is; a trial on a user's device takes the same bound.

Summands that cancel leave a truth that is 0 but for rounding, which has no scale of its own. A test that can meet
this gives the `magnitude` of what was added up, |a| + |b| for a - b. Where the truth is smaller than the rounding of
its own summands, C * eps * sqrt(K) * magnitude with the accumulator's eps, this rounding is added to the bound;
elsewhere the magnitude changes nothing.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lgkernels.core.accuracy import C, bound, largest

# golden/lls/README.md, relative to the largest absolute entry; sines and the float32 loss are absolute
GOLDEN = {"float64": 1e-10, "float32_gradient": 1e-5, "float32_loss": 3e-6, "sine": 1.2e-7, "half_gradient": 2e-2}


class _Magnitudes(TorchDispatchMode):
    """Inside, a backward adds absolute values: |a| + |b| for a - b. A product's sign does not matter then."""

    SUMS = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "add", "sub", "sum", "mean")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = args, kwargs or {}
        if function is torch.ops.aten._log_softmax_backward_data.default:
            grad, log_p, dim, _ = args
            return grad.abs() + log_p.exp() * grad.abs().sum(dim, keepdim=True)
        if function.overloadpacket in self.SUMS:
            args = [a.abs() if isinstance(a, torch.Tensor) else a for a in args]
            if function.overloadpacket is torch.ops.aten.sub:
                function = torch.ops.aten.add.Tensor
        return function(*args, **kwargs)


def gradient_magnitudes(outputs, inputs, grad_outputs):
    """The sizes of what a backward adds up, in the places of the gradients."""
    with _Magnitudes():
        return [m.abs() for m in torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=True)]


def assert_accurate(name, got, torch_same_dtype, truth, length, *, per_row=False, rounding=None, magnitude=None):
    """`got` and `torch_same_dtype` have the kernel's output dtype, `truth` is float64; `length` is K of the bound;
    `rounding` is the dtype of values on the way (a half pre-activation) where it is coarser than the output's;
    `magnitude` is that of the truth's summands."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, reference {tuple(truth.shape)}"
    assert got.dtype == torch_same_dtype.dtype, f"{name}: dtype {got.dtype}, reference {torch_same_dtype.dtype}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    got64, torch64 = got.detach().double().cpu(), torch_same_dtype.detach().double().cpu()
    if not torch.isfinite(truth).all():
        special = ~torch.isfinite(truth)
        assert torch.equal(got64[special].nan_to_num(nan=-7.0), truth[special].nan_to_num(nan=-7.0)), (
            f"{name}: not the reference's inf or nan where it has one"
        )
        got64, torch64, truth = (t.masked_fill(special, 0) for t in (got64, torch64, truth))
    assert torch.isfinite(got64).all(), f"{name}: {(~torch.isfinite(got64)).sum()} entries are nan or inf"
    scale = largest(truth, per_row)
    own = (got64 - truth).abs()
    rival = (torch64 - truth).abs()
    if per_row and truth.dim() > 1:
        rival = rival.flatten(1).amax(1).reshape(scale.shape)
    else:
        rival = rival.max()
    allowed = bound(rival, scale, torch.finfo(rounding or got.dtype).eps, length)
    if magnitude is not None:
        accumulator = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
        noise = C * accumulator * math.sqrt(max(length, 1)) * largest(magnitude.double(), per_row)
        allowed = allowed + torch.where(scale <= noise, noise, 0.0)
    excess = (own - allowed).max()
    assert excess <= 0, (
        f"{name}: error {own.max():.3e}, bound {allowed.max():.3e} "
        f"(torch's own error {rival.max():.3e}, largest entry {scale.max():.3e})"
    )


def assert_relative(name, got, expected, tolerance):
    """Largest error relative to the largest absolute entry of `expected` (the golden files' measure)."""
    got, expected = torch.as_tensor(got).detach().double(), torch.as_tensor(expected).double()
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), f"{name}: error {error:.3e} of {scale:.3e}, allowed {tolerance:g}"


def assert_bit_equal(name, got, expected):
    """Same dtype, shape and bits (nan equals nan, 0 does not equal -0)."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        f"{name}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    got, expected = (t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in (got, expected))
    if got.dim() == 0:
        got, expected = got.reshape(1), expected.reshape(1)
    if got.numel():
        same = got.view(torch.uint8) == expected.view(torch.uint8)
        assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} bytes differ"
