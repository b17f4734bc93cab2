"""The sources of the native module give every name one definition: a type that two files define differently under one
name is undefined behaviour that no compiler of a single file can see. GCC's link-time optimiser sees it. A function it
does not see: of two bodies under one name it takes one; there the text of the sources is read."""

import os
import subprocess
import sysconfig
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.simt import executor
from tests.support.cpp_functions import functions
from tests.support.once import made_once

CSRC = executor.ROOT / "csrc"
# The wider instruction-set levels are the same headers in another namespace.
SOURCES = [
    *(path for path in sorted(CSRC.glob("*/cpu/*.cpp")) if not path.stem.endswith(("_avx2", "_avx512"))),
    *sorted(CSRC.glob("*/cuda/*.cpp")),
    *sorted(CSRC.glob("*/cuda/*.cu")),
]
SEEDED = "namespace lgk { struct Norm { const double* mean; }; double seeded(const Norm& norm) { return *norm.mean; } }"


def _unavailable():
    if executor.unavailable():
        return executor.unavailable()
    version = subprocess.run([executor.compiler(), "--version"], capture_output=True, text=True).stdout
    return None if "Free Software Foundation" in version else "needs GCC"


needs_gcc = pytest.mark.skipif(_unavailable() is not None, reason=str(_unavailable()))


def compiled(source, out):
    import pybind11

    folders = (CSRC, executor.HERE, pybind11.get_include(), sysconfig.get_paths()["include"])
    include = [f"-I{folder}" for folder in folders]
    command = [executor.compiler(), "-std=c++17", "-O0", "-flto", "-fPIC", "-w", "-DLGK_SIMT", *include]
    subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
    return str(out)


def linked(objects, out):
    """What the linker says of definitions that differ."""
    command = [executor.compiler(), "-O0", "-flto", "-shared", "-fPIC", "-Wodr", "-Werror=odr"]
    return subprocess.run([*command, *objects, "-o", str(out)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    names = [f"{i}.o" for i in range(len(SOURCES))]

    def compile_all(folder):
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, SOURCES, (folder / name for name in names)))

    folder = made_once(tmp_path_factory, "one_definition", compile_all)
    return [str(folder / name) for name in names]


@needs_gcc
def test_the_native_module_defines_every_type_once(objects, tmp_path):
    result = linked(objects, tmp_path / "module.so")
    assert result.returncode == 0, result.stderr


@needs_gcc
def test_a_second_definition_of_a_type_is_seen(objects, tmp_path):
    (tmp_path / "seeded.cpp").write_text(SEEDED)
    result = linked([*objects, compiled(tmp_path / "seeded.cpp", tmp_path / "seeded.o")], tmp_path / "module.so")
    assert result.returncode != 0
    assert "struct Norm" in result.stderr and "violates the C++ One Definition Rule" in result.stderr, result.stderr


# -- functions ------------------------------------------------------------------------------------------------------


def defined_twice(*more):
    """{function: files} of functions with more than one body, in csrc/ and in `more` (name, text)."""
    files = [(path.relative_to(CSRC), path.read_text()) for path in CSRC.rglob("*") if path.suffix[1:] in SUFFIXES]
    found = defaultdict(list)
    for name, text in (*files, *more):
        for function in functions(text):
            found[function].append(str(name))
    assert len(found) > 200
    return {function: sorted(names) for function, names in found.items() if len(names) > 1}


SUFFIXES = ("h", "cuh", "cpp", "cu")


def test_every_function_is_defined_once():
    assert not defined_twice()


@pytest.mark.parametrize(
    "text, seen",
    [
        ("namespace lgk::cuda { inline int finish_blocks(const Finish& f) { return 0; } }", True),
        (
            "namespace lgk { namespace cuda {\nint finish_blocks(\n    const Finish &finish)  // {\n{ return 0; } } }",
            True,
        ),
        ("namespace lgk::cpu { inline int finish_blocks(const Finish& f) { return 0; } }", False),
        ("namespace lgk::cuda { inline int finish_blocks(const Finish& f, int n = 2) { return 0; } }", False),
        ("namespace lgk::cuda { static int finish_blocks(const Finish& f) { return 0; } }", False),
        ("namespace lgk::cuda { namespace { int finish_blocks(const Finish& f) { return 0; } } }", False),
        ("namespace lgk::cuda { int finish_blocks(const Finish& f); }", False),
    ],
)
def test_a_second_definition_of_a_function_is_seen(text, seen):
    twice = {("lgk::cuda", "finish_blocks", "constFinish&"): ["lls/cuda/finish.h", "toy.h"]}
    assert defined_twice(("toy.h", text)) == (twice if seen else {})


def test_a_second_definition_of_a_template_is_seen():
    text = "namespace lgk::cuda { template <class T, class U> LGK_DEVICE T block_sum(T sum, T* r) { return sum; } }"
    assert functions(text) == {("lgk::cuda", "block_sum", "T,T*")}
