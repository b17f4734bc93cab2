"""Training loops: local losses block by block, and back-propagation with the same interface."""
from .backprop import BackpropTrainer
from .blockwise import BlockwiseTrainer
from .offset import refresh_trainer
from .partition import split_blocks

__all__ = ["BackpropTrainer", "BlockwiseTrainer", "refresh_trainer", "split_blocks"]
