"""Ahead-of-time compilation of the Triton kernels, with no GPU:

    python -m tests.static.aot [--table] [ARCH ...] [KERNEL ...]

The backends' own functions run over cases that reach every row of the configuration tables; instead of a launch, the
kernel, its arguments and its blocks are recorded, and each distinct specialisation is compiled as Triton would at that
launch. Its Python is translated once for all architectures (Triton's IR names none); every stage from there on, to the
machine code, runs for each, but where two are known to give the same (SAME, SAME_PTX). Prints one JSON object a line,
with `--table` the table of sass.py. Must run without TRITON_INTERPRET: kernels are decorated differently under it.

A family takes part by a module tests/<family>/aot.py:
    cases()         calls of its backend's functions, one for each specialisation that matters
    MATRIX_KERNELS  names of the kernels that multiply matrices
    TABLES          {kernel: (its table's rows by architecture, names of their first entries)}
"""

import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import triton_key

from lgkernels.core import tiles
from lgkernels.ops.common import launch as launching

from . import sass

FAMILIES = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/aot.py") if path.parent.name != "static"
)

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
DISASSEMBLED = {86}  # architectures whose machine code the gate counts; the PTX of all is searched


def families():
    return [importlib.import_module(f"tests.{name}.aot") for name in FAMILIES]


def record(arch):
    """`{key: (kernel, signature, constants, attributes, options)}` of all launches that the cases make on `arch`."""
    launches = {}

    def start(kernel, programs, device, args, meta):
        values = dict(zip((p.name for p in kernel.params if p.name not in meta), args), **meta)
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            specialise = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32"
                if specialise and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        options = {name: values[name] for name in ("num_warps", "num_stages", "maxnreg") if name in values}
        key = repr((kernel.fn.__name__, signature, constants, attributes, options))
        launches[key] = kernel, signature, constants, attributes, options

    with mock.patch.multiple(launching, start=start, architecture=lambda device: arch):
        for family in families():
            family.cases()
    return launches


def resources(cubin, directory):
    """Registers and stack bytes of a kernel."""
    file = os.path.join(directory, f"{os.getpid()}.cubin")
    Path(file).write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", text)[1]), "stack": int(re.search(r"STACK:(\d+)", text)[1])}


class Source(ASTSource):
    """A specialisation whose Python is translated at its first compilation only."""

    text = None

    def make_ir(self, *arguments):
        context = arguments[-1]  # after target, options, and functions that Python of ours may call
        if self.text is None:
            module = super().make_ir(*arguments)
            self.text = str(module)
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(self.text)
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


def describe(arch, launch):
    kernel, signature, constants, _, options = launch
    return {
        "arch": arch,
        "kernel": kernel.fn.__name__,
        "options": options,
        "constants": {kernel.params[i].name: v for (i,), v in constants.items()},
        "types": sorted({t for t in signature.values() if t.startswith("*")}),
    }


def stages(arch, source, options):
    """What Triton makes of a specialisation: its stages by name, and its shared memory."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {name: compiled.asm[name] for name in ("ttir", "ptx", "cubin")} | {"shared": compiled.metadata.shared}


def retarget(made, of, arch, options):
    """`made`, the stages for the architecture `of`, with machine code for `arch` from the same PTX."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    ptx = made["ptx"].replace(f".target sm_{of}", f".target sm_{arch}")
    return made | {"ptx": ptx, "cubin": backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), arch)}


def shares_ptx(made, of):
    """Whether other architectures may take the PTX that was made for `of`."""
    return of != 100 or not ("tt.dot" in made["ttir"] or "redux" in made["ptx"])


def judged(made, directory, count):
    """What the tests ask of the stages; with `count` the machine code itself, to be counted."""
    found = MATRIX_INSTRUCTION.search(made["ptx"])
    return (
        resources(made["cubin"], directory)
        | ({"code": sass.code(made["cubin"])} if count else {})
        | {
            "shared": made["shared"],
            "double_precision": ".f64" in made["ptx"],
            "wide": "ld.global.v4" in made["ptx"] and "st.global.v4" in made["ptx"],
            "dot": "tt.dot" in made["ttir"],
            "matrix_instruction": found[1] if found else None,
        }
    )


# What two architectures share is compiled once. sm_89 has sm_86's instructions, registers and shared memory. sm_80 has
# its PTX, as far as Triton knows, and sm_120 that of sm_100 but for matrix products and sm_100's maximum over lanes;
# ptxas runs for both, and each kernel's first specialisation shows that it is so.
SAME, SAME_PTX = ({}, {}) if os.environ.get("LGKERNELS_TEST_ALL") == "1" else ({89: 86}, {80: 86, 120: 100})
_recorded = {}  # key: (launch, its architectures); kernels cannot be pickled, so forked workers inherit them


def _compile(job):
    key, directory, counted, compare = job
    launch, archs = _recorded[key]
    source, options = Source(*launch[:4]), launch[-1]
    made, results = {}, {}
    for arch in sorted(archs, key=lambda arch: arch in SAME_PTX):  # those that take another's PTX come last
        if SAME.get(arch) in archs:
            continue
        of = SAME_PTX.get(arch)
        shared = of in made and shares_ptx(made[of], of)
        try:
            made[arch] = retarget(made[of], of, arch, options) if shared else stages(arch, source, options)
            results[arch] = describe(arch, launch) | judged(made[arch], directory, arch in counted)
            if shared and compare:
                own = stages(arch, source, options)
                assert own["ptx"] == made[arch]["ptx"], f"the PTX of sm_{arch} is no longer that of sm_{of}"
        except Exception as error:  # reported as a failed line
            results[arch] = describe(arch, launch) | {"error": f"{type(error).__name__}: {error}"}
    return [results.get(arch) or results[SAME[arch]] | {"arch": arch} for arch in archs]


def compile_all(archs, counted, kernels=()):
    """The results of all launches (of these kernels, where some are named) on `archs`, as they come; with counts on the
    architectures `counted`, at the end."""
    for arch in archs:
        for key, launch in record(arch).items():
            if not kernels or launch[0].fn.__name__ in kernels:
                _recorded.setdefault(key, (launch, []))[1].append(arch)
    shared = [key for key, (_, on) in _recorded.items() if any({*pair} <= {*on} for pair in SAME_PTX.items())]
    compared = {_recorded[key][0][0].fn.__name__: key for key in reversed(shared)}.values()  # each kernel's first
    triton_key()  # kept in memory: workers need not hash Triton's files again
    context, uncounted = multiprocessing.get_context("fork"), {}
    with tempfile.TemporaryDirectory() as directory, context.Pool(len(os.sched_getaffinity(0))) as pool:
        jobs = [(key, directory, counted, key in compared) for key in _recorded]
        for result in itertools.chain.from_iterable(pool.imap(_compile, jobs)):
            code = result.pop("code", None)
            if code and result["arch"] in counted:
                uncounted.setdefault(result["arch"], []).append((result, code))
            else:
                yield result
        for arch, pairs in uncounted.items():
            results, codes = zip(*pairs)
            listings = sass.listings(triton.knobs.nvidia.nvdisasm.path, arch, codes, directory)
            yield from (result | sass.counts(listing) for result, listing in zip(results, listings))


def main(arguments):
    arguments = list(map(str, arguments))
    archs = [int(word) for word in arguments if word.isdigit()] or list(tiles.SHARED_MEMORY)
    kernels = [word for word in arguments if word.endswith("_kernel")]
    if "--table" in arguments:
        print(f"Triton {triton.__version__}; counts of all variants together, the largest of their resources\n")
        print(sass.table(compile_all(archs, set(archs), kernels)))
    else:
        for result in compile_all(archs, DISASSEMBLED, kernels):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
