"""Bad input: which exception, and a message that names the argument, what was got and what was expected."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import dispatch
from tests.support.problems import randn

IMPL = f"impl must be one of {', '.join(map(repr, dispatch.IMPLEMENTATIONS))}"
A, T = randn(2, 3, 4, 4), torch.tensor([0, 1])


def loss(activation=A, target=T, modulation=None, **changes):
    return LF.lls_loss(activation, target, modulation, **{"num_classes": 5, "pool_size": 2, **changes})


LOSS = [
    (dict(activation=[1.0]), TypeError, "activation must be a torch.Tensor, got list"),
    (dict(activation=A.int()), TypeError, "activation must be one of float32, bfloat16, float16, float64, got int32"),
    (dict(activation=randn(2, 3, 4)), ValueError, "activation must be (B, C, H, W) or (B, N), got shape (2, 3, 4)"),
    (
        dict(activation=randn(2, 0, 4, 4)),
        ValueError,
        "activation must have no empty dimension but the batch, got shape (2, 0, 4, 4)",
    ),
    (dict(target=None), TypeError, "target must be a torch.Tensor, got NoneType"),
    (
        dict(target=T.float()),
        TypeError,
        "target must hold integers (int64, int32, ...), got float32; class indices are expected",
    ),
    (
        dict(target=torch.tensor([0])),
        ValueError,
        "target must have shape (2,) (one class index per row of activation), got (1,)",
    ),
    (
        dict(target=torch.tensor([[0], [1]])),
        ValueError,
        "target must have shape (2,) (one class index per row of activation), got (2, 1)",
    ),
    (
        dict(target=torch.tensor([0, 5])),
        ValueError,
        "target must hold class indices in [0, 4] or ignore_index=-100, got 5",
    ),
    (
        dict(target=torch.tensor([-1, 0])),
        ValueError,
        "target must hold class indices in [0, 4] or ignore_index=-100, got -1",
    ),
    (
        dict(target=torch.tensor([-100, 7]), ignore_index=7, num_classes=9),
        ValueError,
        "target must hold class indices in [0, 8] or ignore_index=7, got -100",
    ),
    (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    (dict(num_classes=2.0), TypeError, "num_classes must be an int, got float"),
    (dict(num_classes=True), TypeError, "num_classes must be an int, got bool"),
    (dict(pool_size=0), ValueError, "pool_size must be at least 1, got 0"),
    (dict(pool_size=(2, 2)), TypeError, "pool_size must be an int, got tuple"),
    (dict(waveform="sine"), ValueError, "waveform must be one of 'square', 'cosine', got 'sine'"),
    (dict(loss="mse"), ValueError, "loss must be one of 'cross_entropy', 'hard_sigmoid_mse', got 'mse'"),
    (dict(reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (dict(temperature=0.0), ValueError, "temperature must be greater than 0, got 0.0"),
    (dict(temperature=float("nan")), ValueError, "temperature must be greater than 0, got nan"),
    (dict(temperature="0.5"), TypeError, "temperature must be a number, got str"),
    (dict(temperature=float("inf")), ValueError, "temperature must be finite, got inf"),
    (dict(basis_scale=float("nan")), ValueError, "basis_scale must be finite, got nan"),
    (dict(normalize="no"), TypeError, "normalize must be a bool, got str"),
    (dict(ignore_index=1.5), TypeError, "ignore_index must be an int, got float"),
    (dict(impl=None), TypeError, f"{IMPL}, got NoneType"),
    (
        dict(modulation=randn(0, 5)),
        ValueError,
        "modulation must be (num_classes,) or (K, num_classes) with num_classes=5, got shape (0, 5)",
    ),
    (
        dict(activation=torch.ones(2, 12).to_sparse()),
        TypeError,
        "activation must be a dense tensor, got layout torch.sparse_coo; use .to_dense()",
    ),
    (dict(eps=-1.0), ValueError, "eps must be greater than 0, got -1.0"),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing must lie in [0.0, 1.0], got 1.5"),
    (
        dict(loss="hard_sigmoid_mse", label_smoothing=0.1),
        ValueError,
        "label_smoothing must be 0 with loss='hard_sigmoid_mse', got 0.1",
    ),
    (
        dict(modulation=torch.ones(5, dtype=torch.int64)),
        TypeError,
        "modulation must be one of float32, bfloat16, float16, float64, got int64",
    ),
    (
        dict(modulation=randn(4)),
        ValueError,
        "modulation must be (num_classes,) or (K, num_classes) with num_classes=5, got shape (4,)",
    ),
    (
        dict(modulation=randn(5, 4)),
        ValueError,
        "modulation must be (num_classes,) or (K, num_classes) with num_classes=5, got shape (5, 4)",
    ),
    (
        dict(modulation=randn(1, 5, 5)),
        ValueError,
        "modulation must be (num_classes,) or (K, num_classes), got shape (1, 5, 5)",
    ),
    (
        dict(basis=randn(5, 11)),
        ValueError,
        "basis must have shape (5, 12) (the size of the pooled latents), got (5, 11)",
    ),
    (dict(basis=randn(12)), ValueError, "basis must be (K, 12), got shape (12,)"),
    (dict(basis=randn(4, 12)), ValueError, "basis must have 5 rows (num_classes), got shape (4, 12)"),
    (
        dict(basis=randn(4, 12), modulation=randn(7, 5)),
        ValueError,
        "basis must have 7 rows (those of modulation), got shape (4, 12)",
    ),
    (dict(target=T.to("meta")), ValueError, "target must be on cpu like activation, got meta; move it with .to('cpu')"),
    (dict(impl="fast"), ValueError, f"{IMPL}, got 'fast'"),
    (
        dict(impl="triton", activation=A.double()),
        ValueError,
        "impl='triton' can't run lls_loss on cpu torch.float64: float64 is for the reference only; "
        "usable here: ['reference']",
    ),
]


def table(rows):
    return pytest.mark.parametrize(
        "changes, error, message", rows, ids=[f"{i}-{'-'.join(r[0])}" for i, r in enumerate(rows)]
    )


@table(LOSS)
def test_loss(changes, error, message):
    with pytest.raises(error) as caught:
        loss(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("target", [torch.tensor([0, 5]), torch.tensor([3, -7])], ids=str)
def test_a_class_out_of_range_is_refused_by_every_backend(impl, target):
    with pytest.raises(
        ValueError, match=r"target must hold class indices in \[0, 4\] or ignore_index=-100, got (5|-7)"
    ):
        loss(target=target, impl=impl)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (dict(rows=0), ValueError, "rows must be at least 1, got 0"),
        (dict(dim=1.5), TypeError, "dim must be an int, got float"),
        (dict(min_freq=float("nan")), ValueError, "min_freq must be finite, got nan"),
        (dict(waveform="saw"), ValueError, "waveform must be one of 'square', 'cosine', got 'saw'"),
        (dict(impl="fast"), ValueError, f"{IMPL}, got 'fast'"),
    ],
    ids=["rows", "dim", "frequency", "waveform", "impl"],
)
def test_basis(value, error, message):
    with pytest.raises(error) as caught:
        LF.lls_basis(**{"rows": 2, "dim": 3, **value})
    assert str(caught.value) == message


def conv(**changes):
    return lnn.LLSConvBlock(3, 4, 3, **{"num_classes": 5, "pool_size": 2, **changes})


def linear(**changes):
    return lnn.LLSLinearBlock(6, 8, **{"num_classes": 5, "pool_size": 8, **changes})


@table(
    [
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(pool_size=-1), ValueError, "pool_size must be at least 1, got -1"),
        (
            dict(modulation="full"),
            ValueError,
            "modulation must be one of None, 'vector', 'matrix', 'reduced', got 'full'",
        ),
        (dict(modulation="reduced", reduced_rows=0), ValueError, "reduced_rows must be at least 1, got 0"),
        (dict(waveform="sine"), ValueError, "waveform must be one of 'square', 'cosine', got 'sine'"),
        (
            dict(activation="swish"),
            ValueError,
            "activation must be one of 'leaky_relu', 'relu', 'gelu', 'silu', 'tanh', 'identity', got 'swish'",
        ),
        (dict(temperature=-0.5), ValueError, "temperature must be greater than 0, got -0.5"),
        (dict(label_smoothing=-0.1), ValueError, "label_smoothing must lie in [0.0, 1.0], got -0.1"),
        (dict(impl="quick"), ValueError, f"{IMPL}, got 'quick'"),
    ]
)
@pytest.mark.parametrize("make", [conv, linear])
def test_block_arguments(make, changes, error, message):
    with pytest.raises(error) as caught:
        make(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "make, x, target, error, message",
    [
        (conv, randn(2, 4, 5, 5), T, ValueError, "x must have 3 channels (in_channels), got shape (2, 4, 5, 5)"),
        (conv, randn(2, 3), T, ValueError, "x must be (B, 3, H, W), got shape (2, 3)"),
        (
            conv,
            randn(2, 3, 5, 5).int(),
            T,
            TypeError,
            "x must be one of float32, bfloat16, float16, float64, got int32",
        ),
        (
            conv,
            randn(2, 3, 5, 5),
            T.float(),
            TypeError,
            "target must hold integers (int64, int32, ...), got float32; class indices are expected",
        ),
        (
            conv,
            randn(2, 3, 5, 5),
            T[:1],
            ValueError,
            "target must have shape (2,) (one class index per row of x), got (1,)",
        ),
        (
            conv,
            randn(2, 3, 5, 5),
            torch.tensor([0, 5]),
            ValueError,
            "target must hold class indices in [0, 4] or ignore_index=-100, got 5",
        ),
        (linear, randn(2, 5), T, ValueError, "x must have 6 features (in_features), got shape (2, 5)"),
        (linear, randn(2, 6, 1, 1), T, ValueError, "x must be (B, 6), or (B, T, 6) for tokens, got shape (2, 6, 1, 1)"),
        (
            linear,
            randn(2, 6),
            T.to("meta"),
            ValueError,
            "target must be on cpu like x, got meta; move it with .to('cpu')",
        ),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_block_input(make, x, target, error, message):
    with pytest.raises(error) as caught:
        make()(x, target)
    assert str(caught.value) == message


def test_refused_input_changes_nothing():
    """No running statistic moves before the arguments are known to be good."""
    block = conv()
    with pytest.raises(ValueError):
        block(randn(2, 3, 5, 5), torch.tensor([0, 5]))
    assert not block.norm.running_mean.any() and (block.norm.running_var == 1).all()
    assert block.norm.num_batches_tracked == 0


def test_unusable_impl_says_why_and_what_else(monkeypatch):
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    assert torch.equal(loss(), loss(impl="reference"))
    monkeypatch.setenv("LGKERNELS_IMPL", "quick")
    with pytest.raises(ValueError, match="LGKERNELS_IMPL must be one of .* got 'quick'"):
        loss()
    assert torch.isfinite(loss(impl="reference"))  # the argument wins
    monkeypatch.delenv("LGKERNELS_IMPL")
    with pytest.raises(
        ValueError, match="impl='cuda' can't run lls_loss on cpu torch.float32: .*usable here: .*'reference'"
    ):
        loss(impl="cuda")
