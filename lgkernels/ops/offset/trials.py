"""How the step's kernels prove themselves on a user's GPU (core/trial.py): over tensors of the trial's own, since the
sizes of the caller's do not choose anything."""

import torch

from ...core import tiles
from ...core.trial import Trial
from .tiles import TILES


def _kind(a):
    """Whether there is momentum, and the dtypes of the offsets."""
    dtypes = {o.dtype for o in a["offsets"] if o is not None and o.numel()} if a["offset_scale"] else ()
    return bool(a["momentum"]), tuple(sorted(map(str, dtypes)))


def _example(a):
    """A single element, part of a chunk, more than one chunk, and tensors that lie askew in memory; the dtypes of the
    offsets in turn, and one parameter without."""
    device, (momentum, dtypes) = a["params"][0].device, _kind(a)
    config = TILES["offset_sgd"]((1 << 20,), torch.float32, tiles.architecture(device))
    sizes = (1, 1008, config["BLOCK"] * config["PARTS"] + 1, 1000, 33)

    def tensors(dtype=torch.float32):
        return [torch.empty(n + 1, dtype=dtype, device=device)[int(i > 2) :][:n] for i, n in enumerate(sizes)]

    offsets = tensors()
    if dtypes:
        kinds = [getattr(torch, name.removeprefix("torch.")) for name in dtypes]
        offsets = [tensors(kinds[i % len(kinds)])[i] for i in range(len(sizes))]
    offsets = [o if dtypes and i != 1 else o.new_empty(0) for i, o in enumerate(offsets)]
    numbers = dict(lr=0.1, momentum=0.9 * momentum, weight_decay=0.01, local_scale=0.7, offset_scale=1.5)
    lists = dict(params=tensors(), grads=tensors(), momentum_buffers=tensors() if momentum else [], offsets=offsets)
    return {**a, **lists, **numbers, "grad_scale": 0.5}


TRIALS = {
    "offset_sgd_": Trial(mutates=("params", "momentum_buffers"), length=lambda a: 4, kind=_kind, example=_example)
}
