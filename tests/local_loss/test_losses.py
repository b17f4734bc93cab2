"""The local losses as a user calls them, against autograd of the written-out definitions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lgkernels.functional as LF
from lgkernels.ops.local_loss import reference
from tests.local_loss import definition as definition
from tests.support.cases import DTYPES, subsets
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_accurate, assert_bit_equal, assert_relative, gradient_magnitudes

Y = targets(6, 5)
NEGATIVES = torch.tensor([[1, 5, 7], [0, 2, 2], [3, 4, 6], [7, 1, 0], [5, 5, 5], [0, 1, 2]])
LONE = torch.tensor([3, 1, 3, 0, 2, 3])  # three classes with one row
POSITIVE = torch.tensor([True, False, True, True, False, False])


def call(name, **options):
    """`f(module, *tensors)`: the loss `name` of `module`, LF or the definition."""
    return lambda module, *tensors: getattr(module, name)(*tensors, **options)


def first(function):
    return lambda *arguments: function(*arguments)[0]


# id -> (f(module, *differentiable tensors), their shapes)
CASES = {
    "ce-map": (lambda m, h, w, b: m.local_cross_entropy(h, w, b, Y), [(6, 4, 3, 5), (5, 4), (5,)]),
    "ce-tokens": (lambda m, h, w, b: m.local_cross_entropy(h, w, b, Y, label_smoothing=0.1), [(6, 7, 4), (5, 4), (5,)]),
    "ce-vector": (lambda m, h, w: m.local_cross_entropy(h, w, None, Y, reduction="sum"), [(6, 9), (5, 9)]),
    "ce-rows": (
        lambda m, h, w, b: m.local_cross_entropy(h, w, b, Y, reduction="none", label_smoothing=1.0),
        [(6, 4, 2, 2), (5, 4), (5,)],
    ),
    "goodness-mean": (lambda m, h: m.goodness_loss(h, POSITIVE), [(6, 4, 3, 2)]),
    "goodness-sum": (lambda m, h: m.goodness_loss(h, POSITIVE, threshold=7.0, goodness="sum"), [(6, 7)]),
    "peer": (
        lambda m, h: m.peer_normalization_loss(h, torch.linspace(0, 1, 7, dtype=h.dtype), momentum=0.7)[0],
        [(6, 7)],
    ),
    "sim-std": (lambda m, h, w: m.similarity_matching_loss(h, Y, w, num_classes=5), [(6, 8, 4, 3), (8, 8, 3, 3)]),
    "sim-std-gram": (lambda m, h: m.similarity_matching_loss(h, Y, num_classes=5), [(6, 4, 4, 3)]),
    "sim-flat": (lambda m, h: m.similarity_matching_loss(h, Y, num_classes=5, use_std=False), [(6, 4, 4, 3)]),
    "sim-3-channels": (lambda m, h: m.similarity_matching_loss(h, Y, num_classes=5), [(6, 3, 4, 3)]),
    "sim-one-row": (lambda m, h: m.similarity_matching_loss(h, Y, num_classes=5), [(6, 8, 1, 3)]),
    "sim-linear": (lambda m, h, w: m.similarity_matching_loss(h, Y, w, num_classes=5), [(6, 9), (9, 9)]),
    "sim-linear-gram": (lambda m, h, w: m.similarity_matching_loss(h, Y, w, num_classes=5), [(6, 4), (4, 4)]),
    "predsim": (
        lambda m, h, s, w, b: m.prediction_similarity_loss(
            h, Y, s, w, b, num_classes=5, beta=0.7, pool_kernel=2, pool_padding=1
        ),
        [(6, 4, 4, 4), (4, 4, 3, 3), (5, 36), (5,)],
    ),
    "predsim-linear": (lambda m, h, w: m.prediction_similarity_loss(h, Y, None, w, num_classes=5), [(6, 9), (5, 9)]),
    "ntxent": (call("nt_xent_loss"), [(6, 9)]),
    "ntxent-raw": (call("nt_xent_loss", normalize=False, temperature=2.0), [(6, 9)]),
    "supcon": (lambda m, z: m.supcon_loss(z, Y, base_temperature=0.2), [(6, 9)]),
    "supcon-views": (lambda m, z: m.supcon_loss(z, Y, temperature=0.5), [(6, 3, 9)]),
    "supcon-no-target": (call("supcon_loss", temperature=0.5), [(6, 3, 9)]),
    "supcon-one": (
        lambda m, z: m.supcon_loss(z, Y, contrast_mode="one", temperature=0.3, normalize=False),
        [(6, 2, 5)],
    ),
    "supcon-no-positives": (call("supcon_loss", temperature=0.5), [(6, 9)]),
    "supcon-exclude": (
        lambda m, z: m.supcon_loss(z, LONE, temperature=0.5, anchors_without_positives="exclude"),
        [(6, 9)],
    ),
    "supcon-exclude-all": (call("supcon_loss", temperature=0.5, anchors_without_positives="exclude"), [(6, 9)]),
    "infonce": (call("info_nce_loss", negatives=NEGATIVES, temperature=0.5), [(6, 9), (8, 9)]),
}
ALL = pytest.mark.parametrize("name", CASES)


def inputs(name, dtype=torch.float32, layout="dense", only=None):
    return [
        arrange(randn(*shape, seed=i + 1, dtype=dtype), layout if only in (None, i) else "dense")
        for i, shape in enumerate(CASES[name][1])
    ]


def run(module, name, tensors, scale=-1.3, backward=torch.autograd.grad):
    """(loss, gradients) for an incoming gradient `scale`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = CASES[name][0](module, *leaves)
    weights = torch.linspace(scale, 1, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *backward(loss, leaves, weights)]


def compare(name, tensors):
    before = [t.clone() for t in tensors]
    got = run(LF, name, tensors)
    for tensor, old in zip(tensors, before):
        assert_bit_equal("an input was written to", tensor, old)
    torchs = run(definition, name, tensors)
    truth = run(definition, name, [t.double() for t in tensors])
    # equal rows of a weight: what reaches h adds up to 0
    sizes = run(definition, name, [t.double() for t in tensors], backward=gradient_magnitudes)
    for i, (ours, same, exact, size) in enumerate(zip(got, torchs, truth, sizes)):
        assert_accurate(f"result {i}", ours, same, exact, 100, magnitude=size if i else None)
    return got


@ALL
def test_closed_form_is_the_gradient_of_the_definition(name):
    """float64 to its last digits."""
    tensors = inputs(name, torch.float64)
    for i, (ours, exact) in enumerate(zip(run(LF, name, tensors), run(definition, name, tensors))):
        assert ours.dtype == torch.float64
        assert_relative(f"result {i}", ours, exact, 1e-10)


@ALL
def test_gradcheck(name):
    leaves = [t.requires_grad_() for t in inputs(name, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: CASES[name][0](LF, *t), leaves, eps=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(name, dtype):
    loss, *grads = compare(name, inputs(name, dtype))
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in grads)


@ALL
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "dense"])
def test_layouts(name, layout):
    for i in range(len(CASES[name][1])):
        if layout == "expanded" and (
            name.startswith(("sim", "ntxent", "supcon", "infonce")) or name.startswith("predsim") and i < 2
        ):
            continue  # equal or constant rows, whose exact gradient is zero: below
        compare(name, inputs(name, layout=layout, only=i))


@ALL
def test_requires_grad_subsets(name):
    full = run(LF, name, inputs(name), scale=1.0)
    for needed in subsets(range(len(CASES[name][1]))):
        tensors = [t.requires_grad_(i in needed) for i, t in enumerate(inputs(name))]
        loss = CASES[name][0](LF, *tensors)
        assert_bit_equal("loss", loss.detach(), full[0])
        assert loss.requires_grad == bool(needed)
        if needed:
            loss.sum().backward()
        for i, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (i in needed)
            if i in needed:
                assert_relative("gradient", tensor.grad, full[i + 1], 1e-6)


@ALL
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode):
    with mode():
        tensors = [t.requires_grad_() for t in inputs(name)]
        loss = CASES[name][0](LF, *tensors)
    assert not loss.requires_grad
    assert_bit_equal("loss", loss.clone(), run(LF, name, inputs(name))[0])


@ALL
def test_second_derivative_raises_by_name(name):
    leaves = [t.requires_grad_() for t in inputs(name)]
    grads = torch.autograd.grad(CASES[name][0](LF, *leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        sum(g.square().sum() for g in grads).backward()


# the similarity layer is an ordinary layer, to which autocast applies
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("sim-std", "sim-linear", "sim-linear-gram", "predsim")])
def test_autocast_leaves_the_loss_alone(name):
    tensors = inputs(name)
    expected = run(LF, name, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(LF, name, tensors)
    for a, b in zip(got, expected):
        assert_bit_equal("result", a, b)


def test_map_gradient_is_one_value_per_channel():
    """Stride 0 over the positions, and the map itself is not kept."""
    seen = []
    h = randn(6, 4, 3, 5).requires_grad_()
    middle = h * 1
    middle.register_hook(lambda g: seen.append(g))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = LF.local_cross_entropy(middle, randn(5, 4), None, Y)
    loss.backward()
    assert seen[0].stride()[2:] == (0, 0)
    assert max(s.numel() for s in saved) <= 6 * 5
    assert h.grad.shape == h.shape


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize(
    "loss",
    [
        lambda: LF.nt_xent_loss(randn(600, 8).requires_grad_()),
        lambda: LF.supcon_loss(randn(300, 2, 8).requires_grad_(), targets(300, 7), contrast_mode="one"),
        lambda: LF.info_nce_loss(
            randn(300, 16).requires_grad_(), randn(300, 16), negatives=targets(4800, 300).reshape(300, 16)
        ),
    ],
    ids=["ntxent", "supcon", "infonce"],
)
def test_row_blocks(loss, monkeypatch):
    """Small blocks give the same result, and no tensor is larger than one of them."""
    whole = loss().item()
    monkeypatch.setattr(reference, "ELEMENTS", 10_000)
    with _Largest() as largest:
        blocked = loss()
    assert largest.elements <= 10_000
    assert abs(blocked.item() - whole) <= 1e-5 * abs(whole)


@pytest.mark.parametrize(
    "name", ["ntxent", "ntxent-raw", "supcon", "supcon-views", "supcon-one", "supcon-no-target", "infonce"]
)
@pytest.mark.parametrize("elements", [1, 13, 100])
def test_row_blocks_of_any_size(name, elements, monkeypatch):
    monkeypatch.setattr(reference, "ELEMENTS", elements)
    tensors = inputs(name, torch.float64)
    for ours, exact in zip(run(LF, name, tensors), run(definition, name, tensors)):
        assert_relative("result", ours, exact, 1e-10)


@pytest.mark.parametrize("batch, features", [(3, 40), (40, 3), (12, 12), (2, 1)])
@pytest.mark.parametrize("gram", [False, True])
def test_both_forms_of_the_similarity(batch, features, gram):
    x, y = randn(batch, features, dtype=torch.float64).requires_grad_(), targets(batch, 4)
    loss, grad, _ = reference.similarity(x.detach(), y, 4, True, True, gram=gram)
    if features > 1:
        exact = definition.similarity_matching_loss(x, y, num_classes=4)
        assert_relative("loss", loss, exact.detach(), 1e-10)
        assert_relative("grad", grad, torch.autograd.grad(exact, x)[0], 1e-9)
    else:
        assert torch.isfinite(loss) and not grad.any()


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e3])
def test_constant_rows_have_gradient_zero(batch, value):
    h = randn(batch, 9)
    h[1] = value
    h.requires_grad_()
    LF.similarity_matching_loss(h, targets(batch, 4), num_classes=4).backward()
    assert torch.isfinite(h.grad).all() and h.grad[0].any() and not h.grad[1].any()


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_maps_and_equal_deviations_have_gradient_zero(value):
    h = randn(5, 6, 4, 4)
    h[1] = value  # every map constant: deviations 0, row constant
    h[2] = randn(1, 4, 4, seed=5).expand(6, 4, 4)  # equal deviations
    h[3, 2] = value  # one dead map
    h.requires_grad_()
    loss = LF.similarity_matching_loss(h, targets(5, 4), num_classes=4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all()
    assert not h.grad[1].any() and not h.grad[2].any() and not h.grad[3, 2].any() and h.grad[3, 1].any()


def test_one_class():
    h = randn(5, 6).requires_grad_()
    loss = LF.similarity_matching_loss(h, torch.zeros(5, dtype=torch.long), num_classes=1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all()


def test_large_goodness_does_not_overflow():
    h = torch.full((2, 4), 1e4).requires_grad_()
    loss = LF.goodness_loss(h, torch.tensor([True, False]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all() and not h.grad[0].any()


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name):
    """As torch: the mean over nothing is nan, the gradients are empty."""
    empty = {"Y": Y[:0]}
    leaves = [torch.zeros(0, *s[1:]) if i == 0 else randn(*s) for i, s in enumerate(CASES[name][1])]
    leaves[0].requires_grad_()
    functions = {
        "ce": lambda h, *w: LF.local_cross_entropy(h, w[0], None, empty["Y"]),
        "goodness": lambda h: LF.goodness_loss(h, POSITIVE[:0]),
        "peer": lambda h: LF.peer_normalization_loss(h, torch.zeros(h.shape[1:]))[0],
        "sim": lambda h, *w: LF.similarity_matching_loss(h, empty["Y"], *w, num_classes=5),
        "predsim": lambda h, *w: LF.similarity_matching_loss(h, empty["Y"], num_classes=5),
        "ntxent": LF.nt_xent_loss,
        "supcon": LF.supcon_loss,
        "infonce": lambda q, k: LF.info_nce_loss(q, k, negatives=NEGATIVES[:0]),
    }
    loss = functions[name.split("-")[0]](*leaves)
    loss.backward()
    assert torch.isnan(loss) and leaves[0].grad.shape == leaves[0].shape


def test_equal_rows_of_a_contrastive_loss():
    z = randn(1, 9).expand(6, 9).clone().requires_grad_()
    loss = LF.nt_xent_loss(z)
    loss.backward()
    assert abs(loss.item() - 1.6094379) < 1e-5 and z.grad.abs().max() < 1e-5


def test_overlay_label():
    x = randn(4, 3, 2, 5)
    before = x.clone()
    out = LF.overlay_label(x, torch.tensor([0, 6, 3, 3]), num_classes=7)
    assert_bit_equal("input", x, before)
    flat, source = out.flatten(2), x.flatten(2)
    assert torch.equal(flat[:, :, 7:], source[:, :, 7:])
    expected = torch.zeros(4, 3, 7)
    expected[torch.arange(4), :, torch.tensor([0, 6, 3, 3])] = x.max()
    assert torch.equal(flat[:, :, :7], expected)
    assert LF.overlay_label(x[:, 0, 0], torch.tensor([1, 1, 0, 0]), num_classes=2, value=3)[0].tolist()[:2] == [0, 3]


def test_overlay_label_takes_the_maximum_as_published_code_passes_it():
    x, y = randn(4, 6), torch.tensor([0, 2, 1, 1])
    expected = LF.overlay_label(x, y, num_classes=3)
    assert_bit_equal("of x.max()", LF.overlay_label(x, y, num_classes=3, value=x.max()), expected)
    value = torch.tensor([x.max().item()], dtype=torch.float64, requires_grad=True)
    overlaid = LF.overlay_label(x, y, num_classes=3, value=value)
    assert_bit_equal("of a parameter", overlaid.detach(), expected)
    overlaid.sum().backward()
    assert value.grad.tolist() == [4.0]
    with pytest.raises(ValueError, match="value must be finite in float16, that of x, got 70000.0"):
        LF.overlay_label(x.half(), y, num_classes=3, value=7e4)


KERNELS = ("ce-map", "goodness-mean", "sim-std")


@pytest.mark.parametrize("name", [*KERNELS, "ntxent", "infonce", "peer"])
@pytest.mark.unpoisoned
def test_compiled(name):
    check_compiled(name)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("backend", ["triton", "cuda-simt"], indirect=True)
@pytest.mark.unpoisoned
def test_compiled_with_the_backends_of_gpus(name, backend, impl, monkeypatch):
    monkeypatch.setenv("LGKERNELS_IMPL", impl)
    check_compiled(name)


def check_compiled(name):
    torch._dynamo.reset()
    tensors = inputs(name)
    leaves = [t.clone().requires_grad_() for t in tensors]
    # h is computed inside the graph, as in a network
    function = lambda h, *rest: CASES[name][0](LF, torch.tanh(h), *rest)  # noqa: E731
    eager = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, eager):
        assert_relative("gradient", a, b, 1e-6)


@pytest.mark.unpoisoned
def test_registered_ops(backend, impl):
    """Schemas and shape functions, by torch's own checker, whichever backend runs."""
    ops, tests = torch.ops.lgkernels, ("test_schema", "test_faketensor")
    h, x = randn(6, 4, 3, 5), randn(6, 8)
    grads = ops.local_cross_entropy(h, randn(5, 4), None, Y, 0.1, "mean", True, impl)[1:]
    one = torch.tensor(1.0)
    sim = ops.similarity(h, Y, 5, True, True, impl)[1:]
    for op, arguments in [
        (ops.local_cross_entropy, (h, randn(5, 4), randn(5), Y, 0.1, "none", True, impl)),
        (ops.local_cross_entropy, (x, randn(5, 8), None, Y, 0.1, "mean", False, impl)),
        (ops.local_cross_entropy_backward, (one, *grads, torch.bfloat16, True, True, False, impl)),
        (ops.goodness, (h, POSITIVE, 2.0, True, True, impl)),
        (ops.goodness_backward, (h, randn(6), one, impl)),
        (ops.similarity, (h, Y, 5, True, True, impl)),
        (ops.similarity, (x, Y, 5, True, True, impl)),
        (ops.similarity, (h, Y, 5, True, False, impl)),
        (ops.similarity_backward, (h, *sim, one, impl)),
    ]:
        torch.library.opcheck(op.default, arguments, test_utils=tests)
    if backend != "reference":
        return
    for op, arguments in [
        (ops.peer_normalization, (x, randn(8), 0.5, "auto")),
        (ops.contrastive, (x, Y, 6, 0.5, 1.0, True, False, True, "auto")),
        (ops.contrastive, (x, Y, 6, 0.5, 1.0, False, True, False, "auto")),
        (ops.info_nce, (x, x, NEGATIVES % 6, 0.5, True, "auto")),
    ]:
        torch.library.opcheck(op.default, arguments, test_utils=tests)


X4, W5 = randn(2, 3, 4, 4), randn(5, 3)
Y2 = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (
            lambda: LF.local_cross_entropy(X4.int(), W5, None, Y2),
            TypeError,
            "h must be one of float32, bfloat16, float16, float64, got int32",
        ),
        (
            lambda: LF.local_cross_entropy(X4[0, 0, 0], W5, None, Y2),
            ValueError,
            "h must be (B, C, H, W), (B, T, C) or (B, C), got shape (4,)",
        ),
        (
            lambda: LF.local_cross_entropy(X4[:, :, :0], W5, None, Y2),
            ValueError,
            "h must have no empty dimension but the first, got shape (2, 3, 0, 4)",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5.t(), None, Y2),
            ValueError,
            "weight must be (num_classes, 3) for h of shape (2, 3, 4, 4), got shape (3, 5)",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, randn(3), Y2),
            ValueError,
            "bias must have shape (5,) (one for each output of weight), got (3,)",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2 + 4),
            ValueError,
            "target must hold class indices in [0, 4], got 5",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2 - 100),
            ValueError,
            "target must hold class indices in [0, 4], got -100",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2.float()),
            TypeError,
            "target must hold integers (int64, int32, ...), got float32; class indices are expected",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2, label_smoothing=1.5),
            ValueError,
            "label_smoothing must lie in [0.0, 1.0], got 1.5",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2, reduction="max"),
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (
            lambda: LF.local_cross_entropy(X4, W5, None, Y2.to("meta")),
            ValueError,
            "target must be on cpu like h, got meta; move it with .to('cpu')",
        ),
        (lambda: LF.goodness_loss(X4, Y2), TypeError, "is_positive must be bool, got int64; pass `label == 1`, say"),
        (
            lambda: LF.goodness_loss(X4[0, 0, 0], Y2 == 1),
            ValueError,
            "h must be (B, ...) with at least 2 dimensions, got shape (4,)",
        ),
        (
            lambda: LF.goodness_loss(X4, Y2 == 1, goodness="max"),
            ValueError,
            "goodness must be one of 'mean', 'sum', got 'max'",
        ),
        (
            lambda: LF.peer_normalization_loss(X4, randn(3)),
            ValueError,
            "running_mean must have shape (3, 4, 4) (one row of h_pos), got (3,)",
        ),
        (
            lambda: LF.overlay_label(X4, Y2, num_classes=17),
            ValueError,
            "num_classes must be at most 16, the entries that x of shape (2, 3, 4, 4) offers, got 17",
        ),
        (
            lambda: LF.overlay_label(X4, Y2 + 9, num_classes=10),
            ValueError,
            "label must hold class indices in [0, 9], got 10",
        ),
        (
            lambda: LF.similarity_matching_loss(X4[:, 0], Y2, num_classes=5),
            ValueError,
            "h must be (B, C, H, W) or (B, N), got shape (2, 4, 4)",
        ),
        (
            lambda: LF.similarity_matching_loss(X4, Y2, W5, num_classes=5),
            ValueError,
            "sim_weight must have shape (3, 3, 3, 3) (convolution with padding 1), got (5, 3)",
        ),
        (
            lambda: LF.similarity_matching_loss(X4, Y2, num_classes=1),
            ValueError,
            "target must hold class indices in [0, 0], got 1",
        ),
        (
            lambda: LF.prediction_similarity_loss(X4, Y2, None, W5, num_classes=5),
            ValueError,
            "decoder_weight must have shape (5, 48) (classes, pooled and flattened h), got (5, 3)",
        ),
        (
            lambda: LF.prediction_similarity_loss(W5, Y2, None, W5, num_classes=5, pool_kernel=2),
            ValueError,
            "pool_kernel must be 1 and pool_padding 0 for h of shape (5, 3), got 2 and 0",
        ),
        (
            lambda: LF.nt_xent_loss(W5),
            ValueError,
            "z must be (2N, D), the second views below the first, got shape (5, 3)",
        ),
        (lambda: LF.nt_xent_loss(W5, temperature=0), ValueError, "temperature must be greater than 0, got 0"),
        (lambda: LF.supcon_loss(X4), ValueError, "z must be (B, V, D) or (B, D), got shape (2, 3, 4, 4)"),
        (
            lambda: LF.supcon_loss(W5, Y2),
            ValueError,
            "target must have shape (5,) (one class index per row of z), got (2,)",
        ),
        (
            lambda: LF.supcon_loss(W5, contrast_mode="two"),
            ValueError,
            "contrast_mode must be one of 'all', 'one', got 'two'",
        ),
        (
            lambda: LF.info_nce_loss(W5, W5[:3], negatives=Y2),
            ValueError,
            "keys must be (M, 3) with M >= 5 (row i is the positive of query i), got shape (3, 3)",
        ),
        (
            lambda: LF.info_nce_loss(W5, W5.half(), negatives=Y2),
            TypeError,
            "keys must be float32 like query, got float16",
        ),
        (
            lambda: LF.info_nce_loss(W5, W5, negatives=Y2),
            ValueError,
            "negatives must be (5, n): row numbers of keys for each query, got shape (2,)",
        ),
        (
            lambda: LF.info_nce_loss(W5, W5, negatives=torch.full((5, 2), 5)),
            ValueError,
            "negatives must hold class indices in [0, 4], got 5",
        ),
        (
            lambda: LF.nt_xent_loss(W5[:4], impl="cuda"),
            ValueError,
            "impl='cuda' can't run contrastive on cpu torch.float32: contrastive has no cuda backend; usable here: "
            "['reference']",
        ),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error) as caught:
        bad()
    assert str(caught.value) == message
