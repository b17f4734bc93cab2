"""The authors' states and errors (tests/golden/holo_ep) by the kernels of GPUs, interpreted and on the CPU executor.

What test_golden.py asks of the others, from fewer steps: a program takes milliseconds here.
"""

import pytest
import torch

import lgkernels.functional as LF
from tests.equilibrium.common import CONV, DENSE, close, golden

KERNELS = pytest.mark.only(where=lambda backend: backend in ("triton", "cuda-simt"))
# the executor is fast; of a conv net only Triton has kernels
CHOSEN = pytest.mark.only(where=lambda backend, name: name in (DENSE if backend == "cuda-simt" else (DENSE[0], CONV)))


@KERNELS
@CHOSEN
@pytest.mark.parametrize("name", (*DENSE, CONV))
def test_states_and_errors(impl, backend, name):
    data, single = golden(name), golden(name, torch.float32)
    own = dict(activation=data.activation, impl=impl)
    state = LF.ep_settle(single.weights, single.x, steps=5, **own)
    for key, u in data.group("u_T5").items():
        assert (state[key] - u).abs().max() <= 1e-5
    for points in (2,) if name == CONV else (0, 2, 4):
        nudged = dict(beta=data.meta["beta"], points=points, steps=data.meta["T2"], **own)
        e = LF.holomorphic_ep_error(single.weights, single.x, single.y, single.group("u_free"), **nudged)
        expected = data.group(f"du_dbeta_N{points}")
        largest = max(v.abs().max().item() for v in expected.values())
        close(f"du_dbeta_N{points}", e, expected, 1e-4, dict.fromkeys(expected, largest))
