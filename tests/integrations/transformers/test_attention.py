"""The attention implementation "aajr" and its masks: structure where it suffices, exact everywhere."""

from __future__ import annotations

from types import SimpleNamespace

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients
from integrations.transformers.subjects import SUBJECTS, cache_name, tiny
from torch.nn import functional as F
from zoo import LENGTH, WINDOW, embeddings, padding

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse, register
from aajr_kernels.integrations.transformers.attention import attention_forward
from aajr_kernels.integrations.transformers.masks import Visibility, mask_builder

transformers = pytest.importorskip("transformers")
masking = transformers.masking_utils
build = mask_builder(masking)


register()


def config(window: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(_attn_implementation="aajr", sliding_window=window, is_causal=True)


def created(name: str, mask: torch.Tensor | None = None, window: int | None = None, **options) -> Visibility:
    if "bidirectional" not in name:
        options[cache_name()] = None
    result = getattr(masking, name)(config(window), embeddings(2, LENGTH, 4), mask, **options)
    assert isinstance(result, Visibility)
    return result


def written_out(visibility: Visibility, n: int, m: int) -> torch.Tensor:
    """The bool [B, 1, N, M] that a Visibility stands for."""
    offset = {"lower_right": m - n, "upper_left": 0, False: m}[visibility.causal]
    last = torch.arange(n)[:, None] + offset
    keys = torch.arange(m)
    allowed = keys <= last
    if visibility.window is not None:
        allowed = allowed & (keys > last - visibility.window)
    return allowed if visibility.mask is None else allowed & visibility.mask


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, torch.ones(2, LENGTH, dtype=torch.long)])
def test_no_mask_without_padding(mask):
    assert created("create_causal_mask", mask) == Visibility("lower_right")
    assert created("create_sliding_window_causal_mask", mask, WINDOW) == Visibility("lower_right", WINDOW)
    assert created("create_sliding_window_causal_mask", mask, LENGTH) == Visibility("lower_right")
    assert created("create_bidirectional_mask", mask) == Visibility()


@pytest.mark.parametrize("padded", [False, True])
def test_masks_under_compilation(padded):
    """Dynamo cannot look into closures: the window is read from what transformers passes beside them."""
    mask = padding((LENGTH, 9)) if padded else None

    settings, no_cache = config(WINDOW), {cache_name(): None}

    def masks(x):
        causal = masking.create_causal_mask(settings, x, mask, **no_cache)
        window = masking.create_sliding_window_causal_mask(settings, x, mask, **no_cache)
        return x + 1, causal, window, masking.create_bidirectional_sliding_window_mask(settings, x, mask)

    x = embeddings(2, LENGTH, 4)
    torch._dynamo.reset()
    compiled = torch.compile(masks, fullgraph=True, backend="eager")(x)[1:]
    torch._dynamo.reset()
    for got, want in zip(compiled, masks(x)[1:]):
        assert (got.causal, got.window) == (want.causal, want.window)
        assert (got.mask is None) == (want.mask is None)
        assert want.mask is None or torch.equal(got.mask, want.mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_one_row(side):
    mask = padding((LENGTH, 9), side)
    for name, window in (
        ("create_causal_mask", None),
        ("create_sliding_window_causal_mask", WINDOW),
        ("create_bidirectional_mask", None),
    ):
        declared = created(name, mask, window)
        assert declared.mask.shape == (2, 1, 1, LENGTH) and torch.equal(declared.mask[:, 0, 0], mask)
        assert declared.window == window
        assert declared.causal == (False if "bidirectional" in name else "lower_right")


def test_what_has_no_structure_is_written_out_small():
    declared = created("create_bidirectional_sliding_window_mask", None, WINDOW)
    assert (
        declared.mask.shape == (1, 1, LENGTH, LENGTH) and declared.causal is False and declared.window is None
    )
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    assert torch.equal(declared.mask[0, 0], distance <= WINDOW)
    padded = created("create_bidirectional_sliding_window_mask", padding((LENGTH, 9)), WINDOW)
    assert padded.mask.shape == (2, 1, LENGTH, LENGTH)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]])
    declared = created("create_causal_mask", None, position_ids=packed)
    group = torch.tensor([0] * 5 + [1] * 3 + [2] * 5)
    expected = (group[:, None] == group) & torch.ones(LENGTH, LENGTH).tril().bool()
    assert torch.equal(declared.mask.expand(2, 1, -1, -1)[1, 0], expected)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (4, 2), (9, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_offsets_of_caches_mean_what_transformers_writes_out(window, offsets, padded):
    n, (q_offset, kv_offset) = 3, offsets
    for m in (n, n + q_offset - kv_offset, n + q_offset):
        function = masking.causal_mask_function
        if window is not None:
            function = masking.sliding_window_causal_mask_function(window)
        mask = padding((kv_offset + m, kv_offset + m - 3), "left", kv_offset + m) if padded else None
        options = dict(batch_size=2, q_length=n, kv_length=m, q_offset=q_offset, kv_offset=kv_offset)
        options |= dict(mask_function=function, attention_mask=mask)
        expected = masking.sdpa_mask(**options, allow_is_causal_skip=False)
        allowed = written_out(build(**options), n, m).expand(2, 1, n, m)
        assert torch.equal(allowed, expected)


def test_a_static_cache_is_written_out():
    built = build(batch_size=1, q_length=2, kv_length=6, q_offset=torch.tensor(3))
    assert torch.equal(built.mask[0, 0], torch.arange(6) <= torch.tensor([[3], [4]]))


# -- the model's calls ------------------------------------------------------------------------------------------------


def step(model, x, cache, mask=None):
    return model(inputs_embeds=x, attention_mask=mask, use_cache=True, **{cache_name(): cache})


@pytest.mark.parametrize("name", ["llama-sdpa", "mistral-sdpa", "gemma2-eager", "gemma3-sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_filled_in_steps(name, padded):
    model = SUBJECTS[name]().model
    x = embeddings(2, LENGTH, 32)
    mask = padding((LENGTH, 9), "left").long() if padded else None
    seen = slice(None) if mask is None else mask.bool()

    def outputs():
        cache, start, parts = transformers.DynamicCache(config=model.config), 0, []
        for stop in (6, 7, LENGTH):
            output = step(model, x[:, start:stop], cache, None if mask is None else mask[:, :stop])
            cache, start = output[cache_name()], stop
            parts.append(output.logits)
        return torch.cat(parts, 1)[seen]

    expected = outputs()
    with fuse(model):
        actual = outputs()
        whole = model(inputs_embeds=x, attention_mask=mask).logits[seen]
    assert_exact(actual, expected, tolerance=3e-6)
    assert_exact(actual, whole, tolerance=3e-6)


def test_a_dual_goes_through_a_cache():
    model = tiny("llama")
    x, v = embeddings(2, LENGTH, 32), embeddings(2, LENGTH, 32, seed=8)
    with fuse(model):
        y = step(model, aajr.dual(x, v), transformers.DynamicCache()).logits
        expected = model(inputs_embeds=aajr.dual(x, v), use_cache=False).logits
    assert torch.equal(y.stacked, expected.stacked)


def test_packed_sequences_do_not_see_each_other():
    model = tiny("llama")
    x = embeddings(1, 8, 32)
    with fuse(model):
        packed = model(
            inputs_embeds=aajr.dual(x, x),
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
            use_cache=False,
        ).logits
        second = model(inputs_embeds=aajr.dual(x[:, 5:], x[:, 5:])).logits
    assert_exact(packed.stacked[:, :, 5:], second.stacked, tolerance=2e-6)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_prepared_by_the_user(kind):
    model = tiny("llama")
    x = embeddings(2, LENGTH, 32)
    allowed = (torch.rand(2, 1, LENGTH, LENGTH) > 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    mask = allowed if kind == "bool" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    expected = model(inputs_embeds=x, attention_mask=mask).logits
    with fuse(model):
        logits = model(inputs_embeds=x, attention_mask=mask).logits
        dual = model(inputs_embeds=aajr.dual(x, x), attention_mask=mask).logits
    assert_exact(logits, expected, tolerance=2e-6)
    assert_exact(dual.primal, expected, tolerance=2e-6)


def test_the_implementation_alone_by_name():
    model, x = tiny("llama"), embeddings(2, LENGTH, 32)
    mask = padding((LENGTH, 9), "left")
    expected = model(inputs_embeds=x, attention_mask=mask.long()).logits
    model.set_attn_implementation("aajr")
    logits = model(inputs_embeds=x, attention_mask=mask.long()).logits
    assert_exact(logits[mask], expected[mask], tolerance=2e-6)


def test_attention_never_holds_a_score_matrix(monkeypatch):
    """No mask of N x M, and keys and values reach the op with their own number of heads."""
    from aajr_kernels.integrations.transformers import attention as module

    calls = []

    def spy(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], options["mask"], options["causal"], options["window"]))
        return original(q, k, v, **options)

    original = module.attention
    monkeypatch.setattr(module, "attention", spy)
    model = SUBJECTS["mistral-sdpa"]().model
    x = embeddings(2, LENGTH, 32)
    with fuse(model):
        calls.clear()  # fuse() compared the two
        model(inputs_embeds=aajr.dual(x, x))
        assert calls == [(4, 2, None, "lower_right", WINDOW)] * 2
        calls.clear()
        model(inputs_embeds=aajr.dual(x, x), attention_mask=padding((LENGTH, 9)).long())
    assert [mask.shape for _, _, mask, _, _ in calls] == [(2, 1, 1, LENGTH)] * 2


# -- the function -----------------------------------------------------------------------------------------------------


def tensors(n: int = 5, m: int = 7):
    shapes = ((2, 4, n, 6), (2, 2, m, 6), (2, 2, m, 6))
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def plain_attention(q, k, v, allowed=None, scale=None, softcap=None, bias=None):
    """Attention written out, softcap included."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e30)
    return (F.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("causal", "window", "options"),
    [
        (False, None, {}),
        ("lower_right", None, {"scaling": 0.7}),
        ("upper_left", None, {"softcap": 1.5}),
        ("lower_right", 3, {"softcap": 2.0, "scaling": 1.1}),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_values_tangents_and_gradients(causal, window, options, padded):
    q, k, v = tensors()
    mask = padding((7, 5), "right", 7)[:, None, None] if padded else None
    visibility = Visibility(causal, window, mask)
    allowed = written_out(visibility, 5, 7)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    directions = [torch.randn_like(x) for x in inputs]

    def reference(q, k, v, bias):
        extra = dict(scale=options.get("scaling"), softcap=options.get("softcap"), bias=bias)
        return plain_attention(q, k, v, allowed, **extra)

    def ours(q, k, v, bias):
        out, weights = attention_forward(None, q, k, v, visibility, position_bias=bias, **options)
        assert weights is None
        return out

    outcomes = []
    for function, jvp in ((reference, torch.func.jvp), (ours, aajr.jvp)):
        y, tangent = jvp(function, tuple(inputs), tuple(directions))
        loss = (tangent**2).sum() + (y * torch.linspace(-1, 1, 6, dtype=torch.float64)).sum()
        gradients = oracle_losses.gradients_of(loss, dict(zip("qkvb", inputs)))
        outcomes.append((y, tangent, gradients))
    (y, tangent, gradients), (fused_y, fused_tangent, fused_gradients) = outcomes
    assert_exact(fused_y, y)
    assert_exact(fused_tangent, tangent)
    assert_exact_gradients(fused_gradients, gradients)


def test_without_a_mask_the_module_decides():
    q, k, v = tensors(5, 5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for module, is_causal, allowed in (
        (SimpleNamespace(is_causal=True), None, causal),
        (SimpleNamespace(is_causal=False), None, None),
        (SimpleNamespace(is_causal=True), False, None),
        (SimpleNamespace(), None, causal),
    ):
        actual = attention_forward(module, aajr.dual(q, q), k, v, None, is_causal=is_causal)[0]
        assert_exact(actual.primal, plain_attention(q, k, v, allowed))
    one = attention_forward(SimpleNamespace(is_causal=True), q[:, :, :1], k, v, None)[0]
    assert_exact(one, plain_attention(q[:, :, :1], k, v))


def test_a_longer_prepared_mask_is_cut():
    q, k, v = tensors()
    allowed = torch.rand(2, 1, 5, 9) > 0.3
    allowed[..., 0] = True
    actual = attention_forward(None, aajr.dual(q, q), k, v, allowed)[0]
    assert_exact(actual.primal, plain_attention(q, k, v, allowed[..., :7]))


def test_bias_with_an_additive_mask():
    q, k, v = tensors()
    bias, mask = torch.randn(1, 4, 5, 7, dtype=torch.float64), torch.randn(2, 1, 5, 7, dtype=torch.float64)
    actual = attention_forward(None, q, k, v, mask, position_bias=bias)[0]
    assert_exact(actual, plain_attention(q, k, v, bias=bias + mask))


def test_dropout_has_one_mask_for_primal_and_tangents():
    q, k, v = tensors()
    directions = [torch.randn_like(x) for x in (q, k, v)]

    def value(step):
        torch.manual_seed(5)
        moved = [x + step * d for x, d in zip((q, k, v), directions)]
        zero = [aajr.dual(x, torch.zeros_like(x)) for x in moved]
        return attention_forward(None, *zero, Visibility(), dropout=0.4)[0].primal

    torch.manual_seed(5)
    duals = [aajr.dual(x, d) for x, d in zip((q, k, v), directions)]
    y = attention_forward(None, *duals, Visibility(), dropout=0.4)[0]
    h = 1e-4
    assert_exact(y.primal, value(0.0))
    assert_exact(y.tangent, (value(h) - value(-h)) / (2 * h), tolerance=1e-6)
    without = attention_forward(None, *duals, Visibility())[0]
    assert (without.primal - y.primal).abs().max() > 0.01


@pytest.mark.parametrize(("name", "what"), [("s_aux", "attention sinks"), ("cache", "a paged cache")])
def test_what_it_does_not_have_raises(name, what):
    q, k, v = tensors()
    with pytest.raises(aajr.UnsupportedOperation, match=f"was given {what}"):
        attention_forward(None, q, k, v, None, **{name: torch.zeros(4)})
