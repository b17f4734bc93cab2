"""When the native CUDA kernels count as there: by driver, and by what they were compiled for."""

from pathlib import Path
from unittest import mock

import pytest
import torch

import lgkernels.ops.lls.op  # noqa: F401 (registers its ops)
from lgkernels.core import dispatch, native

DEVICE = torch.device("cuda:0")


def entries(runtime=13000, driver=13000, status=0):
    made = mock.Mock()
    made.cuda_runtime_version.return_value, made.cuda_driver_version.return_value = runtime, driver
    made.cuda_device_status.return_value, made.cuda_architectures.return_value = status, [800, 860]
    made.cuda_error_string.return_value = "no kernel image is available for execution on the device"
    return made


@pytest.mark.parametrize(
    "state, reason",
    [
        ({}, None),
        ({"driver": 13010}, None),
        ({"driver": 0}, "there is no CUDA driver"),
        ({"driver": 12040}, "the driver serves CUDA 12.4, the native kernels were built with 13.0: update the driver"),
        (
            {"status": 209},
            "the native kernels, built for sm_80, sm_86, do not run on it: "
            "no kernel image is available for execution on the device",
        ),
    ],
)
def test_the_reason(monkeypatch, state, reason):
    made = entries(**state)
    monkeypatch.setattr(native, "_cuda_override", None)  # the executor of other tests
    monkeypatch.setattr(native, "cuda_entries", lambda: made)
    assert dispatch.unavailable("lls_loss", "cuda", DEVICE, torch.float32) == reason
    assert native.cuda_unusable(DEVICE) == reason
    assert made.cuda_driver_version.call_count == 1  # asked once a device


def test_every_entry_lets_other_threads_run():
    sources = [p.read_text() for p in (Path(__file__).parents[2] / "csrc").glob("*/cuda/bindings.cpp")]
    assert len(sources) >= 4
    assert all(text.count("m.def(") == text.count("Release()") for text in sources)
    common = (Path(__file__).parents[2] / "csrc" / "common" / "bindings.h").read_text()
    assert "arguments...); }, doc, Release());" in common
