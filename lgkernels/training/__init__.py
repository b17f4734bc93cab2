"""Training loops: local losses block by block, and back-propagation with the same interface."""
from .backprop import BackpropTrainer
from .blockwise import BlockwiseTrainer

__all__ = ["BackpropTrainer", "BlockwiseTrainer"]
