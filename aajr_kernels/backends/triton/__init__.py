"""Launching Triton kernels, and what they share: layouts of rows, sums, elementary functions."""
