"""Training loops: local losses block by block, direct feedback, and back-propagation with the same interface."""

from .backprop import BackpropTrainer
from .blockwise import BlockwiseTrainer
from .direct import CONVENTIONS, DirectTrainer
from .offset import refresh_trainer
from .partition import split_blocks

__all__ = ["CONVENTIONS", "BackpropTrainer", "BlockwiseTrainer", "DirectTrainer", "refresh_trainer", "split_blocks"]
