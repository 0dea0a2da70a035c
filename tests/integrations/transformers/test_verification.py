"""fuse() believes what a module does, not what it looks like; and looking leaves no trace."""

from __future__ import annotations

import functools
import importlib
import re

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients
from integrations.transformers.subjects import tiny
from torch import nn
from torch.nn import functional as F
from zoo import embeddings

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import forms, fuse, residual

pytest.importorskip("transformers")
llama = importlib.import_module("transformers.models.llama.modeling_llama")
OFF = r"off by \S+ in float64, by more than 8e-06"


def outcome(model):
    x, v = embeddings(2, 7, 32, seed=3).requires_grad_(), embeddings(2, 7, 32, seed=8)
    penalty = aajr.aligned_penalty(lambda d: model(inputs_embeds=d, use_cache=False), x, v)
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if "embed" not in name}
    return penalty, oracle_losses.gradients_of(penalty, leaves)


def assert_alike(model):
    """The fused model gives what the unfused one gives; returns what fuse() said."""
    penalty, gradients = outcome(model)
    with fuse(model) as fusion:
        fused, fused_gradients = outcome(model)
    assert_exact(fused, penalty, "penalty", tolerance=2e-6)
    assert_exact_gradients(fused_gradients, gradients, tolerance=2e-5)
    return fusion


# -- forwards that lie ------------------------------------------------------------------------------------------------


def normalised(self, x, eps=0.0):
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.variance_epsilon if eps is None else eps))


def half_more(self, x):
    return (0.5 + self.weight) * normalised(self, x, None).to(x.dtype)


def eps_outside(self, x):
    wide = x.to(torch.float32)
    scale = wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
    return self.weight * (wide / scale).to(x.dtype)


def other_eps(self, x):
    return self.weight * normalised(self, x, 2 * self.variance_epsilon).to(x.dtype)


def detached(self, x):
    """The right value, with another derivative."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
    return self.weight * (x * scale).to(x.dtype)


def always_wide(self, x):
    return (self.weight * normalised(self, x, None)).float()


def other_activation(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def clamped(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


def extra_term(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 1e-3 * x


def other_in_training(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return 1.1 * y if self.training else y


def over_the_batch(self, x):
    x = x.to(torch.float32)
    return self.weight * (x * torch.rsqrt(x.pow(2).mean((0, -1), keepdim=True) + self.variance_epsilon))


def random_mask(self, x):
    h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.dropout(h, 0.1, self.training))


NORM, MLP = (
    "LlamaRMSNorm.forward is not the fused RMS norm: its ",
    "LlamaMLP.forward is not the fused SwiGLU MLP: its ",
)
LIES = {
    "half_more": (half_more, NORM + "value is " + OFF),
    "eps_outside": (eps_outside, NORM + "value is " + OFF),
    "other_eps": (other_eps, NORM + "value is " + OFF),
    "detached": (detached, NORM + "derivative is " + OFF),
    "other_activation": (other_activation, MLP + "value is " + OFF),
    "clamped": (clamped, MLP + "value is " + OFF),
    "extra_term": (extra_term, MLP + "value is " + OFF),
    "over_the_batch": (over_the_batch, NORM + "value is " + OFF),
    "other_in_training": (other_in_training, MLP + "value is " + OFF),
    "random_mask": (random_mask, MLP + "value is " + OFF),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LIES)
def test_a_forward_that_is_not_what_it_looks_like_is_left(monkeypatch, name, dtype):
    forward, reason = LIES[name]
    monkeypatch.setattr(llama.LlamaRMSNorm if reason.startswith(NORM) else llama.LlamaMLP, "forward", forward)
    fusion = fuse(tiny("llama").to(dtype))
    number = 5 if reason.startswith(NORM) else 2
    # layers without fused norms have no sums to fuse
    assert len(fusion.left) == number and len(fusion.replaced) == (4 if number == 5 else 9)
    for said in fusion.left.values():
        assert re.fullmatch(reason, said), said


def test_the_dtype_of_a_result_counts(monkeypatch):
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", always_wide)
    left = fuse(tiny("llama").bfloat16()).left["model.norm"]
    assert left.startswith("LlamaRMSNorm.forward is not the fused RMS norm: torch.")
    assert left.endswith("instead of torch.float32 [2, 4, 32]")


def test_gelu_and_its_approximation_differ_in_bfloat16_too(monkeypatch):
    gemma = importlib.import_module("transformers.models.gemma.modeling_gemma")
    assert "GeGLU (tanh) MLP" in fuse(tiny("gemma").bfloat16()).replaced.values()
    monkeypatch.setattr(gemma.GemmaMLP, "forward", other_activation)
    left = fuse(tiny("gemma").bfloat16()).left
    assert left["model.layers.0.mlp"].startswith(
        "GemmaMLP.forward is not the fused GeGLU (tanh) MLP: its value is off"
    )


def test_a_weight_of_zero_hides_nothing(monkeypatch):
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", eps_outside)
    monkeypatch.setattr(llama.LlamaMLP, "forward", other_activation)
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert len(fuse(model).left) == 7


def test_a_dropout_in_another_place_is_left():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
            self.act, self.drop = nn.SiLU(), nn.Dropout(0.1)

        def forward(self, x):
            return self.drop(self.c(self.act(self.a(x)) * self.b(x)))

    class Early(Late):
        def forward(self, x):
            return self.c(self.drop(self.act(self.a(x)) * self.b(x)))

    model = tiny("llama")
    model.model.layers[0].mlp, model.model.layers[1].mlp = Late(), Early()
    fusion = fuse(model)
    assert fusion.left["model.layers.0.mlp"].startswith(
        "Late.forward is not the fused SwiGLU MLP: its value is off"
    )
    assert fusion.replaced["model.layers.1.mlp"] == "SwiGLU MLP"


def test_a_weight_without_a_gradient_is_left(monkeypatch):
    """Value and derivative along the tokens agree; the weight's gradient does not."""

    def constant_weight(self, x):
        return self.weight.detach() * normalised(self, x, None).to(x.dtype)

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", constant_weight)
    left = fuse(tiny("llama")).left["model.norm"]
    assert left == "LlamaRMSNorm.forward is not the fused RMS norm: its weight gets a gradient"


def test_a_layer_that_reads_its_index_is_verified_for_each(monkeypatch):
    class Indexed(llama.LlamaMLP):
        def forward(self, x):
            y = super().forward(x)
            return y if self.layer_idx == 0 else 2 * y

    model = tiny("llama")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Indexed, index
    fusion = assert_alike(model)
    assert fusion.replaced["model.layers.0.mlp"] == "SwiGLU MLP"
    assert "its value is off" in fusion.left["model.layers.1.mlp"]


def test_an_attention_that_reads_its_index_is_left(monkeypatch):
    forward = llama.LlamaAttention.forward

    def scaled(self, *args, **kwargs):
        y, weights = forward(self, *args, **kwargs)
        return y / (1 + self.layer_idx), weights

    monkeypatch.setattr(llama.LlamaAttention, "forward", scaled)
    fusion = assert_alike(tiny("llama"))
    said = fusion.left["model.layers.0.self_attn"]
    assert said.endswith("is not the fused attention: what it computes depends on its layer_idx")


def test_a_compiled_child_of_a_layer_is_not_called():
    model, calls = tiny("llama"), []
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.SiLU()
        layer.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
        layer.mlp.act_fn._compiled_call_impl = layer.mlp.act_fn._call_impl
    assert "SwiGLU MLP" in fuse(model).replaced.values()
    assert not calls


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turn = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def test_a_rotary_embedding_of_interleaved_pairs_is_left(monkeypatch):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", interleaved)
    fusion = assert_alike(tiny("llama"))
    said = fusion.left["model.layers.0.self_attn"]
    assert said.startswith(
        "apply_rotary_pos_emb of LlamaAttention is not the fused rotary: its value is off by"
    )
    assert fusion.replaced["model.layers.0.self_attn"] == "attention + projections"


@pytest.mark.parametrize("what", ["scale", "softcap"])
def test_attention_of_another_size_keeps_its_implementation(monkeypatch, what):
    eager = llama.eager_attention_forward

    def other(module, query, key, value, mask, scaling, **options):
        if what == "scale":
            return eager(module, query, key, value, mask, 1.1 * scaling, **options)
        out, weights = eager(module, query, key, value, mask, scaling, **options)
        return 20 * torch.tanh(out / 20), weights

    monkeypatch.setattr(llama, "eager_attention_forward", other)
    model = tiny("llama", attention="eager")
    fusion = assert_alike(model)
    said = fusion.left["model.layers.0.self_attn"]
    assert said.startswith("attention: LlamaAttention is not the fused attention: its value is off by")
    assert fusion.replaced["model.layers.0.self_attn"] == "rotary + projections"


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_a_fused_op_with_another_tangent_is_refused(monkeypatch, op):
    def broken(function, *args, **options):
        y = function(*args, **options)
        return aajr.dual(y.primal, 1.001 * y.tangent) if aajr.is_dual(y) else y

    if op == "rms_norm":
        monkeypatch.setattr(residual, "rms_norm", functools.partial(broken, residual.rms_norm))
    else:
        formula, fused, name = forms._GATES["SwiGLU"]
        monkeypatch.setitem(forms._GATES, "SwiGLU", (formula, functools.partial(broken, fused), name))
        forms._gated_forward.cache_clear()
    left = fuse(tiny("llama")).left
    forms._gated_forward.cache_clear()
    assert len(left) == (5 if op == "rms_norm" else 2)
    assert all("its derivative is off by 1e-03 in float64" in why for why in left.values())


# -- right ones under other names -------------------------------------------------------------------------------------


def test_an_offset_is_seen(monkeypatch):
    """Under Llama's attributes; the op has an offset, and takes it."""
    forward = lambda self, x: (1.0 + self.weight) * normalised(self, x, None).to(x.dtype)
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", forward)
    fusion = assert_alike(tiny("llama"))
    assert fusion.left == {} and fusion.replaced["model.norm"] == "RMS norm"


def shout(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


class Thing(nn.Module):
    """A norm."""

    def __init__(self):
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.randn(32)), 1e-5

    @shout
    @shout
    def forward(self, states):
        size = torch.einsum("...d,...d->...", states, states)[..., None] / states.shape[-1] + self.tiny
        return states / size.sqrt() * self.weight


class Blob(nn.Module):
    """A gated MLP of which one projection makes up and gate, in this order, and whose activation is a function."""

    def __init__(self):
        super().__init__()
        self.out, self.both = nn.Linear(48, 32), nn.Linear(32, 96)
        self.bend = F.silu

    @shout
    def forward(self, states):
        both = self.both(states)
        return self.out(both[..., :48] * self.bend(both[..., 48:]))


class Mixer(nn.Module):
    """Attention."""

    def __init__(self, original):
        super().__init__()
        self.config, self.is_causal, self.num_key_value_groups = original.config, True, 1
        self.inputs, self.outputs = nn.Linear(32, 96), nn.Linear(32, 32)

    @shout
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        heads = self.inputs(hidden_states).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)
        name = self.config._attn_implementation
        interface = llama.ALL_ATTENTION_FUNCTIONS.get_interface(name, llama.eager_attention_forward)
        y, _ = interface(self, *heads, attention_mask, scaling=0.3)
        return self.outputs(y.flatten(-2)), None


def test_other_names_with_the_right_behaviour_are_fused():
    model = tiny("llama")
    model.model.norm, model.model.layers[0].mlp = Thing(), Blob()
    model.model.layers[1].self_attn = Mixer(model.model.layers[1].self_attn)
    fusion = assert_alike(model)
    assert fusion.left == {}
    assert (
        fusion.replaced["model.norm"] == "RMS norm" and fusion.replaced["model.layers.0.mlp"] == "SwiGLU MLP"
    )
    assert fusion.replaced["model.layers.1.self_attn"] == "attention"


def test_a_last_weight_in_float32_is_followed():
    """T5 keeps it so in half precision; the module casts, and only such a module's replacement does."""
    t5 = importlib.import_module("transformers.models.t5.modeling_t5")
    config = importlib.import_module("transformers").T5Config(
        d_model=32, d_ff=48, feed_forward_proj="gated-gelu"
    )
    mlp, x = t5.T5DenseGatedActDense(config).bfloat16().eval(), torch.randn(2, 5, 32).bfloat16()
    mlp.wo.float()
    replacement = forms.find(mlp, torch.bfloat16)
    actual, expected = replacement.function(mlp, x), mlp(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert_exact(actual, expected, tolerance=1e-2)
    other = llama.LlamaMLP(tiny("llama").config).bfloat16()
    other.down_proj.float()
    with pytest.raises(RuntimeError, match="dtype"):
        forms.find(other, torch.bfloat16).function(other, x)


# -- no trace ---------------------------------------------------------------------------------------------------------


def state_of(model):
    modules = {name: (module.training, set(vars(module))) for name, module in model.named_modules()}
    tensors = {name: (t._version, t.grad, t.requires_grad) for name, t in model.named_parameters()}
    return modules, tensors, {name: b._version for name, b in model.named_buffers()}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training):
    model, calls = tiny("llama", attention_dropout=0.5).train(training), []
    for module in model.modules():
        module.register_forward_hook(lambda *args: calls.append(args))
        module.register_forward_pre_hook(lambda *args: calls.append(args))
    state, generator, grad = state_of(model), torch.get_rng_state(), torch.is_grad_enabled()
    with aajr.coverage() as coverage:
        fusion = fuse(model)
    assert torch.equal(torch.get_rng_state(), generator) and torch.is_grad_enabled() == grad
    assert calls == [] and coverage.entries == {} and fusion.left == {}
    fusion.undo()
    assert state_of(model) == state


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "meta"],
)
def test_surroundings_change_nothing(context):
    model = tiny("llama")
    with context():
        fusion = fuse(model)
    assert fusion.left == {} and len(fusion.replaced) == 11


def test_every_class_and_configuration_is_run_once(monkeypatch):
    calls = []
    for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention"):
        own = getattr(llama, name).forward

        def counted(*args, own=own, name=name, **kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(getattr(llama, name), "forward", counted)
    counts = []
    for layers in (2, 6):
        calls.clear()
        assert fuse(tiny("llama", num_hidden_layers=layers)).left == {}
        counts.append({name: calls.count(name) for name in calls})
    counts[0]["LlamaAttention"] += 4  # its own method runs once more for every layer_idx
    assert counts[0] == counts[1]


# -- modules that cannot run ------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """A linear layer in integers, for a device that is not here."""

    def __init__(self, original):
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight = nn.Parameter(torch.zeros(original.weight.shape, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        raise NotImplementedError("needs a device")


@pytest.mark.parametrize("how", ["meta", "quantised"])
def test_a_small_twin_runs_for_them(how):
    model = tiny("llama")
    expected = fuse(tiny("llama")).replaced
    if how == "meta":
        model = model.to("meta")
    else:
        for layer in model.model.layers:
            for part in (layer.mlp, layer.self_attn):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, Quantised(child))
    fusion = fuse(model)
    assert fusion.replaced == expected and fusion.left == {}


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "LlamaAttention"])
def test_a_forward_that_runs_nowhere_is_left_with_its_error(monkeypatch, name):
    def forward(self, *args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(getattr(llama, name), "forward", forward)
    left = fuse(tiny("llama")).left
    reason = f"{name}.forward cannot be run for a check (RuntimeError: no kernel image)"
    if name == "LlamaAttention":  # nor does a layer with it
        for layer in ("model.layers.0", "model.layers.1"):
            assert left.pop(layer).startswith(
                "residual sums: LlamaDecoderLayer.forward cannot be run for a check"
            )
    assert len(left) == (5 if name == "LlamaRMSNorm" else 2)
    assert set(left.values()) == {reason if name == "LlamaRMSNorm" else f"attention: {reason}"}


def test_attention_that_was_replaced_on_the_instance_is_left():
    model = tiny("llama")
    first = model.model.layers[0].self_attn
    first.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    left = fuse(model).left
    assert left["model.layers.0.self_attn"] == "its forward was replaced on the instance by something else"
    assert left["model.layers.1.self_attn"].endswith(
        "its masks go to model.layers.0.self_attn, too, which is left"
    )
