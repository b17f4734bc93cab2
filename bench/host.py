"""Host cost: what Python takes around a kernel, with the driver replaced by one that starts nothing.

    python -m bench.host [ROUNDS]   # one JSON object a line; needs Triton, no GPU

Rows: the launches of a fused LLS forward, by Triton, by the library's launcher, and alone (the driver's call, with
arguments that lie ready); the look-up that says whether its kernels are trusted; the step of `OffsetSGD` beside torch's
fused SGD, on tiny tensors. `over_us` is what the library adds to the calls alone.
Times are the best of many short runs, in interleaved rounds: the work is the same each time, and what comes on top of
it is the machine's.
"""

import json
import os
import sys
import timeit
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
from torch import nn

from lgkernels.core import trust
from lgkernels.core.trial import Trial
from lgkernels.ops.common import launch
from lgkernels.ops.lls import basis
from lgkernels.ops.lls import op as lls_op
from lgkernels.ops.lls import triton as lls
from lgkernels.ops.lls.options import HeadOptions
from lgkernels.optim import OffsetSGD

from .offset import resnet50_shapes
from .stand_in import Compiled, installed

CPU = torch.device("cpu")
ROUNDS = int(sys.argv[1]) if __name__ == "__main__" and sys.argv[1:] else 200


def best(functions, calls=20):
    """Microseconds of one call of each function."""
    found = [float("inf")] * len(functions)
    for function in functions:
        function()
        function()
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            found[i] = min(found[i], timeit.timeit(function, number=calls) / calls * 1e6)
    return [round(t, 2) for t in found]


def fused_forward():
    """The launches of a block with its head: (kernel, programs, args, meta)."""
    launches = []

    def start(kernel, programs, device, args, meta):
        launches.append((kernel, programs, args, meta))

    z, channel = torch.empty(128, 128, 16, 16), torch.empty(128)
    with mock.patch.object(launch, "start", start):
        lls.batch_stats(z, None, channel, channel, 0.1, 1e-5)
        lls.norm_act_pool(z, channel, channel, channel, channel, 0.01, 4, True, True)
        target = torch.zeros(128, dtype=torch.int64)
        lls.head(torch.empty(128, 2048), target, None, basis.signs(10, 2048), HeadOptions(10), True)
    return launches


def made_ready(launches):
    """The driver's calls that the launches end in: (function, arguments)."""
    calls = []
    with mock.patch.object(Compiled, "run", lambda *called: calls.append(called)):
        for kernel, programs, args, meta in launches:
            for _ in range(2):  # the first time Triton starts it, then the library's launcher
                launch.launch(kernel, programs, CPU, *args, **meta)
    launch._remembered.clear()
    return [(compiled.run, arguments) for compiled, *arguments in calls[1::2]]


def launch_rows():
    with installed():
        launches = fused_forward()
        ready = dict(zip(map(id, launches), made_ready(launches)))

        def by_triton(some):
            for kernel, programs, args, meta in some:
                kernel[(programs,)](*args, **meta)

        def cached(some):
            for kernel, programs, args, meta in some:
                launch.launch(kernel, programs, CPU, *args, **meta)

        def alone(calls):
            for run, arguments in calls:
                run(*arguments)

        for some in [*([one] for one in launches), launches]:
            name = some[0][0].__name__ if len(some) == 1 else f"all {len(some)} launches of a fused forward"
            calls = [ready[id(one)] for one in some]
            ways = lambda some=some: by_triton(some), lambda some=some: cached(some), lambda calls=calls: alone(calls)
            before, after, least = best(ways)
            row = {"triton_us": before, "lgkernels_us": after, "alone_us": least, "over_us": round(after - least, 2)}
            yield {"what": name, **row}


def trust_rows():
    """`trust.admits` of a call that has been admitted."""
    x, weight, target = torch.empty(128, 128, 16, 16), torch.empty(128, 128, 3, 3), torch.zeros(128, dtype=torch.int64)
    numbers = ([1, 1], [1, 1], [1, 1], 1, 0.1, 1e-5, 0.01, 4, True, 10, "cross_entropy", 0.1, -100, True, True)
    arguments = (x, weight, None, *(torch.empty(128) for _ in range(4)), target, None, *numbers)
    op = trust.Op("lls_block", lls_op.lls_block, (), lambda given: given, Trial(length=lambda given: 1))
    key = trust._quick(op, "triton", arguments)
    with mock.patch.dict(trust._admitted, {key: True}):
        (time,) = best([lambda: trust.admits(op, "triton", lls, lls, arguments)])
    yield {"what": "look-up of the verdict of lls_block", "lgkernels_us": time}


def optimizer_rows():
    shapes = [(4,)] * len(resnet50_shapes())

    def made(optimizer, **options):
        params = [nn.Parameter(torch.ones(s)) for s in shapes]
        grads = [[torch.ones(s) for s in shapes] for _ in range(8)]
        step, turn = optimizer(params, lr=0.0, momentum=0.9, **options), [0]
        for p, g in zip(params, grads[0]):
            p.grad = g

        def moving():
            turn[0] += 1
            for p, g in zip(params, grads[turn[0] % len(grads)]):
                p.grad = g
            step.step()

        return step.step, moving

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rivals = {"torch SGD fused": made(torch.optim.SGD, fused=True), "OffsetSGD": made(OffsetSGD)}
        for i, what in enumerate(("the same gradients", "new gradients in each step")):
            times = best([both[i] for both in rivals.values()], calls=5)
            yield {"what": f"step over {len(shapes)} parameters, {what}", **dict(zip(rivals, times))}
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for row in (*launch_rows(), *trust_rows(), *optimizer_rows()):
        print(json.dumps(row))
