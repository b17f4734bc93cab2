"""A whole training step of VGG8, beside back-propagation: for the families that train networks."""

import torch

from lgkernels.recipes.models import build
from lgkernels.training import BackpropTrainer

from . import common
from .common import Contestant, Problem


class TrainingStep(Problem):
    baseline = "bp"
    network = "vgg8"

    @property
    def footprint(self):
        """Its activations alone are more than a cache holds."""
        return common.CACHE_BYTES

    def layers(self, rule, wrap=None, **options):
        """VGG8 for a rule; `wrap` makes another layer of each block."""
        torch.manual_seed(5)
        layout = torch.channels_last if self.case.channels_last else torch.contiguous_format
        layers = build(self.network, rule, in_channels=self.case.channels, num_classes=self.case.classes, **options)
        layers = [layer.to(self.device, memory_format=layout) for layer in layers]
        return [wrap(layer) if wrap and hasattr(layer, "pool_size") else layer for layer in layers]

    @staticmethod
    def optimizer(parameters):
        """Without state, and at rate 0: any step can be compared with the first."""
        return torch.optim.SGD(parameters, lr=0.0)

    def step(self, trainer, parts=1, x=None, result="losses"):
        """Steps of a trainer over the batch, or its parts. `result` is the losses' name among the results."""
        x = self.input if x is None else x
        batches = list(zip(x.chunk(parts), self.target.chunk(parts)))

        def run():
            with self.autocast():
                for part, labels in batches:
                    losses = trainer.step(part, labels)
            return {result: losses}

        return run

    def backpropagation(self, name="bp", parts=1, wrap=None):
        def make():
            layers = self.layers("bp", wrap)
            trainer = BackpropTrainer(layers, self.optimizer, accumulation_steps=parts)
            return self.step(trainer, parts, result="back-propagated")

        return Contestant(name, "bp", make)


def small(problem):
    """The same with a network that takes milliseconds: for the smoke preset."""
    title = problem.title.replace("VGG8", "SmallConv")
    return type(problem.__name__, (problem,), {"network": "smallconv", "title": title})
