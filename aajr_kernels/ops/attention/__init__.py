"""Scaled dot-product attention of Duals.

S = cap(s QKᵀ) + bias, P = softmax(S), P̃ the weights after dropout.

JVP:     Ṡ_k = cap'∘s(Q̇_kKᵀ + QK̇_kᵀ) + ḃias_k, μ_k = rowsum(P∘Ṡ_k), Ȯ_k = (P̃∘(Ṡ_k − μ_k))V + P̃V̇_k.
Reverse: written out in :mod:`aajr_kernels.ops.attention.reference`; 15 tile products for one tangent.
Saved:   the inputs, the output, and per row the shift and the normaliser of the softmax and μ_k: memory O(N·D).
"""

from .api import attention, draws_apart

__all__ = ["attention", "draws_apart"]
