"""The kernels of every family that has a `tests/<family>/sanitized.py`, for a checker of memory accesses.

`python -m tests.support.sanitized triton|cuda [family ...]` runs them on the CUDA device. Each file has
`run(kernels, device)`, which calls the functions of a backend and returns their results.
"""

import importlib
import sys
from pathlib import Path

import torch

from tests.conftest import backend_module

FAMILIES = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/sanitized.py") if path.parent.name != "support"
)


if __name__ == "__main__":
    results = []
    for family in sys.argv[2:] or FAMILIES:
        cases = importlib.import_module(f"tests.{family}.sanitized")
        results += cases.run(backend_module(family, sys.argv[1]), "cuda")
    torch.cuda.synchronize()
    finite = sum(bool(t.isfinite().all()) for t in results)
    print(f"{finite} of {len(results)} finite")
    sys.exit(finite != len(results))
