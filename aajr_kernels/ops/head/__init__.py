"""Language-model head and output metric in one stream over the vocabulary; no [tokens, vocabulary] tensor exists.

z = cap(s(W h + b)), ż = cap'·s W ḣ (s the logits multiplier, cap(x) = c tanh(x/c) or the identity), p = softmax(z),
μ = Σ p ż, e = ż − μ:
    l2      q = ‖ḣ‖² of the hidden states themselves
    logits  q = Σ ż²          ż̄ = 2 q̄ ż
    fisher  q = Σ p e²        z̄ = Σ_k q̄ p(e² − q),            ż̄ = 2 q̄ p e
    probs   q = Σ p² e²       z̄ = Σ_k q̄(2p²e² − 2pq − 2κpe),  ż̄ = q̄(2p²e − 2κp), κ = Σ p² e
    nll     log Σ e^z − z[label]: z̄ += nll-bar (p − onehot)
With x the logit before the cap and ẋ its tangent: x̄ = cap' z̄ + Σ_k cap'' ẋ ż̄, ẋ̄ = cap' ż̄, where cap' = 1 − (z/c)² and
cap'' ẋ = −2zż/c². Then h̄ = s Wᵀx̄, ḣ̄ = s Wᵀẋ̄, W̄ = s(x̄hᵀ + Σ_k ẋ̄_kḣ_kᵀ), b̄ = s Σ_rows x̄.

Streaming: every chunk of the vocabulary yields, under weights e^(z − max), its mean of ż − r and its sum of squares
about that mean; chunks merge by the parallel variance rule, whose terms are all positive. r is a per-row reference
taken from the first chunk. Accumulating Σ e^z ż² instead would cancel: an offset of ż by 1000 standard deviations
would cost a third of q in float32.
Saved: h, ḣ, W, b and O(rows) statistics; the backward recomputes the chunks. K = 1 costs 8 products of
[tokens, hidden] by [hidden, vocabulary], 2 forward and 6 backward.
"""

from .api import METRICS, lm_head_sensitivity

__all__ = ["METRICS", "lm_head_sensitivity"]
