"""Adapters of PEFT: exact with every kind, frozen weights cost no gradient, merging does not change the penalty."""

from __future__ import annotations

import functools
import math
from typing import Any

import oracle_losses
import pytest
import torch
from assertions import (
    assert_exact,
    assert_exact_gradients,
    assert_gradients_within_budget,
    assert_within_budget,
)
from integrations.trainer.trainers import gpt2
from integrations.transformers.subjects import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zoo import LENGTH, Subject, embeddings, randomise

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.testing import oracle
from aajr_kernels.training import Objective, policy_of

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LLAMA = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
#: fan_in_fan_out: GPT-2 keeps its weights the other way round
TARGETS = {"llama": LLAMA, "gpt2": ["c_attn", "c_proj", "c_fc"]}


def adapted(kind: str, name: str = "llama", **options: Any) -> nn.Module:
    """A model with adapters that do something: B is not zero."""
    base = tiny("llama") if name == "llama" else randomise(gpt2(), 5)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[name],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
        **(KINDS[kind] | options),
    )
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            elif "magnitude" in key:  # not the norm that it starts with
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    return model


class Adapted(Subject):
    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def subject(kind: str, name: str = "llama", **options: Any) -> Adapted:
    model = adapted(kind, name, **options)
    width = model.get_input_embeddings().weight.shape[1]
    return Adapted(
        model, embeddings(2, LENGTH, width), lambda model, x: model(inputs_embeds=x, use_cache=False)
    )


def directions(like: Tensor) -> Tensor:
    return torch.randn(1, *like.shape, generator=torch.Generator().manual_seed(1)).to(like)


@functools.cache
def exact(kind: str, name: str) -> tuple[Adapted, Tensor, oracle_losses.Outcome]:
    """The subject in float64, a direction, and what the oracle says."""
    single = subject(kind, name)
    wide = Adapted(single.model.double(), single.x.double(), single.call)
    v = directions(wide.x)
    return wide, v, oracle_losses.loss_and_gradients(wide.tensor, wide.x, v, wide.parameters, metric="fisher")


def penalised(subject: Subject, x: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Penalty and gradients, by the package."""
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    pen = aajr.aligned_penalty(subject.output, x, v)
    return pen, oracle_losses.gradients_of(pen, {**subject.parameters, "x": x, "v": v})


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.integration(
    "PEFT: {kind}", "penalty and all gradients, float64", "float64 oracle, written-out adapters"
)
@every_kind
@pytest.mark.parametrize("name", TARGETS)
def test_penalty_and_all_gradients_are_exact(kind, name, record_property):
    wide, v, expected = exact(kind, name)
    layers = 2 * len(LLAMA) if name == "llama" else 2 * 4  # c_proj is in attention and in the MLP
    assert len(wide.parameters) == layers * (3 if kind == "dora" else 2)
    with oracle.KeepFloat64(aajr.Dual), aajr.coverage() as coverage:
        pen, gradients = penalised(wide, wide.x, v)
    assert coverage.fallbacks == [] and coverage.unsupported == []
    assert_exact(pen, expected.penalty, "penalty", tolerance=1e-12)
    record_property("error", assert_exact_gradients(gradients, expected.gradients, tolerance=1e-11))


@every_kind
@pytest.mark.parametrize("fused", [False, True])
def test_float32_is_within_the_budget(kind, fused):
    _, _, expected = exact(kind, "llama")
    low = subject(kind)
    v = directions(low.x)
    eager = oracle_losses.loss_and_gradients(low.tensor, low.x, v, low.parameters, metric="fisher")
    if fused:
        fuse(low.model)
    pen, gradients = penalised(low, low.x, v)
    assert_within_budget(pen, eager.penalty, expected.penalty, "penalty")
    assert_gradients_within_budget(gradients, eager.gradients, expected.gradients)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_dora_is_the_formula_written_out(fan_in_fan_out):
    """W' = m (W + s B A) / ‖W + s B A‖ by rows, the norm a constant of the gradient; elementary operations alone."""
    name = "gpt2" if fan_in_fan_out else "llama"
    model = adapted("dora", name).double()
    layer = next(m for m in model.modules() if hasattr(m, "lora_magnitude_vector"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude, scale = layer.lora_magnitude_vector["default"].weight, layer.scaling["default"]
    base = layer.base_layer.weight
    bias = layer.base_layer.bias
    weight = base.t() if fan_in_fan_out else base
    x, v = (embeddings(5, weight.shape[1], seed=n).double() for n in (1, 2))
    merged = weight + scale * b @ a
    merged = (magnitude / merged.norm(dim=1).detach()).unsqueeze(1) * merged
    z, z_tan = x @ merged.t(), v @ merged.t()
    if bias is not None:
        z = z + bias
    expected = oracle.metric_values(z, z_tan.unsqueeze(0), "fisher").mean()
    pen = aajr.aligned_penalty(layer, x, v)
    assert_exact(pen, expected, "penalty", tolerance=1e-13)
    leaves = {"A": a, "B": b, "magnitude": magnitude}
    assert_exact_gradients(
        oracle_losses.gradients_of(pen, leaves), oracle_losses.gradients_of(expected, leaves), tolerance=1e-12
    )


def test_the_norm_of_dora_follows_the_weights(monkeypatch):
    """Finite differences of the penalty: with the norm held they are the gradient, else they are not."""
    wide, v, expected = exact("dora", "llama")
    layer = next(m for m in wide.model.modules() if hasattr(m, "lora_magnitude_vector"))
    name, p = next((n, p) for n, p in wide.parameters.items() if "lora_B" in n)
    step = torch.randn_like(p)
    directional = float((expected.gradients[name] * step).sum())

    def value() -> Tensor:
        with oracle.KeepFloat64(aajr.Dual):
            return aajr.aligned_penalty(wide.output, wide.x, v[0])

    moving = oracle.finite_difference(value, {name: p}, {name: step})
    dora = type(layer.lora_magnitude_vector["default"])
    norms: dict[int, Tensor] = {}
    original = dora.get_weight_norm

    def held(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if id(self) not in norms:
            norms[id(self)] = original(self, *arguments, **options)
        return norms[id(self)]

    monkeypatch.setattr(dora, "get_weight_norm", held)
    value()
    still = oracle.finite_difference(value, {name: p}, {name: step})
    assert still == pytest.approx(directional, rel=1e-6)
    assert abs(moving - directional) > 1e-2 * abs(directional)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.integration("PEFT: merged and unmerged", "the same penalty", "one another, float64")
@every_kind
@pytest.mark.parametrize("name", TARGETS)
def test_merged_and_unmerged_give_the_same_penalty(kind, name, record_property):
    single = subject(kind, name)
    wide = Adapted(single.model.double(), single.x.double(), single.call)
    v = directions(wide.x)[0]
    values = []
    with oracle.KeepFloat64(aajr.Dual):
        for merged in (False, True, False):
            if values:
                (wide.model.merge_adapter if merged else wide.model.unmerge_adapter)()
            assert all(m.merged == merged for m in wide.model.modules() if hasattr(m, "lora_A"))
            values.append(aajr.aligned_penalty(wide.output, wide.x, v))
        whole = wide.model.merge_and_unload()
        values.append(aajr.aligned_penalty(lambda x: whole(inputs_embeds=x), wide.x, v))
    errors = [assert_exact(value, values[0], tolerance=1e-12) for value in values[1:]]
    record_property("error", max(errors))


@every_kind
def test_merged_in_float32_is_within_the_budget(kind):
    _, _, expected = exact(kind, "llama")
    low = subject(kind)
    v = directions(low.x)
    low.model.merge_adapter()
    eager = oracle_losses.loss_of(low.tensor, low.x, v, metric="fisher").penalty
    pen = aajr.aligned_penalty(low.output, low.x, v[0])
    assert_within_budget(pen, eager, expected.penalty, "penalty")


# -- frozen weights ---------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Shapes of all matrix products while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(result.shape))
        return result


def backward_of(model: nn.Module, x: Tensor, v: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """Arithmetic of the backward of a penalty, and the shapes of its products."""
    policy = policy_of(model)
    pen = aajr.aligned_penalty(policy.forward, x, v, head=policy.head)
    with FlopCounterMode(display=False) as counter, Products() as products:
        pen.backward()
    return counter.get_total_flops(), products.shapes


def sizes() -> dict[str, int]:
    """No two axes of the same length: a product is known by its shape."""
    return dict(hidden_size=24, intermediate_size=46, vocab_size=59, num_key_value_heads=2)


def test_frozen_weights_cost_no_weight_gradients(record_property):
    """Counted: the backward of an unfrozen model has the weight gradients of LoRA's base more, 4 tokens·in·out each."""
    x, v = embeddings(2, LENGTH, 24), embeddings(2, LENGTH, 24, seed=8)
    lora = peft.LoraConfig(r=3, target_modules=LLAMA, task_type="CAUSAL_LM")
    with aajr.use_backend("reference"):
        model = peft.get_peft_model(tiny("llama", **sizes()), lora)
        frozen_flops, frozen_shapes = backward_of(model, x, v)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        flops, shapes = backward_of(model, x, v)
    named = model.named_parameters()
    base = [p for name, p in named if p.dim() == 2 and "lora_" not in name and "embed" not in name]
    weights = [tuple(p.shape) for p in base]
    body = [shape for shape in weights if 59 not in shape]  # the head forms its gradient while it is streamed
    tokens = 2 * x.shape[0] * x.shape[1]  # the primal and one tangent
    assert not set(frozen_shapes) & set(weights)
    assert all(shapes.count(shape) == body.count(shape) for shape in body)
    saved = flops - frozen_flops
    record_property("saved", saved / flops)
    assert saved >= sum(2 * tokens * math.prod(shape) for shape in body) and saved / flops > 0.3


def test_neither_the_attack_nor_the_step_forms_them():
    """A whole step of the method on LoRA: no product has the shape of a frozen weight."""
    from integrations.trainer.trainers import CONFIG, Rows, collate

    lora = peft.LoraConfig(r=3, target_modules=LLAMA, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama", **sizes()), lora)
    with aajr.use_backend("reference"), Products() as products:
        Objective(model, CONFIG)(collate(list(Rows()))).total.backward()
    weights = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    assert products.shapes and not set(products.shapes) & weights
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# -- what does not go with it -----------------------------------------------------------------------------------------


def test_a_learned_prompt_is_refused():
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match=r"must not learn a prompt \(PEFT\).*use LoRA"):
        policy_of(peft.get_peft_model(tiny("llama"), prompt))


def test_a_head_with_an_adapter_is_not_streamed():
    """Its logits are not those of its weight alone: they are formed, and the gradient reaches the adapter."""
    lora = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), lora).eval()
    policy = policy_of(model)
    assert policy.head is None
    x, v = embeddings(2, LENGTH, 32), embeddings(2, LENGTH, 32, seed=8)
    aajr.aligned_penalty(policy.forward, x, v).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "lm_head.lora_B" in n}
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads.values())
