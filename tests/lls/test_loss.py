"""`lls_loss` as a user calls it: every backend against autograd of the written-out definition."""

import contextlib
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lgkernels.functional as LF
from lgkernels.ops.lls import reference
from lgkernels.ops.lls.options import HeadOptions
from tests.conftest import BACKENDS, running
from tests.lls.definition import definition
from tests.lls.problems import modulation
from tests.support.cases import DTYPES, SIZES, label, subsets, sweep
from tests.support.layouts import LAYOUTS, arrange
from tests.support.problems import place, randn, targets
from tests.support.tolerances import assert_accurate, assert_bit_equal, assert_relative, gradient_magnitudes


def shape_of(case):
    return (case["B"], case["N"]) if "N" in case else (case["B"], case["C"], case["H"], case["W"])


def run(function, tensors, grad_output, backward=torch.autograd.grad, **arguments):
    """(loss, gradient of activation, gradient of modulation) for copies of the tensors, in their layout."""
    activation, target, m = tensors
    activation = activation.detach().requires_grad_()
    m = None if m is None else m.detach().requires_grad_()
    loss = function(activation, target, m, **arguments)
    wanted = [t for t in (activation, m) if t is not None]
    if grad_output.dim() == 0:
        grad_output = grad_output.expand(loss.shape)
    return [loss.detach(), *backward(loss, wanted, grad_output.to(loss.dtype))]


def compare(impl, activation, target, m, per_row=False, grad_output=None, **arguments):
    """Kernel and plain torch at the given dtype against the definition in float64, with a random incoming gradient."""
    if grad_output is None:
        grad_output = (
            randn(activation.shape[0], seed=99) if arguments.get("reduction") == "none" else torch.tensor(-1.3)
        )
    tensors = (activation, target, m)
    before = [None if t is None else t.clone() for t in tensors]
    zero = arguments.pop("zero_gradient_below_eps", False)
    placed = [place(t) for t in tensors]
    got = run(
        LF.lls_loss,
        placed,
        place(grad_output),
        impl=impl,
        zero_gradient_below_eps=zero,
        **{**arguments, "basis": place(arguments.get("basis"))},
    )
    for name, tensor, old in zip(("activation", "target", "modulation"), placed, before):
        if tensor is not None:
            assert_bit_equal(f"{name} was written to", tensor, old)
    torchs = run(definition, tensors, grad_output, **arguments)
    exact = [t if t is None or not t.is_floating_point() else t.double() for t in tensors]
    truth = run(definition, exact, grad_output, **arguments)
    # equal rows of a basis, one class, one latent: what reaches the activation adds up to 0
    sizes = run(definition, exact, grad_output, backward=gradient_magnitudes, **arguments)
    if zero:
        below = reference.latents(activation, arguments["pool_size"]).norm(dim=1) < arguments.get("eps", 1e-12)
        torchs[1][below] = 0
        truth[1][below] = 0
    length = arguments["pool_size"] ** 2 * activation.shape[1] + max(arguments["num_classes"], activation.shape[0])
    for name, ours, same, exact, size in zip(("loss", "grad activation", "grad modulation"), got, torchs, truth, sizes):
        assert_accurate(
            name,
            ours,
            same,
            exact,
            length,
            per_row=per_row and name == "grad activation",
            magnitude=None if name == "loss" else size,
        )
    return got


BASE = dict(B=3, C=5, H=8, W=8, P=2, classes=10, kind="matrix", waveform="square")
CASES = [
    *sweep(
        BASE, B=(0, 1, 17), C=(1, 7), P=(1, 4, 8), classes=(1, 2, 65), kind=("none", "vector"), waveform=("cosine",)
    ),
    dict(BASE, H=7, W=7, P=2),
    dict(BASE, H=3, W=3, P=2),
    dict(BASE, H=5, W=9, P=4),  # overlapping bins
    dict(BASE, H=1, W=1, P=2),
    dict(BASE, H=2, W=3, P=4),  # up-sampling
    *(
        {"B": 3, "N": n, "P": p, "classes": 10, "kind": "vector", "waveform": "cosine"}
        for n, p in ((48, 48), (7, 16), (63, 64), (129, 65), (1024, 2048), (1, 1), (40, 16))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_loss_and_gradients(impl, case):
    classes = case["classes"]
    compare(
        impl,
        randn(*shape_of(case)),
        targets(case["B"], classes),
        modulation(case["kind"], classes, classes),
        num_classes=classes,
        pool_size=case["P"],
        waveform=case["waveform"],
    )


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_the_definition(case, reduction):
    """float64 to its last digits: closed forms against autograd."""
    classes = case["classes"]
    tensors = (
        randn(*shape_of(case), dtype=torch.float64),
        targets(case["B"], classes),
        modulation(case["kind"], classes, classes),
    )
    tensors = (*tensors[:2], None if tensors[2] is None else tensors[2].double())
    arguments = dict(num_classes=classes, pool_size=case["P"], waveform=case["waveform"], reduction=reduction)
    grad_output = randn(case["B"], seed=99) if reduction == "none" else torch.tensor(0.7)
    ours = run(LF.lls_loss, tensors, grad_output, impl="reference", **arguments)
    exact = run(definition, tensors, grad_output, **arguments)
    for name, a, b in zip(("loss", "grad activation", "grad modulation"), ours, exact):
        assert a.dtype == torch.float64
        assert_relative(name, a.nan_to_num(7), b.nan_to_num(7), 1e-11)


OPTIONS = [
    dict(temperature=2.0),
    dict(label_smoothing=0.1),
    dict(label_smoothing=1.0),
    dict(normalize=False, basis_scale=1 / 20),
    dict(basis_scale=0.25),
    dict(loss="hard_sigmoid_mse"),
    dict(loss="hard_sigmoid_mse", normalize=False),
    dict(loss="hard_sigmoid_mse", ignore_index=2),
    dict(ignore_index=2),
    dict(ignore_index=2, label_smoothing=0.1),
    dict(eps=3.0),
    dict(eps=3.0, zero_gradient_below_eps=True),
    dict(waveform="cosine"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(impl, options, reduction):
    target = targets(6, 7)
    target[1], target[4] = 2, 2
    compare(
        impl,
        randn(6, 5, 4, 4),
        target,
        modulation("matrix", 7, 7),
        num_classes=7,
        pool_size=2,
        reduction=reduction,
        **options,
    )


@pytest.mark.parametrize("rows, classes", [(20, 10), (3, 8), (1, 2)])
def test_reduced_set(impl, rows, classes):
    compare(
        impl,
        randn(4, 6, 4, 4),
        targets(4, classes),
        modulation("matrix", rows, classes),
        num_classes=classes,
        pool_size=2,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
def test_basis_of_the_users(impl, kind, layout):
    """The random-basis control."""
    rows = 9 if kind == "matrix" else 6
    basis = arrange(randn(rows, 20, seed=8), layout)
    before = basis.clone()
    compare(impl, randn(4, 5, 4, 4), targets(4, 6), modulation(kind, rows, 6), num_classes=6, pool_size=2, basis=basis)
    assert_bit_equal("basis was written to", basis, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["activation", "target", "modulation"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (4, 9)], ids=str)
def test_layouts(impl, layout, which, shape):
    tensors = {"activation": randn(*shape), "target": targets(shape[0], 6), "modulation": modulation("matrix", 6, 6)}
    tensors[which] = arrange(tensors[which], layout)
    compare(impl, *tensors.values(), num_classes=6, pool_size=2 if len(shape) == 4 else 9)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "offset"])
def test_layouts_of_the_incoming_gradient(impl, layout):
    compare(
        impl,
        randn(4, 5, 7, 8),
        targets(4, 6),
        modulation("vector", 6, 6),
        num_classes=6,
        pool_size=3,
        reduction="none",
        grad_output=arrange(randn(4, seed=3), layout),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 7), (5, 17)], ids=str)
@pytest.mark.parametrize("m_dtype", [torch.float32, None], ids=str)
def test_dtypes(impl, dtype, shape, m_dtype):
    """A half activation, with a float32 or an equally half modulation."""
    m = modulation("matrix", 10, 10).to(m_dtype or dtype)
    loss, grad, grad_m = compare(
        impl, randn(*shape, dtype=dtype), targets(shape[0], 10), m, num_classes=10, pool_size=4
    )
    assert loss.dtype == torch.float32 and grad.dtype == dtype and grad_m.dtype == m.dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_target_dtypes(impl, dtype):
    target = targets(3, 10)
    a, b = (
        run(LF.lls_loss, (randn(3, 8), t, None), torch.tensor(1.0), num_classes=10, pool_size=8, impl=impl)
        for t in (target, target.to(dtype))
    )
    for x, y in zip(a, b):
        assert_bit_equal("result", x, y)


@pytest.mark.parametrize("needed", subsets(["activation", "modulation"]), ids=lambda s: "+".join(s) or "nothing")
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_requires_grad_subsets(impl, needed, kind):
    tensors = {"activation": randn(3, 5, 4, 4), "modulation": modulation(kind, 6, 6)}
    full = run(
        LF.lls_loss,
        (tensors["activation"], targets(3, 6), tensors["modulation"]),
        torch.tensor(1.0),
        num_classes=6,
        pool_size=2,
        impl=impl,
    )
    for name in needed:
        tensors[name].requires_grad_()
    loss = LF.lls_loss(
        tensors["activation"], targets(3, 6), tensors["modulation"], num_classes=6, pool_size=2, impl=impl
    )
    assert_bit_equal("loss", loss.detach(), full[0])
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
    for i, name in enumerate(("activation", "modulation"), 1):
        if name in needed:
            assert_bit_equal(f"gradient of {name}", tensors[name].grad, full[i])
        else:
            assert tensors[name].grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, mode):
    activation, target = randn(3, 5, 4, 4).requires_grad_(), targets(3, 6)
    expected = LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl).detach()
    with mode():
        loss = LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl)
    assert not loss.requires_grad
    assert_bit_equal("loss", loss.clone(), expected)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_norm_row(impl, zero, reduction):
    activation = randn(4, 5, 4, 4)
    activation[2] = 0
    grad = compare(
        impl,
        activation,
        targets(4, 6),
        None,
        num_classes=6,
        pool_size=2,
        reduction=reduction,
        per_row=True,
        zero_gradient_below_eps=zero,
    )[1]
    assert (grad[2] == 0).all() if zero else grad[2].abs().max() > 1e9


@pytest.mark.parametrize("loss", ["cross_entropy", "hard_sigmoid_mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(impl, loss, reduction):
    got = (
        compare(
            impl,
            randn(3, 8),
            torch.full((3,), -1),
            None,
            num_classes=4,
            pool_size=8,
            ignore_index=-1,
            loss=loss,
            reduction=reduction,
        )
        if reduction != "mean"
        else None
    )
    if got is None:  # torch: nan loss, and a gradient of 0 or nan that depends on its own kernels; ours is 0
        activation = randn(3, 8).requires_grad_()
        value = LF.lls_loss(
            activation, torch.full((3,), -1), num_classes=4, pool_size=8, ignore_index=-1, loss=loss, impl=impl
        )
        value.backward()
        assert value.isnan() and (activation.grad == 0).all()


def test_straight_through_where_the_hard_sigmoid_is_flat(impl):
    """Saturated and right: no gradient. Saturated and wrong: the full one, where a true hard sigmoid has none."""
    basis = torch.eye(4)[:2]
    activation = torch.tensor([[9.0, -9.0, 0, 0], [9.0, -9.0, 0, 0]]).requires_grad_()
    loss = LF.lls_loss(
        activation,
        torch.tensor([0, 1]),
        num_classes=2,
        pool_size=4,
        basis=basis,
        normalize=False,
        temperature=1.0,
        loss="hard_sigmoid_mse",
        impl=impl,
    )
    loss.backward()
    assert loss.item() == 0.5 and (activation.grad[0] == 0).all()
    assert torch.equal(activation.grad[1], torch.tensor([0.5, -0.5, 0, 0]))


def test_second_backward_of_a_kept_graph(impl):
    activation, m = randn(3, 5, 4, 4).requires_grad_(), modulation("matrix", 6, 6).requires_grad_()
    loss = LF.lls_loss(activation, targets(3, 6), m, num_classes=6, pool_size=2, impl=impl)
    first = torch.autograd.grad(loss, (activation, m), torch.tensor(2.0), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (activation, m), torch.tensor(2.0))):
        assert_bit_equal("second gradient", b, a)


@pytest.mark.only(where=lambda backend: backend == "reference")
def test_float64_divides_in_float64(impl):
    """The rows that count, times a temperature of no short binary form: not in the default dtype."""
    activation = randn(7, 12).double().requires_grad_()
    arguments = dict(num_classes=6, pool_size=12, temperature=0.07)
    (ours,) = torch.autograd.grad(LF.lls_loss(activation, targets(7, 6), **arguments), activation)
    (exact,) = torch.autograd.grad(definition(activation, targets(7, 6), None, **arguments), activation)
    assert_relative("gradient", ours, exact, 1e-12)


def test_a_batch_of_incoming_gradients(impl):
    latents = randn(4, 33).requires_grad_()
    loss = LF.lls_loss(latents, targets(4, 6), num_classes=6, pool_size=33, impl=impl)
    (one,) = torch.autograd.grad(loss, latents, retain_graph=True)
    (batch,) = torch.autograd.grad(loss, latents, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack([one, 2 * one]))


def test_gradient_of_the_latents_themselves_belongs_to_the_caller(impl):
    """Nothing is pooled or scaled there, so nothing is left to compute; yet it is no part of a kept graph."""
    latents = randn(4, 33).requires_grad_()
    loss = LF.lls_loss(latents, targets(4, 6), num_classes=6, pool_size=33, impl=impl)
    (first,) = torch.autograd.grad(loss, latents, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert_bit_equal("second gradient", torch.autograd.grad(loss, latents, retain_graph=True)[0], kept)
    assert_bit_equal("doubled", torch.autograd.grad(loss, latents, torch.tensor(2.0))[0], 2 * kept)


def test_gradient_composes_with_what_lies_above_and_below(impl):
    """softmax saves its output: a kernel that writes to its input would corrupt the softmax's gradient."""
    source = randn(3, 12).requires_grad_()

    def total(function, dtype):
        h = torch.softmax(source.to(dtype), dim=1)
        return function(h, targets(3, 6), num_classes=6, pool_size=12) * 3 + h.square().sum()

    (ours,) = torch.autograd.grad(total(lambda *a, **k: LF.lls_loss(*a, impl=impl, **k), torch.float32), source)
    (exact,) = torch.autograd.grad(total(definition, torch.float64), source)
    assert_relative("gradient", ours, exact, 1e-5)


def test_repeatable_bit_for_bit(impl):
    tensors = randn(17, 3, 9, 9), targets(17, 33), modulation("matrix", 20, 33)
    arguments = dict(num_classes=33, pool_size=2, impl=impl)
    first = run(LF.lls_loss, tensors, torch.tensor(1.0), **arguments)
    for _ in range(5):
        for a, b in zip(first, run(LF.lls_loss, tensors, torch.tensor(1.0), **arguments)):
            assert_bit_equal("result", b, a)


# -- derivatives that exist, and those that do not --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normalize=False, basis_scale=0.1),
        dict(label_smoothing=0.2, temperature=2.0),
        dict(waveform="cosine"),
        dict(reduction="none"),
        dict(reduction="sum", ignore_index=1),
    ],
    ids=label,
)
@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
def test_gradcheck(options, shape, kind):
    m = modulation(kind, 3, 3)
    inputs = [randn(*shape, dtype=torch.float64).requires_grad_()]
    inputs += [] if m is None else [m.double().requires_grad_()]

    def loss(activation, modulation=None):
        return LF.lls_loss(
            activation, targets(shape[0], 3), modulation, num_classes=3, pool_size=2, impl="reference", **options
        )

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=False)


def small(impl, activation, m=None, **options):
    return LF.lls_loss(activation, torch.tensor([1, 0]), m, num_classes=3, pool_size=4, impl=impl, **options)


@pytest.mark.parametrize("leaf", [True, False])
def test_second_derivative_raises_by_name(impl, leaf):
    source = randn(2, 4).requires_grad_()
    activation = source if leaf else source * 2
    (grad,) = torch.autograd.grad(small(impl, activation), source, create_graph=True)
    with pytest.raises(NotImplementedError, match="lls_loss has no second derivative"):
        (grad.sum() + source.pow(3).sum()).backward()


def test_second_derivative_through_the_modulation_raises_by_name(impl):
    m = modulation("vector", 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(small(impl, randn(2, 4), m), m, create_graph=True)
    with pytest.raises(NotImplementedError, match="lls_loss has no second derivative"):
        grad.sum().backward()


def test_a_graph_through_what_scales_the_loss(impl):
    """`create_graph=True` where a factor of each row's loss asks for a gradient: nothing is pooled, nothing copied."""
    x, factors = randn(4, 16).requires_grad_(), torch.ones(4, requires_grad=True)
    loss = LF.lls_loss(x, torch.arange(4), num_classes=5, pool_size=16, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad((loss * factors).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(
        LF.lls_loss(x, torch.arange(4), num_classes=5, pool_size=16, reduction="sum", impl=impl), x
    )
    assert_relative("grad", grad, plain, 1e-6)


def test_create_graph_alone_is_fine(impl):
    activation = randn(2, 4).requires_grad_()
    (plain,) = torch.autograd.grad(small(impl, activation), activation)
    (graph,) = torch.autograd.grad(small(impl, activation), activation, create_graph=True)
    assert_bit_equal("gradient", graph.detach(), plain)


def test_forward_mode_is_refused(impl):
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(randn(2, 4), randn(2, 4, seed=1))
        with pytest.raises((NotImplementedError, RuntimeError), match="(?i)forward.mode|jvp"):
            small(impl, dual)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_function_transforms_are_refused(impl, transform):
    activation = randn(3, 2, 4)
    with pytest.raises((NotImplementedError, RuntimeError)):
        if transform == "vmap":
            torch.func.vmap(lambda a: small(impl, a))(activation)
        else:
            torch.func.grad(lambda a: small(impl, a))(activation[0])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 17)], ids=str)
def test_opcheck_of_the_loss(impl, kind, shape):
    m = modulation(kind, 6, 6)
    for compute_grad, activation in ((True, randn(*shape)), (False, arrange(randn(*shape), "transposed"))):
        arguments = (activation, targets(2, 6), m, None, "square", 2, *HeadOptions(6), compute_grad, impl)
        torch.library.opcheck(torch.ops.lgkernels.lls_loss_forward.default, arguments)
    _, grad_latents, similarity, grad_logits = torch.ops.lgkernels.lls_loss_forward(
        randn(*shape), targets(2, 6), m, None, "square", 2, *HeadOptions(6), True, impl
    )
    for channels_last, wants_m in ((False, m is not None), (len(shape) == 4, False)):
        torch.library.opcheck(
            torch.ops.lgkernels.lls_loss_backward.default,
            (
                torch.tensor(1.0),
                grad_latents,
                similarity,
                grad_logits,
                shape,
                torch.float32,
                channels_last,
                2,
                kind == "vector",
                True,
                wants_m,
                impl,
            ),
        )


# -- fuzz: the same cases on every machine ----------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_fuzz(name):
    with running(name) as impl:

        @settings(
            max_examples=60 if name in ("reference", "cpu") else 15,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
        )  # no shrinking, which takes the interpreter minutes
        @given(st.data())
        def check(data):
            draw = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
            batch, classes, pool = draw(0, 1, 2, 5, 33), draw(1, 2, 3, 10, 31), draw(1, 2, 3, 5)
            shape = (
                (batch, draw(*SIZES[1:]))
                if draw(True, False)
                else (batch, draw(1, 2, 3, 9), *(draw(1, 2, 4, 5, 9, 16),) * 2)
            )
            kind = draw("none", "vector", "matrix")
            rows = draw(1, 4, classes) if kind == "matrix" else classes
            activation = arrange(randn(*shape, dtype=draw(*DTYPES), seed=draw(1, 2, 3)), draw(*LAYOUTS))
            loss = draw("cross_entropy", "hard_sigmoid_mse")
            single = activation.shape[1:].numel() == 1  # normalised, its exact gradient is 0: no scale
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compare(
                    impl,
                    activation,
                    targets(batch, classes),
                    modulation(kind, rows, classes),
                    num_classes=classes,
                    pool_size=pool,
                    waveform=draw("square", "cosine"),
                    loss=loss,
                    temperature=draw(0.5, 1.0, 3.0),
                    normalize=draw(True, False) and not single,
                    reduction=draw("mean", "sum", "none"),
                    label_smoothing=draw(0.0, 0.1) if loss == "cross_entropy" else 0.0,
                )

        check()


def test_the_cached_basis_does_not_depend_on_the_callers_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        basis = LF.lls_basis(6, 123, waveform="cosine")
    assert basis.device.type == "cpu" and torch.equal(basis, LF.lls_basis(6, 123, waveform="cosine"))
    with FakeTensorMode(), contextlib.suppress(AssertionError):  # a fake mode refuses real tensors
        LF.lls_basis(6, 124)
    assert type(LF.lls_basis(6, 124)) is torch.Tensor
