"""The optimizer step of the BP-modified local loss: SGD on the local gradient plus an offset."""
