"""Your own network without a backward pass: its gradients estimated by forward-mode derivatives, for any optimizer:

python examples/forward_gradients_of_your_own_network.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.functional import forward_gradient
from lgkernels.random import RandomFeedback
from lgkernels.recipes import data


class TransformerBlock(nn.Module):
    """One block on the four quarters of an image: the fewer numbers are perturbed, the less the estimate varies."""

    def __init__(self, width=16):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 14, stride=14)
        self.position = nn.Parameter(torch.zeros(4, width))  # no layer's: it is perturbed itself
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.block(tokens).mean(1))


def networks():
    torch.manual_seed(0)
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=3), nn.GroupNorm(1, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 3 * 3, 10)),
    )
    return {"small CNN": cnn, "transformer block": TransformerBlock()}


def train(model, images, steps, draws=1, batch_size=128):
    def losses(x, target):  # one for each sample: its own loss tells what its noise did
        return F.cross_entropy(model(x), target, reduction="none")

    noise = RandomFeedback(seed=0, law="sign")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        indices = torch.randint(0, len(images.train[1]), (batch_size,), generator=generator)
        x, target = images.training_batch(indices, generator)
        loss, gradients = forward_gradient(losses, x, target, draws=draws, noise=noise, modules=model)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        if step % 50 == 0:
            print(f"  step {step:3d}: loss {loss:.3f}")


@torch.no_grad()
def accuracy(model, images):
    model.eval()
    correct = sum((model(x).argmax(1) == target).sum().item() for x, target in images.test_batches(500))
    return 100 * correct / len(images.test[1])


def main(steps=300):
    images = data.load("fashion-mnist", augmentation="none")
    accuracies = {}
    for name, model in networks().items():
        print(name)
        train(model, images, steps)
        accuracies[name] = accuracy(model, images)
        print(f"  test accuracy {accuracies[name]:.1f} %")
    return accuracies


if __name__ == "__main__":
    main()
