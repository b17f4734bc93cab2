"""Builds the optional native module lgkernels._C with CMake; without it the package is complete in Python and Triton.

Environment:
  LGKERNELS_BUILD       auto (default) | none | cpu | cuda. auto takes what can be built, another choice fails loudly
  LGKERNELS_CUDA_ARCHS  e.g. "86" or "80;90a"; "all" for every supported one; default: the devices of this machine
  MAX_JOBS              compilers run at once
"""

import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zlib
from functools import lru_cache
from pathlib import Path

import setuptools

OLDEST = 77  # it reads this pyproject.toml's license; its bdist_wheel is its own
if int(setuptools.__version__.partition(".")[0]) < OLDEST:
    sys.exit(
        f"lgkernels: building needs setuptools >= {OLDEST}, this is {setuptools.__version__}: run "
        f"{sys.executable} -m pip install 'setuptools>={OLDEST}', or build by {sys.executable} -m pip wheel --no-deps "
        "., which fetches what it needs"
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.editable_wheel import editable_wheel  # noqa: E402

ROOT = Path(__file__).resolve().parent
MODULE = "lgkernels._C"
FILENAME = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
CUDA_ARCHS = "75;80;86;89;90a;100;120"
MODES = ("auto", "none", "cpu", "cuda")


class NativeBuildError(Exception):
    """The native module can't be built; the message says why in one line."""


def say(message):
    print(f"lgkernels: {message}", file=sys.stderr, flush=True)


def tool(name):
    """Path of a program: PATH first (an isolated build puts its own there), then this Python's script directory."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def run_logged(command, log):
    with open(log, "a") as stream:
        print("$", *command, file=stream, flush=True)
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode == 0


def first_error(log):
    """The line of the log that tells most, for the one-line report."""
    lines = log.read_text(errors="replace").splitlines()
    if any("CMAKE_CXX_COMPILER" in line or "CXX compiler identification is unknown" in line for line in lines):
        return "no working C++ compiler"
    found = next((line.removeprefix("-- error: ") for line in lines if "error: " in line), None)
    return found or cmake_error(lines) or "CMake failed"


def cmake_error(lines):
    """CMake's own last error in one line."""
    starts = [number for number, line in enumerate(lines) if line.startswith("CMake Error")]
    if not starts:
        return None
    first, *rest = lines[starts[-1] :]  # "CMake Error: text", or "CMake Error at file:line (command):" with text below
    below = itertools.takewhile(lambda line: not line or line.startswith("  "), rest)
    return textwrap.shorten(first.partition(": ")[2] or " ".join(below), 240)


def build(cuda):
    """Configure and compile; `cuda` is "OFF", "AUTO" or "ON". Returns (built module, log)."""
    compiler = "|".join(os.environ.get(name, "") for name in ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX"))
    directory = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{zlib.crc32(compiler.encode()):08x}"
    log = directory.with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake:
        raise NativeBuildError("cmake is not installed")
    try:
        import pybind11
    except ImportError:
        raise NativeBuildError("pybind11 is not installed") from None
    architectures = os.environ.get("LGKERNELS_CUDA_ARCHS", "native")
    architectures = CUDA_ARCHS if architectures == "all" else architectures.replace(",", ";").replace(" ", ";")
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(directory),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DLGK_WITH_CUDA={cuda}",
        f"-DLGK_CUDA_ARCHITECTURES={architectures}",
        f"-DPython_EXECUTABLE={sys.executable}",
        # an isolated build has these at a new place each time, the build directory may be an old one
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    known = (directory / "CMakeCache.txt").exists()
    configured = run_logged(configure, log)
    if not configured and known:  # the compiler or generator has changed since
        shutil.rmtree(directory)
        configured = run_logged(configure, log)
    if not configured:
        raise NativeBuildError(f"{first_error(log)}; log: {log}")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not run_logged([cmake, "--build", str(directory), "--target", "_C", "--parallel", jobs], log):
        raise NativeBuildError(f"{first_error(log)}; log: {log}")
    for line in log.read_text(errors="replace").splitlines():
        if "lgkernels: " in line:
            say(line.partition("lgkernels: ")[2])
    return directory / FILENAME


@lru_cache(maxsize=1)
def native_module():
    """The compiled module, or None where this is to be a pure package. Built once a run."""
    mode = os.environ.get("LGKERNELS_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"lgkernels: LGKERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return None
    reason = None
    for cuda in {"auto": ("AUTO", "OFF"), "cpu": ("OFF",), "cuda": ("ON",)}[mode]:
        try:
            module = build(cuda)
        except NativeBuildError as error:
            reason = error
        else:
            if reason:
                say(f"CPU kernels only: {reason}")
            return module
    if mode != "auto":
        sys.exit(f"lgkernels: LGKERNELS_BUILD={mode} failed: {reason}")
    say(f"no native module, the package is pure Python ({reason})")
    return None


class BuildExt(build_ext):
    def run(self):
        module = native_module()
        if module:
            target = Path(self.get_ext_fullpath(MODULE))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".new")
            shutil.copyfile(module, partial)
            os.replace(partial, target)  # a process that has the old one loaded keeps it

    def get_outputs(self):
        return [self.get_ext_fullpath(MODULE)] if native_module() else []

    def get_output_mapping(self):
        return {}


class BdistWheel(bdist_wheel):
    def run(self):
        if not native_module():
            self.root_is_pure = True
            self.distribution.ext_modules = None
        # files that are gone from the tree must not reach the wheel through an old build directory
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


class EditableWheel(editable_wheel):
    def run(self):
        if not native_module():
            self.distribution.ext_modules = None
            (ROOT / "lgkernels" / FILENAME).unlink(missing_ok=True)  # of an earlier build, and not asked for any more
        super().run()


setup(
    ext_modules=[Extension(MODULE, sources=[])],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel, "editable_wheel": EditableWheel},
)
