"""Training loops: local losses block by block, and back-propagation with the same interface."""
from .backprop import BackpropTrainer
from .blockwise import BlockwiseTrainer
from .partition import split_blocks

__all__ = ["BackpropTrainer", "BlockwiseTrainer", "split_blocks"]
