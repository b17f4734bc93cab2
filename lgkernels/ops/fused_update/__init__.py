"""Weight gradient and optimizer step of a linear layer in one pass over its weight."""
