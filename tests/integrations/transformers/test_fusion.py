"""The handle of fuse(): what it lists, what it refuses, and the way back."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from assertions import assert_exact
from integrations.transformers.subjects import SUBJECTS, tiny
from torch import nn
from zoo import embeddings

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse

pytest.importorskip("transformers")


def test_repr_lists_what_was_replaced_and_what_was_left():
    fusion = fuse(SUBJECTS["mixtral-eager-eager"]().model)
    text = repr(fusion)
    assert text.startswith("Fusion of MixtralForCausalLM\n")
    assert "attention + rotary" in text and "2 x model.layers.*.self_attn" in text
    assert 'set_experts_implementation("grouped_mm")' in text
    assert set(fusion.left) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    fusion.undo()
    assert "(undone)" in repr(fusion)


def test_undo_puts_everything_back():
    model = tiny("llama")
    config, attributes = model.config, {name: set(m.__dict__) for name, m in model.named_modules()}
    fusion = fuse(model)
    assert model.config is not config and model.model.layers[0].self_attn.config is model.config
    assert model.config._attn_implementation == "aajr" and config._attn_implementation == "sdpa"
    assert "aajr" not in str(model.config.to_dict())
    model.config.use_cache = False
    fusion.undo()
    fusion.undo()
    assert model.config is config and config._attn_implementation == "sdpa" and config.use_cache is False
    assert attributes == {name: set(m.__dict__) for name, m in model.named_modules()}
    assert not fusion.active


def test_the_context_undoes_after_an_error():
    model = tiny("llama")
    with pytest.raises(KeyError), fuse(model):
        raise KeyError("inside")
    fuse(model)


def test_twice_raises():
    model = tiny("llama")
    fuse(model)
    for part in (model, model.model, copy.deepcopy(model), nn.ModuleList([model])):
        with pytest.raises(RuntimeError, match="is fused already: call undo"):
            fuse(part)


def test_only_this_instance_changes():
    import transformers

    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    before = dict(vars(llama)), dict(vars(llama.LlamaAttention)), dict(vars(llama.LlamaRMSNorm))
    model = tiny("llama")
    other = transformers.LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert other.config is model.config
    x = embeddings(1, 5, 32)
    expected = other(inputs_embeds=x).logits
    with fuse(model):
        assert other.config._attn_implementation == "sdpa"
        assert not any("forward" in m.__dict__ for m in other.modules())
        assert torch.equal(other(inputs_embeds=x).logits, expected)
        after = dict(vars(llama)), dict(vars(llama.LlamaAttention)), dict(vars(llama.LlamaRMSNorm))
        assert after == before


def test_a_deep_copy_is_fused_on_its_own():
    model = tiny("llama")
    fusion = fuse(model)
    twin = copy.deepcopy(model)
    fusion.undo()
    norm = twin.model.norm
    assert norm.forward.__self__ is norm
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    x = embeddings(1, 5, 32)
    plain = tiny("llama")
    plain.load_state_dict(twin.state_dict())
    assert_exact(twin(inputs_embeds=x).logits, plain(inputs_embeds=x).logits, tolerance=2e-6)
    with aajr.coverage() as coverage:
        twin(inputs_embeds=aajr.dual(x, x))
    assert {"rms_norm", "swiglu"} <= {op for op, _ in coverage.entries}


def test_undo_refuses_when_something_else_replaced_a_method():
    model = tiny("llama")
    fusion = fuse(model)
    ours = model.model.norm.forward
    model.model.norm.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match=r"forward of a LlamaRMSNorm was replaced after fuse"):
        fusion.undo()
    model.model.norm.forward = ours
    fusion.undo()


def test_a_method_replaced_before_is_left():
    model = tiny("llama")
    original = model.model.norm.forward
    model.model.norm.forward = lambda x: original(x)
    fusion = fuse(model)
    assert fusion.left == {"model.norm": "its forward was replaced on the instance by something else"}


def test_unknown_models_raise():
    import transformers

    sizes = dict(vocab_size=17, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
    bart = transformers.BartModel(transformers.BartConfig(**sizes))
    with pytest.raises(ValueError, match=r"type 'bart', which fuse\(\) does not know .*known: bert, gemma"):
        fuse(bart)
    with pytest.raises(TypeError, match="contain a transformers model, got Linear"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        fuse("llama")


def test_unknown_forms_are_left():
    model = tiny("llama", hidden_act="relu")

    class OddRMSNorm(nn.Module):
        def forward(self, x):
            return 2 * x

    model.model.norm = OddRMSNorm()
    fusion = fuse(model)
    assert fusion.left["model.norm"] == "OddRMSNorm.forward has an unknown form"
    assert fusion.left["model.layers.0.mlp"] == "there is no gated product with the activation ReLU"
    assert "model.layers.0.input_layernorm" in fusion.replaced


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    library = importlib.import_module("aajr_kernels.integrations.transformers.library")
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "aajr_kernels\[hf\]"'):
        fuse(nn.Linear(1, 1))
