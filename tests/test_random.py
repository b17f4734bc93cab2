"""Random matrices: published Philox vectors, golden file, and every backend against an independent NumPy version.

The golden file is rewritten (only when `LAW_VERSION` changes) as tests/golden/random/README.md says.
"""

import copy
import ctypes
import io
import os
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lgkernels import random as lgk_random
from lgkernels.core import philox_numpy
from lgkernels.random import LAW_VERSION, VALUES_PER_CALL, RandomFeedback, philox, random_matrix, random_rows
from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "random" / f"philox_v{LAW_VERSION}.npz"

# Random123 1.09, tests/kat_vectors, "philox4x32 10": counter, key, result
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# name: (seed, stream, step, law, scale, low, rows, cols, offset)
CASES = {
    "uniform": (0, 0, 0, "uniform", 1.0, None, 5, 13, (0, 0)),
    "uniform_wide": (0x0123456789ABCDEF, 0xFFFFFFFF, 3, "uniform", 0.37, None, 7, 130, (4294967000, 4294967001)),
    "uniform_low": (-1, 5, 0xFFFFFFFF, "uniform", 0.3, -0.1, 6, 33, (2, 3)),
    # its first value is a tie of float32 in float64, and rounds up: float64 first would lose that
    "uniform_far_low": (0, 0, 0, "uniform", 1 + 8392705 * 2.0**-46, 1.0, 4, 16, (1303239, 0)),
    "uniform_low0": (11, 1, 1, "uniform", 1e-4, 0.0, 3, 21, (0, 4)),
    "normal": (1, 2, 3, "normal", 1.0, None, 17, 65, (0, 0)),
    "normal_scaled": (-(2**63), 9, 0, "normal", 0.05, None, 9, 30, (1, 2)),
    "uniform8": (7, 0, 2, "uniform8", 0.7, None, 4, 50, (3, 5)),
    "uniform8_low": (2**62, 3, 0, "uniform8", 0.9, 0.2, 4, 40, (0, 1)),
    "uniform8_low0": (8, 3, 0, "uniform8", 0.9, 0.0, 4, 40, (0, 0)),
    "sign": (42, 1, 7, "sign", 0.5, None, 6, 300, (1, 100)),
}


# -- an independent version: NumPy, unsigned 64-bit words, one element at a time -----------------------------------


def numpy_philox(counter, key):
    c, k = [np.asarray(w, np.uint64) for w in counter], [np.asarray(w, np.uint64) for w in key]
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> shift) ^ c[1] ^ k[0], p1 & mask, (p0 >> shift) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(np.broadcast_arrays(*c), -1).astype(np.uint32)


def nearest(exact):
    """The float32 nearest to a fraction, the even one of two."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda value: (abs(Fraction(float(value)) - exact), value.view(np.int32) & 1))


def numpy_matrix(seed, stream, step, law, scale, low, rows, cols, offset):
    f32, v = np.float32, {"uniform": 4, "normal": 4, "uniform8": 16, "sign": 128}[law]
    row, col = np.arange(rows)[:, None] + offset[0], np.arange(cols)[None, :] + offset[1]
    key = (seed % 2**64 % 2**32, seed % 2**64 >> 32)
    words = numpy_philox((col // v, row, step, stream), key)
    index = np.broadcast_to(col % v, words.shape[:2])

    def unit(word):
        return ((word >> 9).astype(f32) + f32(0.5)) * f32(2.0**-23)

    def scaled(u):
        if low is None:
            return (2 * u - f32(1)) * f32(scale)
        span, start = Fraction(float(f32(scale - low))), Fraction(float(f32(low)))
        return np.vectorize(lambda value: nearest(Fraction(float(value)) * span + start), otypes=[f32])(u)

    def pick(which):
        return np.take_along_axis(words, which[..., None], -1)[..., 0]

    if law == "uniform":
        return scaled(unit(pick(index)))
    if law == "uniform8":
        byte = (pick(index // 4) >> (index % 4 * 8).astype(np.uint32)) & 255
        return scaled((byte.astype(f32) + f32(0.5)) / f32(256))
    if law == "sign":
        return np.where((pick(index // 32) >> (index % 32).astype(np.uint32)) & 1, -f32(scale), f32(scale))
    radius = np.sqrt(-2 * np.log(unit(pick(index // 2 * 2)).astype(np.float64)))
    angle = (unit(pick(index // 2 * 2 + 1)) * f32(2 * np.pi)).astype(np.float64)
    return (radius * np.where(index % 2, np.sin(angle), np.cos(angle))).astype(f32) * f32(scale)


def golden_arrays():
    return {"law_version": np.int64(LAW_VERSION), **{name: numpy_matrix(*case) for name, case in CASES.items()}}


def assert_law_equal(actual, expected, law):
    """Bit-equal, and for `normal` within 4 units in the last place."""
    assert actual.dtype == expected.dtype == np.float32 and actual.shape == expected.shape
    if law == "normal":
        np.testing.assert_array_max_ulp(actual, expected, maxulp=4)
    else:
        np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


def feedback(name):
    seed, stream, step, law, scale, low, *_ = CASES[name]
    result = RandomFeedback(seed, stream, law, scale, low)
    result.state[2] = step
    return result


# -- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_published_vectors(counter, key, expected):
    assert tuple(numpy_philox(counter, key)) == expected
    assert philox(*counter, *key) == expected
    tensors = [torch.tensor(word) for word in (*counter, *key)]
    assert tuple(int(word) for word in philox(*tensors)) == expected


def test_words_equal_numpy_over_the_whole_range():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, (6, 4096), dtype=np.uint64)
    words[:, :2] = [[0, 0xFFFFFFFF]] * 6
    ours = torch.stack(philox(*torch.from_numpy(words.astype(np.int64))), -1).numpy()
    np.testing.assert_array_equal(ours, numpy_philox(words[:4], words[4:]))


# -- the four laws, per backend ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_golden_file(name, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(lgk_random, "_native_matrix", lambda *arguments: None)
    with np.load(GOLDEN, allow_pickle=False) as golden:
        assert golden["law_version"] == LAW_VERSION and set(golden.files) == {"law_version", *CASES}
        expected = golden[name]
    *_, law, _, _, rows, cols, offset = CASES[name]
    assert_law_equal(numpy_matrix(*CASES[name]), expected, law)
    assert_law_equal(feedback(name).materialize((rows, cols), offset=offset).numpy(), expected, law)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """`csrc/common/philox.h` behind one C function, compiled so that multiply-adds would be contracted."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here: the header is for the native module, which needs one too")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "philox.cpp").write_text("""
#include "common/philox.h"
template <int LAW>
static void run(const int64_t* state, uint32_t row, uint32_t block, const lgk::Range& range, float* out) {
  lgk::law_values<LAW>(lgk::feedback_words(state, row, block), range, out);
}
extern "C" void values(const int64_t* state, int law, double scale, double low, int has_low, uint32_t row,
                       uint32_t block, float* out) {
  const lgk::Range range = has_low ? lgk::range_from(low, scale) : lgk::signed_range(scale);
  if (law == lgk::kUniform) run<lgk::kUniform>(state, row, block, range, out);
  if (law == lgk::kNormal) run<lgk::kNormal>(state, row, block, range, out);
  if (law == lgk::kUniform8) run<lgk::kUniform8>(state, row, block, range, out);
  if (law == lgk::kSign) run<lgk::kSign>(state, row, block, range, out);
}
extern "C" void words(const uint32_t* c, const uint32_t* k, uint32_t* out) {
  const lgk::Words words = lgk::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
  for (int i = 0; i < 4; ++i) out[i] = words.w[i];
}
""")
    fma = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text() else [] if Path("/proc/cpuinfo").exists() else []
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-ffp-contract=fast",
            *fma,
            f"-I{ROOT / 'csrc'}",
            "-o",
            folder / "philox.so",
            folder / "philox.cpp",
        ],
        check=True,
    )
    return ctypes.CDLL(str(folder / "philox.so"))


@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_header_published_vectors(header, counter, key, expected):
    out = (ctypes.c_uint32 * 4)()
    header.words((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert tuple(out) == expected


@pytest.mark.parametrize("name", CASES)
def test_header(header, name):
    seed, stream, step, law, scale, low, rows, cols, offset = CASES[name]
    v, index = VALUES_PER_CALL[law], ["uniform", "normal", "uniform8", "sign"].index(law)
    first, last = offset[1] // v, (offset[1] + cols - 1) // v
    state, buffer = (ctypes.c_int64 * 3)(seed, stream, step), (ctypes.c_float * v)()
    matrix = np.empty((rows, (last - first + 1) * v), np.float32)
    for row in range(rows):
        for block in range(first, last + 1):
            header.values(
                state,
                index,
                ctypes.c_double(scale),
                ctypes.c_double(low or 0.0),
                low is not None,
                ctypes.c_uint32(row + offset[0]),
                ctypes.c_uint32(block),
                buffer,
            )
            matrix[row, (block - first) * v : (block - first + 1) * v] = buffer
    skip = offset[1] % v
    assert_law_equal(matrix[:, skip : skip + cols].copy(), numpy_matrix(*CASES[name]), law)


TRITON_PROGRAM = """
import sys
from fractions import Fraction
import numpy as np
import torch
import triton
import triton.language as tl
sys.path.insert(0, sys.argv[1])
import test_random
from lgkernels.ops.common import philox as P


@triton.jit
def elements(state, out, row0, col0, cols, scale, span, low, LAW: tl.constexpr, HAS_LOW: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):
    seed, stream, step = P.load_state(state)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    value = P.element(seed, stream, step, r + row0.to(tl.int64), c + col0.to(tl.int64), scale, span, low, LAW, HAS_LOW)
    tl.store(out + r * cols + c, value, mask=c < cols)


@triton.jit
def tiles(state, out, row0, block0, cols, scale, span, low, LAW: tl.constexpr, HAS_LOW: tl.constexpr,
          ROWS: tl.constexpr, BLOCKS: tl.constexpr, V: tl.constexpr):
    seed, stream, step = P.load_state(state)
    r, b = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
    value = P.tile(seed, stream, step, r + row0.to(tl.int64), b + block0.to(tl.int64), scale, span, low, LAW, HAS_LOW,
                   ROWS, BLOCKS)
    c = tl.arange(0, BLOCKS * V)[None, :]
    tl.store(out + r * cols + c, value)


if sys.argv[2] == "compile":  # for real GPUs, ahead of time
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    pointers = dict(state="*i64", out="*fp32", row0="i64", cols="i32", scale="fp32", span="fp32", low="fp32")
    for capability in (80, 90, 120):
        for law, LAW in P.LAWS.items():
            fixed, v = dict(LAW=LAW, HAS_LOW=law.startswith("uniform"), ROWS=16), P.values_per_call(law)
            target = GPUTarget("cuda", capability, 32)
            triton.compile(ASTSource(elements, {**pointers, "col0": "i64"}, {**fixed, "COLS": 64}), target=target)
            fixed.update(BLOCKS=2, V=v)
            triton.compile(ASTSource(tiles, {**pointers, "block0": "i64"}, fixed), target=target)
    sys.exit()

ROWS, results = 4, {}
for name, (seed, stream, step, law, scale, low, rows, cols, offset) in test_random.CASES.items():
    state, v = test_random.feedback(name).state, P.values_per_call(law)
    LAW, HAS_LOW, *numbers = P.law_arguments(law, scale, low)
    out = torch.full((ROWS, 16), float("nan"))
    elements[(1,)](state, out, offset[0], offset[1], 16, *numbers, LAW=LAW, HAS_LOW=HAS_LOW, ROWS=ROWS, COLS=16)
    results[name + "/element"] = out.numpy()
    out = torch.full((ROWS, 2 * v), float("nan"))
    tiles[(1,)](state, out, offset[0], offset[1] // v, 2 * v, *numbers, LAW=LAW, HAS_LOW=HAS_LOW, ROWS=ROWS, BLOCKS=2,
                V=v)
    results[name + "/tile"] = out.numpy()
np.savez(sys.argv[2], **results)
"""


def run_triton_program(folder, output, interpret):
    """In a process of its own: Triton reads the switch when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    (folder / "program.py").write_text(TRITON_PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, folder / "program.py", ROOT / "tests", output], check=True, env=environment)


def test_triton_compiles_ahead_of_time(tmp_path):
    run_triton_program(tmp_path, "compile", "0")


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory):
    def interpret(folder):
        folder.mkdir(exist_ok=True)
        run_triton_program(folder, folder / "out.npz", "1")

    with np.load(made_once(tmp_path_factory, "random_triton", interpret) / "out.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_triton(triton_results, name):
    seed, stream, step, law, scale, low, _, _, (row, col) = CASES[name]
    v = VALUES_PER_CALL[law]
    expected = numpy_matrix(seed, stream, step, law, scale, low, 4, 16, (row, col))
    assert_law_equal(triton_results[name + "/element"], expected, law)
    expected = numpy_matrix(seed, stream, step, law, scale, low, 4, 2 * v, (row, col // v * v))
    assert_law_equal(triton_results[name + "/tile"], expected, law)


# -- RandomFeedback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("law", VALUES_PER_CALL)
@pytest.mark.parametrize(
    "rows, cols, offset", [(3, 7, (0, 0)), (1, 1, (4, 131)), (5, 128, (2, 64)), (0, 4, (0, 0)), (4, 0, (0, 0))]
)
def test_a_slice_is_the_matrix_of_the_slice(law, rows, cols, offset, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(lgk_random, "_native_matrix", lambda *arguments: None)
    one = RandomFeedback(3, 4, law, 0.5)
    whole = one.materialize((9, 300))
    row, col = offset
    monkeypatch.setattr(philox_numpy, "_COUNTERS_AT_ONCE", 2)
    assert torch.equal(one.materialize((rows, cols), offset=offset), whole[row : row + rows, col : col + cols])


def test_shapes_map_to_rows_and_flattened_rest():
    one = RandomFeedback(5)
    assert torch.equal(one.materialize((4, 3, 2, 2)).flatten(1), one.materialize((4, 12)))
    assert torch.equal(one.materialize((4,)), one.materialize((4, 1)).squeeze(1))


def test_dtype_is_rounded_once_and_wider_is_exact():
    one = RandomFeedback(5, law="normal")
    full = one.materialize((6, 10))
    assert full.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(one.materialize((6, 10), dtype=dtype), full.to(dtype))


def test_advance_moves_only_the_step_in_place():
    one = RandomFeedback(5, 6)
    before, pointer = one.materialize((3, 8)), one.state.data_ptr()
    one.advance()
    assert one.state.tolist() == [5, 6, 1] and one.state.data_ptr() == pointer
    assert not torch.equal(one.materialize((3, 8)), before)
    assert torch.equal(one.materialize((3, 8)), random_matrix(torch.tensor([5, 6, 1]), 3, 8))
    one.state[2] = 0
    assert torch.equal(one.materialize((3, 8)), before)


def test_seed_stream_and_step_each_give_another_matrix():
    states = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    matrices = {random_matrix(torch.tensor(state), 2, 8).numpy().tobytes() for state in states}
    assert len(matrices) == len(states)


def test_state_is_a_buffer_outside_the_state_dict_and_survives_copies():
    model = torch.nn.Module()
    model.feedback = RandomFeedback(-5, 6, "uniform8", 0.25, 0.0)
    model.feedback.advance()
    assert not model.state_dict() and not list(model.parameters())
    assert model.feedback.state.dtype == torch.int64 and model.feedback.state.tolist() == [-5, 6, 1]
    assert model.half().feedback.state.dtype == torch.int64
    expected = model.feedback.materialize((3, 20))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin.feedback.materialize((3, 20)), expected)
        twin.feedback.advance()
        assert model.feedback.state.tolist() == [-5, 6, 1]
    assert repr(model.feedback) == "RandomFeedback(law=uniform8, scale=0.25, low=0)"


def test_seeds_wrap_to_64_bits_and_inference_mode_leaves_a_usable_state():
    assert torch.equal(RandomFeedback(2**64 - 1).state, RandomFeedback(-1).state)
    with torch.inference_mode():
        one = RandomFeedback(np.int64(1))
        inside = one.materialize((2, 4))
    one.advance()
    assert torch.equal(RandomFeedback(1).materialize((2, 4)), inside)


def test_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    RandomFeedback(0, law="normal").materialize((4, 4))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.unpoisoned  # the compiler does not trace the poisoned torch.empty
def test_compiles_in_one_graph_and_does_not_recompile_for_another_seed():
    compiled = torch.compile(lambda one: one.materialize((4, 40)), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            one = RandomFeedback(seed)
            assert torch.equal(compiled(one), one.materialize((4, 40)))


@pytest.mark.parametrize("law, std", [("uniform", 3**-0.5), ("normal", 1.0), ("uniform8", 3**-0.5), ("sign", 1.0)])
def test_moments(law, std):
    values = RandomFeedback(9, law=law).materialize((256, 1024), dtype=torch.float64)
    assert abs(values.mean()) < 4 * std / 512 and abs(values.std() / std - 1) < 0.01


BAD = [
    (dict(seed=1.0), TypeError, "seed must be an int, got float"),
    (dict(seed=True), TypeError, "seed must be an int, got bool"),
    (
        dict(seed=2**64),
        ValueError,
        r"seed must be an integer in \[-9223372036854775808, 18446744073709551616\), got 18446744073709551616",
    ),
    (dict(stream=-1), ValueError, r"stream must be an integer in \[0, 4294967296\), got -1"),
    (dict(law="cauchy"), ValueError, "law must be one of 'uniform', 'normal', 'uniform8', 'sign', got 'cauchy'"),
    (dict(scale="kaiming"), TypeError, "scale must be a number, got str"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(scale=0.0), ValueError, "scale must be greater than 0, got 0"),
    (
        dict(law="sign", low=0.0),
        ValueError,
        r"low must be None for law='sign' \(uniform laws alone have a low end\), got 0.0",
    ),
    (dict(scale=0.5, low=0.5), ValueError, "low must be below scale=0.5, got 0.5"),
    (dict(low=float("inf")), ValueError, "low must be finite, got inf"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RandomFeedback(**{"seed": 0, **arguments})


@pytest.mark.parametrize(
    "shape, arguments, error, message",
    [
        ((), {}, ValueError, r"shape must be .* of at least one dimension, none negative, got \(\)"),
        ((2, -1), {}, ValueError, r"shape must be .* got \(2, -1\)"),
        ((2, 2), dict(dtype=torch.int64), TypeError, "dtype must be a floating-point dtype, got torch.int64"),
        (
            (2, 2),
            dict(offset=(2**32 - 1, 0)),
            ValueError,
            r"offset must keep rows and columns within \[0, 2\*\*32\), got \(4294967295, 0\) for a \(2, 2\) matrix",
        ),
    ],
)
def test_bad_materialize(shape, arguments, error, message):
    with pytest.raises(error, match=message):
        RandomFeedback(0).materialize(shape, **arguments)


def test_numpy_sizes_do_not_wrap_around():
    feedback = RandomFeedback(3)
    whole = feedback.materialize((3, 100, 30))
    assert torch.equal(feedback.materialize(tuple(np.int8([3, 100, 30]))), whole)
    rows = random_rows(feedback.state, torch.arange(3), np.int32(30))
    assert torch.equal(rows, random_matrix(feedback.state, np.int32(3), np.int32(30)))
