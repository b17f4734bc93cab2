"""Direct feedback: a whole training step with DFA."""

from dataclasses import dataclass

from lgkernels.training import DirectTrainer

from . import common
from .common import Contestant
from .training_step import TrainingStep, small


@dataclass(frozen=True)
class Case(common.Case):
    classes: int = 10


class DFAStep(TrainingStep):
    op = "dfa_step"
    title = "VGG8 training step with direct feedback"

    def contestants(self):
        return [Contestant("lgkernels", "ours", self.direct), self.backpropagation()]

    def direct(self):
        return self.step(DirectTrainer(self.layers("dfa"), self.optimizer, rule="dfa"))


CASES = {"smoke": [Case(small(DFAStep), 2, 3, size=16, rule="dfa")], "cpu": [Case(DFAStep, 32, 3, size=32, rule="dfa")]}
