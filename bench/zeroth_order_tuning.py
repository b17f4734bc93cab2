"""What tuning by forward passes alone gains, and the memory of a step: `python -m bench.zeroth_order_tuning`.

A network is trained on the first half of the embedded Fashion-MNIST until it is half good, then tuned on the other half
by zeroth-order steps, by back-propagation, and by back-propagation with checkpointing, each on the same batches.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from lgkernels.optim import ZerothOrder
from lgkernels.recipes import data, measure

BATCH = 32


def network(width):
    torch.manual_seed(0)
    sizes = [784, width, width, width, 10]
    layers = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def batches(images, labels, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        yield images[rows], labels[rows]


@torch.no_grad()
def accuracy(model, images, labels):
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def back_propagation(model, lr, forward):
    optimizer = torch.optim.SGD(model.parameters(), lr)

    def step(x, y):
        optimizer.zero_grad()
        F.cross_entropy(forward(model, x), y).backward()
        optimizer.step()

    return step


def zeroth_order(model, lr, eps, members):
    model.requires_grad_(False)
    optimizer = ZerothOrder(model, lr, eps=eps, members=members, law="sign")
    return lambda x, y: optimizer.step(lambda: F.cross_entropy(model(x), y))


def checkpointed(model, x):
    return checkpoint_sequential(model, 3, x, use_reentrant=False)


def measured(model, step, steps, tuning, test):
    """(steps, accuracy on the test images in percent, seconds a step, bytes of a step with the weights)"""
    start = time.perf_counter()
    for x, y in batches(*tuning, steps, seed=1):
        step(x, y)
    seconds = (time.perf_counter() - start) / steps
    reached, (x, y) = accuracy(model, *test), next(batches(*tuning, 1, seed=2))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return steps, reached, seconds, weights + measure.peak_memory(lambda: step(x, y), torch.device("cpu"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=240, help="of zeroth order; others: a sixth of them")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eps", type=float, default=1e-3)
    given = parser.parse_args(arguments)
    loaded = data.load("fashion-mnist")
    (images, labels), test = (
        (((part[0] / 255 - loaded.mean) / loaded.std).flatten(1), part[1]) for part in (loaded.train, loaded.test)
    )
    half = len(images) // 2
    start = network(given.width)
    first = back_propagation(start, 0.05, lambda model, x: model(x))
    for x, y in batches(images[:half], labels[:half], 60, seed=0):
        first(x, y)
    tuning = images[half:], labels[half:]

    def inference(model):
        return torch.no_grad()(lambda x, y: F.cross_entropy(model(x), y))

    few, rate = given.steps // 6, 0.05
    ways = {
        "inference alone": (1, inference),
        f"zeroth order, {given.members} members a step": (
            given.steps,
            lambda model: zeroth_order(model, given.lr, given.eps, given.members),
        ),
        "back-propagation": (few, lambda model: back_propagation(model, rate, lambda m, x: m(x))),
        "back-propagation with checkpointing": (few, lambda model: back_propagation(model, rate, checkpointed)),
    }
    rows = {}
    for name, (steps, make) in ways.items():
        model = copy.deepcopy(start)
        rows[name] = measured(model, make(model), steps, tuning, test)
    print(f"{'':38} steps  accuracy    a step  peak memory")
    for name, (steps, reached, seconds, memory) in rows.items():
        print(f"{name:38} {steps:5} {reached:7.2f} % {1e3 * seconds:6.1f} ms {memory / 2**20:7.3f} MiB")
    return rows


if __name__ == "__main__":
    main()
