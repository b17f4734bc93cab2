"""Which of two ways is faster here: asked once, written down, and then the same for every process."""

import json

import pytest
import torch

from lgkernels.core import measured
from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.ops.feedback import cpu
from tests.support.tolerances import assert_relative

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="needs the native module")
pytestmark = needs_kernels


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A processor of its own: nothing known, a clock that the ways turn."""
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "_answers", {})
    measured.records.cache_clear()
    now = [0.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    yield now
    measured.records.cache_clear()


def ways(clock, ours, other, calls=None):
    def way(seconds):
        def run():
            clock[0] += seconds
            if calls is not None:
                calls.append(seconds)

        return run

    return lambda: (way(ours), way(other))


@pytest.mark.parametrize("other, expected", [(0.5, True), (0.9, True), (0.95, False), (1.0, False), (2.0, False)])
def test_the_faster_way_is_taken_and_a_hardly_faster_one_is_not(clock, other, expected):
    assert measured.other_is_faster("a question", ways(clock, 1.0, other)) is expected


def test_an_answer_is_written_down_and_read_by_the_next_process(clock, tmp_path, monkeypatch):
    assert measured.other_is_faster("a question", ways(clock, 1.0, 0.5))
    (path,) = tmp_path.glob("processor-*.jsonl")
    about, record = map(json.loads, filter(None, path.read_text().splitlines()))
    assert about["about"]["processor"] == measured.processor()
    assert record["ours_ms"] == 1000 and record["other_ms"] == 500
    assert record["key"].endswith(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(measured, "_answers", {})
    measured.records.cache_clear()
    calls = []
    assert measured.other_is_faster("a question", ways(clock, 1.0, 2.0, calls))
    assert calls == []
    assert not measured.other_is_faster("another", ways(clock, 1.0, 2.0, calls))
    assert calls


def test_two_processes_that_ask_together_take_one_answer(clock, tmp_path):
    """The other one has written while this one measured."""

    def make():
        ours, other = ways(clock, 1.0, 2.0)()
        elsewhere = measured.Records(measured.records().path, measured.records().about, lambda *_: False)
        key = f"a question, {torch.get_num_threads()} threads"
        elsewhere.put(key, {"ours_ms": 2.0, "other_ms": 1.0})
        return ours, other

    assert measured.other_is_faster("a question", make)


def test_nothing_is_measured_where_algorithms_are_to_be_deterministic(clock):
    calls = []
    torch.use_deterministic_algorithms(True)
    try:
        assert not measured.other_is_faster("a question", ways(clock, 1.0, 0.5, calls))
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == []


def test_a_folder_that_cannot_be_written_to(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path / "file"))
    assert measured.other_is_faster("a question", ways(clock, 1.0, 0.5))


def matrices():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1100, generator=generator)
    weight[3, 5] = 0.0
    state = torch.tensor([5, 1, 2])
    return {
        "signs": FeedbackMatrix(weight, scale=0.5),
        "random signs": FeedbackMatrix(weight, state=state, law="uniform8"),
        "magnitudes": FeedbackMatrix(weight, magnitude=weight.abs() + 1),
        "law": FeedbackMatrix(state=state, law="normal", scale=2.0),
        "rows apart": FeedbackMatrix(torch.randn(300, 1200, generator=generator)[:, :1100]),
    }


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("panel", [2**19, 1100 * 7, 1])
def test_the_librarys_product_is_ours(kind, panel, monkeypatch):
    """Panels of F that end within the rows, or hold one row; signs, laws and tensors start where a panel starts."""
    monkeypatch.setattr(cpu, "_PANEL", panel)
    grad, f = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)), matrices()[kind]
    expected = grad.double() @ cpu.matrix((300, 1100), f, torch.float32, grad.device).double()
    assert_relative(kind, cpu._by_library(grad, 1100, f), expected.float(), 1e-5)
    assert_relative(kind, cpu._by_kernel(grad, 1100, f), expected.float(), 1e-5)


@pytest.mark.parametrize("shape", [(64, 0, 5), (64, 5, 0), (0, 5, 4)])
def test_the_librarys_product_without_rows_or_columns(shape):
    batch, rows, columns = shape
    f = FeedbackMatrix(torch.ones(rows, columns))
    assert torch.equal(cpu._by_library(torch.ones(batch, rows), columns, f), torch.zeros(batch, columns))


@pytest.mark.parametrize("answer", [False, True])
def test_the_answer_chooses_the_product(answer, monkeypatch):
    if cpu._C.cpu_level() == "default":
        pytest.skip("these instructions are not asked about")
    asked, taken = [], []
    monkeypatch.setattr(measured, "other_is_faster", lambda question, make: asked.append(question) or answer)
    for name in ("_by_kernel", "_by_library"):
        monkeypatch.setattr(cpu, name, lambda *_, name=name: taken.append(name))
    f = FeedbackMatrix(state=torch.zeros(3, dtype=torch.int64))
    for batch, rows in ((8, 2048), (64, 16), (64, 1024), (200, 1024), (5000, 1024)):
        cpu.product(torch.ones(batch, rows), 2048, f)
    way = "_by_library" if answer else "_by_kernel"
    assert taken == ["_by_kernel", "_by_kernel", way, way, way]
    assert asked == [f"feedback_product of {n} rows" for n in (64, 128, 512)]
