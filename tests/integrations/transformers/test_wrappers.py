"""Decorated layers: fuse() looks through every form of decorator, and what the decorator does still happens."""

from __future__ import annotations

import functools
import importlib
import inspect
import types

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients
from integrations.transformers.subjects import SUBJECTS, cache_name, tiny
from torch import nn
from zoo import LENGTH, embeddings, padding

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.integrations.transformers.verify import signature
from aajr_kernels.integrations.transformers.wrappers import around, chains

transformers = pytest.importorskip("transformers")
llama = importlib.import_module("transformers.models.llama.modeling_llama")

CALLS: list[str] = []


def scaled(args):
    """Change a call as the decorators below do: the first tensor arrives larger."""
    CALLS.append("call")
    at = 0 if isinstance(args[0], (torch.Tensor, aajr.Dual)) else 1
    return (*args[:at], 1.25 * args[at], *args[at + 1 :])


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs.get("hidden_states") is not None:
            args, kwargs = (
                (*args, kwargs["hidden_states"]),
                {k: v for k, v in kwargs.items() if k != "hidden_states"},
            )
        return function(*scaled(args), **kwargs)

    return wrapper


def unnamed(function):
    """A closure that does not say what it wraps, and that refers to itself."""

    def forward(*args, **kwargs):
        assert forward is not None
        if "hidden_states" in kwargs:
            args = (*args, kwargs.pop("hidden_states"))
        return function(*scaled(args), **kwargs)

    return forward


def twice(function):
    return unnamed(functools.wraps(function)(functools.partial(function)))


def partially(function):
    """Holds the function as an argument of a partial, which is the default of an argument."""

    def call(inner, *args, **kwargs):
        return wrapped(inner)(*args, **kwargs)

    bound = functools.partial(call, function)

    def forward(*args, _bound=bound, **kwargs):
        return _bound(*args, **kwargs)

    return forward


def methodically(function):
    return functools.partialmethod(wrapped(function))


class Decorated:
    """A decorator that is an object."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args, **kwargs):
        return wrapped(self.function)(*args, **kwargs)


def by_name(function):
    """Passes everything by the names of the parameters, as decorators of renamed arguments do."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)

    @functools.wraps(function)
    def forward(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        more, me = arguments.pop("kwargs", {}), [arguments.pop("self")] if "self" in arguments else []
        first = next(iter(arguments))
        CALLS.append("call")
        arguments[first] = 1.25 * arguments[first]
        return function(*me, **arguments, **more)

    return forward


DECORATORS = (wrapped, unnamed, twice, partially, Decorated, by_name)


def as_module(function):
    """Wrap a function as the kernels library does."""

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return function(*scaled(args), **kwargs)

    return Func()


def dispatched(function):
    """Wrap a function as kernels 0.19 does: inside a layer that knows it, a call goes to the layer's own copy."""

    class Func(nn.Module):
        kernel_layer_name = function.__name__

        def forward(self, *args, **kwargs):
            copies = ACTIVE[-1] if ACTIVE else {}
            if (own := copies.get(id(self))) is not None:
                return own(*args, **kwargs)
            return function(*args, **kwargs)

    return Func()


ACTIVE: list[dict[int, nn.Module]] = []


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + llama.rotate_half(q) * sin, k * cos + llama.rotate_half(k) * sin


def with_copies(cls, function, monkeypatch):
    """Give a class copies of a dispatched function, as the kernels library decorates it."""
    init, forward = cls.__init__, cls.forward

    @functools.wraps(init)
    def new_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.__dict__.setdefault("_kernel_funcs", {})[function.kernel_layer_name] = type(function)()

    @functools.wraps(forward)
    def new_forward(self, *args, **kwargs):
        ACTIVE.append({id(function): self._kernel_funcs[function.kernel_layer_name]})
        try:
            return forward(self, *args, **kwargs)
        finally:
            ACTIVE.pop()

    monkeypatch.setattr(cls, "__init__", new_init)
    monkeypatch.setattr(cls, "forward", new_forward)


def outcome(model):
    x, v = embeddings(2, LENGTH, 32, seed=3).requires_grad_(), embeddings(2, LENGTH, 32, seed=8)
    mask = padding((LENGTH, 9), "left")
    CALLS.clear()
    penalty = aajr.aligned_penalty(
        lambda d: model(inputs_embeds=d, attention_mask=mask.long(), use_cache=False), x, v, mask=mask
    )
    calls = len(CALLS)
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if "embed" not in name}
    return penalty, oracle_losses.gradients_of(penalty, leaves), calls


def assert_fused_alike(model, listing=None, calls=True):
    """The fused model gives what the unfused one gives, with as many calls of the decorators."""
    penalty, gradients, expected_calls = outcome(model)
    fusion = fuse(model)
    fused, fused_gradients, found_calls = outcome(model)
    assert found_calls == expected_calls and (found_calls > 0) == calls
    assert_exact(fused, penalty, "penalty", tolerance=2e-6)
    assert_exact_gradients(fused_gradients, gradients, tolerance=2e-5)
    if listing is not None:
        assert fusion.left == {} and fusion.replaced == listing
    fusion.undo()
    assert_exact(outcome(model)[0], penalty, "penalty", tolerance=0.0)
    return fusion


@pytest.fixture(scope="module")
def listing():
    return fuse(tiny("llama")).replaced


@pytest.mark.parametrize("decorator", [*DECORATORS, methodically], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["LlamaAttention", "LlamaRMSNorm", "LlamaMLP"])
def test_a_decorator_is_looked_through_and_kept(monkeypatch, listing, name, decorator):
    cls = getattr(llama, name)
    decorated = decorator(cls.forward)
    if isinstance(decorated, Decorated):  # an object is bound by nothing
        monkeypatch.setattr(
            Decorated, "__get__", lambda s, o, t=None: s if o is None else functools.partial(s, o), False
        )
    monkeypatch.setattr(cls, "forward", decorated)
    # projections and norms inside take other numbers than the tokens and the stream outside
    if name == "LlamaAttention":
        listing = {module: what.removesuffix(" + projections") for module, what in listing.items()}
    if name == "LlamaRMSNorm":
        listing = {module: what for module, what in listing.items() if what != "residual sums"}
    assert_fused_alike(tiny("llama"), listing)


@pytest.mark.parametrize("decorator", [*DECORATORS, as_module], ids=lambda d: d.__name__)
def test_a_decorated_rotary_embedding(monkeypatch, listing, decorator):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", decorator(llama.apply_rotary_pos_emb))
    assert_fused_alike(tiny("llama"), listing)


def test_a_rotary_embedding_of_which_every_layer_has_a_copy(monkeypatch, listing):
    function = dispatched(apply_rotary_pos_emb)
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", function)
    with_copies(llama.LlamaAttention, function, monkeypatch)
    model = tiny("llama")
    assert_fused_alike(model, listing, calls=False)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert signature(first, ("layer_idx",)) == signature(second, ("layer_idx",))
    name = "apply_rotary_pos_emb"
    second._kernel_funcs[name].forward = types.MethodType(turned_back, second._kernel_funcs[name])
    assert signature(first, ("layer_idx",)) != signature(second, ("layer_idx",))
    fusion = assert_fused_alike(model, calls=False)
    reason = "apply_rotary_pos_emb of LlamaAttention is not the fused rotary: its value is off"
    assert list(fusion.left) == ["model.layers.1.self_attn"]
    assert fusion.left["model.layers.1.self_attn"].startswith(reason)


def turned_back(self, q, k, cos, sin, unsqueeze_dim=1):
    return apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def test_decorated_gates_of_experts(monkeypatch):
    subject = SUBJECTS["mixtral-sdpa-grouped_mm"]()
    experts = type(subject.model.model.layers[0].mlp.experts)
    expected = fuse(subject.model)
    expected.undo()
    monkeypatch.setattr(experts, "_apply_gate", wrapped(experts._apply_gate))
    assert_fused_alike(subject.model, expected.replaced)


REGISTRY = {}


def test_a_decorator_that_does_not_hold_what_it_decorates_is_left(monkeypatch):
    """A declared function is called through a table: nothing can be put inside, and the listing says so."""
    original = llama.LlamaRMSNorm.forward
    REGISTRY["norm"] = original
    norm = functools.wraps(original)(lambda *args: REGISTRY["norm"](*scaled(args)))
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    fusion = assert_fused_alike(tiny("llama"))
    assert fusion.left["model.norm"] == "a decorator of LlamaRMSNorm.forward does not hold what it decorates"
    assert len(fusion.left) == 5 and len(fusion.replaced) == 4


# -- what is not known ------------------------------------------------------------------------------------------------


class OwnAttention(nn.Module):
    """Computes attention from the mask that the model made, as model files did before the registry."""

    def __init__(self, original):
        super().__init__()
        self.inner = nn.ModuleList([original.q_proj, original.k_proj, original.v_proj, original.o_proj])
        self.size = original.head_dim

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in self.inner[:3]
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -1e4)
        y = scores.softmax(-1) @ v
        return self.inner[3](y.transpose(1, 2).flatten(-2)), None


def test_attention_that_does_not_ask_the_registry_keeps_its_masks():
    model = tiny("llama")
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)
    fusion = assert_fused_alike(model, calls=False)
    first, second = (f"model.layers.{i}.self_attn" for i in (0, 1))
    layer = fusion.left.pop("model.layers.1")  # tried with the masks of those that ask
    assert layer.startswith(
        "residual sums: LlamaDecoderLayer.forward cannot be run for a check (TypeError: ~"
    )
    assert fusion.left == {
        first: f"attention: its masks go to {second}, too, which does not ask the registry",
        second: "attention: OwnAttention does not ask transformers' registry for it",
    }
    assert fusion.replaced[first] == "rotary + projections"
    assert model.config._attn_implementation == "sdpa"


def test_forms_of_every_kind_that_are_not_known_are_left(monkeypatch):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))

    class OwnNorm(nn.Module):
        def forward(self, x):
            return x - x.mean(-1, keepdim=True)

    class OwnFeedForward(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    class OwnRotary(nn.Module):
        def forward(self, x, position_ids):
            return x, x

    model = tiny("llama")
    model.model.norm, model.model.layers[1].mlp = OwnNorm(), OwnFeedForward()
    model.model.rotary_emb = OwnRotary()
    policy = nn.ModuleDict({"body": model, "attention": nn.MultiheadAttention(4, 1), "value": OwnNorm()})
    fusion = fuse(policy)
    for layer in (0, 1):
        rotary = fusion.left.pop(f"body.model.layers.{layer}.self_attn")
        assert rotary.startswith(
            "apply_rotary_pos_emb of LlamaAttention is not the fused rotary: its value is off"
        )
    assert fusion.left == {
        "body.model.layers.1.mlp": "OwnFeedForward.forward has an unknown form",
        "body.model.norm": "OwnNorm.forward has an unknown form",
        "body.model.rotary_emb": "OwnRotary.forward has an unknown form",
        "value": "norm: OwnNorm is no part of a transformers model",
    }
    assert fusion.replaced["body.model.layers.0.self_attn"] == "attention + projections"
    assert fusion.kept == {"attention": "attention: runs on the rules of torch's functions"}


def test_a_norm_with_other_statistics_is_left(monkeypatch):
    """The lines of Gemma's ``forward`` say nothing about the method that they call."""
    gemma = importlib.import_module("transformers.models.gemma.modeling_gemma")
    monkeypatch.setattr(
        gemma.GemmaRMSNorm, "_norm", lambda self, x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True))
    )
    fusion = assert_fused_alike(tiny("gemma"), calls=False)
    assert fusion.left["model.norm"].startswith(
        "GemmaRMSNorm.forward is not the fused RMS norm: its value is off by"
    )


# -- the ways in ------------------------------------------------------------------------------------------------------


def test_a_replacement_is_shared_and_the_original_stays():
    def inner(self, x):
        return x

    def other(self, x):
        return -x

    outer = unnamed(wrapped(inner))
    way = next(way for way in chains(outer) if way[-1] is inner)
    replaced = around(way, other)
    assert replaced is around(way, other) and replaced is not outer
    x = torch.ones(2)
    assert torch.equal(outer(None, x), 1.25**2 * x) and torch.equal(replaced(None, x), -(1.25**2) * x)
    assert list(chains(len)) == [(len,)]


def test_a_renamed_argument_keeps_its_old_name():
    if cache_name() == "past_key_values":
        pytest.skip("before transformers 5.24 the argument has one name")
    model, x = tiny("llama"), embeddings(2, 5, 32)
    with fuse(model):
        expected = model(inputs_embeds=x, cache=transformers.DynamicCache(), use_cache=True)
        with pytest.warns(FutureWarning, match="past_key_values"):
            actual = model(inputs_embeds=x, past_key_values=transformers.DynamicCache(), use_cache=True)
        layer, cache = model.model.layers[0].self_attn, transformers.DynamicCache()
        with pytest.warns(FutureWarning, match="past_key_values"):
            layer(x, model.model.rotary_emb(x, torch.arange(5)[None]), None, past_key_values=cache)
    assert torch.equal(actual.logits, expected.logits)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_generation_goes_on_as_before(name, options):
    """Left padding, windows, and caches of both kinds: for a static one generate() makes the masks."""
    model = SUBJECTS["mistral-sdpa"]().model if name == "mistral" else tiny(name)
    tokens, mask = torch.randint(3, 97, (2, 9)), padding((9, 5), "left", 9).long()
    options = options | dict(attention_mask=mask, max_new_tokens=6, do_sample=False, output_scores=True)
    expected = model.generate(tokens, return_dict_in_generate=True, **options)
    with fuse(model):
        actual = model.generate(tokens, return_dict_in_generate=True, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_exact(torch.stack(actual.scores), torch.stack(expected.scores), tolerance=5e-6)
