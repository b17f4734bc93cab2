"""The whole life of a key: unknown, running, good or bad; kernels broken in every way that a trial must catch.

Triton's interpreter, or a module of planted faults, stands in for a GPU's kernels, the CPU for the GPU.
"""

import importlib
import os
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.core import dispatch, trust, verdicts
from lgkernels.core.trial import Trial

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    """The CPU counts as a GPU whose driver is Triton's interpreter, and verdicts lie in a folder of the test's own."""
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LGKERNELS_TRUST", raising=False)
    monkeypatch.setattr(trust, "DEVICE_TYPES", {"cpu"})
    trust.forget_all()
    dispatch._chosen.cache_clear()
    yield
    trust.forget_all()
    dispatch._chosen.cache_clear()


def entries():
    return {key: entry["state"] for key, entry in trust.store(CPU).known.items()}


def written():
    """What a process that begins now would read."""
    assert len(list(Path(os.environ["LGKERNELS_CACHE_DIR"]).glob("verdicts-*"))) == 1
    return {"verdicts": verdicts.Verdicts(CPU).known}


# -- an op of the test's own -------------------------------------------------------------------------------------------


def double(kernels, x):
    return kernels.double(x)


OP = trust.Op("double", double, ("x",), lambda arguments: arguments, Trial(rows=("x",), length=lambda a: 1))
REFERENCE = types.SimpleNamespace(double=lambda x: x * 2)


def right(x):
    return torch.empty_like(x).copy_(x * 2)


def one_lane(x):
    out = right(x)
    out.view(-1)[5] += 0.01
    return out


def one_mask(x):
    """The last row of an odd batch is left out."""
    out = torch.empty_like(x)
    even = len(x) // 2 * 2
    out[:even] = x[:even] * 2
    return out


def one_unwritten_element(x):
    out = torch.empty_like(x)
    out.view(-1)[1:] = (x * 2).view(-1)[1:]
    return out


def beyond_the_end(x):
    out = right(x)
    out.as_strided((out.numel() + 1,), (1,))[-1] = 3.0
    return out


def into_the_input(x):
    x.view(-1)[0] += 1
    return (x * 2).clone()


def another_each_time(x, runs=[0]):  # noqa: B006
    runs[0] += 1
    return right(x) * (1 + 2e-7 * (runs[0] % 2))


def raises(x):
    raise RuntimeError("no image of this kernel for the device")


FAULTS = {
    one_lane: "error",
    one_mask: "nan or inf",
    one_unwritten_element: "nan or inf",
    beyond_the_end: "outside of its results",
    into_the_input: "wrote to its input x",
    another_each_time: "two runs differ",
    raises: "RuntimeError: no image",
}


def admits(function, x=None):
    x = torch.linspace(-1, 1, 64 * 7).view(64, 7) if x is None else x
    return trust.admits(OP, "planted", types.SimpleNamespace(double=function), REFERENCE, (x,))


def test_a_right_kernel_is_tried_once():
    calls = []

    def counted(x):
        calls.append(len(x))
        return right(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert admits(counted) and admits(counted)
    assert calls == [64, 64, 63, 63], "whole blocks and a ragged batch, twice each"
    assert list(entries().values()) == [verdicts.GOOD]
    assert [e["state"] for e in written()["verdicts"].values()] == [verdicts.GOOD]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_caught_and_named(fault):
    with pytest.warns(UserWarning, match=f"the planted kernels of double failed.*{FAULTS[fault]}.*verify --again"):
        assert not admits(fault)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not admits(fault), "one warning, and no second trial"


def test_what_only_this_process_lacks_is_tried_again_by_the_next():
    with pytest.warns(UserWarning):
        assert not admits(raises)
    assert not written()["verdicts"]
    trust.forget_all()
    assert admits(right)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    assert admits(right)
    assert torch.equal(state, torch.get_rng_state())


def test_keys_tell_layouts_dtypes_and_alignment_apart():
    x = torch.randn(64, 8)
    for like in (x, x.t().contiguous().t(), x.half(), torch.randn(64 * 8 + 1)[1:].view(64, 8), x[:, ::2]):
        assert admits(lambda x: x * 2, like)
    assert len(entries()) == 5
    assert admits(raises, x[:32].repeat(2, 1)), "the same specialisation"


def test_a_verdict_of_one_device_is_none_of_another():
    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    x = torch.ones(64, 8)
    assert trust._quick(OP, "planted", (x,)) != trust._quick(OP, "planted", (x.as_subclass(Elsewhere),))


def test_a_look_up_runs_little_python():
    """By counting: the look-up and its key, whatever the arguments are."""
    arguments = torch.ones(64, 8), None, torch.nn.Parameter(torch.ones(8)), [1, 1], 3, 0.5, 1.0, True, "word"
    op = OP._replace(names=tuple("abcdefghi"))
    trust._admitted[trust._quick(op, "planted", arguments)] = True
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        assert trust.admits(op, "planted", None, None, arguments)
    finally:
        sys.setprofile(None)
    assert calls == ["admits", "_quick"]
    for i, other in ((3, [1, 2]), (4, 4), (5, 1.0), (6, 0.5), (7, False), (8, "other"), (1, 0)):
        changed = (*arguments[:i], other, *arguments[i + 1 :])
        assert trust._quick(op, "planted", changed) != trust._quick(op, "planted", arguments)
    assert trust._quick(op, "planted", (*arguments[:5], 0.7, *arguments[6:])) in trust._admitted, "a schedule's number"


def test_the_next_process_takes_the_verdict_over():
    assert admits(right)
    trust.forget_all()
    assert admits(raises), "it is not tried again"


@pytest.mark.parametrize("change", ["sources", "driver", "torch", "gpu", "triton"])
def test_a_change_of_what_a_verdict_depends_on_tries_again(change, monkeypatch):
    assert admits(right)
    trust.forget_all()
    before = verdicts.fingerprint(CPU)
    monkeypatch.setattr(verdicts, "fingerprint", lambda device: before | {change: "another"})
    with pytest.warns(UserWarning, match="failed"):
        assert not admits(one_lane)


def test_the_sources_are_hashed():
    assert len(verdicts.sources_hash()) == 16


def test_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path / "file" / "below"))  # root may write into any folder
    assert admits(right) and admits(raises), "memory serves this process"
    assert trust.store(CPU).path is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"about": 3}\n', '{"about": 3}\n{"key": "a"}', "\x00\x01", "\n\n"])
def test_a_damaged_file_counts_as_empty(text):
    assert admits(right)
    path = trust.store(CPU).path
    path.write_text(text)
    trust.forget_all()
    assert admits(right)
    assert verdicts.GOOD in [e["state"] for e in written()["verdicts"].values() if isinstance(e, dict)]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"state": "bad"}', '{"key": [], "state": "bad"}', '{"key": "a'])
def test_a_damaged_line_is_none(line):
    assert admits(right)
    path = trust.store(CPU).path
    with open(path, "a") as file:
        file.write(line)  # without an end: its process was killed while it wrote
    verdicts.Verdicts(CPU).note("b", verdicts.GOOD, "b")
    assert [e["state"] for e in written()["verdicts"].values()] == [verdicts.GOOD] * 2


def killed_in_a_trial(signal=9):
    """A process that ends in the middle of a trial."""
    program = """
        import os, sys, torch
        sys.path.insert(0, {root!r})
        from tests.integration import test_trust
        from lgkernels.core import trust
        trust.DEVICE_TYPES = {{"cpu"}}
        test_trust.admits(lambda x: os.kill(os.getpid(), {signal}), torch.ones(64, 7))
    """
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program.format(root=root, signal=signal))])
    assert result.returncode == -signal
    return [(e["state"], e["left"]) for e in written()["verdicts"].values()]


def test_a_kernel_that_took_two_processes_down_is_not_tried_again():
    assert killed_in_a_trial() == [(verdicts.RUNNING, 0)]
    assert killed_in_a_trial() == [(verdicts.RUNNING, 1)]
    with pytest.warns(UserWarning, match="2 processes that tried it ended in the middle"):
        assert not admits(right, torch.ones(64, 7))


def test_a_process_that_was_ended_in_a_trial_condemns_nothing():
    assert killed_in_a_trial(15) == [(verdicts.RUNNING, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert admits(right, torch.ones(64, 7))
    assert list(entries().values()) == [verdicts.GOOD]


def test_ranks_that_try_at_once_are_one_strike():
    one, two = verdicts.Verdicts(CPU), verdicts.Verdicts(CPU)
    one.note("a", verdicts.RUNNING, "a")
    two.note("a", verdicts.RUNNING, "a")
    assert written()["verdicts"]["a"]["left"] == 0
    one.known["a"]["started"] = "1"  # as if both had been ended
    assert one.state("a") == (None, "")


def test_a_key_that_another_process_tries_now_is_no_crash():
    store = trust.store(CPU)
    assert admits(right)
    (key,) = entries()
    store.note(key, verdicts.RUNNING, "double")
    entry = written()["verdicts"][key]
    assert entry["pid"] == os.getpid() and store.state(key) == (None, "")


def test_two_ranks_keep_each_others_verdicts():
    mine, theirs = verdicts.Verdicts(CPU), verdicts.Verdicts(CPU)
    mine.note("a", verdicts.GOOD, "a")
    theirs.note("b", verdicts.BAD, "b", "wrong")
    mine.note("c", verdicts.GOOD, "c")
    assert {k: e["state"] for k, e in written()["verdicts"].items()} == {"a": "good", "b": "bad", "c": "good"}
    assert mine.state("b") == ("bad", "wrong")


def test_no_memory_for_a_trial_is_no_verdict_but_for_this_process():
    def no_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning, match="double runs in plain torch in this process: there was no memory for a trial"):
        assert not admits(no_memory)
    assert not entries() and not written()["verdicts"]
    assert not admits(right), "each of its calls would end there"
    trust.forget_all()
    assert admits(right)


def test_a_kernel_that_broke_the_device_is_not_tried_again():
    def broken(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.warns(UserWarning, match="illegal memory access"):
        assert not admits(broken)
    assert [e["state"] for e in written()["verdicts"].values()] == [verdicts.BAD]


def test_a_call_that_the_reference_refuses_says_nothing_of_the_kernel():
    def refuses(x):
        raise ValueError("x must be longer")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = types.SimpleNamespace(double=refuses)
        assert not trust.admits(OP, "planted", types.SimpleNamespace(double=right), reference, (torch.ones(64, 7),))
    assert not entries()


def test_a_trial_on_another_machine_says_nothing_here():
    store = trust.store(CPU)
    assert admits(right)
    (key,) = entries()
    store.note(key, verdicts.RUNNING, "double")
    store.known[key]["node"] = "another"
    assert store.state(key) == (None, "")
    store.known[key] |= {"node": verdicts.platform.node(), "started": "1", "left": 1}
    assert store.state(key)[0] == verdicts.BAD, "the same number, another process"
    store.known[key]["node"] = "another"
    assert store.state(key) == (None, "")


def test_an_interrupted_trial_is_no_verdict():
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        admits(interrupted)
    assert not entries() and not written()["verdicts"]


def test_nothing_is_tried_during_a_capture(monkeypatch):
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    with pytest.warns(UserWarning, match="Run one step before the capture"):
        assert not admits(right)
    monkeypatch.setattr(trust, "capturing", lambda device: False)
    assert admits(right), "after the capture it is"
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    assert admits(right), "and its verdict holds in the next capture"


def test_modes_of_torch_are_as_they_were():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert admits(right)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        assert admits(right, torch.ones(64, 9))


# -- the library's own ops ------------------------------------------------------------------------------------------


def goodness(h=None):
    h = torch.linspace(-1, 1, 64 * 12).view(64, 12) if h is None else h
    h = h.clone().requires_grad_()
    loss = LF.goodness_loss(h, torch.arange(64) % 2 == 0, threshold=0.3)
    loss.backward()
    return loss.detach(), h.grad


def test_auto_takes_the_kernel_that_has_passed(monkeypatch):
    from lgkernels.ops.local_loss import triton

    calls, kernel = [], triton.goodness
    monkeypatch.setattr(triton, "goodness", lambda *a: calls.append(1) or kernel(*a))
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    expected = goodness()
    monkeypatch.delenv("LGKERNELS_IMPL")
    first, tried = goodness(), len(calls)
    second = goodness()
    assert len(calls) == tried + 1
    assert set(entries().values()) == {verdicts.GOOD} and len(entries()) == 2
    for got in (first, second):
        torch.testing.assert_close(got, expected)


def zeros(results):
    return tuple(torch.zeros_like(r) for r in results)


def halved(results):
    return tuple(r / 2 if r.is_floating_point() else r for r in results)


def other_rows(results):
    """Every row of a gradient but the first and the last points the wrong way."""
    return tuple(torch.cat([r[:1], -3 * r[1:-1], r[-1:]]) if r.dim() == 2 else r for r in results)


def run_product(dtype):
    weight = torch.linspace(-1, 1, 4096 * 8).view(4096, 8).to(dtype)
    LF.sign_symmetric_linear(torch.ones(16, 8, dtype=dtype, requires_grad=True), weight).sum().backward()


def run_block(dtype):
    from lgkernels.nn import LLSConvBlock

    block = LLSConvBlock(3, 8, 3, padding=1, num_classes=10, pool_size=2).to(dtype)
    block(torch.linspace(-1, 1, 16 * 3 * 64).view(16, 3, 8, 8).to(dtype), torch.arange(16) % 10)


def run_head(dtype):
    x = torch.linspace(-1, 1, 16 * 32).view(16, 32).to(dtype).requires_grad_()
    LF.lls_loss(x, torch.arange(16) % 10, num_classes=10, pool_size=32).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "run, op, family, name, wrong",
    [
        (run_product, "feedback_product", "feedback", "product", lambda r: zeros([r])[0]),
        (run_product, "feedback_product", "feedback", "product", lambda r: halved([r])[0]),
        (run_block, "lls_block", "lls", "norm_act_pool", zeros),
        (run_block, "lls_block", "lls", "norm_grads", halved),
        (run_head, "lls_loss_forward", "lls", "head", other_rows),
    ],
    ids=["product zeros", "product halved", "block zeros", "block halved", "head rows"],
)
def test_a_wrong_kernel_of_an_op_is_caught_in_every_dtype(run, op, family, name, wrong, dtype, monkeypatch):
    module = importlib.import_module(f"lgkernels.ops.{family}.triton")
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: wrong(kernel(*a, **k)))
    with pytest.warns(UserWarning, match=f"the triton kernels of {op} failed"):
        run(dtype)
    monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_right_kernels_pass_in_every_dtype(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_product(dtype), run_block(dtype), run_head(dtype)
        x = torch.linspace(-1, 1, 16 * 32).view(16, 32).to(dtype).requires_grad_()  # without maps: no mean
        LF.similarity_matching_loss(x, torch.arange(16) % 10, num_classes=10).backward()
        for kind in (torch.uint8, torch.int8, torch.int16):
            LF.lls_loss(x, (torch.arange(16) % 10).to(kind), num_classes=300, pool_size=32)
    assert set(entries().values()) == {verdicts.GOOD}


def test_auto_falls_back_from_a_kernel_that_has_not(monkeypatch):
    from lgkernels.ops.local_loss import triton

    kernel = triton.goodness_grad
    monkeypatch.setattr(triton, "goodness_grad", lambda *a: kernel(*a) * 1.01)
    expected_state = {"goodness": verdicts.GOOD, "goodness_backward": verdicts.BAD}
    with pytest.warns(UserWarning, match="the triton kernels of goodness_backward failed"):
        _, grad = goodness()
    assert {key.partition("/")[0]: state for key, state in entries().items()} == expected_state
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    torch.testing.assert_close(grad, goodness()[1])


@pytest.mark.parametrize("policy, kernels_run", [("always", True), ("never", False)])
def test_other_policies_try_nothing(policy, kernels_run, monkeypatch):
    from lgkernels.ops.local_loss import triton

    calls, kernel = [], triton.goodness
    monkeypatch.setattr(triton, "goodness", lambda *a: calls.append(1) or kernel(*a))
    monkeypatch.setenv("LGKERNELS_TRUST", policy)
    goodness()
    assert bool(calls) == kernels_run and not entries()


def test_an_impossible_policy_is_refused(monkeypatch):
    monkeypatch.setenv("LGKERNELS_TRUST", "sometimes")
    with pytest.raises(ValueError, match="LGKERNELS_TRUST must be one of first-use, always, never, got 'sometimes'"):
        goodness()


def test_a_backend_that_is_asked_for_is_not_tried():
    LF.goodness_loss(torch.ones(64, 12), torch.arange(64) % 2 == 0, threshold=0.3, impl="triton")
    assert not entries()


@pytest.mark.unpoisoned
def test_a_compiled_call_is_tried_too():
    torch._dynamo.reset()
    step = torch.compile(lambda h, y: LF.goodness_loss(h, y, threshold=0.3), backend="aot_eager", fullgraph=True)
    h = torch.linspace(-1, 1, 64 * 12).view(64, 12).requires_grad_()
    step(h, torch.arange(64) % 2 == 0).backward()
    torch.testing.assert_close(h.grad, goodness()[1])
    assert set(entries().values()) == {verdicts.GOOD}


def test_autocast_changes_no_verdict():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        goodness()
    assert set(entries().values()) == {verdicts.GOOD}
