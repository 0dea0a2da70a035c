"""Random small transformers: as they are, fused, after a cache, with dropout, a context, adapters or checkpoints.

Penalty, a random linear functional of the logits and all gradients against the float64 oracle on the unmodified model,
with dropout in one random state.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import oracle_losses
import pytest
import torch
import zoo
from assertions import assert_exact, assert_exact_gradients
from fuzz.examples import fuzzed
from hypothesis import reject
from hypothesis import strategies as st

import aajr_kernels as aajr
from aajr_kernels.testing import oracle
from aajr_kernels.testing.budgets import EXACT

pytest.importorskip("transformers", minversion="5.0")
#: names of earlier versions, which all versions that are supported know
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
FORMS = ("as it is", "fused", "cache", "context", "adapters", "checkpoints", "dropout")
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def drawn_model(data: Any) -> torch.nn.Module:
    """A decoder with random sizes, in float64."""
    family = data.draw(st.sampled_from(FAMILIES), "family")
    attention = data.draw(
        st.sampled_from(("eager",) if family == "gemma2" else ("eager", "sdpa")), "attention"
    )
    config_class, model_class, options, _ = zoo._DECODERS[family]
    options = dict(options)
    keys = data.draw(st.integers(1, 2), "key heads")
    heads = keys * data.draw(st.integers(1, 3), "queries of a key head")
    # the derivative of a norm of few features is a difference of nearly equal terms: at least six
    size = 2 * data.draw(st.integers(max(1, -(-3 // heads)), 5), "half of a head's size")
    layers = data.draw(st.integers(1, 3), "layers")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    inner = data.draw(st.integers(3, 40), "inner size")
    if family == "gpt2":
        options |= dict(
            n_embd=heads * size, n_layer=layers, n_head=heads, n_inner=inner, activation_function=activation
        )
    else:
        options |= dict(hidden_size=heads * size, num_hidden_layers=layers, num_attention_heads=heads)
        options |= dict(
            intermediate_size=inner, **{"hidden_act": activation} if "gemma" not in family else {}
        )
        options |= {} if family == "gpt_neox" else {"num_key_value_heads": keys}
        options |= {"head_dim": size} if "head_dim" in options else {}
        if "layer_types" in options:
            kinds = st.lists(
                st.sampled_from(("sliding_attention", "full_attention")), min_size=layers, max_size=layers
            )
            options["layer_types"] = data.draw(kinds, "layer types")
        if options.get("sliding_window"):
            options["sliding_window"] = data.draw(st.integers(2, 9), "window")
    options["tie_word_embeddings"] = data.draw(st.booleans(), "tied")
    model = zoo._from_config(config_class, model_class, options, attention)
    return zoo.randomise(model, data.draw(st.integers(0, 99), "weights")).double()


def logits_of(model: Any, mask: Any, cache: bool, start: int, x: Any) -> Any:
    """Logits of all tokens, or of those after a cached start, whose directions are zero; in one random state."""
    torch.manual_seed(11)
    if not cache:
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
    held = model(inputs_embeds=x[:, :start], use_cache=True)
    return model(inputs_embeds=x[:, start:], past_key_values=held.past_key_values, use_cache=True).logits


def drop(model: torch.nn.Module) -> None:
    """Train with a dropout of a third, of attention weights and wherever else the architecture has one."""
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 1 / 3
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 1 / 3)


@fuzzed("random transformers", quick=3, full=300)
def test_a_transformer_is_exact(data):
    model, form = drawn_model(data), data.draw(st.sampled_from(FORMS), "form")
    width = model.get_input_embeddings().weight.shape[1]
    batch, length = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(3, 13), "length")
    start = data.draw(st.integers(1, length - 1), "start")
    k, metric = data.draw(st.integers(1, 2), "K"), data.draw(st.sampled_from(oracle.METRICS), "metric")
    side = data.draw(st.sampled_from(("none", "left", "right")), "padding") if form != "cache" else "none"
    padded = tuple(length - (row % 2) * data.draw(st.integers(0, start - 1), "pad") for row in range(batch))
    kept = None if side == "none" else zoo.padding(padded, side, length)
    x, v = (
        zoo.embeddings(batch, length, width).double(),
        zoo.embeddings(k, batch, length, width, seed=5).double(),
    )
    if form == "context":
        v[:, :, :start] = 0
    if form == "adapters":
        peft = pytest.importorskip("peft")
        names = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
        config = peft.LoraConfig(
            r=2, target_modules=names.get(model.config.model_type, ["q_proj", "v_proj"]),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )  # fmt: skip
        model = peft.get_peft_model(model, config).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
        model.requires_grad_(True)
    reference = copy.deepcopy(model)
    mask = None if kept is None else kept.long()
    tokens = slice(start, None) if form in ("cache", "context") else slice(None)
    count = torch.ones(batch, length, dtype=torch.bool)[:, tokens] if kept is None else kept[:, tokens]
    if form == "dropout":
        if model.config._attn_implementation == "sdpa":  # the oracle's attention has no dropout
            reject()
        for part in (model, reference):
            drop(part)
    exact = lambda z: logits_of(reference, mask, form == "cache", start, z)[:, -count.shape[1] :]
    with oracle.oracle_mode(), torch.no_grad():
        shape = exact(x).shape
    probe = (
        0.1
        * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        * count[..., None]
    )
    parameters = dict(reference.named_parameters())
    by_oracle = lambda x: oracle_losses.loss_and_gradients(
        exact, x, v, parameters, metric=metric, probe=probe, mask=count
    )
    expected = by_oracle(x)
    actual = ours(model, form, x, v, mask, start, count, probe, metric)
    if form == "context":  # whose tokens have no direction
        expected.gradients["v"][:, :, :start] = 0
    try:
        compare(actual, expected, count)
    except AssertionError:
        nudged = by_oracle(x * (1 + 2**-51))
        if form == "context":
            nudged.gradients["v"][:, :, :start] = 0
        try:
            compare(nudged, expected, count, EXACT / 10)
        except AssertionError:  # one unit in the last place of x moves the oracle, too
            reject()
        raise


def compare(actual: Any, expected: Any, count: torch.Tensor, tolerance: float = EXACT) -> None:
    primals = (actual.primal * count[..., None], expected.primal * count[..., None])
    assert_exact(actual.penalty, expected.penalty, "penalty", tolerance=tolerance, floor=1e-12)
    assert_exact(*primals, "primal", tolerance=tolerance)
    assert_exact_gradients(actual.gradients, expected.gradients, tolerance=tolerance)


def ours(
    model: Any, form: str, x: Any, v: Any, mask: Any, start: int, count: Any, probe: Any, metric: str
) -> oracle_losses.Outcome:
    from aajr_kernels.integrations.transformers import fuse, shared_context

    x, v, point = x.clone().requires_grad_(), v.clone().requires_grad_(), None
    leaves = {**dict(model.named_parameters()), "x": x, "v": v}
    options: dict[str, Any] = {"metric": metric, "mask": count}
    with oracle.KeepFloat64(aajr.Dual):
        if form == "fused":
            fuse(model)
        if form == "checkpoints":
            for part in model.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
            model.train()
            # the backward pass recomputes without the modes around it
            contexts = lambda: (contextlib.nullcontext(), oracle.KeepFloat64(aajr.Dual))
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        func = lambda z: logits_of(model, mask, form == "cache", start, z)
        point, direction = x, v
        if form == "context":
            context = shared_context(model, x, start=start, attention_mask=mask)
            func, point, direction = context, context.x, v[:, :, start:]
        penalty, output = aajr.aligned_penalty(func, point, direction, return_primal=True, **options)
        primal = getattr(output, "logits", output)
        loss = penalty + (probe * primal).sum()
        gradients = oracle_losses.gradients_of(loss, leaves)
    return oracle_losses.Outcome(loss, penalty, primal, torch.empty(0), gradients)
