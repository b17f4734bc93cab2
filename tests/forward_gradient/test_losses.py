"""What the replicated losses and dual layers do besides the authors' numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import lgkernels.functional as LF
from bench.forward_gradient import Case, Losses
from bench.timing import peak_memory
from lgkernels.random import RandomFeedback
from tests.support.problems import randn, targets

SHAPE = (3, 5, 4, 6)


def arguments(dtype=torch.float64, classes=7):
    return randn(*SHAPE, dtype=dtype), randn(24, classes, dtype=dtype), randn(classes, dtype=dtype), targets(3, classes)


def naive(x, weight, bias, target, layer_norm):
    """Every replica written out, the others' channels without gradient; autograd of this is the truth."""
    x = F.layer_norm(x, x.shape[-1:]) if layer_norm else x
    n, patches, groups, channels = x.shape
    losses = torch.empty(n, patches, groups, dtype=x.dtype)
    for p in range(patches):
        for g in range(groups):
            mask = torch.zeros(patches, groups, 1, dtype=torch.bool)
            mask[p, g] = True
            rows = torch.where(mask, x, x.detach()).mean(1).flatten(1)
            losses[:, p, g] = F.cross_entropy(rows @ weight + bias, target, reduction="none")
    return losses


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradients_and_tangents_of_the_naive_replicas(layer_norm):
    x, weight, bias, target = arguments()
    grad, tangents = (
        randn(*SHAPE[:3], seed=4, dtype=torch.float64),
        [randn(*t.shape, seed=5, dtype=torch.float64) for t in (x, weight, bias)],
    )

    def ours(x, weight, bias):
        return LF.replicated_cross_entropy(x, weight, bias, target, layer_norm=layer_norm)

    results = []
    for function in (ours, lambda *p: naive(*p, target, layer_norm)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss = function(*leaves)
        loss.backward(grad)
        results.append([loss.detach(), *(t.grad for t in leaves)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    # the tangent of each replica: the product of its own gradient with the tangents
    expected = torch.empty_like(grad)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    loss = naive(*leaves, target, layer_norm)
    for index in torch.cartesian_prod(*map(torch.arange, grad.shape)):
        grads = torch.autograd.grad(loss[tuple(index)], leaves, retain_graph=True)
        expected[tuple(index)] = sum((g * t).sum() for g, t in zip(grads, tangents))
    torch.testing.assert_close(torch.func.jvp(ours, (x, weight, bias), tuple(tangents))[1], expected)
    explicit = LF.replicated_cross_entropy_dual(
        x,
        tangents[0],
        weight,
        bias,
        target,
        weight_tangent=tangents[1],
        bias_tangent=tangents[2],
        layer_norm=layer_norm,
    )
    torch.testing.assert_close(explicit[1], expected)


def test_several_tangents_by_vmap():
    x, weight, bias, target = arguments()
    many = randn(3, *SHAPE, seed=6, dtype=torch.float64)

    def derivative(tangent, function):
        return torch.func.jvp(function, (x,), (tangent,))[1]

    for function in (
        lambda x: LF.replicated_cross_entropy(x, weight, bias, target, layer_norm=True),
        lambda x: LF.replicated_nt_xent(x, 2 * x + 1, weight, bias),
    ):
        got = torch.func.vmap(lambda t: derivative(t, function))(many)
        torch.testing.assert_close(got, torch.stack([derivative(t, function) for t in many]))


def test_gradcheck_of_one_patch_and_group():
    """Elsewhere finite differences see what a replica passes no gradient to."""
    x, weight, bias = (
        t.requires_grad_()
        for t in (
            randn(3, 1, 1, 4, dtype=torch.float64),
            randn(4, 5, dtype=torch.float64),
            randn(5, dtype=torch.float64),
        )
    )
    for layer_norm in (False, True):
        assert torch.autograd.gradcheck(
            lambda *p: LF.replicated_cross_entropy(*p, targets(3, 5), layer_norm=layer_norm),
            (x, weight, bias),
            check_forward_ad=True,
        )


TARGET = targets(3, 7)
LOSSES = {
    "replicated_cross_entropy": lambda x, w, b: LF.replicated_cross_entropy(x, w, b, TARGET).sum(),
    "replicated_cross_entropy of a norm": lambda x, w, b: LF.replicated_cross_entropy(
        x, w, b, TARGET, layer_norm=True
    ).sum(),
    "replicated_nt_xent": lambda x, w, b: LF.replicated_nt_xent(x, 2 * x + 1, w, b).sum(),
    "replicated_nt_xent of the other view": lambda x, w, b: LF.replicated_nt_xent(torch.ones_like(x), x, w, b).sum(),
}


def by_backward(loss, leaf):
    leaf = leaf.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (loss(leaf) + grad.square().sum()).backward()


def by_backward_from_an_intermediate(loss, leaf):
    by_backward(lambda leaf: loss(leaf * 2), leaf)


def by_dual_level(loss, leaf):
    leaf = leaf.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        forward_ad.unpack_dual(torch.autograd.grad(loss(dual), dual)[0])


def by_backward_of_a_tangent(loss, leaf):
    leaf = leaf.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        both = forward_ad.unpack_dual(loss(dual))
        (both.primal + both.tangent).backward()


def along(function):
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1].sum()


SECOND = {
    "backward": by_backward,
    "backward from an intermediate": by_backward_from_an_intermediate,
    "dual level": by_dual_level,
    "backward of a tangent": by_backward_of_a_tangent,
    "hessian": lambda loss, leaf: torch.func.hessian(loss)(leaf),
    "grad of grad": lambda loss, leaf: torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(leaf),
    "jvp of grad": lambda loss, leaf: along(torch.func.grad(loss))(leaf),
    "grad of jvp": lambda loss, leaf: torch.func.grad(along(loss))(leaf),
    "jvp of jvp": lambda loss, leaf: along(along(loss))(leaf),
    "vmap of grad of grad": lambda loss, leaf: torch.func.vmap(
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())
    )(torch.stack((leaf, leaf))),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("mode", SECOND)
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_raise_by_name(name, mode, which):
    given = list(arguments()[:3])

    def loss(leaf):
        return LOSSES[name](*given[:which], leaf, *given[which + 1 :])

    message = "no second derivative" if mode == "jvp of jvp" else f"{name.split()[0]} has no second derivative"
    with pytest.raises(NotImplementedError, match=message):
        SECOND[mode](loss, given[which])


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_derivatives_of_all_modes_agree(name):
    x, weight, bias, _ = arguments()
    leaf = x.clone().requires_grad_()

    def loss(x):
        return LOSSES[name](x, weight, bias)

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    many = torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x)))
    for got in (torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0], torch.func.grad(loss)(x), *many):
        torch.testing.assert_close(got.detach(), expected)
    with forward_ad.dual_level():  # a tangent that does not come here
        forward_ad.make_dual(bias, torch.ones_like(bias))
        torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], expected)


@pytest.mark.parametrize("function", ["plain", "dual"])
def test_compiles(function):
    x, weight, bias, target = (t.float() if t.is_floating_point() else t for t in arguments())
    tangent = randn(*SHAPE, seed=5)
    if function == "plain":

        def run(x):
            return LF.replicated_cross_entropy(x, weight, bias, target).sum()

        expected, got = (torch.func.grad(run)(x) if f is None else None for f in (None, run))
        leaf = x.clone().requires_grad_()
        torch.compile(run, fullgraph=True, backend="aot_eager")(leaf).backward()
        torch.testing.assert_close(leaf.grad, expected)
    else:

        def run(x, tangent):
            return LF.replicated_cross_entropy_dual(x, tangent, weight, bias, target)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, tangent)
        for one, other in zip(compiled, run(x, tangent)):
            torch.testing.assert_close(one, other)


def test_compiling_inside_of_a_dual_level_is_refused():
    """torch.compile would take the derivative of what it sees in the forward."""
    x, weight, bias, target = arguments(torch.float32)
    compiled = torch.compile(
        lambda x: LF.replicated_cross_entropy(x, weight, bias, target), fullgraph=True, backend="eager"
    )
    with forward_ad.dual_level(), pytest.raises(Exception, match="replicated_cross_entropy"):
        compiled(forward_ad.make_dual(x, torch.ones_like(x)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="replicated_cross_entropy"):
        torch.compile(
            lambda x, t: torch.func.jvp(lambda x: LF.replicated_cross_entropy(x, weight, bias, target), (x,), (t,))[1],
            fullgraph=True,
            backend="eager",
        )(x, torch.ones_like(x))


def test_explicit_tangents_refuse_dual_tensors():
    x, weight, bias, target = arguments()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="takes tangents as arguments"):
            LF.replicated_cross_entropy_dual(dual, None, weight, bias, target)
        with pytest.raises(NotImplementedError, match="takes tangents as arguments"):
            LF.dual_norm_noise_relu(dual, None, noise=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_halves_and_strides(dtype, layout):
    x, weight, bias, target = arguments(torch.float32)
    x = x.to(dtype)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x[:1].expand(3, -1, -1, -1)
    tangent = randn(*SHAPE, seed=5, dtype=dtype)
    loss, derivatives = LF.replicated_cross_entropy_dual(x, tangent, weight, bias, target, layer_norm=True)
    assert loss.dtype == derivatives.dtype == torch.float32
    exact = LF.replicated_cross_entropy_dual(
        x.double(), tangent.double(), weight.double(), bias.double(), target, layer_norm=True
    )
    torch.testing.assert_close(derivatives.double(), exact[1], rtol=1e-4, atol=1e-5)


# -- layers with tangents ---------------------------------------------------------------------------------------------


def test_dual_linear_is_forward_mode_differentiation():
    x, weight, bias = (randn(*s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,)))
    tangents = [randn(*t.shape, seed=7, dtype=torch.float64) for t in (x, weight, bias)]
    expected = torch.func.jvp(F.linear, (x, weight, bias), tuple(tangents))
    both = torch.stack((x, tangents[0]))  # one behind the other: one product
    for a, a_tangent in ((x, tangents[0]), both.unbind()):
        got = LF.dual_linear(a, a_tangent, weight, bias, weight_tangent=tangents[1], bias_tangent=tangents[2])
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other)
    y, y_tangent = LF.dual_linear(x, None, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert not y_tangent.any()


def test_dual_linear_with_a_formula():
    x, weight, law = randn(3, 700), randn(2000, 700), RandomFeedback(3, law="sign", scale=0.5)
    got = LF.dual_linear(x, None, weight, weight_tangent=law)[1]
    torch.testing.assert_close(got, x @ law.materialize((2000, 700)).t(), rtol=1e-5, atol=1e-4)


def test_dual_group_linear_is_forward_mode_differentiation():
    x, weight, bias = (randn(*s, dtype=torch.float64) for s in ((2, 3, 4, 5), (4, 6, 5), (4, 6)))
    tangent = randn(2, 3, 4, 5, seed=7, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: torch.einsum("npgc,gdc->npgd", x, weight) + bias, (x,), (tangent,))
    for a, a_tangent in ((x, tangent), torch.stack((x, tangent)).unbind()):
        for one, other in zip(LF.dual_group_linear(a, a_tangent, weight, bias), expected):
            torch.testing.assert_close(one, other)
    assert not LF.dual_group_linear(x, None, weight, bias)[1].any()


@pytest.mark.parametrize("function", [LF.dual_linear, lambda x, v, w: LF.dual_group_linear(x, v, w.expand(4, 6, 5))])
def test_a_tangent_of_another_precision_is_rounded_to_that_of_x(function):
    x, tangent, weight = randn(3, 4, 5).bfloat16(), randn(3, 4, 5, seed=7), randn(6, 5).bfloat16()
    got, expected = function(x, tangent, weight), function(x, tangent.bfloat16(), weight)
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(got, expected))


@pytest.mark.parametrize("moved", [("weight_tangent",), ("bias_tangent",), ("weight_tangent", "bias_tangent")])
def test_losses_with_tangents_of_the_head_are_the_same_under_autocast(moved):
    x, y, tangent = (randn(3, 4, 2, 5, seed=s) for s in range(3))
    head = dict(weight=randn(10, 6), bias=randn(6))
    given = {name: head[name.removesuffix("_tangent")] for name in moved}

    def both():
        one = LF.replicated_cross_entropy_dual(x, tangent, *head.values(), torch.arange(3), **given)
        return one + LF.replicated_nt_xent_dual(x, y, tangent, None, *head.values(), **given)

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        got = both()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_layers_under_autocast():
    """As torch's: products in bfloat16, but of float64."""
    x, tangent, weight, bias = (randn(*s) for s in ((2, 3, 4, 5), (2, 3, 4, 5), (4, 6, 5), (4, 6)))
    for given in (tangent, None):
        with torch.autocast("cpu", torch.bfloat16):
            one, other = (
                LF.dual_group_linear(x, given, weight, bias),
                LF.dual_linear(x[:, :, 1], tangent[:, :, 1], weight[1], bias[1]),
            )
            assert LF.dual_group_linear(x.double(), None, weight.double(), None)[0].dtype == torch.float64
        assert {t.dtype for t in (*one, *other)} == {torch.bfloat16}
        for a, b in zip(one[: 2 if given is not None else 1], other):
            torch.testing.assert_close(a[:, :, 1], b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dual_norm_noise_relu_is_forward_mode_differentiation(dim, with_residual):
    z, tangent, noise, residual = (randn(3, 4, 6, seed=s, dtype=torch.float64) for s in range(4))
    residual = residual if with_residual else torch.zeros_like(z)

    def function(z, u):
        v = z.movedim(dim, -1)
        return F.relu(F.layer_norm(v, v.shape[-1:]).movedim(-1, dim) + residual + u)

    expected = torch.func.jvp(function, (z, torch.zeros_like(z)), (tangent, noise))
    got = LF.dual_norm_noise_relu(z, tangent, residual if with_residual else None, noise=noise, dim=dim)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
def test_noise_by_a_formula_is_the_tensor_and_never_stored(law):
    z, formula = randn(4, 5, 6), RandomFeedback(9, stream=2, law=law)
    formula.advance()
    noise = formula.materialize(z.shape)
    for one, other in zip(
        LF.dual_norm_noise_relu(z, None, noise=formula), LF.dual_norm_noise_relu(z, None, noise=noise)
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    y, x = LF.dual_norm_noise_relu(z, None, noise=noise)[0], randn(4, 5, 3)
    coefficient = randn(4, 5, 2)
    for one, other in zip(*(LF.activity_perturbation_grad(x, z, y, coefficient, noise=u) for u in (formula, noise))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_activity_perturbation_grad_is_the_layers_own_gradient():
    """Of <noise times coefficient, relu(norm(x W + b))>, by autograd through this one layer."""
    x, weight, bias = (randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(((2, 3, 4), (6, 4), (6,))))
    noise, coefficient = randn(2, 3, 6, seed=5, dtype=torch.float64), randn(2, 3, 2, seed=6, dtype=torch.float64)
    weight.requires_grad_(), bias.requires_grad_()
    z = F.linear(x, weight, bias)
    y = F.relu(F.layer_norm(z, (6,)))
    y.backward(coefficient.repeat_interleave(3, 2) * noise)
    got = LF.activity_perturbation_grad(x, z.detach(), y.detach(), coefficient, noise=noise)
    torch.testing.assert_close(got[0], weight.grad)
    torch.testing.assert_close(got[1], bias.grad, atol=1e-10, rtol=1e-7)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("layer_norm", [False, True])
def test_no_replica_is_ever_stored(layer_norm):
    """M/8/16 at 128 samples: at most 8 MiB beyond the inputs, where the naive replicas take about 1 GiB."""
    case = Case(Losses, 128, 512, patches=64, groups=16, classes=10, layer_norm=layer_norm)
    problem = Losses(case, torch.device("cpu"))
    impls = [b for b in problem.backends() if b == "cpu"] or ([] if layer_norm else ["torch"])
    for impl in impls:
        run = problem.library(impl)
        run()
        assert peak_memory(run, problem.device) <= 8 * 2**20
