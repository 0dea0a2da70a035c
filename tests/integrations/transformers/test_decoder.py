"""Decoder layers as one step of autograd: the numbers of their parts, and of torch, and where they run as parts."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from integrations.transformers.subjects import SUBJECTS, cache_name, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import embeddings

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import decoder, fuse

pytest.importorskip("transformers")


@pytest.fixture
def steps(monkeypatch):
    """Results of layers that ran in one step."""
    made, own = [], decoder.in_one_step

    def counted(*args):
        made.append(own(*args))
        return made[-1]

    monkeypatch.setattr(decoder, "in_one_step", counted)
    return made


def gradients(y, inputs):
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum()
    return torch.autograd.grad(loss, inputs)


quick = ("qwen2", "smollm3", "llama-sdpa-pad_left", "gemma3-sdpa")
others = ("gemma", "llama-eager-pad_right", "mistral-sdpa", "qwen3-sdpa", "gemma2-eager-pad_left")


@pytest.mark.parametrize("name", [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in others)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_its_parts(name, dtype, steps, monkeypatch):
    subject = SUBJECTS[name]().to(dtype)
    subject.model.config.use_cache = False
    fuse(subject.model)
    x = subject.x.detach().requires_grad_()
    tangents = torch.stack([x.detach().cos(), x.detach().sin()])
    results = []
    for size in (decoder._LARGE, decoder._LARGE, -1):
        monkeypatch.setattr(decoder, "_LARGE", size)
        y = subject.call(subject.model, aajr.dual(x, tangents)).logits.stacked
        results.append((y, *gradients(y, [x, *subject.model.model.layers.parameters()])))
    assert len(steps) == 4
    noted, repeated, parts = results
    assert all(map(torch.equal, noted, parts)) and all(map(torch.equal, repeated, parts))


def exact(model):
    """In float64, with torch's own norms: those of transformers round to float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "RMSNorm" in type(child).__name__:
                norm = nn.RMSNorm(child.weight.shape, eps=1e-5)
                norm.weight.data.copy_(child.weight.data)
                setattr(module, name, norm)
    return model.double()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_are_those_of_torch(name, steps):
    model = exact(tiny(name).model)
    x = embeddings(2, 5, 32).double().requires_grad_()
    v = x.detach().cos().requires_grad_()
    inputs = [x, v, *model.layers.parameters()]
    call = functools.partial(lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = torch.stack(torch.func.jvp(call, (x,), (v,)))
        expected = gradients(theirs, inputs)
    fuse(model)
    ours = call(aajr.dual(x, v)).stacked
    assert len(steps) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for got, exact_gradient in zip(gradients(ours, inputs), expected, strict=True):
        torch.testing.assert_close(got, exact_gradient, rtol=1e-10, atol=1e-11)


# -- calls that are repeated without the code around them -------------------------------------------------------------


@pytest.fixture
def noted(monkeypatch):
    """Layers whose calls were noted."""
    layers, own = [], decoder.Form.run

    def counted(form, layer, *args):
        layers.append(layer)
        return own(form, layer, *args)

    monkeypatch.setattr(decoder.Form, "run", counted)
    return layers


def as_parts(model, monkeypatch, **options):
    """Results and gradients in one step, which are checked against those in parts."""
    parameters, results = list(model.layers.parameters()), []
    for size in (2**22, -1):
        monkeypatch.setattr(decoder, "_LARGE", size)
        y = run(model, **options).stacked
        results.append((y, *gradients(y, parameters)))
    assert all(map(torch.equal, *results))
    monkeypatch.setattr(decoder, "_LARGE", 2**22)
    return results[0]


@pytest.fixture
def gemma2():
    decoder.by_form.cache_clear()  # nothing is noted of layers of this form
    subject = SUBJECTS["gemma2-eager"]()
    fuse(subject.model)
    return subject.model.model


def rescaled(layer):
    layer.self_attn.scaling *= 2.0


def recapped(layer):
    layer.self_attn.attn_logit_softcapping = 0.5


def with_another_epsilon(layer):
    layer.post_attention_layernorm.eps = 0.5


def swapped(layer):
    """Keys and values, which have one shape, in another order of registration."""
    layer.self_attn._modules = {
        name: layer.self_attn._modules[name] for name in reversed(layer.self_attn._modules)
    }


@pytest.mark.parametrize("change", [rescaled, recapped, with_another_epsilon, swapped])
def test_what_a_layer_reads_may_change(change, gemma2, noted, monkeypatch):
    before = as_parts(gemma2, monkeypatch)  # layers that are alike are noted once
    run(gemma2)
    assert noted == [gemma2.layers[0]]
    change(gemma2.layers[0])
    after = as_parts(gemma2, monkeypatch)
    assert noted == [gemma2.layers[0]] * 2
    assert torch.equal(before[0], after[0]) == (change is swapped)


def test_what_calls_depend_on_may_change(noted, monkeypatch):
    """Layers that are alike are noted once."""
    decoder.by_form.cache_clear()
    fused = tiny("llama").model
    fuse(fused)
    noted.clear()
    as_parts(fused, monkeypatch)
    assert noted == [fused.layers[0]]
    noted.clear()
    masks = torch.ones(3, 2, 5, dtype=torch.bool)
    masks[1, 0, :2] = masks[2, 1, 3:] = False
    for mask, count in zip(masks, (0, 1, 1)):  # the first hides nothing and is left out
        as_parts(fused, monkeypatch, attention_mask=mask)
        assert len(noted) == count
    with aajr.use_backend("reference"):
        as_parts(fused, monkeypatch)
    assert len(noted) == 2
    model = copy.deepcopy(fused)
    as_parts(model, monkeypatch)
    assert len(noted) == 2
    model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    run(model)
    assert len(noted) == 3


# -- what sees what is inside -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused():
    model = tiny("llama", attention_dropout=0.1).model
    fuse(model)
    return model


def run(model, **options):
    x = embeddings(2, 5, 32).float().requires_grad_()
    options = {"use_cache": False} | options
    return model(inputs_embeds=aajr.dual(x, x.detach().cos()), **options).last_hidden_state


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


def hooked(layer):
    layer.mlp.register_forward_hook(lambda *args: None)


def adapted(layer):
    layer.mlp.down_proj.__class__ = _Doubled


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)


def forward_replaced(layer):
    own = layer.mlp.forward
    layer.mlp.forward = functools.wraps(own)(lambda x: own(x))


def with_a_dual(layer):
    weight = layer.mlp.up_proj.weight.detach()
    del layer.mlp.up_proj._parameters["weight"]
    layer.mlp.up_proj.weight = aajr.dual(weight, torch.ones_like(weight))


def in_training(layer):
    layer.train()


@pytest.mark.parametrize(
    "change", [hooked, adapted, parametrized, forward_replaced, with_a_dual, in_training]
)
def test_a_layer_that_is_more_than_its_form_runs_in_parts(change, fused, steps):
    model = copy.deepcopy(fused)
    run(model)
    assert len(steps) == 2
    change(model.layers[0])
    run(model)
    assert len(steps) == 3


def test_weights_of_another_dtype_run_in_parts(steps):
    model = tiny("gemma").model.bfloat16()
    fuse(model)
    for layer in model.layers:
        layer.input_layernorm.float()
    x = embeddings(2, 5, 32).bfloat16()
    model(inputs_embeds=aajr.dual(x, x.cos()), use_cache=False)
    assert not steps


def test_another_attention_runs_in_parts(fused, steps):
    model = copy.deepcopy(fused)
    model.set_attn_implementation("eager")
    run(model)
    assert not steps


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        aajr.recompute,
        functools.partial(torch.autocast, "cpu", torch.bfloat16),
        functools.partial(FlopCounterMode, display=False),
        aajr.coverage,
    ],
    ids=["no_grad", "recompute", "autocast", "dispatch mode", "coverage"],
)
def test_contexts_in_which_layers_run_in_parts(context, fused, steps):
    with context():
        run(fused)
    assert not steps


def test_arguments_with_which_layers_run_in_parts(fused, steps, monkeypatch):
    mask = torch.full((2, 1, 5, 5), -1.0).triu(1)
    for options in ({"attention_mask": mask}, {"output_router_logits": 1}, {"use_cache": True}):
        run(fused, **options)
        assert not steps, options
    import transformers

    run(fused, **{cache_name(): transformers.DynamicCache()})
    monkeypatch.setattr(decoder, "_LARGE", 2 * 2 * 5 * 32 - 1)
    run(fused)
    assert not steps
    monkeypatch.setattr(decoder, "_LARGE", 2 * 2 * 5 * 32)
    run(fused)
    assert len(steps) == 2


def test_checkpointed_layers_and_those_whose_results_are_computed_again(steps):
    model = tiny("llama").model
    with fuse(model, recompute=True):
        run(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    with fuse(model):
        model.train()
        run(model).stacked.sum().backward()
        assert not steps
        model.eval()
        run(model)
    assert len(steps) == 2


def test_what_is_no_op_inside_runs_in_parts(steps, monkeypatch):
    """A form that does something else than ops gives the gradients of its parts."""
    decoder.by_form.cache_clear()
    fused = tiny("llama").model
    fuse(fused)
    own, parameters = decoder.attend, list(fused.layers.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_LARGE", -1)
        expected = gradients(run(fused).stacked, parameters)
    monkeypatch.setattr(decoder, "attend", lambda *args, **options: own(*args, **options) * 1.0)
    assert all(map(torch.equal, gradients(run(fused).stacked, parameters), expected))
    assert not steps


def noting(self, output):
    self.calls = getattr(self, "calls", 0) + 1
    return output


def dropping(self, output):
    """Nothing is dropped while the probability is 0; it may be another one later."""
    return nn.functional.dropout(output, 0.0, self.training)


def training_otherwise(self, output):
    return 2.0 * output if self.training else output


def as_theirs(function, module):
    """As if it were written in a module of transformers."""
    names = {**function.__globals__, "__name__": module}
    return types.FunctionType(function.__code__, names, function.__name__, None, function.__closure__)


@pytest.mark.parametrize("change", [noting, dropping, training_otherwise])
def test_a_layer_that_does_more_than_its_form(change, monkeypatch, steps):
    attention = type(tiny("llama").model.layers[0].self_attn)
    own, change = attention.forward, as_theirs(change, attention.__module__)

    def forward(self, hidden_states, *args, **kwargs):
        output, *rest = own(self, hidden_states, *args, **kwargs)
        return change(self, output), *rest

    monkeypatch.setattr(attention, "forward", as_theirs(forward, attention.__module__))
    model = tiny("llama").model
    fuse(model)
    run(model)
    assert not steps


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
def test_code_of_others_is_run(part, monkeypatch, steps):
    """It may do more than it returns."""
    cls, calls = type(getattr(tiny("llama").model.layers[0], part)), []
    own = cls.forward

    @functools.wraps(own)
    def forward(*args, **kwargs):
        calls.append(args[0])
        return own(*args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    model = tiny("llama").model
    fuse(model)
    calls.clear()
    run(model)
    assert not steps and len(calls) == len({*map(id, calls)}) >= 2


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, by transformers
@pytest.mark.parametrize("first", [True, False], ids=["adapted first", "fused first"])
def test_adapted_layers_run_in_parts(first, steps):
    peft = pytest.importorskip("peft")
    model = tiny("llama").model
    if not first:
        fuse(model)
    config = peft.LoraConfig(target_modules=["layers.0.mlp.down_proj"], lora_dropout=0.5)
    adapted = peft.get_peft_model(model, config)
    if first:
        fuse(adapted)
    run(model)
    assert len(steps) == 1  # the second layer, which has no adapter
