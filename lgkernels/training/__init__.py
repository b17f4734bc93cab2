"""Training loops: local losses block by block, direct feedback, and back-propagation with the same interface."""
from .backprop import BackpropTrainer
from .blockwise import BlockwiseTrainer
from .direct import CONVENTIONS, DirectTrainer

__all__ = ["CONVENTIONS", "BackpropTrainer", "BlockwiseTrainer", "DirectTrainer"]
