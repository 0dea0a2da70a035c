"""Linear layer of a Dual, y = x Wᵀ + b.

JVP:     ẏ = ẋ Wᵀ. Weights are shared, so primal and tangents are rows of one matrix product; the bias joins the
         primal rows alone.
Reverse: x̄ = ȳ W, ẋ̄ = ẏ̄ W (one product), W̄ = ȳᵀx + Σ_k ẏ̄_kᵀẋ_k (one product over the stacked rows, so one
         accumulation and one write of W̄), b̄ = Σ_rows ȳ.
         Several layers of one input add their x̄ to one buffer, product by product.
Saved:   the stacked x (only if W needs a gradient) and W (only if x needs one).
"""

from .api import linear, projections

__all__ = ["linear", "projections"]
