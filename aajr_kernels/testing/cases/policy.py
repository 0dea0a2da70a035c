"""A whole policy in miniature, through :func:`aajr_kernels.aligned_penalty` and through PyTorch's forward mode.

The forward pass is written once, in PyTorch's own functions, as in any unmodified model; the oracle runs it on the
written-out layers of :func:`~aajr_kernels.testing.oracle.oracle_mode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...method import LMHead, aligned_penalty
from ..oracle import metric_values, oracle_mode
from .case import Case, Stacks, forward_mode, stacks

HEADS, KEY_HEADS, FEATURES = 4, 2, 6  # of the attention; the policy is HEADS * FEATURES wide


def hidden_states(p: Mapping[str, Tensor], x: Any) -> Any:
    """Two blocks: RMS norm, causal attention, gated MLP; layer norm, attention with a learned bias, GELU MLP."""
    size = (x.shape[-1],)
    x = x + _attend(p, F.rms_norm(x, size, p["norm1"], 1e-6), "1", None)
    h = F.rms_norm(x, size, p["norm2"], 1e-6)
    x = x + F.linear(F.silu(F.linear(h, p["gate"])) * F.linear(h, p["up"]), p["down"])
    x = x + _attend(p, F.layer_norm(x, size, p["norm3"], p["shift3"], 1e-5), "2", p["positions"])
    h = F.layer_norm(x, size, p["norm4"], p["shift4"], 1e-5)
    return x + F.linear(F.gelu(F.linear(h, p["wide"], p["wide_bias"])), p["narrow"])


def _attend(p: Mapping[str, Tensor], h: Any, block: str, bias: Tensor | None) -> Any:
    def heads(name: str, count: int) -> Any:
        return F.linear(h, p[name + block]).unflatten(-1, (count, FEATURES)).transpose(1, 2)

    q, k, v = heads("q", HEADS), heads("k", KEY_HEADS), heads("v", KEY_HEADS)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), p["o" + block])


def _parameters(length: int, vocabulary: int) -> dict[str, Tensor]:
    size, keys, inner = HEADS * FEATURES, KEY_HEADS * FEATURES, 37

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, dtype=torch.float64)

    def matrix(outer: int, inner: int) -> Tensor:
        return draw(outer, inner, scale=inner**-0.5)

    p = {f"norm{i}": draw(size, scale=0.2, mean=1.0) for i in (1, 2, 3, 4)}
    p |= {f"shift{i}": draw(size, scale=0.2) for i in (3, 4)}
    for block in "12":
        shapes = {"q": (size, size), "k": (keys, size), "v": (keys, size), "o": (size, size)}
        p |= {name + block: matrix(*shape) for name, shape in shapes.items()}
    p |= {"gate": matrix(inner, size), "up": matrix(inner, size), "down": matrix(size, inner)}
    p |= {"wide": matrix(inner, size), "wide_bias": draw(inner), "narrow": matrix(size, inner)}
    p |= {"positions": draw(1, HEADS, length, length)}
    return p | {"head": matrix(vocabulary, size), "head_bias": draw(vocabulary)}


def policy_case(
    name: str, metric: str, *, streamed: bool, form: str = "squared", unit: str = "token"
) -> Case:
    """One call of ``aligned_penalty`` with the task loss from the same forward.

    Args:
        name: of the case.
        metric: metric of the penalty.
        streamed: hidden states with ``head=`` and labels (the task loss is the cross-entropy), or logits returned by
            the policy (the task loss is a random linear form of them).
        form: ``"squared"``, or ``"hinge"`` above a threshold of zero.
        unit: ``"token"`` or ``"sequence"``.
    """
    batch, length, vocabulary, softcap = 2, 7, 29, 8.0
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, :2] = False
    labels = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))
    labels[1, 3] = -100
    names = tuple(_parameters(1, 1))

    def build(k: int) -> tuple[list[Tensor], list[Tensor]]:
        return [stacks(batch, length, HEADS * FEATURES, k=k)], [*_parameters(length, vocabulary).values()]

    def ours(s: Stacks, params: Stacks) -> Tensor:
        p, device = dict(zip(names, params)), s[0].device

        def func(x: Any) -> Any:
            h = hidden_states(p, x)
            return h if streamed else F.linear(h, p["head"], p["head_bias"])

        penalty, task = aligned_penalty(
            func,
            s[0][0],
            s[0][1:],
            metric=metric,
            head=LMHead(p["head"], p["head_bias"], softcap=softcap) if streamed else None,
            labels=labels.to(device) if streamed else None,
            gamma=0.0 if form == "hinge" else None,
            form=form,
            mask=mask.to(device),
            unit=unit,
            return_primal=True,
        )
        return torch.cat([penalty.view(1), task.flatten()])

    def exact(s: Stacks, params: Stacks) -> Tensor:
        p = dict(zip(names, params))

        def func(x: Tensor) -> Tensor:
            z = F.linear(hidden_states(p, x), p["head"], p["head_bias"])
            return softcap * torch.tanh(z / softcap) if streamed else z

        with oracle_mode(float64=s[0].dtype == torch.float64):
            z = forward_mode(func, s, [])
        q = metric_values(z[0], z[1:], metric) * mask
        units = mask.sum() if unit == "token" else batch
        q = q.sum(-1) if unit == "sequence" else q
        if form == "hinge":
            q = torch.where(q > 0, torch.where(q > 0, q, torch.ones_like(q)).sqrt(), torch.zeros_like(q))
        penalty = q.sum() / (q.shape[0] * units)
        task = F.cross_entropy(z[0].flatten(0, 1), labels.flatten()) if streamed else z[0].flatten()
        return torch.cat([penalty.view(1), task.view(-1)])

    return Case("", f"{metric}, {name}", "aligned_penalty", ("x", *names), build, ours, exact, rows="first")


CASES = [
    policy_case("head with labels", "fisher", streamed=True),
    policy_case("head with labels", "probs", streamed=True),
    policy_case("logits", "fisher", streamed=False),
    policy_case("logits, per sequence", "logits", streamed=False, unit="sequence"),
    policy_case("hinge", "fisher", streamed=True, form="hinge", unit="sequence"),
]
