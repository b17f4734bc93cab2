"""The ways to the same random matrix: NumPy, torch operations, the native module, and a function compiled by torch for
CUDA, whose source a C++ compiler takes here. `test_random.py` compares the first with an independent version."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from lgkernels import random as lgk_random
from lgkernels.core import philox_cuda, philox_numpy
from lgkernels.core.native import native
from lgkernels.random import VALUES_PER_CALL, RandomFeedback, philox, random_matrix, random_rows
from tests.support.counting import at_most

MOST_OPERATIONS = 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAWS = [
    ("uniform", 0.7, None),
    ("uniform", 0.7, 0.0),
    ("uniform", 0.7, -0.3),
    ("uniform8", 0.7, None),
    ("uniform8", 0.7, 0.0),
    ("uniform8", 0.7, 0.1),
    ("sign", 0.3, None),
    ("normal", 0.5, None),
]
SPANS = [(0, 1), (0, 300), (3, 700), (127, 129), (2**32 - 200, 2**32), (5, 5)]


def state(seed=0x0123456789ABCDEF, stream=0xFFFFFFF0, step=0xABCDEF01):
    return torch.tensor([seed, stream, step])


def index(rows):
    return torch.cat([torch.arange(rows), torch.tensor([2**32 - 1, 2**31, 7])])


def assert_same(law, got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous()
    if law == "normal":
        np.testing.assert_array_max_ulp(got.numpy(), expected.numpy(), maxulp=4)
    else:
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("at_once", [3, 64, 1 << 12])
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_numpy(law, span, at_once, monkeypatch):
    monkeypatch.setattr(philox_numpy, "_COUNTERS_AT_ONCE", at_once)
    monkeypatch.setattr(lgk_random, "_BLOCKS_AT_ONCE", 2 * at_once)
    for seed in (0, -1, -(2**63), 0x0123456789ABCDEF):
        expected = lgk_random._rows_in_torch(state(seed), index(5), span, *law, torch.float32)
        got = random_rows(state(seed), index(5), span[1] - span[0], *law, first=span[0])
        assert_same(law[0], got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_rounds_once(dtype):
    """Ties to even; 65520 and more are inf in float16, and 2**-25 is 0."""
    for law in LAWS:
        full = random_matrix(state(), 64, 700, *law)
        for scale in (1.0, 2.0**17, 2.0**-20):
            full, got = (
                random_matrix(state(), 64, 700, law[0], scale * law[1], dtype=d) for d in (torch.float32, dtype)
            )
            assert got.dtype == dtype and torch.equal(got, full.to(dtype))


def test_scales_at_the_ends_of_float32():
    for law in VALUES_PER_CALL:
        for scale in (1.2e-38, 3e38):
            expected = lgk_random._rows_in_torch(state(), index(1), (0, 64), law, scale, None, torch.float32)
            assert_same(law, random_rows(state(), index(1), 64, law, scale), expected)


@pytest.mark.skipif(native() is None, reason="the native module is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_materialize_has_the_bits_of_random_matrix(law, dtype):
    """But for normal, which is within 4 ulp of them, and rounded from the same float32 number in every dtype."""
    feedback = RandomFeedback(-5, 3, *law)
    for shape in ((9, 300), (1, 1), (3, 1100), (0, 4), (4, 0)):
        expected = random_matrix(feedback.state, *shape, *law)
        full, got = feedback.materialize(shape), feedback.materialize(shape, dtype=dtype)
        assert_same(law[0], full, expected)
        assert torch.equal(got, full.to(dtype))
        if law[0] != "normal":
            assert torch.equal(got, expected.to(dtype))


@pytest.mark.skipif(native() is None, reason="the native module is not built")
@pytest.mark.parametrize("rows, cols", [(5, 1), (2, 127), (3, 128), (3, 2500)])
@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (7, 3), (1, 128), (2, 1023), (2**32 - 5, 2**32 - 2500)], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_native_slices(law, offset, rows, cols, monkeypatch):
    """At any column, also amid the values of a call and behind the first segment that is made at once."""
    feedback = RandomFeedback(11, 3, *law)
    for dtype in (torch.float32, torch.bfloat16):
        got = feedback.materialize((rows, cols), offset=offset, dtype=dtype)
        if offset[1] < 2000:
            whole = feedback.materialize((rows, offset[1] + cols), offset=(offset[0], 0), dtype=dtype)
            assert torch.equal(got, whole[:, offset[1] :])
    with monkeypatch.context() as patch:
        patch.setattr(lgk_random, "_native_matrix", lambda *arguments: None)
        expected = feedback.materialize((rows, cols), offset=offset)
    assert_same(law[0], feedback.materialize((rows, cols), offset=offset), expected)


@pytest.mark.skipif(native() is None, reason="the native module is not built")
def test_normal_of_many_elements_is_within_4_ulp():
    """Angles near the zeros of sine and cosine, and units near 1, where the logarithm has few digits."""
    for seed in range(2):
        feedback = RandomFeedback(seed, 1, "normal")
        assert_same("normal", feedback.materialize((512, 2048)), random_matrix(feedback.state, 512, 2048, "normal"))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_operations(law):
    with at_most(MOST_OPERATIONS):
        random_matrix(state(), 2048, 257, *law, offset=(3, 5), dtype=torch.bfloat16)
        RandomFeedback(1, 2, *law).materialize((2048, 257))


# -- what torch compiles for CUDA --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The functions of `philox_cuda.LAWS`, in C++: `compiled[kind](*inputs, *outputs, count)`."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder, found = tmp_path_factory.mktemp("random_call"), {}
    for kind in philox_cuda.LAWS:
        text = f"""
#include <cmath>
#include <cstdint>
using std::cos; using std::log; using std::sin; using std::sqrt;
{philox_cuda.code(kind)}
extern "C" void run(const int64_t* block, const int64_t* row, const int64_t* stream, const int64_t* step,
                    const int64_t* seed, int64_t* first, int64_t* second, int64_t count) {{
  for (int64_t i = 0; i < count; ++i)
    random_call<int64_t>(block[i], row[i], stream[i], step[i], seed[i], first[i], second[i]);
}}
"""
        (folder / f"{kind}.cpp").write_text(text)
        library = folder / f"{kind}.so"
        command = [compiler, "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-ffp-contract=fast"]
        subprocess.run([*command, "-o", library, folder / f"{kind}.cpp"], check=True)
        found[kind] = ctypes.CDLL(str(library)).run
    text = f"""
#include <cmath>
using std::fma;
{philox_cuda.FUSED_MULTIPLY_ADD}
extern "C" void run(const float* unit, float span, float low, float* out, long count) {{
  for (long i = 0; i < count; ++i) out[i] = affine<float>(unit[i], span, low);
}}
"""
    (folder / "affine.cpp").write_text(text)
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", folder / "affine.so", folder / "affine.cpp"], check=True)
    found["affine"] = ctypes.CDLL(str(folder / "affine.so")).run
    return found


@pytest.fixture
def stand_in(compiled, monkeypatch):
    """The CPU counts as a CUDA device: torch's compiler is the C++ one. Returns the names of the kernels that ran."""
    launches = []

    def kernel(kind):
        def run(*tensors):
            launches.append(kind)
            inputs = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*(t.numpy() for t in tensors))]
            outputs = [np.empty_like(inputs[0]) for _ in range(2)]
            compiled[kind](
                *(a.ctypes.data_as(ctypes.c_void_p) for a in (*inputs, *outputs)), ctypes.c_int64(inputs[0].size)
            )
            return tuple(torch.from_numpy(a) for a in outputs)

        return run

    def affine(unit, *, span, low):
        out = np.empty(tuple(unit.shape), np.float32)
        unit = np.ascontiguousarray(unit.numpy())
        places = [a.ctypes.data_as(ctypes.c_void_p) for a in (unit, out)]
        compiled["affine"](places[0], ctypes.c_float(span), ctypes.c_float(low), places[1], ctypes.c_long(out.size))
        return torch.from_numpy(out)

    monkeypatch.setattr(philox_cuda, "kernel", kernel)
    monkeypatch.setattr(philox_cuda, "fused_multiply_add", lambda: affine)
    return launches


def test_torch_finds_the_function_in_the_source():
    parse = torch.cuda.jiterator._CodeParser
    assert {parse(philox_cuda.code(kind)).function_name for kind in philox_cuda.LAWS} == {"random_call"}
    assert parse(philox_cuda.FUSED_MULTIPLY_ADD).function_name == "affine"


def test_words(stand_in):
    generator = np.random.default_rng(0)
    block, row = (torch.from_numpy(generator.integers(0, 2**32, 4096)) for _ in range(2))
    for seed, stream, step in generator.integers(-(2**63), 2**63, (8, 3)):
        mine = philox_cuda.words(block, row, torch.tensor([seed, stream, step])).long() & 0xFFFFFFFF
        low = [int(word) & 0xFFFFFFFF for word in (step, stream, seed, seed >> 32)]
        assert torch.equal(mine, torch.stack(philox(block, row, *low), -1))


@pytest.mark.parametrize("span", SPANS[:-1], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_compiled_rows(law, span, stand_in):
    v = VALUES_PER_CALL[law[0]]
    for seed in (0, -1, 0x0123456789ABCDEF):
        expected = lgk_random._rows_in_torch(state(seed), index(5), span, *law, torch.float32)
        got = philox_cuda.rows(state(seed), index(5), span, law[0], v, *law[1:], torch.float32)
        assert_same(law[0], got, expected)
        half = philox_cuda.rows(state(seed), index(5), span, law[0], v, *law[1:], torch.bfloat16)
        assert torch.equal(half, got.bfloat16())


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_launches(law, stand_in):
    arguments = state(), index(5)
    with at_most(MOST_OPERATIONS - 1 - 1):  # the kernel, and the row numbers of `random_matrix`
        philox_cuda.rows(*arguments, (3, 700), law[0], VALUES_PER_CALL[law[0]], *law[1:], torch.bfloat16)
    assert len(stand_in) == 1


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_what_is_compiled_is_compared_first(law, stand_in, monkeypatch):
    compare = lambda: lgk_random._compare_compiled(torch.device("cpu"), law[0], law[2] is not None)  # noqa: E731
    assert compare()
    for kind in set(stand_in):
        monkeypatch.setitem(philox_cuda.LAWS, kind, philox_cuda.LAWS[kind])
        right = philox_cuda.kernel
        wrong = lambda k, kind=kind: (  # noqa: E731
            right(k) if k != kind else lambda *tensors: tuple(t ^ (1 << 44) for t in right(kind)(*tensors))
        )
        with monkeypatch.context() as patch:
            patch.setattr(philox_cuda, "kernel", wrong)
            assert not compare(), kind


def test_what_cannot_be_compiled_is_not_used(monkeypatch):
    device, calls = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(lgk_random, "_compiled_verdicts", {})
    monkeypatch.setattr(lgk_random, "_compare_compiled", lambda *a: calls.append(a) or 1 / 0)
    capturing = [True]
    assert not lgk_random._compiled_is_right(device, "normal", False) and not calls, "not while a graph is captured"
    capturing.clear()
    assert not lgk_random._compiled_is_right(device, "normal", False)
    assert not lgk_random._compiled_is_right(device, "normal", False) and len(calls) == 1, "once"
