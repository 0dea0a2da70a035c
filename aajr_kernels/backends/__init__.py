"""The backends: each a door to its kernels, and the operators that torch.compile sees."""
