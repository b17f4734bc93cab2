"""Which of two ways is faster here: asked once, written down, and then the same for every process."""

import json

import pytest
import torch

from lgkernels.__main__ import main
from lgkernels.core import diagnostics, measured
from lgkernels.ops.common.matrix import FeedbackMatrix
from lgkernels.ops.feedback import cpu
from tests.support.tolerances import assert_relative

pytestmark = pytest.mark.skipif(cpu._C is None, reason="needs the native module")


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


@pytest.mark.parametrize("other, expected", [(0.5, True), (0.85, True), (0.92, False), (1.0, False), (2.0, False)])
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


def test_the_first_call_and_a_busy_moment_do_not_count(clock):
    """The best of the rounds after the first call: a library that plans at first is not slow for it."""
    rounds = iter([50.0, 3.0, 0.5, *[3.0] * 20])

    def other():
        clock[0] += next(rounds)

    assert measured.other_is_faster("a question", lambda: (ways(clock, 1.0, 0.0)()[0], other))


def test_two_processes_that_ask_together_take_one_answer(clock, monkeypatch):
    """The other one writes after this one's last look, while it waits for the lock."""
    key = f"a question, {torch.get_num_threads()} threads"
    elsewhere = measured.Records(measured.records().path, measured.records().about, lambda *_: False)
    own = measured.Records._writing

    def late(records, write):
        monkeypatch.setattr(measured.Records, "_writing", own)
        elsewhere.put(key, {"ours_ms": 2.0, "other_ms": 1.0})
        own(records, write)

    monkeypatch.setattr(measured.Records, "_writing", late)
    assert measured.other_is_faster("a question", ways(clock, 1.0, 2.0))
    elsewhere.read()
    assert elsewhere.entries[key]["ours_ms"] == 2.0


@pytest.mark.parametrize(
    "damaged", ['{"x": 1}', '{"ours_ms": 3.0}', '{"ours_ms": null, "other_ms": 1}', '{"ours_ms": "a", "other_ms": NaN}']
)
def test_a_damaged_record_is_measured_again(clock, damaged, monkeypatch):
    measured.other_is_faster("a question", ways(clock, 1.0, 2.0))
    path, key = measured.records().path, f"a question, {torch.get_num_threads()} threads"
    with open(path, "a") as file:
        file.write(json.dumps({"key": key} | json.loads(damaged)) + "\n")
    monkeypatch.setattr(measured, "_answers", {})
    measured.records.cache_clear()
    assert diagnostics.measurements() == {}
    assert measured.other_is_faster("a question", ways(clock, 1.0, 0.5))
    assert diagnostics.measurements() == {key: (1000.0, 500.0)}


@pytest.mark.parametrize("other", ["processor", "kernels", "torch", "sources"])
def test_another_processor_or_version_has_a_file_of_its_own(clock, other, monkeypatch):
    measured.other_is_faster("a question", ways(clock, 1.0, 0.5))
    first = measured.records()
    target = {
        "processor": (measured, "processor"),
        "kernels": (cpu._C, "cpu_level"),
        "torch": (torch, "__version__"),
        "sources": (measured.verdicts, "sources_hash"),
    }[other]
    if other == "kernels":  # a native module's function is not to be patched
        kernels = type("Kernels", (), {"cpu_level": staticmethod(lambda: "another")})
        monkeypatch.setattr(measured.native, "cpu_entries", lambda: kernels)
    else:
        monkeypatch.setattr(*target, "another" if other == "torch" else lambda: "another")
    measured.records.cache_clear()
    assert measured.records().entries == {} and measured.records().path != first.path
    measured.records().put("x", {"ours_ms": 1.0, "other_ms": 1.0})
    assert first.path.exists()  # the other's is no older


def test_a_user_without_a_home(clock, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(measured.verdicts, "directory", nowhere)
    assert measured.other_is_faster("a question", ways(clock, 1.0, 0.5)) and measured.records().path is None


def test_info_shows_and_verify_forgets_what_was_measured(clock, capsys):
    measured.other_is_faster("a question", ways(clock, 1.0, 0.5))
    assert "a question, " in diagnostics.as_text(diagnostics.gather())
    assert main(["verify", "--forget"]) == 0
    assert "1 measurements of this processor removed" in capsys.readouterr().out
    assert diagnostics.measurements() == {}


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
        "columns apart": FeedbackMatrix(weight, magnitude=torch.randn(1100, 300, generator=generator).t()),
        "packed": FeedbackMatrix(cpu.pack_signs(weight), state=state, law="uniform"),
    }


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("panel", [(256, 2048), (7, 256), (1, 1024)], ids=str)
def test_the_librarys_product_is_ours(kind, panel, monkeypatch):
    """Panels that end within F, or hold one row; signs, laws and tensors start where a panel starts."""
    monkeypatch.setattr(cpu, "_PANEL", panel)
    grad, f = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)), matrices()[kind]
    expected = grad.double() @ cpu.matrix((300, 1100), f, torch.float32, grad.device).double()
    assert_relative(kind, cpu._by_library(grad, 1100, f), expected.float(), 1e-5)
    assert_relative(kind, cpu._by_kernel(grad, 1100, f), expected.float(), 1e-5)


def test_in_16_bits_the_librarys_product_rounds_once(monkeypatch):
    monkeypatch.setattr(cpu, "_PANEL", (1, 128))
    grad, f = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)), matrices()["law"]
    expected = grad.bfloat16().double() @ cpu.matrix((300, 1100), f, torch.bfloat16, grad.device).double()
    assert_relative("bfloat16", cpu._by_library(grad.bfloat16(), 1100, f).double(), expected, 2**-8)


@pytest.mark.parametrize("batch", [64, 512])
def test_what_is_asked_about_is_one_product(batch):
    ours, other = (way() for way in cpu._ways(batch))
    assert ours.shape == (batch, cpu._PANEL[1]) and ours.dtype == torch.float32
    assert_relative("ways", other, ours, 1e-5)


def test_ours_is_the_kernel_and_the_other_the_librarys(monkeypatch):
    monkeypatch.setattr(cpu, "_by_kernel", lambda *_: "ours")
    monkeypatch.setattr(cpu, "_by_library", lambda *_: "the library's")
    assert [way() for way in cpu._ways(64)] == ["ours", "the library's"]


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


LARGE = 512, 1024, 1024  # rows of grad, rows and columns of F


@pytest.mark.parametrize(
    "dtype, signs_alone, looked_up, bf16, expected",
    [
        (torch.float32, False, True, True, "asked"),
        (torch.float32, True, False, True, "asked"),
        (torch.float32, True, True, True, False),
        (torch.bfloat16, False, True, True, True),
        (torch.bfloat16, False, True, False, False),
        (torch.bfloat16, True, False, True, False),
        (torch.float16, False, True, True, False),
    ],
)
def test_which_products_are_asked_about(dtype, signs_alone, looked_up, bf16, expected, monkeypatch):
    if cpu._C.cpu_level() == "default":
        pytest.skip("these instructions are not asked about")
    monkeypatch.setattr(cpu, "SIGNS_BY_LOOK_UP", looked_up)
    monkeypatch.setattr(cpu, "_BF16", bf16)
    monkeypatch.setattr(measured, "other_is_faster", lambda *_: "asked")
    assert cpu._library_is_faster(*LARGE, dtype, signs_alone) == expected
    assert not cpu._library_is_faster(8, *LARGE[1:], dtype, signs_alone)
