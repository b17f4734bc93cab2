"""Bad input to the family `feedback`: which exception, and a message that names the argument, got and expected."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from lgkernels.random import RandomFeedback
from tests.feedback.common import randn

IMPL = f"impl must be one of {', '.join(map(repr, dispatch.IMPLEMENTATIONS))}"
X, W, B = randn(2, 6), randn(4, 6), randn(4)
IMAGE, KERNEL = randn(2, 6, 8, 8), randn(4, 3, 3, 3)
RANDOM = RandomFeedback(0)

LINEAR = [
    (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    (dict(x=X.int()), TypeError, "x must be one of float32, bfloat16, float16, float64, got int32"),
    (dict(x=randn(2, 5)), ValueError, "x must be (..., 6) (K of weight), got shape (2, 5)"),
    (dict(x=randn()), ValueError, "x must be (..., 6) (K of weight), got shape ()"),
    (dict(x=X.half()), TypeError, "x must have weight's dtype float32 (outside of autocast), got float16"),
    (dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    (dict(weight=W.long()), TypeError, "weight must be one of float32, bfloat16, float16, float64, got int64"),
    (dict(weight=randn(6)), ValueError, "weight must be (N, K), got shape (6,)"),
    (dict(bias=randn(5)), ValueError, "bias must have shape (4,) (one for each output of weight), got (5,)"),
    (dict(bias=B.double()), TypeError, "bias must have weight's dtype float32 (outside of autocast), got float64"),
    (dict(x=X.to("meta")), ValueError, "x must be on cpu like weight, got meta; move it with .to('cpu')"),
    (dict(impl="fast"), ValueError, f"{IMPL}, got 'fast'"),
    (dict(impl=3), TypeError, f"{IMPL}, got 3"),
]
FEEDBACK = LINEAR + [
    (
        dict(feedback=None),
        TypeError,
        "feedback must be a torch.Tensor or a lgkernels.random.RandomFeedback, got NoneType",
    ),
    (dict(feedback=W.int()), TypeError, "feedback must be one of float32, bfloat16, float16, float64, got int32"),
    (dict(feedback=randn(6, 4)), ValueError, "feedback must have shape (4, 6) (that of weight), got (6, 4)"),
    (dict(feedback=W.to("meta")), ValueError, "feedback must be on cpu like weight, got meta; move it with .to('cpu')"),
    (
        dict(feedback=RandomFeedback(0).to("meta")),
        ValueError,
        "feedback must be on cpu like weight, got meta; move it with .to('cpu')",
    ),
]
SYMMETRIC = LINEAR + [
    (dict(scale=0.0), ValueError, "scale must be greater than 0, got 0.0"),
    (dict(scale=float("nan")), ValueError, "scale must be greater than 0, got nan"),
    (dict(scale="kaiming"), ValueError, "scale must be one of 'mean_abs', got 'kaiming'"),
    (dict(scale=randn(2)), TypeError, "scale must be a number or 'mean_abs', got Tensor"),
    (dict(scale=True), TypeError, "scale must be a number or 'mean_abs', got bool"),
    (
        dict(magnitude=0.5),
        TypeError,
        "magnitude must be a torch.Tensor or a lgkernels.random.RandomFeedback, got float",
    ),
    (dict(magnitude=randn(4)), ValueError, "magnitude must have shape (4, 6) (that of weight), got (4,)"),
    (dict(sign_zero="minus"), ValueError, "sign_zero must be one of 'zero', 'plus', got 'minus'"),
    (
        dict(packed_signs=True),
        ValueError,
        "sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got 'zero'",
    ),
]
CONV = [
    (dict(weight=randn(4, 3)), ValueError, "weight must be (O, C / groups, kh, kw), got shape (4, 3)"),
    (
        dict(x=randn(2, 4, 8, 8)),
        ValueError,
        "x must be (B, 6, H, W) (weight's channels times groups) or the same without B, got shape (2, 4, 8, 8)",
    ),
    (
        dict(x=randn(8, 8)),
        ValueError,
        "x must be (B, 6, H, W) (weight's channels times groups) or the same without B, got shape (8, 8)",
    ),
    (dict(weight=randn(5, 3, 3, 3)), ValueError, "groups must divide weight's 5 outputs, got 2"),
    (dict(groups=0), ValueError, "groups must be at least 1, got 0"),
    (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    (dict(stride=(1, 2, 3)), TypeError, "stride must be an int or two of them, got (1, 2, 3)"),
    (dict(stride=1.5), TypeError, "stride must be an int or two of them, got 1.5"),
    (dict(dilation=True), TypeError, "dilation must be an int or two of them, got True"),
    (dict(padding=-1), ValueError, "padding must be at least 0, got -1"),
    (dict(padding="full"), ValueError, "padding must be one of 'same', 'valid', got 'full'"),
    (
        dict(padding="same", stride=2),
        ValueError,
        "padding must be numbers where stride is not 1, got 'same' with stride=(2, 2)",
    ),
    (
        dict(dilation=4),
        ValueError,
        "x must reach over weight's kernel, (9, 9) with dilation, when padded by (0, 0), got shape (2, 6, 8, 8)",
    ),
    (dict(bias=randn(3)), ValueError, "bias must have shape (4,) (one for each output of weight), got (3,)"),
]
PROJECTION = [
    (dict(error=randn(3)), ValueError, "error must be (B, C), got shape (3,)"),
    (
        dict(error=torch.ones(2, 3, dtype=torch.int64)),
        TypeError,
        "error must be one of float32, bfloat16, float16, float64, got int64",
    ),
    (dict(feedback=1.0), TypeError, "feedback must be a torch.Tensor or a lgkernels.random.RandomFeedback, got float"),
    (
        dict(feedback=randn(3, 5)),
        ValueError,
        "feedback must have shape (3, 2, 2) or (3, 4) (classes, then shape), got (3, 5)",
    ),
    (
        dict(feedback=randn(2, 4)),
        ValueError,
        "feedback must have shape (3, 2, 2) or (3, 4) (classes, then shape), got (2, 4)",
    ),
    (
        dict(feedback=randn(3, 4).to("meta")),
        ValueError,
        "feedback must be on cpu like error, got meta; move it with .to('cpu')",
    ),
    (dict(shape=()), ValueError, "shape must be the sizes of one sample, none negative, got ()"),
    (dict(shape=(2, -2)), ValueError, "shape must be the sizes of one sample, none negative, got (2, -2)"),
    (dict(shape=(2.0,)), ValueError, "shape must be the sizes of one sample, none negative, got (2.0,)"),
]
T = torch.tensor([0, 2])
TARGET = [
    (dict(target=[0, 2]), TypeError, "target must be a torch.Tensor, got list"),
    (
        dict(target=T.float()),
        TypeError,
        "target must hold integers (int64, int32, ...), got float32; class indices are expected",
    ),
    (dict(target=T.view(2, 1)), ValueError, "target must be (B,) class indices or (B, C) floats, got shape (2, 1)"),
    (dict(target=torch.tensor([0, 3])), ValueError, "target must hold class indices in [0, 2], got 3"),
    (
        dict(target=torch.tensor([0, -1]), feedback=RANDOM),
        ValueError,
        f"target must hold class indices in [0, {2**32 - 1}], got -1",
    ),
    (
        dict(feedback=randn(3, 5)),
        ValueError,
        "feedback must have shape (3, 2, 2) or (3, 4) (classes, then shape), got (3, 5)",
    ),
]


def table(rows):
    return pytest.mark.parametrize(
        "changes, error, message", rows, ids=[f"{i}-{'-'.join(r[0])}" for i, r in enumerate(rows)]
    )


def check(function, arguments, changes, error, message):
    with pytest.raises(error) as caught:
        function(**{**arguments, **changes})
    assert str(caught.value) == message


@table(FEEDBACK)
def test_feedback_linear(changes, error, message):
    check(LF.feedback_linear, dict(x=X, weight=W, bias=B, feedback=W), changes, error, message)


@table(SYMMETRIC)
def test_sign_symmetric_linear(changes, error, message):
    check(LF.sign_symmetric_linear, dict(x=X, weight=W, bias=B), changes, error, message)


@table(CONV)
def test_convolutions(changes, error, message):
    arguments = dict(x=IMAGE, weight=KERNEL, groups=2)
    check(LF.sign_symmetric_conv2d, arguments, changes, error, message)
    check(LF.feedback_conv2d, dict(arguments, feedback=RANDOM), changes, error, message)


@table(PROJECTION)
def test_feedback_projection(changes, error, message):
    check(LF.feedback_projection, dict(error=randn(2, 3), feedback=randn(3, 4), shape=(2, 2)), changes, error, message)


@table(TARGET)
def test_target_projection(changes, error, message):
    check(LF.target_projection, dict(target=T, feedback=randn(3, 4), shape=(2, 2)), changes, error, message)


MODULES = [
    (
        lnn.SignSymmetricLinear,
        dict(rule="fa"),
        ValueError,
        "rule must be one of 'usf', 'frsf', 'brsf', 'signed_init', got 'fa'",
    ),
    (
        lnn.SignSymmetricLinear,
        dict(scale="he"),
        ValueError,
        "scale must be one of 'kaiming', 'xavier', 'inv_sqrt_fan_in', 'he_fan_out', 'he_fan_in', got 'he'",
    ),
    (lnn.SignSymmetricLinear, dict(scale=0), ValueError, "scale must be greater than 0, got 0"),
    (lnn.SignSymmetricLinear, dict(scale=None), TypeError, "scale must be a name or a number, got NoneType"),
    (
        lnn.SignSymmetricLinear,
        dict(rule="signed_init", scale="mean_abs"),
        ValueError,
        "packed_signs must be False and scale a fixed one with rule='signed_init' (it does not read the weight), got "
        "packed_signs=False, scale='mean_abs'",
    ),
    (
        lnn.SignSymmetricLinear,
        dict(law="normal"),
        ValueError,
        "law must be None with rule='usf' (it has no random magnitudes), got 'normal'",
    ),
    (
        lnn.SignSymmetricLinear,
        dict(rule="frsf", stream=-1),
        ValueError,
        "stream must be an integer in [0, 4294967296), got -1",
    ),
    (
        lnn.FeedbackAlignmentLinear,
        dict(feedback_init="mean_abs"),
        ValueError,
        "feedback_init must be one of 'kaiming', 'xavier', 'inv_sqrt_fan_in', 'he_fan_out', 'he_fan_in', "
        "got 'mean_abs'",
    ),
    (lnn.FeedbackAlignmentLinear, dict(seed="1"), TypeError, "seed must be an int, got str"),
]


@pytest.mark.parametrize("layer, options, error, message", MODULES, ids=[str(row[1]) for row in MODULES])
def test_modules(layer, options, error, message):
    check(lambda **options: layer(6, 4, **options), {}, options, error, message)


def test_modules_check_their_input():
    with pytest.raises(ValueError, match=r"x must be \(..., 6\) \(K of weight\), got shape \(2, 5\)"):
        lnn.SignSymmetricLinear(6, 4)(randn(2, 5))
    with pytest.raises(ValueError, match=r"x must be \(B, 6, H, W\)"):
        lnn.FeedbackAlignmentConv2d(6, 4, 3)(randn(2, 5, 8, 8))


def test_kernels_refuse_float64():
    with pytest.raises(
        ValueError,
        match="impl='triton' can't run feedback_product on cpu torch.float64: float64 is for the reference only",
    ):
        LF.feedback_linear(X.double(), W.double(), feedback=RANDOM, impl="triton")
