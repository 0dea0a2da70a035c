"""Pointwise activations and gated products of Duals.

Pointwise f:  y = f(x), ẏ = f'(x)∘ẋ; x̄ = ȳ∘f' + Σ_k ẏ̄_k∘f''∘ẋ_k, ẋ̄_k = ẏ̄_k∘f'. Saved: the stacked x.
Gated f:      h = f(g)∘u, ḣ = f'(g)∘ġ∘u + f(g)∘u̇;
              ḡ = h̄ u f' + Σ_k ḣ̄_k (f'' ġ_k u + f' u̇_k), ġ̄_k = ḣ̄_k u f',
              ū = h̄ f + Σ_k ḣ̄_k f' ġ_k, u̇̄_k = ḣ̄_k f. Saved: the stacked g and u.

With σ the logistic function, Φ and φ the normal distribution and its density:
    silu        f = xσ          f' = σ(1 + x(1−σ))    f'' = σ(1−σ)(2 + x(1−2σ))
    quick_gelu  the same line with σ(βx), β = 1.702: f' = σ(1 + βx(1−σ)), f'' = βσ(1−σ)(2 + βx(1−2σ))
    gelu        f = xΦ          f' = Φ + xφ           f'' = φ(2 − x²)
    gelu tanh   f = x(1+t)/2, t = tanh(v), v = √(2/π)(x + 0.044715 x³), s = 1 − t²:
                f' = (1+t)/2 + x s v'/2, f'' = s v' + x(s v'' − 2 t s v'²)/2
    relu, relu2 max(x, 0) and its square; the derivative at 0 is 0
    tanh        f' = 1 − t², f'' = −2t(1 − t²);  sigmoid f' = σ(1−σ), f'' = σ(1−σ)(1−2σ)
"""

from .api import geglu, gelu, quick_gelu, relu, relu2, sigmoid, silu, swiglu, tanh

__all__ = ["geglu", "gelu", "quick_gelu", "relu", "relu2", "sigmoid", "silu", "swiglu", "tanh"]
