"""The fused blocks inside autograd: what the graph holds, costs and refuses."""

import copy
import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

import lgkernels.functional as LF
from lgkernels.core import native, unit
from lgkernels.core.unit import unit_gradient
from lgkernels.ops.lls import autograd as lls_autograd
from lgkernels.ops.lls import op as lls_op
from lgkernels.recipes.measure import peak_memory
from lgkernels.recipes.models import build
from tests.conftest import backend_module
from tests.lls.blocks import CONV, LINEAR, make, results
from tests.simt import executor
from tests.support.cases import label
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_bit_equal

BOTH = pytest.mark.parametrize(
    "case", [dict(CONV, modulation="matrix"), dict(LINEAR, modulation="vector")], ids=["conv", "linear"]
)


@BOTH
def test_gradients_are_handed_over_without_a_copy(impl, case, monkeypatch):
    """`.grad` is the memory that the op returned: AccumulateGrad takes it as it is; the bias's zeros too."""
    made = []
    real = torch.ops.lgkernels.lls_block

    class Spy:
        def lls_block(self, *arguments):
            result = real(*arguments)
            made.extend(t.data_ptr() for t in result[2:])
            return result

    monkeypatch.setattr(lls_autograd, "_ops", Spy())
    block, x, target = make(case, impl)
    block(x, target)[1].backward()
    kept = [p.grad.data_ptr() for p in (*block.layer.parameters(), *block.norm.parameters(), block.modulation)]
    assert kept == made


@BOTH
def test_without_grad_no_gradient_is_taken(impl, case, monkeypatch):
    """A parameter still asks for its gradient there; only the ambient switch says that none is wanted."""
    empty = []
    real = torch.ops.lgkernels

    class Spy:
        def lls_block(self, *arguments):
            result = real.lls_block(*arguments)
            empty.extend(t.numel() == 0 for t in result[2:])
            return result

        def lls_loss_forward(self, *arguments):
            result = real.lls_loss_forward(*arguments)
            empty.extend(result[i].numel() == 0 for i in (1, 3))
            return result

    monkeypatch.setattr(lls_autograd, "_ops", Spy())
    block, x, target = make(case, impl)
    parameter = x.clone().requires_grad_()
    with torch.no_grad():
        assert not block(x, target)[1].requires_grad
        loss = LF.lls_loss(parameter, target, num_classes=10, pool_size=2, impl=impl)
    assert not loss.requires_grad and len(empty) == 7 and all(empty)


@BOTH
def test_only_the_bias_is_trained(impl, case):
    block, x, target = make(case, impl)
    block.requires_grad_(False)
    block.layer.bias.requires_grad_()
    block(x, target)[1].backward()
    assert block.layer.bias.grad.abs().max() == 0


@BOTH
def test_gradients_accumulate(impl, case):
    block, x, target = make(case, impl)
    first = results(block, x, target)
    first = {name: value.clone() for name, value in first.items()}
    block(x, target)[1].backward()
    for name, parameter in block.named_parameters():
        if name != "layer.bias":
            assert torch.allclose(parameter.grad, 2 * first[name], rtol=1e-5, atol=1e-7)


@BOTH
def test_second_backward_raises_by_name(impl, case):
    block, x, target = make(case, impl)
    loss = block(x, target)[1]
    loss.backward(retain_graph=True)
    before = block.layer.weight.grad.clone()
    with pytest.raises(RuntimeError, match="backward ran twice through a fused LLS block"):
        loss.backward()
    assert_bit_equal("gradient after the failed backward", block.layer.weight.grad, before)


@BOTH
def test_second_derivative_raises_by_name(impl, case):
    block, x, target = make(case, impl)
    (grad,) = torch.autograd.grad(block(x, target)[1], block.layer.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="lls_block has no second derivative"):
        (grad.sum() + block.layer.weight.pow(3).sum()).backward()


@BOTH
def test_backward_with_chosen_inputs(impl, case):
    """`loss.backward(inputs=...)`, as the trainer calls it."""
    block, x, target = make(case, impl)
    full = results(copy.deepcopy(block), x, target)
    block(x, target)[1].backward(inputs=[block.norm.weight, block.modulation])
    assert block.layer.weight.grad is None
    assert_bit_equal("norm.weight", block.norm.weight.grad, full["norm.weight"])
    assert_bit_equal("modulation", block.modulation.grad, full["modulation"])


def test_losses_of_blocks_may_be_summed(impl):
    blocks = [make(CONV, impl, seed=i) for i in range(2)]
    alone = [results(copy.deepcopy(b), x, t) for b, x, t in blocks]
    sum(b(x, t)[1] for b, x, t in blocks).backward()
    for (block, _, _), expected in zip(blocks, alone):
        assert_bit_equal("layer.weight", block.layer.weight.grad, expected["layer.weight"])


def test_output_carries_no_graph_and_input_may_be_a_view(impl):
    block, x, target = make(CONV, impl)
    wide = torch.cat([x, x], 1)
    out, loss = block(wide[:, :3], target)
    assert not out.requires_grad and loss.requires_grad
    assert torch.equal(out, block(x, target)[0])


def test_writing_to_the_output_does_not_touch_the_gradients(impl):
    block, x, target = make(CONV, impl)
    full = results(copy.deepcopy(block), x, target)
    out, loss = block(x, target)
    out.zero_()
    x.zero_()
    loss.backward()
    assert_bit_equal("layer.weight", block.layer.weight.grad, full["layer.weight"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_warns_once(impl, monkeypatch, reentrant):
    monkeypatch.setattr(lls_autograd, "_warned_checkpoint", False)
    block, x, target = make(CONV, impl)
    expected = results(copy.deepcopy(block), x, target)["layer.weight"]
    x.requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            block.zero_grad()
            checkpoint(lambda a: block(a, target)[1], x, use_reentrant=reentrant).backward()
    ours = [w for w in caught if "activation checkpointing around a fused LLS block" in str(w.message)]
    assert len(ours) == 1
    assert_bit_equal("layer.weight", block.layer.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:activation checkpointing around a fused LLS block")  # the test before asserts it
def test_reentrant_checkpointing_gives_the_same_gradients(impl):
    """Its first pass runs without gradients, so nothing local is taken twice."""
    block, x, target = make(CONV, impl)
    expected = results(copy.deepcopy(block), x, target)["layer.weight"]
    checkpoint(lambda a: block(a, target)[1], x.requires_grad_(), use_reentrant=True).backward()
    assert_bit_equal("layer.weight", block.layer.weight.grad, expected)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_transforms_are_refused(impl, transform):
    block, x, target = make(CONV, impl)
    weight = block.layer.weight.detach()

    def loss(weight):
        return torch.func.functional_call(block, {"layer.weight": weight}, (x, target))[1]

    with pytest.raises((NotImplementedError, RuntimeError)):
        if transform == "vmap":
            torch.func.vmap(lambda a: block(a, target)[1])(torch.stack([x, x]))
        elif transform == "grad":
            torch.func.grad(loss)(weight)
        else:
            torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "case",
    [
        dict(CONV, modulation="matrix"),
        dict(CONV, max_pool=True, channels_last=True),
        dict(CONV, stride=2, H=9, W=7, padding=0),
        LINEAR,
    ],
    ids=label,
)
def test_opcheck(impl, case):
    block, x, target = make(case, impl)
    if case.get("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    m, norm = block.modulation, block.norm
    tensors = [t.detach() for t in (block.layer.weight, block.layer.bias, norm.weight, norm.bias)]
    stride, padding = block._geometry()
    for compute_grad in (True, False):
        torch.library.opcheck(
            torch.ops.lgkernels.lls_block.default,
            (
                x,
                *tensors,
                norm.running_mean.clone(),
                norm.running_var.clone(),
                target,
                None if m is None else m.detach(),
                block.waveform,
                stride,
                padding,
                0.1,
                norm.eps,
                block.negative_slope,
                block.max_pool,
                block.num_classes,
                block.pool_size,
                block.temperature,
                block.label_smoothing,
                compute_grad,
                True,
                m is not None,
                impl,
            ),
        )


# -- what it costs ----------------------------------------------------------------------------------------------

_FREE = (
    "empty",
    "new_empty",
    "view",
    "_unsafe_view",
    "reshape",
    "as_strided",
    "detach",
    "alias",
    "t.",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "lift_fresh",
)


class Dispatches(TorchDispatchMode):
    """Names of the torch calls that do work: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(_FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def opened(monkeypatch):
    """The ops as plain functions, so that a dispatch mode sees the calls inside; without the targets' range check,
    which runs on CPU tensors only (elsewhere it would be a synchronisation)."""
    monkeypatch.setattr(lls_op, "class_indices", lambda name, target, *_: target)
    monkeypatch.setattr(lls_autograd, "_ops", SimpleNamespace(lls_block=lls_op.lls_block.implementation))


def count_kernels(monkeypatch, backend, names):
    """Every call of a compiled kernel appends to `names`."""
    if backend == "cpu":
        module = backend_module("lls", "cpu")

        class Counting:
            def __getattr__(self, name):
                value = getattr(compiled, name)
                if not callable(value) or not name.startswith("lls_") or name == "lls_packed_signs":
                    return value
                return lambda *a, **k: (names.append(f"kernel {name}"), value(*a, **k))[1]

        compiled = module._C
        monkeypatch.setattr(module, "_C", Counting())
    elif backend == "cuda-simt":
        simt = executor.module()

        class Counting:
            def __getattr__(self, name):
                value = getattr(simt, name)
                if not name.startswith("lls_"):
                    return value

                def run(*arguments):
                    simt.launches()
                    result = value(*arguments)
                    names.extend([f"kernel {name}"] * len(simt.launches()))
                    return result

                return run

        monkeypatch.setattr(native, "cuda_entries", Counting)
    else:
        import triton.runtime.interpreter as interpreter

        call = interpreter.GridExecutor.__call__

        def launch(self, *args, **kwargs):
            names.append(f"kernel {self.fn.__name__}")
            with _disable_current_modes():  # the interpreter's own torch calls are no launches
                return call(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "case",
    [
        CONV,
        dict(CONV, max_pool=True),
        dict(CONV, modulation="vector"),
        dict(CONV, modulation="matrix"),
        LINEAR,
        dict(LINEAR, modulation="matrix"),
        dict(CONV, num_classes=100),
        dict(CONV, num_classes=40, modulation="matrix"),
        dict(CONV, num_classes=300),
        dict(CONV, num_classes=300, modulation="matrix"),
    ],
    ids=label,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.only(where=lambda backend: backend not in ("reference", "torch"))
def test_at_most_eight_launches_a_layer(impl, backend, case, dtype, monkeypatch, opened):
    """Forward, loss and all gradients of a layer: torch calls plus our kernels.

    A convolution counts as one, the packing of its operands and result included, whether the library does it inside
    the call or we do around it. Left out: the counter of batches, which torch's batch norm also keeps. The backward is
    called as BlockwiseTrainer does; a loss that something scales costs one multiplication of all gradients more.
    """
    block, x, target = make(case, impl)
    x = x.to(dtype)
    if dtype != torch.float32:
        block.layer.to(dtype)
    loss = block(x, target)[1]
    loss.backward(unit_gradient(loss))  # tables and caches
    block.zero_grad()
    monkeypatch.setattr(unit, "_readable", lambda gradient: False)  # as on a GPU
    with Dispatches() as dispatches:
        count_kernels(monkeypatch, backend, dispatches.names)
        loss = block(x, target)[1]
        loss.backward(unit_gradient(loss))
    free = ("add_.Tensor", "kernel lls_to_channels_last")
    names = [n for n in dispatches.names if n not in free]
    if dtype != torch.float32 or backend == "cpu":
        names = [n for n in names if n != "_to_copy.default"]  # casts, as in any mixed precision; packing (see above)
    # More than 256 classes: Triton's head is three launches instead of one, five with a matrix.
    kind, many = case.get("modulation"), case["num_classes"] > 256
    limit = 8
    if backend == "triton" and many:
        limit += 4 if kind == "matrix" else 2
    assert sum(n.startswith("kernel") for n in names) >= 4, names
    assert len(names) <= limit, "; ".join(names)


def test_a_hook_that_writes_to_the_loss_gradient_scales_one_step_alone(impl, monkeypatch):
    monkeypatch.setattr(unit, "_readable", lambda gradient: False)  # as on a GPU, where its value is not looked at
    block, x, target = make(CONV, impl)
    expected = results(copy.deepcopy(block), x, target)["layer.weight"]
    for factor in (2.0, 1.0):
        loss = block(x, target)[1]
        if factor != 1.0:
            loss.register_hook(lambda gradient: gradient.mul_(factor))
        block.zero_grad()
        loss.backward(unit_gradient(loss))
        torch.testing.assert_close(block.layer.weight.grad, factor * expected)


@pytest.mark.only(where=lambda backend: backend != "reference")
def test_no_synchronisation(impl, opened):
    """Nothing in the forward reads a device value back. (test_gpu_blocks.py asks the device itself.)"""
    block, x, target = make(dict(CONV, modulation="matrix"), impl)
    with Dispatches() as dispatches:
        block(x, target)
    assert not [n for n in dispatches.names if "_local_scalar_dense" in n or "item" in n or "nonzero" in n]


def test_the_graph_holds_no_activation(impl):
    """After the forward only parameters, their gradients and the output are alive."""
    block, x, target = make(dict(CONV, B=8, H=16, W=16, cout=16 if impl != "triton" else 4), impl)
    block(x, target)
    gc.collect()
    floats = x.shape[0] * 16 * 16 * block.layer.weight.shape[0]

    def tensors():
        return [t for t in gc.get_objects() if type(t) is torch.Tensor]

    before = {id(t) for t in tensors()}
    out, loss = block(x, target)
    gc.collect()
    new = [t for t in tensors() if id(t) not in before and t is not out]
    assert all(t.numel() < floats for t in new)
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            assert tensor is None or tensor.numel() < floats


def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.ones(1000)
        b = a + 1
        del a
        return (b * 2).sum()

    assert peak_memory(step, torch.device("cpu")) in range(8000, 8400)


def vgg8_step(rule):
    """One training step without optimizer, so that its state is not counted; parameter gradients are."""
    torch.manual_seed(0)
    blocks = build("vgg8", rule, in_channels=3, num_classes=10)
    x, target = randn(32, 3, 32, 32), targets(32, 10)

    def lls():
        hidden = x
        for block in blocks:
            if any(True for _ in block.parameters()):
                hidden, loss = block(hidden, target)
                loss.backward()
                del loss
            else:
                hidden = block(hidden)

    def bp():
        hidden = x
        for block in blocks:
            hidden = block(hidden)
        torch.nn.functional.cross_entropy(hidden, target).backward()

    return bp if rule == "bp" else lls


def test_memory_of_a_vgg8_step_is_a_third_of_backpropagations():
    """Peak of one step (B=32, 32x32) beyond parameters and input, as the profiler's allocation events count it."""
    from tests.conftest import unavailable

    if unavailable("cpu"):
        pytest.skip("the fused path on the CPU needs the native module")
    lls, bp = (peak_memory(vgg8_step(rule), torch.device("cpu")) for rule in ("lls", "bp"))
    assert lls <= 0.35 * bp, f"LLS {lls / 2**20:.1f} MiB, back-propagation {bp / 2**20:.1f} MiB: {lls / bp:.3f}"
