"""fuse(): every known type against the unfused model and the oracle, and what it promises beside."""

from __future__ import annotations

import functools
import importlib

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients
from integrations.transformers.subjects import SUBJECTS, tiny
from torch import nn
from zoo import LENGTH, Subject, embeddings, padding

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.integrations.transformers import KNOWN, fuse
from aajr_kernels.testing import oracle
from aajr_kernels.testing.budgets import EXACT

pytest.importorskip("transformers")

every_model = pytest.mark.parametrize("name", SUBJECTS)


@functools.lru_cache(maxsize=2)
def problem(name: str, k: int):
    """The float64 model, directions, a probe of the primal (zero at padding) and the oracle's outcome."""
    subject = SUBJECTS[name]().double()
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(k, *subject.x.shape, generator=generator, dtype=torch.float64)
    with oracle.oracle_mode(), torch.no_grad():
        shape = subject.tensor(subject.x).shape
    probe = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if subject.mask is not None:  # a query that sees nothing gives zeros here, an average in eager attention
        probe = probe * subject.mask[..., None]
    exact = oracle_losses.loss_and_gradients(
        subject.tensor,
        subject.x,
        v,
        subject.parameters,
        metric=subject.metric,
        probe=probe,
        mask=subject.mask,
    )
    return subject, v, probe, exact


def through_the_dual(subject: Subject, v: torch.Tensor, probe: torch.Tensor) -> oracle_losses.Outcome:
    x, v = subject.x.clone().requires_grad_(), v.clone().requires_grad_()
    with oracle.KeepFloat64(aajr.Dual):
        y = subject.tensor(aajr.dual(x, v))
    penalty = oracle.mean_over_units(oracle.metric_values(y.primal, y.tangents, subject.metric), subject.mask)
    loss = penalty + (probe * y.primal).sum()
    return oracle_losses.Outcome(
        loss,
        penalty,
        y.primal,
        y.tangents,
        oracle_losses.gradients_of(loss, {**subject.parameters, "x": x, "v": v}),
    )


# -- exactness --------------------------------------------------------------------------------------------------------


THREE = (
    "llama-sdpa-pad_left",
    "gemma2-eager",
    "t5_encoder-sdpa",
    "modernbert-sdpa",
)  # every kind of attention


@pytest.mark.parametrize(("name", "k"), [(name, 1) for name in SUBJECTS] + [(name, 3) for name in THREE])
def test_fused_is_exact(name, k, record_property):
    subject, v, probe, exact = problem(name, k)
    with fuse(subject.model) as fusion, aajr.coverage() as coverage:
        actual = through_the_dual(subject, v, probe)
    assert fusion.replaced
    assert coverage.unsupported == [] and coverage.fallbacks == []
    errors = [
        assert_exact(actual.penalty, exact.penalty, "penalty"),
        assert_exact(actual.loss, exact.loss, "loss"),
        assert_exact_gradients(actual.gradients, exact.gradients),
    ]
    plain = through_the_dual(subject, v, probe)  # undone: the unfused model
    errors += [
        assert_exact(actual.penalty, plain.penalty, "penalty"),
        assert_exact_gradients(actual.gradients, plain.gradients),
    ]
    record_property("error", max(errors))
    assert EXACT == 1e-10


@pytest.fixture
def ordered_sums():
    """With several threads torch sums the gradient of an indexed weight (experts) in no fixed order otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@every_model
@pytest.mark.usefixtures("ordered_sums")
def test_plain_tensors_give_the_same_values_and_gradients(name):
    subject = SUBJECTS[name]()
    keys = list(subject.model.state_dict())

    def run():
        x = subject.x.clone().requires_grad_()
        y = subject.tensor(x)
        kept = y if subject.mask is None else y[subject.mask]
        loss = (kept * torch.linspace(-1, 1, kept.shape[-1])).sum() + kept.square().mean()
        return kept, oracle_losses.gradients_of(loss, {**subject.parameters, "x": x})

    before, gradients = run()
    with fuse(subject.model):
        fused, fused_gradients = run()
        assert list(subject.model.state_dict()) == keys
    after, after_gradients = run()
    assert_exact(fused, before, "values", tolerance=2e-6)
    assert_exact_gradients(fused_gradients, gradients, tolerance=2e-5)
    assert torch.equal(after, before)
    for key, gradient in gradients.items():
        assert gradient is None or torch.equal(after_gradients[key], gradient), key


def _llama_like(mlp, norms, attention="attention + rotary + projections"):
    return {"residual sums": 2, attention: 2, mlp: 2, "RMS norm": norms}


EXPECTED = {
    "gemma": _llama_like("GeGLU (tanh) MLP", 5),
    "qwen2": _llama_like("SwiGLU MLP", 5),
    # one layer turns nothing
    "smollm3": _llama_like("SwiGLU MLP", 5)
    | {"attention + rotary + projections": 1, "attention + projections": 1},
    "llama-sdpa": _llama_like("SwiGLU MLP", 5),
    "mistral-sdpa": _llama_like("SwiGLU MLP", 5),
    "qwen3-sdpa": _llama_like("SwiGLU MLP", 9),
    "gemma2-eager": _llama_like("GeGLU (tanh) MLP", 9),
    "gemma3-sdpa": _llama_like("GeGLU (tanh) MLP", 13),
    "phi3-sdpa": _llama_like("SwiGLU MLP", 5, "attention + rotary"),
    "gpt2-sdpa": {"residual sums": 2, "attention": 2, "GELU (tanh)": 2},
    "gpt_neox-sdpa": {"residual sums": 2, "attention + rotary": 2},
    "mixtral-sdpa-grouped_mm": _llama_like("SwiGLU of the experts", 5),
    "qwen3_moe-sdpa-grouped_mm": _llama_like("SwiGLU of the experts", 9),
    "bert-sdpa": {"residual sums": 4, "attention + projections": 2},
    "modernbert-sdpa": {"residual sums": 2, "attention + rotary": 2, "GeGLU MLP": 2},
    "vit-sdpa": {"residual sums": 2, "attention + projections": 2},
    "t5_encoder-sdpa": {
        "residual sums": 10,
        "attention + projections": 6,
        "GeGLU (tanh) MLP": 4,
        "RMS norm": 12,
    },
}


#: the lines of what needs no replacement; BERT's and ViT's depend on how a version cuts a layer into modules
NORM, ROTARY = (
    "norm: runs on the rules of torch's functions",
    "rotary: computes cos and sin, which carry no tangent",
)
PLAIN_MLP = "MLP: linear layers and an activation run on the rules of torch's functions"
KEPT = {
    "gpt2-sdpa": {NORM: 5, PLAIN_MLP: 2},
    "gpt_neox-sdpa": {NORM: 5, PLAIN_MLP: 2, ROTARY: 1},
    "mixtral-sdpa-grouped_mm": {"MLP: consists of experts": 2, ROTARY: 1},
    "qwen3_moe-sdpa-grouped_mm": {"MLP: consists of experts": 2, ROTARY: 1},
    "bert-sdpa": {NORM: 6, PLAIN_MLP: 2, "attention: consists of self": 2},
    "modernbert-sdpa": {NORM: 6, ROTARY: 1},
    "vit-sdpa": {NORM: 5, PLAIN_MLP: 2},
    "t5_encoder-sdpa": {},
}
#: what class names of attention, rotary embeddings, norms and MLPs have in them, as people would look for them
WORDS = ("attention", "attn", "rotary", "norm", "mlp", "dense", "expert", "intermediate")


def counted(lines: dict[str, str]) -> dict[str, int]:
    return {what: list(lines.values()).count(what) for what in lines.values()}


@pytest.mark.parametrize("name", EXPECTED)
def test_everything_is_listed(name):
    """The same on every version of transformers, but for T5 before it asked the registry, and for ViT's wrapper."""
    model = SUBJECTS[name]().model
    fusion = fuse(model)
    expected, kept, left = dict(EXPECTED[name]), dict(KEPT.get(name, {ROTARY: 1})), {}
    if name.startswith("t5") and not type(model)._supports_sdpa:
        left = {
            "attention: T5Attention does not ask transformers' registry for it": expected.pop(
                "attention + projections"
            )
        }
    if hasattr(model, "vit") and hasattr(model.vit, "encoder"):  # until 5.8
        kept["attention: consists of attention"] = 2
    assert counted(fusion.replaced) == expected
    assert counted(fusion.left) == left
    assert counted(fusion.kept) == kept
    assert {what for what, _, _ in fusion.rows()} == set(expected)
    lines = fusion.replaced | fusion.left | fusion.kept
    assert len(lines) == len(fusion.replaced) + len(fusion.left) + len(fusion.kept)
    for module, part in model.named_modules():
        if any(word in type(part).__name__.lower() for word in WORDS):
            assert module in lines and module.split(".")[0] in repr(fusion), module


def test_expected_covers_every_known_type():
    types = {SUBJECTS[name]().model.config.model_type for name in EXPECTED}
    assert types == set(KNOWN)


def test_the_fused_operations_run():
    subject = SUBJECTS["llama-sdpa"]()
    with fuse(subject.model), aajr.coverage() as coverage:
        subject.tensor(aajr.dual(subject.x, torch.ones_like(subject.x)))
    counts = {op: n for op, backend, n, _ in coverage.rows() if backend in choice.BACKENDS}
    assert counts["rms_norm"] == 1 and counts["add_rms_norm"] == 4  # the last norm is in no layer
    assert counts["linear"] == 9  # of a layer: queries, keys and values; what follows them; gate and up; down
    assert counts["swiglu"] == 2 and counts["attention"] == 2
    assert counts["rotary"] == 2  # queries and keys together


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-sdpa", "gemma2-eager", "t5_encoder-sdpa"])
def test_bfloat16_keeps_its_dtype_and_its_size_of_error(name):
    subject = SUBJECTS[name]()
    exact = subject.tensor(subject.x).detach()
    low = Subject(subject.model.bfloat16(), subject.x.bfloat16(), subject.call, field=subject.field)
    plain = low.tensor(low.x).detach()
    with fuse(low.model):
        fused = low.tensor(low.x).detach()
        dual = low.tensor(aajr.dual(low.x, torch.ones_like(low.x)))
    assert fused.dtype == dual.dtype == torch.bfloat16
    error = (plain.float() - exact).norm()
    assert (fused.float() - exact).norm() <= 1.5 * error
    assert (dual.primal.float() - exact).norm() <= 1.5 * error
    assert dual.tangent.float().norm() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma", "t5"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_have_the_output_dtype_of_the_original(family, weight, x):
    from aajr_kernels.integrations.transformers.forms import find

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = {"llama": "LlamaRMSNorm", "gemma": "GemmaRMSNorm", "t5": "T5LayerNorm"}[family]
    norm = getattr(module, cls)(8).to(weight)
    torch.nn.init.normal_(norm.weight)
    value = torch.randn(3, 8).to(x)
    expected = norm(value)
    replacement = find(norm, weight)
    actual = replacement.function(norm, value)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-2, atol=2e-2)
    assert replacement.function(norm, aajr.dual(value, value)).dtype == expected.dtype


# -- beside other libraries -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft
@pytest.mark.parametrize("order", ["before", "after"])
def test_peft_lora(order):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], lora_dropout=0.0
    )

    def adapt(model):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, options).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return adapted

    plain = adapt(tiny("llama"))
    model = tiny("llama")
    if order == "before":
        fusion, model = fuse(model), adapt(model)
    else:
        model = adapt(model)
        fusion = fuse(model)
        assert "base_model.model.model.layers.0.self_attn" in fusion.replaced
    assert len(fusion.replaced) == 11
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    x, v = embeddings(2, 7, 32), embeddings(2, 7, 32, seed=8)

    def gradients(adapted):
        pen = aajr.aligned_penalty(lambda d: adapted(inputs_embeds=d), x, v)
        leaves = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        return pen, oracle_losses.gradients_of(pen, leaves)

    expected, expected_gradients = gradients(plain)
    with aajr.coverage() as coverage:
        actual, gradients_of_fused = gradients(model)
    assert {"swiglu", "rms_norm", "rotary", "attention"} <= {op for op, _ in coverage.entries}
    assert_exact(actual, expected, "penalty", tolerance=1e-5)
    assert_exact_gradients(gradients_of_fused, expected_gradients, tolerance=1e-4)
    fusion.undo()
    assert_exact(gradients(model)[0], expected, "penalty", tolerance=1e-6)


def checkpointed(model: nn.Module, **options: bool) -> nn.Module:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    return model.train()


@pytest.mark.parametrize("name", ["llama-sdpa-pad_left", "t5_encoder-sdpa", "gemma3-sdpa"])
def test_gradient_checkpointing_is_exact(name):
    subject, v, probe, _ = problem(name, 1)
    with fuse(subject.model) as fusion:
        if fusion.left:  # T5 before transformers 5.15
            pytest.skip(
                "the model's own attention rounds to float32, in the second computation beyond our reach"
            )
        expected = through_the_dual(subject, v, probe)
        for module in subject.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        try:
            checkpointed(subject.model, use_reentrant=False)
            actual = through_the_dual(subject, v, probe)
        finally:
            problem.cache_clear()  # the model is changed
    assert_exact(actual.loss, expected.loss, "loss")
    assert_exact_gradients(actual.gradients, expected.gradients)


def test_reentrant_checkpointing_raises():
    subject = SUBJECTS["llama-sdpa"]()
    checkpointed(subject.model, use_reentrant=True)
    with fuse(subject.model), pytest.raises(aajr.UnsupportedOperation, match="use_reentrant=False"):
        subject.tensor(aajr.dual(subject.x, subject.x))


def test_token_ids_and_a_seeded_embedding():
    model = tiny("llama")
    tokens = torch.randint(3, 97, (2, LENGTH))
    v = embeddings(2, LENGTH, 32)
    mask = padding((LENGTH, 9), "left")

    def run():
        with aajr.inject(model.get_input_embeddings(), v):
            y = model(input_ids=tokens, attention_mask=mask.long()).logits
        return y.primal[mask], y.tangent[mask]

    expected = run()
    with fuse(model):
        actual = run()
    for got, want in zip(actual, expected):
        assert_exact(got, want, tolerance=1e-5)


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by Dynamo
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_fused_model_compiles_in_one_graph(backend):
    model = tiny("llama", num_hidden_layers=1)
    x, v = embeddings(2, 7, 32).requires_grad_(), embeddings(2, 7, 32, seed=8)
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if "embed" not in name}

    def loss(x, v):
        y = model(inputs_embeds=aajr.dual(x, v), use_cache=False).logits
        return y.tangent.square().mean() + y.primal.mean()

    with fuse(model):
        expected = loss(x, v)
        gradients = oracle_losses.gradients_of(expected, leaves)
        torch._dynamo.reset()
        actual = torch.compile(loss, fullgraph=True, backend=backend)(x, v)
        assert_exact(actual, expected, tolerance=1e-5)
        assert_exact_gradients(oracle_losses.gradients_of(actual, leaves), gradients, tolerance=1e-4)
    torch._dynamo.reset()
