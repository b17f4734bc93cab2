"""Build, metadata, import cost, and the `info` command."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lgkernels
from lgkernels.core import diagnostics

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CONTRIBUTING.md",
    "constraints.txt",
    "csrc",
    "lgkernels",
)


def python(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(*arguments, **options):
    done = python(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the build ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of a source distribution, without anything built."""
    folder = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pure(source):
    """`setup.py bdist_wheel` with a compiler that fails: (what it printed, the wheel)."""
    done = python("setup.py", "bdist_wheel", cwd=source, CC="/bin/false", CXX="/bin/false", LGKERNELS_BUILD="auto")
    assert done.returncode == 0, done.stderr
    wheels = list((source / "dist").glob("*.whl"))
    assert len(wheels) == 1
    return done.stdout + done.stderr, wheels[0]


def test_setup_imports_neither_torch_nor_a_network():
    text = (ROOT / "setup.py").read_text()
    imported = {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    top = {name.partition(".")[0] for name in imported}
    assert top <= set(sys.stdlib_module_names) | {"setuptools", "pybind11"}
    assert not top & {"urllib", "http", "socket", "ssl", "ftplib"}
    assert "nvidia-smi" not in text


def test_failing_compiler_gives_a_pure_wheel_and_one_line(pure):
    printed, wheel = pure
    assert wheel.name.endswith("-py3-none-any.whl")
    lines = [line for line in printed.splitlines() if line.startswith("lgkernels: ")]
    assert len(lines) == 1 and "pure Python" in lines[0]
    log = re.search(r"log: (\S+?)\)", lines[0])
    if log:  # without cmake there is none
        assert "no working C++ compiler" in lines[0]
        assert "/bin/false" in Path(log[1]).read_text()
    else:
        assert "not installed" in lines[0]


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_explicit_build_that_fails_is_an_error(source, mode):
    done = python("setup.py", "build_ext", cwd=source, CC="/bin/false", CXX="/bin/false", LGKERNELS_BUILD=mode)
    assert done.returncode != 0
    assert f"LGKERNELS_BUILD={mode} failed" in done.stderr


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0"])
def test_an_old_setuptools_is_one_line(version, source, tmp_path):
    """As that of a fresh virtual environment of Python 3.11, which has no bdist_wheel."""
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools/__init__.py").write_text(f"__version__ = {version!r}")
    done = python("setup.py", "bdist_wheel", cwd=source, PYTHONPATH=str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"needs setuptools >= 77, this is {version}: run " in line
    assert "-m pip install 'setuptools>=77'" in line


def test_unknown_build_mode_is_an_error(source):
    done = python("setup.py", "build_ext", cwd=source, LGKERNELS_BUILD="gpu")
    assert done.returncode != 0 and "must be one of auto, none, cpu, cuda, got 'gpu'" in done.stderr


def test_wheel_holds_the_package_and_its_data(pure, source):
    packed = {name for name in zipfile.ZipFile(pure[1]).namelist() if name.startswith("lgkernels/")}
    tree = {
        str(path.relative_to(source))
        for path in (source / "lgkernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree
    assert "lgkernels/py.typed" in packed


def test_source_distribution_can_build_the_native_module(source):
    output("setup.py", "-q", "sdist", "--formats=zip", cwd=source, LGKERNELS_BUILD="none")
    packed = zipfile.ZipFile(next((source / "dist").glob("*.zip"))).namelist()
    packed = {name.partition("/")[2] for name in packed}
    native = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert native | set(SOURCES[:8]) <= packed


# -- metadata -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(line):
    return re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-")


def test_runtime_needs_torch_and_numpy_only(project):
    assert project["dependencies"] == ["torch>=2.9", "numpy"]


def test_constraints_pin_every_extra_of_the_readme(project):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {requirement_name(line) for line in lines}
    assert all("==" in line for line in lines)
    once = [(requirement_name(line), line.partition(";")[2]) for line in lines]
    assert len(set(once)) == len(once)
    wanted = {requirement_name(line) for extra in ("demo", "test") for line in project["optional-dependencies"][extra]}
    assert {"torch", "numpy"} | wanted <= pins


def test_version_and_license(project, pure):
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    metadata = zipfile.ZipFile(pure[1]).read(f"lgkernels-{lgkernels.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {lgkernels.__version__}\n" in metadata


# -- imports ------------------------------------------------------------------------------------------------------

PUBLIC = "import lgkernels, lgkernels.functional, lgkernels.nn, lgkernels.training"


def test_import_is_cheap(tmp_path):
    """With the bytecode that pip leaves behind. Of the processor, so that a busy machine changes little."""
    code = f"import time, torch, numpy; t = time.process_time(); {PUBLIC}; print(time.process_time() - t)"
    places = f"import sys; sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}; "
    first, *times = (float(output("-c", "import torch, numpy; " + places + code)) for _ in range(4))
    assert list(tmp_path.rglob("lls.*.pyc"))
    assert min(times) < 0.3


def test_import_loads_neither_triton_nor_the_native_module():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); " + PUBLIC + "; print(*sorted(set(sys.modules) - before))"
    )
    loaded = output("-c", code).split()
    assert "lgkernels.functional" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert "lgkernels._C" not in loaded
    assert not tops & {"triton", "matplotlib", "tqdm", "safetensors", "schedulefree", "PIL"}


def test_import_and_use_need_only_torch_and_numpy():
    """The reference runs with every other package, and the native module, out of reach."""
    code = """
import sys
for name in ("triton", "lgkernels._C", "matplotlib", "tqdm", "safetensors", "schedulefree", "PIL", "pytest"):
    sys.modules[name] = None
import torch, lgkernels.functional as LF, lgkernels.nn, lgkernels.training
x = torch.randn(4, 3, 8, 8, requires_grad=True)
LF.lls_loss(x, torch.arange(4), num_classes=4, pool_size=2).backward()
assert x.grad.abs().sum() > 0
"""
    output("-c", code)


# -- python -m lgkernels --------------------------------------------------------------------------------------------


READ = ("module.cpp", "toy/options.h", "toy/cpu/kernels.h", "toy/cpu/kernels.cpp")
READ_WITH_CUDA = ("toy/cuda/kernels.h", "toy/cuda/bindings.cpp", "toy/cuda/kernels.cu", "toy/cuda/kernels.cuh")
NOT_READ = ("toy/cpu/.kernels.cpp.swp", "toy/cpu/kernels.cpp~", "toy/.#options.h", "toy/notes.md")


@pytest.mark.parametrize("cuda", [False, True])
def test_an_outdated_native_module_is_reported(cuda, tmp_path):
    """After an update of an editable install, calls into the old module would fail with an obscure message. What the
    build does not read is no reason to build again."""
    native = pytest.importorskip("lgkernels.core.native")
    module = SimpleNamespace(__file__=tmp_path / "_C.so", has_cuda=cuda)
    files = [tmp_path / "csrc" / name for name in (*READ, *READ_WITH_CUDA, *NOT_READ)]
    for path in (module.__file__, *files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000, 1000))
    for path in files:
        os.utime(path, (2000, 2000))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            native._warn_if_outdated(module, tmp_path / "csrc")
        read = str(path.relative_to(tmp_path / "csrc")) in (READ + READ_WITH_CUDA if cuda else READ)
        assert [str(w.message)[:38] for w in said] == ["lgkernels._C is older than its sources"] * read, path
        os.utime(path, (1000, 1000))


@pytest.mark.parametrize("built", [True, False])
def test_a_tree_that_hides_a_built_package_is_reported(built, tmp_path, monkeypatch):
    native = pytest.importorskip("lgkernels.core.native")
    for place in ("tree", "site-packages"):
        (tmp_path / place / "lgkernels").mkdir(parents=True)
    if built:
        (tmp_path / "site-packages/lgkernels/_C.cpython-311.so").touch()
    monkeypatch.chdir(tmp_path / "tree")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        native._warn_if_elsewhere(
            tmp_path / "tree/lgkernels", ["", str(tmp_path / "tree"), str(tmp_path / "site-packages")]
        )
    assert len(said) == built
    if built:
        assert re.search(r"from .*tree, which has no native .* in .*site-packages, which has", str(said[0].message))


def test_a_tree_without_a_native_module_beside_a_wheel_with_it(source, tmp_path):
    """As Python finds them: the tree is the folder where it starts."""
    installed = tmp_path / "lgkernels"
    installed.mkdir()
    (installed / "_C.cpython-311.so").touch()
    code = (  # an editable install of ours would find its own module
        "import sys, torch; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import lgkernels.core.native as n; assert n.native() is None"
    )
    done = python("-c", code, cwd=source, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "which has no native module, and hides the one in" in done.stderr


@pytest.mark.parametrize("cuda", [False, True])
def test_every_source_of_the_tree_is_watched(cuda):
    native = pytest.importorskip("lgkernels.core.native")
    expected = {p for p in (ROOT / "csrc").rglob("*") if p.is_file() and (cuda or p.parent.name != "cuda")}
    assert set(native._sources(ROOT / "csrc", cuda)) == expected


def test_no_command_prints_help():
    printed = output("-m", "lgkernels")
    assert "info" in printed and "train" in printed


def test_info_names_versions_and_what_each_op_would_use():
    printed = output("-m", "lgkernels", "info", LGKERNELS_IMPL="auto")
    assert f"torch      {torch.__version__}" in printed
    assert re.search(r"lls_loss +cpu +float32 +(cpu|torch|reference)", printed)
    assert re.search(r"lls_block +cpu +bfloat16 +(cpu|torch|reference)", printed)


def test_info_follows_the_environment():
    report = json.loads(output("-m", "lgkernels", "info", "--json", LGKERNELS_IMPL="reference"))
    assert report["environment"]["LGKERNELS_IMPL"] == "reference"
    assert {(row["backend"], row["reason"]) for row in report["ops"]} == {("reference", "LGKERNELS_IMPL=reference")}


@pytest.fixture
def compiled_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreted kernels have their own tests, and take seconds


def test_selftest_passes(compiled_only, capsys):
    assert run_info("--selftest") == 0
    printed = capsys.readouterr().out
    assert "PASS lls_loss" in printed and "PASS lls_block" in printed and "FAIL" not in printed


@pytest.mark.parametrize("broken", ["wrong", "nan", "raises"])
def test_selftest_fails_on_a_broken_backend(broken, compiled_only, monkeypatch, capsys):
    from lgkernels.ops.lls import reference

    right = reference.latents

    def latents(activation, pool_size):
        if activation.dtype == torch.float64:
            return right(activation, pool_size)
        if broken == "raises":
            raise RuntimeError("no such kernel")
        return right(activation, pool_size) * (1.05 if broken == "wrong" else float("nan")) + 0.01

    monkeypatch.setattr(reference, "latents", latents)
    assert run_info("--selftest") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert lines and all("reference" in line for line in lines)
    assert broken != "raises" or all("RuntimeError: no such kernel" in line for line in lines)


def run_info(*flags):
    import argparse

    parser = argparse.ArgumentParser()
    diagnostics.add_arguments(parser)
    return diagnostics.main(parser.parse_args(flags))
