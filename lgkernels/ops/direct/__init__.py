"""The fused block of direct feedback (DFA, sDFA, DRTP): convolution, batch norm, leaky ReLU, max-pool."""
