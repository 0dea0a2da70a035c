"""Dual-aware functional operations, one package each, every one with a hand-derived reverse-over-forward backward.

``api.py`` checks the arguments and picks a backend, ``function.py`` holds the ``torch.autograd.Function`` over stacked
tensors, ``reference.py`` is the operation in plain PyTorch. The packages never import each other.
"""
