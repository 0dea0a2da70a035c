"""RMS norm and layer norm of a Dual.

With m the mean over the normalised axes, x centred first by layer norm (x − m(x), ẋ − m(ẋ)):
r = (m(x∘x) + ε)^(-1/2), x̂ = r x, y = w∘x̂ (+ b).

JVP:     c = m(x̂∘ẋ), ẋ̂ = r(ẋ − x̂ c), ẏ = w∘ẋ̂.
Reverse: with a = w∘ȳ and b = w∘ẏ̄: ẋ̄ = r(b − x̂ m(b∘x̂)); x̂̄ = a − r c b − r m(b∘x̂) ẋ;
         x̄ = r(x̂̄ − x̂ m(x̂̄∘x̂ + b∘ẋ̂)); w̄ = Σ_rows (ȳ∘x̂ + ẏ̄∘ẋ̂); the bias gradient sums ȳ alone. Layer norm centres
         x̄ and ẋ̄ on the way out. With K tangents the terms of the tangents are summed.
Saved:   the stacked x and per row r, c (layer norm: and the means).
Sums:    add_rms_norm and add_layer_norm normalise s = x + residual and return s as well; the cotangent of both
         inputs is x̄ as above plus that of s.
"""

from .api import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
