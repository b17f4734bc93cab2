"""A network trained by back-propagation, converted, and fine-tuned without weight transport:

python examples/fine_tune_with_sign_symmetry.py [usf|frsf|brsf]
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels
from lgkernels.recipes import data, models

BATCH = 128


def train(model, images, epochs, lr, seed):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    generator, count = torch.Generator().manual_seed(seed), len(images.train[1])
    steps = epochs * (count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH):
            x, target = images.training_batch(indices, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model, images):
    model.eval()
    correct = sum((model(x).argmax(1) == target).sum().item() for x, target in images.test_batches(500))
    return 100 * correct / len(images.test[1])


def main(rule="usf", pretraining=6, epochs=3, samples=None):
    torch.manual_seed(0)
    images = data.load("fashion-mnist", augmentation="none").truncated(samples)
    model = nn.Sequential(*models.build("smallconv", "bp", in_channels=images.channels, num_classes=images.classes))
    train(model, images, pretraining, lr=0.02, seed=1)
    before = accuracy(model, images)
    lgkernels.convert(model, rule)  # in place: weights are the same, bit for bit; rule="bp" would undo it
    assert accuracy(model, images) == before
    train(model, images, epochs, lr=0.005, seed=2)
    after = accuracy(model, images)
    print(f"back-propagation, {pretraining} epochs: {before:.1f} %; then {epochs} of {rule}: {after:.1f} %")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:2])
