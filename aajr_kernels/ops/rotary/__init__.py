"""Rotary position embedding of a Dual: y = x∘cos + rot(x)∘sin on the first features, the rest passes.

rot(x) = [−x₂, x₁] on the two halves of the features, or the same on neighbouring pairs (interleaved).
JVP:     linear in x, so primal and tangents go through the same map.
Reverse: the transpose on every cotangent, x̄ = ȳ∘cos − rot(ȳ∘sin); for tables that are trained,
         cos-bar = Σ ȳ∘x and sin-bar = Σ ȳ∘rot(x) over primal, tangents and broadcast axes.
Saved:   cos and sin; x only where the tables need a gradient.
"""

from .api import rotaries, rotary

__all__ = ["rotaries", "rotary"]
