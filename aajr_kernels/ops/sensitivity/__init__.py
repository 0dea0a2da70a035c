"""Reductions along an axis of a Dual that is in memory: sensitivities and softmax.

Sensitivity, per token: the squared size of the output's tangent under a metric.

With p = softmax(z) of the primal, μ = Σ p ż, e = ż − μ (sums over the last axis, per tangent):
    l2, logits  q = Σ ẏ²            ẏ̄ = 2 q̄ ẏ
    fisher      q = Σ p e²          z̄ = Σ_k q̄ p(e² − q),            ż̄ = 2 q̄ p e
    probs       q = Σ p² e²         z̄ = Σ_k q̄(2p²e² − 2pq − 2κpe),  ż̄ = q̄(2p²e − 2κp), κ = Σ p² e
ż is taken relative to a reference first, ż at the largest logit: a common offset of ż drops out exactly.
Saved: only the stacked y; the backward recomputes p and e.

Softmax: y = p, ẏ = p∘e; ẋ̄_k = p∘(ẏ̄_k − ν_k) with ν_k = Σ p ẏ̄_k, x̄ = p∘(a − Σ p a) with a = ȳ + Σ_k (ẏ̄_k − ν_k)∘e_k.
Saved: the stacked x.
"""

from .api import METRICS, sensitivity, softmax

__all__ = ["METRICS", "sensitivity", "softmax"]
