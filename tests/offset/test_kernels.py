"""The offset step of every backend against the reference, and the optimizer around it."""

import copy

import pytest
import torch

from lgkernels.ops.offset import reference
from lgkernels.ops.offset.options import StepOptions
from lgkernels.optim import OffsetSGD
from tests.conftest import backend_module
from tests.support.layouts import arrange
from tests.support.problems import place, randn
from tests.support.tolerances import assert_accurate, assert_bit_equal, assert_relative

STEP = dict(lr=0.1, momentum=0.9, weight_decay=0.01, local_scale=0.7, offset_scale=1.5, grad_scale=0.5)
SIZES = [(1,), (7,), (), (0,), (16,), (3, 5), (1023,), (1025,), (2, 3, 5, 4)]
KINDS = ("params", "grads", "buffers", "offsets")


@pytest.fixture
def module(backend):
    return backend_module("offset", backend)


def tensors(shapes, layouts=("dense",) * 4, offset_dtypes=(torch.float32,)):
    """Lists of parameters, gradients, buffers and offsets; every third parameter has no offset."""
    lists = [
        [arrange(randn(*s, seed=10 * i + k), layout) for i, s in enumerate(shapes)] for k, layout in enumerate(layouts)
    ]
    lists[3] = [None if i % 3 == 2 else t.to(offset_dtypes[i % len(offset_dtypes)]) for i, t in enumerate(lists[3])]
    return lists


def run(step, lists, options):
    params, grads, buffers, offsets = lists
    step(params, grads, buffers if options["momentum"] else [], offsets, StepOptions(**options))
    return lists


def check(module, lists, **changes):
    options = {**STEP, **changes}

    def copies(convert):
        return [[None if t is None else convert(t) for t in kind] for kind in lists]

    got = run(module.step_, copies(lambda t: place(t.clone())), options)
    same = run(reference.step_, copies(torch.clone), options)
    truth = run(reference.step_, copies(torch.Tensor.double), options)
    for kind, ours, torchs, exact, old in zip(KINDS, got, same, truth, lists):
        for i, (a, b, c, before) in enumerate(zip(ours, torchs, exact, old)):
            if kind in ("params", "buffers") and (options["momentum"] or kind == "params"):
                assert_accurate(f"{kind}[{i}]", a.cpu(), b, c, 4)
            elif a is not None:
                assert_bit_equal(f"{kind}[{i}] was written to", a, before)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(momentum=0.0),
        dict(weight_decay=0.0),
        dict(offset_scale=0.0),
        dict(momentum=0.0, local_scale=0.0, weight_decay=0.0),
    ],
    ids=str,
)
def test_step(module, changes):
    check(module, tensors(SIZES), **changes)


def test_no_tensors(module):
    check(module, tensors([]))
    check(module, tensors([(0,)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tensors_and_a_large_one(module, dtype):
    check(module, tensors([(3,)] * 70 + [(70001,)] + [(5, 2)] * 3, offset_dtypes=(dtype,)))


def test_nothing_behind_a_large_tensor_changes(module):
    wholes = [place(randn(80001, seed=k)) for k in range(4)]
    behind = [t[70001:].clone() for t in wholes]
    run(module.step_, [[t[:70001]] for t in wholes], STEP)
    for t, before in zip(wholes, behind):
        assert_bit_equal("memory behind", t[70001:], before)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=["bfloat16", "mixed"])
def test_half_offsets(module, dtypes):
    check(module, tensors(SIZES, offset_dtypes=dtypes))


@pytest.mark.parametrize(
    "layouts",
    [
        ("channels_last",) * 4,
        ("channels_last", "dense", "dense", "dense"),
        ("dense", "channels_last", "dense", "offset"),
        ("dense", "expanded", "channels_last", "expanded"),
        ("sliced", "dense", "dense", "dense"),
        ("transposed", "transposed", "sliced", "dense"),
        ("offset", "offset", "offset", "offset"),
    ],
    ids="-".join,
)
def test_any_layout(module, layouts):
    check(module, tensors([(2, 3, 5, 4), (6, 7), (40,)], layouts))


def test_a_sliced_parameter_leaves_its_gaps_alone(module):
    lists = tensors([(6, 7)], ("sliced", "dense", "dense", "dense"))
    param = lists[0][0]
    whole = param.as_strided((param.untyped_storage().nbytes() // 4,), (1,), 0)
    whole = place(whole.clone())
    lists[0] = [torch.as_strided(whole, param.shape, param.stride(), param.storage_offset())]
    run(module.step_, [lists[0]] + [[place(t) for t in kind] for kind in lists[1:]], STEP)
    assert whole.isnan().sum() == whole.numel() - param.numel()


def test_special_values(module):
    lists = tensors([(20,)])
    lists[1][0][3], lists[1][0][17], lists[0][0][5] = float("inf"), float("nan"), float("inf")
    check(module, lists)


@pytest.mark.only(where=lambda backend: backend == "cpu")
def test_threads_do_not_change_a_bit(module):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            lists = tensors([(33,), (50001,), (7, 7), (30000,)], offset_dtypes=(torch.float32, torch.bfloat16))
            results.append(run(module.step_, lists, STEP))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0][0] + results[0][2], other[0] + other[2]):
            assert_bit_equal("result", a, b)


@pytest.mark.parametrize("changes", [dict(), dict(momentum=0.0)], ids=str)
@pytest.mark.parametrize("of_params", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.only(where=lambda backend, of_params: not of_params or backend in ("reference", "torch"))
def test_halves(module, dtype, of_params, changes):
    """Half gradients, and parameters where the backend takes them: all is float32, and rounded once where it is stored.
    So the results are those of the same values in float32, rounded."""
    lists, options = tensors(SIZES), {**STEP, **changes}
    for i, kind in enumerate(lists):
        if i == 1 or of_params:
            lists[i] = [None if t is None else t.to(dtype) for t in kind]
    got = run(module.step_, [[None if t is None else place(t.clone()) for t in kind] for kind in lists], options)
    same = run(reference.step_, [[None if t is None else t.float() for t in kind] for kind in lists], options)
    for i in (0, 2) if options["momentum"] else (0,):
        for a, b in zip(got[i], same[i]):
            assert a.dtype == (dtype if of_params else torch.float32)
            if of_params:
                assert_bit_equal(KINDS[i], a.cpu(), b.to(dtype))
            else:
                assert_relative(KINDS[i], a.cpu(), b, 1e-6)


# -- the op, and the optimizer around it ----------------------------------------------------------------------------


def test_registered_op():
    params, grads, buffers, offsets = tensors(SIZES)
    offsets = [torch.empty(0) if o is None else o for o in offsets]
    torch.library.opcheck(
        torch.ops.lgkernels.offset_sgd_.default,
        (params, grads, buffers, offsets, *STEP.values(), "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )
    half = [p.bfloat16() for p in params]
    with pytest.raises(TypeError, match="params must be float32 for impl='cpu', got bfloat16"):
        torch.ops.lgkernels.offset_sgd_(half, half, [], offsets, 0.1, 0.0, 0.0, 1.0, 1.0, 1.0, "cpu")


def optimizer(dtype=torch.float32, **options):
    groups = [
        [torch.nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
        for shapes in ([(3, 5), (4,)], [(70,), (2, 3, 5, 4)])
    ]
    made = OffsetSGD([{"params": g} for g in groups], lr=0.1, momentum=0.9, weight_decay=0.01, **options)
    for p in groups[0] + groups[1]:
        p.grad = randn(*p.shape, seed=8, dtype=dtype)
        made.state[p]["offset"] = randn(*p.shape, seed=9, dtype=options.get("offset_dtype") or dtype)
    made.param_groups[1]["offset_scale"] = 0.5
    return made


def values(made):
    return [
        t
        for g in made.param_groups
        for p in g["params"]
        for t in (p.detach(), made.state[p].get("momentum_buffer"), made.state[p]["offset"])
        if t is not None
    ]


def test_optimizer_against_its_formula():
    """Two steps, groups of their own coefficients; float32 by the kernel, against float64 by the reference."""
    ours, exact = optimizer(), optimizer(torch.float64)
    for made in (ours, exact):
        made.step()
        made.step()
    for a, b in zip(values(ours), values(exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def _transposed_gradient(made, p):  # in the same memory
    p.grad = p.grad.t()


def _other_data(made, p):
    p.data = p.data.clone()
    p.grad.mul_(2)


CHANGES = {
    "nothing": lambda made, p: None,
    "gradient": lambda made, p: setattr(p, "grad", p.grad * 3),
    "transposed": _transposed_gradient,
    "data": _other_data,
    "rate": lambda made, p: made.param_groups[0].update(lr=0.3, weight_decay=0.2, local_scale=2.0),
    "momentum": lambda made, p: made.param_groups[0].update(momentum=0.0),
    "scale": lambda made, p: (
        made.state[p]["offset"].fill_(float("nan")),
        made.param_groups[0].update(offset_scale=0.0),
    ),
    "offset": lambda made, p: made.state[p].update(offset=made.state[p]["offset"] + 1),
    "no offset": lambda made, p: made._set_offset(p, None),
    "no gradient": lambda made, p: setattr(p, "grad", None),
    "buffer": lambda made, p: made.state[p].update(momentum_buffer=made.state[p]["momentum_buffer"] * 2),
    "copy": lambda made, p: made.load_state_dict(copy.deepcopy(made.state_dict())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_after_a_change(change):
    """What a step keeps for the next one must not outlive the memory it was made for."""
    results = []
    for dtype in (torch.float32, torch.float64):
        p, q = (torch.nn.Parameter(randn(6, 6, seed=i, dtype=dtype)) for i in range(2))
        made = OffsetSGD([p, q], lr=0.1, momentum=0.9)
        for i, t in enumerate((p, q)):
            t.grad = randn(6, 6, seed=8 + i, dtype=dtype)
            made._set_offset(t, randn(6, 6, seed=5 + i, dtype=dtype))
        for _ in range(2):
            made.step()
        change(made, p)
        version = q._version
        for _ in range(2):
            made.step()
        assert q._version == version + 2 or dtype == torch.float64
        results.append([p.detach(), q.detach()] + [made.state[t]["momentum_buffer"] for t in (p, q)])
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_optimizer_goes_on():
    made = optimizer(offset_dtype=torch.bfloat16)
    made.step()
    other = copy.deepcopy(made)
    for group, copied in zip(made.param_groups, other.param_groups):
        for p, q in zip(group["params"], copied["params"]):
            q.grad = p.grad.clone()  # torch copies parameters without theirs
    for one in (made, other):
        one.step()
        one.refresh(
            lambda x: sum(p.sum() for g in one.param_groups for p in g["params"]) * x.mean(), None, torch.ones(4)
        )
    for a, b in zip(values(made), values(other)):
        assert a.dtype == b.dtype
        assert_bit_equal("state", a, b)


def test_bfloat16_parameters_are_stepped_by_the_reference():
    made = optimizer(torch.bfloat16)
    before = [t.clone() for t in values(made)]
    made.step()
    assert all(t.dtype == torch.bfloat16 for t in values(made))
    assert not torch.equal(values(made)[0], before[0])


def test_half_offsets_survive_the_state_dict():
    made = optimizer(offset_dtype=torch.bfloat16)
    made.step()
    other = optimizer(offset_dtype=torch.bfloat16)
    other.load_state_dict(made.state_dict())
    for a, b in zip(values(made), values(other)):
        if a.dtype == torch.bfloat16:
            assert_bit_equal("offset", a, b)
    assert sum(t.dtype == torch.bfloat16 for t in values(other)) == 4
    with pytest.raises(TypeError, match="offset_dtype must be torch.bfloat16 or None, got torch.float16"):
        optimizer(offset_dtype=torch.float16)


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (
            lambda made, p: made.state[p].update(offset=torch.ones(71)),
            ValueError,
            r"param_groups\[1\]: a state's offset must have",
        ),
        (
            lambda made, p: made.state[p].update(offset=torch.ones(70, dtype=torch.float16)),
            TypeError,
            r"param_groups\[1\]: a state's offset must be torch.float32 like its parameter, got torch.float16",
        ),
        (
            lambda made, p: made.state[p].update(momentum_buffer=torch.ones(3)),
            ValueError,
            r"param_groups\[1\]: a state's momentum_buffer must have",
        ),
        (
            lambda made, p: setattr(p, "grad", torch.ones(70).to_sparse()),
            TypeError,
            r"param_groups\[1\]: a gradient is sparse",
        ),
    ],
)
def test_bad_input_changes_nothing(spoil, error, message):
    """The fault is in the second group: the first must not have been stepped."""
    made = optimizer()
    made.step()
    spoil(made, made.param_groups[1]["params"][0])
    before = [t.clone() for t in values(made)]
    with pytest.raises(error, match=message):
        made.step()
    for a, b in zip(values(made), before):
        assert_bit_equal("state", a, b)
