"""What every family is tried over: sizes, dtypes, subsets of requires_grad, and seeded random cases."""

import itertools
import random

import torch

SIZES = (0, 1, 7, 17, 63, 64, 65, 127, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sweep(base, **sizes):
    """`base` (a dict) with one entry changed at a time: not the product, which no suite can afford."""
    yield dict(base)
    for name, values in sizes.items():
        for value in values:
            if value != base.get(name):
                yield {**base, name: value}


def subsets(names):
    """Every subset of `names`, the empty one and the full one included."""
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


def label(case):
    """A short test id: `B3-C7-M-cosine`."""

    def word(name, value):
        if isinstance(value, bool):
            return name if value else f"no_{name}"
        return str(value).replace("torch.", "") if isinstance(value, (str, torch.dtype)) else f"{name}{value}"

    return "-".join(word(name, value) for name, value in case.items())


def random_cases(count, seed, **choices):
    """`count` dicts, each entry drawn from its list of choices; the same for the same seed on every machine."""
    draw = random.Random(seed)
    return [{name: draw.choice(values) for name, values in choices.items()} for _ in range(count)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
