"""A driver of Triton's that compiles and starts nothing, on CPU tensors: what a launch costs in Python, and which
kernel it would start. Needs a process without TRITON_INTERPRET."""

import contextlib
from collections import namedtuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lgkernels.ops.common import launch

STREAM = 7


class Driver:
    """Devices of sm_90."""

    current = 0

    def get_current_device(self):
        return Driver.current

    def get_current_stream(self, device):
        return STREAM

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """What Triton would have compiled under `key`; its launches are noted in `noted`, if that is a list."""

    noted: list | None = None
    function, packed_metadata = "function", ()

    def __init__(self, key, options):
        self.key, self.metadata = key, namedtuple("Metadata", options)(**options)

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        if Compiled.noted is not None:
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            Compiled.noted.append((self.key, (x, y, z), stream, function, metadata, repr(values)))


def _compile(kernel, key, signature, device, constants, options, attributes, warmup):
    cache = kernel.device_caches[device][0]
    cache[key] = Compiled(key, options.__dict__)
    return cache[key]


@contextlib.contextmanager
def installed():
    """Inside, kernels that are launched on CPU tensors go the way of a GPU's, up to the driver."""
    before = driver._active
    driver.set_active(Driver())
    launch._remembered.clear()
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", _compile),
            mock.patch.multiple(launch, DEVICE_TYPES={"cpu"}, architecture=lambda device: 90),
        ):
            yield
    finally:
        launch._remembered.clear()
        driver.set_active(before)
