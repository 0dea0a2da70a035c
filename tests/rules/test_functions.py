"""Autograd Functions of models: penalty and gradients against finite differences of the model in float64."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules.cases import X
from rules.check import check
from torch.nn.attention import SDPBackend, sdpa_kernel

import aajr_kernels as aajr

transformers = pytest.importorskip("transformers", reason="the Functions are transformers' own")


def test_a_root_of_bounded_slope() -> None:
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as module

    root = lambda x: module.SqrtBoundDerivative.apply(x)
    check(lambda x: root(x * x + 0.1), (X,), 2, upstream=False)
    tiny = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    y = root(aajr.dual(tiny, torch.ones_like(tiny)))
    assert torch.equal(y.tangent, torch.full_like(tiny, module._MAX_SQRT_GRADIENT))


def test_blooms_gelu() -> None:
    from transformers.models.bloom.modeling_bloom import BloomGelu

    check(BloomGelu().train(), (X,), 2, upstream=False)


def _bloom() -> Any:
    config = transformers.BloomConfig(
        vocab_size=19, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0
    )
    return transformers.BloomForCausalLM(config)


def _recurrent_gemma() -> Any:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        lru_width=16, attention_window_size=8, conv1d_width=3, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config)


def test_bloom_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    # its softmax in float32 would be the noise of the differences
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    torch.manual_seed(0)
    model = _bloom().double().train()
    x, v = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    h = 1e-3

    def stencil(f: Callable[[float], Any]) -> Any:
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)

    def logits(x: Any) -> Any:
        return model(inputs_embeds=x, use_cache=False).logits

    with torch.no_grad():
        want = stencil(lambda t: logits(x + t * v))
    torch.testing.assert_close(logits(aajr.dual(x, v)).tangent, want, rtol=1e-7, atol=1e-8)
    weight = model.transformer.h[0].mlp.dense_h_to_4h.weight
    step = torch.randn_like(weight)

    def moved(t: float) -> float:
        with torch.no_grad():
            weight.add_(step, alpha=t)
            value = aajr.aligned_penalty(logits, x, v, metric="logits").item()
            weight.sub_(step, alpha=t)
        return value

    (gradient,) = torch.autograd.grad(aajr.aligned_penalty(logits, x, v, metric="logits"), weight)
    assert (gradient * step).sum().item() == pytest.approx(stencil(moved), rel=1e-6)


def test_recurrent_gemma_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against forward mode of the model with an ordinary root; its norms and scan are in float32 by themselves."""
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as module

    torch.manual_seed(0)
    model = _recurrent_gemma().double().train()
    x, v = torch.randn(2, 2, 5, 16, dtype=torch.float64)

    def logits(x: Any) -> Any:
        return model(inputs_embeds=x, use_cache=False).logits

    weights = [
        model.model.layers[0].temporal_block.rg_lru.recurrent_param,
        model.model.layers[0].mlp_block.up_proj.weight,
    ]
    y = logits(aajr.dual(x, v))
    ours = torch.autograd.grad(y.tangent.square().sum(), weights)
    monkeypatch.setattr(module, "SqrtBoundDerivative", types.SimpleNamespace(apply=torch.sqrt))
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(logits, (x,), (v,))
        theirs = torch.autograd.grad(tangent.square().sum(), weights)
    torch.testing.assert_close(y.tangent, tangent, rtol=1e-5, atol=1e-6)
    for got, want in zip(ours, theirs):
        assert (got - want).norm() <= 1e-5 * want.norm()
