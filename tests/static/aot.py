"""Ahead-of-time compilation of the Triton kernels, with no GPU: `python -m tests.static.aot ARCH [ARCH ...]`.

The backend's own functions run over cases that reach every row of the configuration tables; instead of a launch, the
kernel, its arguments and its blocks are recorded, and each distinct specialisation is compiled as Triton would at that
launch. Prints one JSON object a line. Must run without TRITON_INTERPRET: kernels are decorated differently under it.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lgkernels.core import config
from lgkernels.ops.lls import basis
from lgkernels.ops.lls import triton_kernels as lls

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
            torch.int64: "*i64"}
MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


def _convolution_block(shape, pool, dtype, channels_last, windows=(False, True)):
    z, channel = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    lls.batch_stats(z, None, channel, channel, 0.1, 1e-5)
    for max_pool in windows:
        lls.norm_act_pool(z, channel, channel, channel, channel, 0.01, pool, max_pool, True)
    latents = lls.latents(z, pool)
    lls.norm_grads(latents, latents, latents, shape[1], torch.empty(pool**2))
    lls.grad_preactivation_(z, channel, channel, channel, channel, 0.01, latents, channel, channel, pool, 1.0)
    lls.expand_grad(latents, torch.empty(()), z, pool)


def block_cases():
    """Both layouts, the dtypes, both windows, exact and overlapping bins, large and small maps; linear blocks."""
    for channels_last in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            _convolution_block((8, 256, 32, 32), 2, dtype, channels_last)
        _convolution_block((5, 9, 7, 7), 2, torch.bfloat16, channels_last)
        _convolution_block((8, 512, 4, 4), 2, torch.bfloat16, channels_last, windows=(False,))
    _convolution_block((4, 128, 32, 32), 4, torch.float16, True, windows=(False,))
    for shape, pool, dtype in (((128, 1024), 1024, torch.bfloat16), ((7, 40), 16, torch.float32)):
        z, column = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
        lls.batch_stats(z, column, column, column, 0.1, 1e-5)
        lls.norm_act_pool(z, column, column, column, column, 0.01, pool, False, True)
        latents = lls.latents(z, pool)
        lls.linear_grad_preactivation_(z, column, column, column, column, 0.01, latents, pool, 1.0)
        lls.expand_grad(latents, torch.empty(shape[0]), z, pool)


def head_cases():
    """Every mode of the head, and batch and class counts on both sides of each threshold of the tables."""
    options = dict(temperature=0.5, label_smoothing=0.1, normalize=True, eps=1e-12, zero_gradient_below_eps=False,
                   basis_scale=1.0, loss="cross_entropy", ignore_index=-100, reduction="mean", compute_grad=True)
    column, area = torch.empty(256), torch.empty(4)
    for batch, dim, classes, modes in ((128, 2048, 10, (0, 1, 2)), (128, 1024, 20, (0, 2)), (128, 2048, 100, (0, 1, 2)),
                                       (128, 8192, 10, (0, 2)), (128, 8192, 20, (2,)), (128, 8192, 1000, (0, 2))):
        x, target = torch.empty(batch, dim), torch.zeros(batch, dtype=torch.int64)
        for mode in modes:
            modulation = torch.empty((classes,) * mode) if mode else None
            losses, _, similarity, grad_logits = lls.head(
                x, target, modulation, basis.signs(classes, dim), num_classes=classes, reduce=False, **options)
            finish = losses, target, similarity, grad_logits, modulation, -100
            latents, z = torch.empty(batch, 1024), torch.empty(batch, 256, dtype=torch.bfloat16)
            lls.norm_grads(latents, latents, latents, 256, area, finish)
            lls.linear_grad_preactivation_(z, *(column,) * 4, 0.01, torch.empty(batch, 256), 256, 1.0, finish)
            if mode:
                lls.modulation_grad(similarity, grad_logits, mode == 1, torch.empty(()))
        lls.head(x, target, None, torch.empty(classes, dim), num_classes=classes, **options)
    tess = options | dict(normalize=False, loss="hard_sigmoid_mse", reduction="none", zero_gradient_below_eps=True)
    x, target, phi = torch.empty(5, 33), torch.zeros(5, dtype=torch.int64), torch.empty(7, 33)
    lls.head(x, target, None, phi, num_classes=7, **tess)
    lls.head(x, target, None, phi, num_classes=7, **options | dict(compute_grad=False))


def record(arch):
    """`{key: (kernel, signature, constants, attributes, options)}` of all launches that the cases make on `arch`."""
    launches = {}

    def launch(kernel, programs, device, *args, **meta):
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
        options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
        key = repr((kernel.fn.__name__, signature, constants, attributes, options))
        launches[key] = kernel, signature, constants, attributes, options

    lls.launch, lls.architecture = launch, lambda device: arch
    block_cases()
    head_cases()
    return launches


def resources(compiled, directory):
    """(registers, stack bytes) of a compiled kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    file = os.path.join(directory, f"{compiled.hash}.cubin")
    with open(file, "wb") as f:
        f.write(compiled.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compile_one(arch, launch, directory):
    kernel, signature, constants, attributes, options = launch
    result = {"arch": arch, "kernel": kernel.fn.__name__, "options": options,
              "constants": {kernel.params[i].name: v for (i,), v in constants.items()},
              "types": sorted({t for t in signature.values() if t.startswith("*")})}
    try:
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes),
                                  target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # reported as a failed line
        return result | {"error": f"{type(error).__name__}: {error}"}
    registers, stack = resources(compiled, directory)
    found = MATRIX_INSTRUCTION.search(compiled.asm["ptx"])
    return result | {"shared": compiled.metadata.shared, "registers": registers, "stack": stack,
                     "wide": "ld.global.v4" in compiled.asm["ptx"] and "st.global.v4" in compiled.asm["ptx"],
                     "dot": "tt.dot" in compiled.asm["ttir"], "matrix_instruction": found[1] if found else None}


def main(archs):
    with tempfile.TemporaryDirectory() as directory:
        for arch in archs:
            for launch in record(arch).values():
                print(json.dumps(compile_one(arch, launch, directory)), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or list(config.SHARED_MEMORY))
