"""Where no kernel runs, `auto` takes lean plain torch; the definition where there is none, and for float64."""

import pytest
import torch

from lgkernels.core import dispatch, native


@pytest.mark.parametrize("op", ["lls_loss", "lls_block", "direct_forward", "lora_linear"])
def test_without_the_native_module(op, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: None)
    backend, reason = dispatch.explain(op, "cpu", torch.float32)
    lean = "torch" in dispatch.backends(op)
    assert lean == (op != "lora_linear") and backend == dispatch.fallback(op) == ("torch" if lean else "reference")
    assert reason.startswith("the native module is not there" if lean else "lora_linear has no cpu backend")
    assert dispatch.explain(op, "cpu", torch.float64)[0] == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device_without_kernels(dtype):
    assert dispatch.explain("lls_block", "xpu", dtype) == ("torch", "no kernels for xpu")


def test_float64_is_refused():
    with pytest.raises(
        ValueError, match="impl='torch' can't run lls_loss on cpu torch.float64: float64 is for the ref"
    ):
        dispatch.backend("lls_loss", "torch", torch.device("cpu"), torch.float64)
