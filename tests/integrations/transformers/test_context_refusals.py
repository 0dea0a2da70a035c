"""Arguments and models that a shared context refuses, in one sentence each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from integrations.transformers.subjects import tiny
from integrations.transformers.test_context import LENGTH, ROWS, START, batch, family
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import shared_context

transformers = pytest.importorskip("transformers")


def _llama(**changes: Any) -> Any:
    x, mask, _ = batch()
    return shared_context(family("llama").model, changes.pop("x", x), **({"mask": mask} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": None, "start": LENGTH}, ValueError, "start must be below the 13 tokens"),
        ({"mask": None, "start": -1}, ValueError, "start must be an integer >= 0"),
        ({"start": START + 1}, ValueError, "mask lets token 6 be attacked, inside the context of start=7"),
        ({"mask": torch.zeros(ROWS, LENGTH, dtype=torch.bool)}, ValueError, "at least one token to attack"),
        ({"mask": torch.ones(LENGTH, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": None}, TypeError, "needs mask=, the attackable tokens, or start="),
        ({"past_key_values": object()}, ValueError, "past_key_values must not be given"),
        ({"cache": object()}, ValueError, "cache must not be given"),
        ({"token_type_ids": torch.zeros(1)}, TypeError, "has no argument token_type_ids"),
        (
            {"attention_mask": torch.ones(ROWS, 1, LENGTH, LENGTH)},
            ValueError,
            "let the context see the suffix",
        ),
        ({"attention_mask": torch.ones(ROWS, LENGTH)}, TypeError, "attention_mask must be bool or integer"),
        ({"position_ids": torch.arange(LENGTH)}, ValueError, "position_ids must be"),
        ({"position_ids": torch.arange(LENGTH).remainder(7)[None]}, ValueError, "packed sequences"),
        (
            {"x": torch.ones(ROWS, LENGTH, dtype=torch.long)},
            TypeError,
            "x must be a plain tensor of embeddings",
        ),
        ({"x": torch.ones(LENGTH, 32)}, ValueError, r"x must be embeddings \[B, S, C\]"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _llama(**changes)
    assert str(raised.value).count(". ") == 0


def test_values_and_points_of_another_shape():
    context = _llama()
    with pytest.raises(ValueError, match="values must be"):
        context.suffix(torch.zeros(ROWS, LENGTH - 1))
    with pytest.raises(ValueError, match="x must be the suffix"):
        context(batch()[0])


def test_a_context_without_a_graph_or_of_other_parameters():
    model, (x, mask, _) = copy.deepcopy(family("llama")), batch()
    with torch.no_grad():
        context = shared_context(model.model, x, mask=mask)
        context(context.x)
    with pytest.raises(RuntimeError, match="without a graph"):
        context(context.x)
    context = shared_context(model.model, x, mask=mask)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="parameters of the model changed"):
        context(context.x)


def _bidirectional() -> nn.Module:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def _recurrent() -> nn.Module:
    own = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**(zoo.SIZES | own)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_bidirectional, "another value for a suffix after its context than in the whole.* not causal"),
        (_recurrent, "keeps a LinearAttentionLayer|put no keys and values|keeps a Lfm2"),
        (lambda: zoo._bert("sdpa").model, "takes no cache"),
        (lambda: zoo._t5("sdpa", "encoder").model, "has an encoder"),
    ],
)
def test_models_that_cannot_be_split(make, message):
    x, mask, _ = batch()
    with pytest.raises(aajr.UnsupportedOperation, match=message):
        shared_context(make(), x.float(), mask=mask)


def _stretched(kind: str) -> nn.Module:
    """Rotary frequencies that change after ten positions."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    rotary = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10}
    own = {"max_position_embeddings": 10, "rope_parameters": rotary | factors}
    return transformers.LlamaModel(transformers.LlamaConfig(**(zoo.SIZES | own))).double().eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_rotary_frequencies_that_depend_on_the_length(kind):
    x, _, _ = batch()
    positions = torch.arange(LENGTH)[None]
    for start, first, is_refused in (
        (8, 0, kind != "yarn"),
        (11, 0, kind == "dynamic"),  # "longrope" has the long set on both sides
        (8, 10, kind == "dynamic"),
        (8, -4, False),
    ):
        model = _stretched(kind)
        options = dict(start=start, position_ids=positions + first)
        if is_refused:
            with pytest.raises(
                ValueError, match=f"x must end within the 10 positions after which the '{kind}'"
            ):
                shared_context(model, x, **options)
            continue
        with torch.no_grad():
            context = shared_context(model, x, **options)
            got = context(context.x)
            whole = model(inputs_embeds=x, position_ids=positions + first, use_cache=False)
        expected = whole.last_hidden_state[:, start:]
        assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_a_compiled_module():
    with pytest.raises(TypeError, match="got what torch.compile made of one: give its _orig_mod"):
        shared_context(torch.compile(family("llama").model, backend="eager"), batch()[0], start=START)


def test_no_model_of_transformers():
    x, mask, _ = batch()
    for model in (nn.Linear(32, 32), nn.DataParallel(nn.Linear(32, 32)), len):
        with pytest.raises(TypeError, match="model must be a decoder of transformers"):
            shared_context(model, x, mask=mask)
