"""Per-token sensitivity of an output that is already in memory: the squared size of its tangent under a metric.

With p = softmax(z) of the primal, μ = Σ p ż, e = ż − μ (sums over the last axis, per tangent):
    l2, logits  q = Σ ẏ²            ẏ̄ = 2 q̄ ẏ
    fisher      q = Σ p e²          z̄ = Σ_k q̄ p(e² − q),            ż̄ = 2 q̄ p e
    probs       q = Σ p² e²         z̄ = Σ_k q̄(2p²e² − 2pq − 2κpe),  ż̄ = q̄(2p²e − 2κp), κ = Σ p² e
ż is taken relative to a reference first, ż at the largest logit: a common offset of ż drops out exactly.
Saved: the stacked y alone; the backward recomputes p and e.
"""

from .api import METRICS, sensitivity

__all__ = ["METRICS", "sensitivity"]
