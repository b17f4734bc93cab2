"""`python -m tests.support.stand_in <command>`: a command of lgkernels on a machine without a GPU, as if it had one.

The CPU is the device: Triton's interpreter and the CPU executor for CUDA kernels (tests/simt) run the kernels.
LGKERNELS_PLANT="goodness=crash,similarity=wrong": faults to find, in the Triton functions of the local losses.
"""

import os
import signal
import sys
import time

RUNS = __name__ in ("__main__", "__mp_main__")  # or in a child; a collection of doctests imports this file too
if RUNS:
    os.environ["LGKERNELS_STAND_IN"] = "cpu"  # before core/trust.py is imported
    os.environ["TRITON_INTERPRET"] = "1"

from lgkernels.core import native  # noqa: E402
from tests.simt import executor  # noqa: E402


def install():
    if executor.unavailable() is None:
        native.override_cuda(executor.module())
    for fault in filter(None, os.environ.get("LGKERNELS_PLANT", "").split(",")):
        plant(*fault.split("="))


def plant(name, how):
    from lgkernels.ops.local_loss import triton

    right = getattr(triton, name)

    def wrong(*arguments):
        if arguments[0].is_meta:  # launches are foreseen; none starts
            return right(*arguments)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hang":
            time.sleep(600)
        results = right(*arguments)
        return tuple(r * 1.01 if r.is_floating_point() else r for r in results)

    setattr(triton, name, wrong)


if RUNS:
    install()

if __name__ == "__main__":
    from lgkernels.__main__ import main

    sys.exit(main())
