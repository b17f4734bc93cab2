"""Family forward_gradient for the ahead-of-time gate: the published sizes and odd ones in float32, in half precision
one of each kind."""

import torch

from lgkernels.ops.forward_gradient import triton as kernels
from lgkernels.ops.forward_gradient.options import Noise, NormOptions

MATRIX_KERNELS = set()  # the library multiplies
TABLES = {}

# (N, P, G, C): the paper's networks, one group of many channels, odd sizes, groups beyond a tile
SHAPES = [
    (128, 1, 16, 32),
    (128, 64, 16, 32),
    (16, 1024, 64, 32),
    (128, 16, 1, 512),
    (4, 64, 8, 8),
    (4, 9, 3, 33),
    (2, 3, 1, 5000),
]
HALF_SHAPES = [SHAPES[i] for i in (1, 5)]
# and the dimension of a norm: a token's groups, its channels, tokens (the contiguous size divides a vector, or not)
NORMS = [
    ((128, 64, 16, 32), 3),
    ((128, 64, 64, 8), 3),
    ((128, 64, 2048), 2),
    ((128, 64, 512), 1),
    ((128, 512, 64), 1),
    ((4, 9, 33), 2),
    ((4, 33, 9), 1),
    ((2, 9, 5000), 2),
]
HALF_NORMS = [NORMS[i] for i in (0, 3, 5)]
WHOLE = (NORMS[2], NORMS[3])  # those whose every variant is compiled


def losses(shape, dtype, plain):
    """`plain`: without a norm in front too."""
    x, (n, patches, groups, channels) = torch.empty(shape, dtype=dtype), shape
    teach, grad = torch.empty(n, groups * channels), torch.empty(n, patches, groups)
    for normed in (None, x) if plain else (x,):
        kernels.pooled(x, normed is not None)
        kernels.tangent(normed, x, teach, torch.empty(n), torch.empty(n, patches, groups))
        kernels.cotangent(normed, grad, teach, torch.empty_like(x))


def layers(shape, dim, dtype):
    """The variants with most tensors or values in registers; of two shapes all of them."""
    z, options = torch.empty(shape, dtype=dtype), NormOptions(dim, 1e-5, True)
    state = torch.empty(3, dtype=torch.int64)
    coefficient = torch.empty(*shape[:dim], 1, *shape[dim + 1 :])
    kernels.dual_norm(z, z, z, Noise(None, state), options)
    kernels.activity_grad(z, z, coefficient, Noise(None, state), options)
    if (shape, dim) in WHOLE and dtype == torch.float32:
        kernels.dual_norm(z, z, z, Noise(z), options)
        kernels.activity_grad(z, z, coefficient, Noise(z), options)
        kernels.dual_norm(z, z, None, Noise(), options)
        kernels.dual_norm(z, None, None, Noise(None, state), options)


def cases():
    for dtype, shapes, norms in ((torch.float32, SHAPES, NORMS), (torch.bfloat16, HALF_SHAPES, HALF_NORMS)):
        for shape in shapes:
            losses(shape, dtype, plain=dtype == torch.float32 and shape in (SHAPES[1], SHAPES[3], SHAPES[5]))
        for shape, dim in norms:
            layers(shape, dim, dtype)
    for law, dim in (("uniform", 2), ("uniform8", 1), ("sign", 2)):
        z, state = torch.empty(8, 64, 512, dtype=torch.float16), torch.empty(3, dtype=torch.int64)
        kernels.dual_norm(
            z, z, None, Noise(None, state, law, 1.0, 0.2 if "u" in law else None), NormOptions(dim, 1e-5, True)
        )
    for classes in (10, 1000, 3000):
        kernels.classify(torch.empty(64, 32), torch.empty(32, classes), None, torch.zeros(64, dtype=torch.int64))
