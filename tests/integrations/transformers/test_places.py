"""Attacks inside a model: losses, penalty and every gradient against hooks on the plain model, in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from integrations.transformers.by_hand import ByHand
from integrations.transformers.subjects import tiny
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.testing import oracle
from aajr_kernels.training import policy_of

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the logits of BertForMaskedLM:UserWarning"),
    # their names until 5.23, read by peft too
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

ROWS, LENGTH = 2, 7
EXACT = 1e-10
#: a place inside a layer, of every family
INSIDE = {
    "llama": "layers.0.self_attn.q_proj",
    "gpt2": "h.0.attn.c_attn",
    "bert": "layer.0.attention.self.query",
}
LAYER = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "bert": "bert.encoder.layer.{}"}


@functools.cache
def family(name: str, fused: bool = False) -> nn.Module:
    if name == "llama":
        model = tiny("llama")
    else:
        model = zoo._bert("sdpa").model if name == "bert" else zoo._decoder(name, "sdpa").model
    model = copy.deepcopy(model).double()
    if fused:
        fuse(model)
    return model


@functools.cache
def batch(width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, tokens that may be attacked, and labels."""
    generator = torch.Generator().manual_seed(3)
    x = 0.7 * torch.randn(ROWS, LENGTH, width, generator=generator, dtype=torch.float64)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    labels = torch.randint(zoo.VOCABULARY, (ROWS, LENGTH), generator=generator).where(mask.roll(1, 1), -100)
    return x, mask, labels


def objective_by_hand(
    model: nn.Module, names: tuple[str, ...], x: Tensor, tokens: Any, delta: Tensor, v: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    with oracle.oracle_mode(float64=True):
        func = ByHand(model, names, x, tokens)
        logits, tangents = oracle.jvp(func, delta, v)
        q = oracle.metric_values(logits, tangents, "fisher")
        penalty = oracle.mean_over_units(q, labels != -100)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    count = (labels != -100).sum(-1)
    return (losses.reshape(labels.shape).sum(-1) / count).sum(), penalty


def gradients(model: nn.Module, x: Tensor, total: Tensor) -> dict[str, Tensor]:
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    values = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, values) if g is not None}


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    error = float((got - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
    assert error <= EXACT, f"{name} is off by {error:.1e}"


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(g.norm()) for g in expected.values())
    for name, g in expected.items():
        if float(g.norm()) > 1e-12 * scale:  # biases of keys, which have no gradient
            assert_close(got[name], g, f"the gradient of {name}")
    for name in got.keys() - expected.keys():
        assert float(got[name].norm()) <= 1e-12 * scale, name


def compare(model: nn.Module, plain: nn.Module, at: Any, tokens: Tensor | None) -> Any:
    """Our loss, penalty and gradients with those by hand; the opened places."""
    x, mask, labels = batch()
    leaf = x.clone().requires_grad_()
    policy = policy_of(model, at=at)
    with oracle.KeepFloat64(aajr.Dual):
        opened = policy.places(leaf, policy.forward, tokens=tokens)
        generator = torch.Generator().manual_seed(8)
        delta, v, w = (
            0.3 * torch.randn(opened.x.shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        delta, v, w = (t * opened.spread(mask)[..., None] for t in (delta, v, w))
        inner = replace(policy, forward=opened, places=None)
        loss = inner.loss_fn({}, labels, "mean")(delta).sum()
        penalty = aajr.aligned_penalty(
            opened, delta, torch.stack([v, w]), head=inner.described_head(), mask=labels != -100
        )
        got = gradients(model, leaf, loss + 0.7 * penalty)
    again = x.clone().requires_grad_()
    names = policy.places.names
    expected_loss, expected_penalty = objective_by_hand(
        plain, names, again, tokens, delta, torch.stack([v, w]), labels
    )
    assert_close(loss, expected_loss, "the loss")
    assert expected_penalty > 0
    assert_close(penalty, expected_penalty, "the penalty")
    assert_same_gradients(got, gradients(plain, again, expected_loss + 0.7 * expected_penalty))
    return opened


#: of all families, kinds of places and forms the quick suite has these
QUICK = {("several", "llama", True), ("several", "gpt2", False), ("several", "bert", True)}


def slow_but(quick: set[Any], *axes: tuple[Any, ...]) -> list[Any]:
    """The product of the axes; what is not in `quick` is marked slow."""
    every = itertools.product(*axes)
    return [pytest.param(*one, marks=[] if one in quick else pytest.mark.slow) for one in every]


@pytest.mark.parametrize(
    ("kind", "name", "fused"),
    slow_but(
        QUICK,
        ("layer", "inside", "several", "with the embedding"),
        ("llama", "gpt2", "bert"),
        (False, True),
    ),
)
def test_losses_penalty_and_gradients(kind, name, fused):
    at = {
        "layer": -1,
        "inside": INSIDE[name],
        "several": [INSIDE[name], 1],
        "with the embedding": ["embedding", INSIDE[name]],
    }[kind]
    tokens = batch()[1] if kind in ("layer", "several") else None
    opened = compare(family(name, fused), family(name), at, tokens)
    assert len(opened.skipped) == {"layer": 2}.get(kind, 0)


def attacked(model: nn.Module, at: Any, **options: Any) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
    """A training step at `at`: units, trajectory, total and gradients."""
    x, mask, labels = batch()
    leaf = x.clone().requires_grad_()
    policy = policy_of(model, at=at)
    start = options.pop("start", 0)
    # torch's backward, and what a checkpoint runs again there, is outside of modes
    with oracle.KeepFloat64(aajr.Dual) if options.pop("wide", True) else contextlib.nullcontext():
        forward, part = policy.forward, leaf
        if start:
            context = policy.context(leaf, start=start)
            forward, part = (lambda z, **_: context(z)), context.x
        mask, labels = mask.clone(), labels.clone()
        mask[:, :2], labels[:, :2] = False, -100
        mask, labels = mask[:, start:], labels[:, start:]
        opened = policy.places(part, forward, tokens=mask)
        inner = replace(policy, forward=opened)
        attack = dict(radius=0.2, steps=2, step_size=0.1, scope="token", mask=opened.attackable(mask))
        traj = aajr.ascend(inner.loss_fn({}, labels, "mean"), opened.x, module=model, **attack)
        loss = inner.loss_fn({}, labels, "mean")(traj.worst).sum()
        penalty, _ = aajr.trajectory_penalty(
            opened, opened.x, traj, head=inner.described_head(), mask=labels != -100, **options
        )
        total = loss + penalty
        return opened.units, traj, total, gradients(model, leaf, total)


def assert_same(got: Any, expected: Any) -> None:
    assert_close(got[0], expected[0], "the units")
    assert_close(got[1].losses, expected[1].losses, "losses of the ascent")
    assert_close(got[2], expected[2], "the objective")
    assert_same_gradients(got[3], expected[3])


@pytest.mark.parametrize(
    ("kind", "name", "fused"),
    slow_but({("several", "llama", True)}, ("layer", "several"), ("llama", "gpt2"), (False, True)),
)
def test_with_a_shared_context(kind, name, fused):
    at = 0 if kind == "layer" else [INSIDE[name], -1]
    model = family(name, fused)
    assert_same(attacked(model, at, start=2), attacked(model, at))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["layer", "several"])
def test_with_activation_checkpointing(kind, fused):
    at = 0 if kind == "layer" else [INSIDE["llama"], "layers.1.mlp.down_proj"]
    model = copy.deepcopy(family("llama"))
    if fused:
        fuse(model)
    expected, shared = (attacked(model, at, wide=False, start=start) for start in (0, 2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(attacked(model, at, wide=False), expected)
    assert_same(attacked(model, at, wide=False, start=2), shared)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.slow
def test_several_points_at_once():
    expected = attacked(family("llama"), [INSIDE["llama"], 1])
    assert_same(attacked(family("llama"), [INSIDE["llama"], 1], batch_steps=2), expected)


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(family("llama")), config).double()
    plain = model.get_base_model()
    for at in ("base_model.model.model.layers.0.self_attn.q_proj", [0, "layers.1.mlp.down_proj"]):
        policy = policy_of(model, at=at)
        assert policy.places.names == policy_of(plain, at=at).places.names
    compare(model.get_base_model(), plain, at, None)
    assert {name for name in attacked(model, at)[3] if name != "x" and "lora" not in name} == set()


def test_layers_below_run_once_and_keep_their_graph():
    model, (x, _, labels) = copy.deepcopy(family("llama")), batch()
    policy, ran = policy_of(model, at=1), []
    products = [layer.mlp for layer in model.model.layers]
    policy.places(x, policy.forward)  # its first call compares
    for index, module in enumerate(products):
        module.register_forward_hook(lambda *_, index=index: ran.append(index))
    opened = policy.places(x, policy.forward)
    assert ran == [0, 1]
    inner = replace(policy, forward=opened)
    loss_fn = inner.loss_fn({}, labels, "mean")
    aajr.ascend(loss_fn, opened.x, radius=0.1, steps=3, module=model)
    assert ran == [0, 1]
    loss_fn(opened.x).sum().backward()
    assert ran == [0, 1] and all(p.grad is not None for p in products[0].parameters())
    ran.clear()
    shallow = policy_of(model, at=0).places
    shallow(x, policy.forward)
    ran.clear()
    shallow(x, policy.forward)
    assert ran == [0]  # nothing above the last place


def test_layers_that_others_look_for_run_in_every_call():
    """A layer that leaves something behind for a later one, as layers do that share keys and values."""
    model = copy.deepcopy(family("llama"))
    first, second = model.model.layers
    left: list[Any] = []
    first.mlp.register_forward_hook(lambda m, a, y: left.append(y))
    second.mlp.register_forward_hook(lambda m, a, y: y + left.pop())
    x = batch()[0]
    policy = policy_of(model, at="layers.1.input_layernorm")
    opened = policy.places(x, policy.forward)
    assert not policy.places.skips and not opened.skipped
    left.clear()
    got = opened(torch.zeros_like(opened.x))
    left.clear()
    assert_close(got, policy.forward(x), "the output")


def test_rows_of_the_batch():
    model, (x, _, _) = family("llama"), batch()
    policy = policy_of(model, at=[INSIDE["llama"], 1])
    opened = policy.places(x, policy.forward)
    delta = 0.1 * torch.randn(opened.x.shape, dtype=torch.float64)
    part = opened.of_rows(torch.tensor([1]))
    assert part.x.shape[0] == 1 and torch.equal(part.units, opened.units)
    assert_close(part(delta[1:]), opened(delta)[1:], "the second row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_dtypes_and_autocast(dtype):
    model = tiny("llama")
    x = batch()[0].float()
    if dtype == torch.bfloat16:
        model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    policy = policy_of(model, at=[INSIDE["llama"], 1])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            opened = policy.places(x, policy.forward)
            assert opened.x.dtype == dtype and opened.units.dtype == torch.float32
            delta = 0.1 * torch.randn(opened.x.shape, dtype=dtype)
            y = opened(delta.requires_grad_())
        exact = policy_of(family("llama"), at=[INSIDE["llama"], 1])
        exact = exact.places(batch()[0], exact.forward)(delta.detach().double())
        limit = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
        assert (y.double() - exact).norm() <= limit * exact.norm()
        (slope,) = torch.autograd.grad(y.float().square().sum(), delta)
        assert slope.isfinite().all() and slope.abs().sum() > 0


def test_where_nothing_has_a_gradient():
    model, (x, _, labels) = copy.deepcopy(family("llama")), batch()
    policy = policy_of(model, at=1)
    with torch.no_grad():
        opened = policy.places(x, policy.forward)
        assert not opened.units.requires_grad
    loss_fn = replace(policy, forward=opened).loss_fn({}, labels, "mean")
    with torch.no_grad():
        loss_fn(opened.x)
    assert torch.isfinite(aajr.ascend(loss_fn, opened.x, radius=0.1, steps=1, module=model).losses).all()
    with pytest.raises(RuntimeError, match="were opened without a graph"):
        loss_fn(opened.x)
    opened = policy.places(x, policy.forward)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="changed after its places were opened"):
        opened(opened.x)


@pytest.mark.parametrize("relative", [True, False])
def test_units_masks_and_spreads(relative):
    model, (x, mask, _) = family("gpt2"), batch()
    policy = policy_of(model, at=[INSIDE["gpt2"], 1])
    opened = policy.places(x, policy.forward, relative=relative)
    assert opened.widths == (96, 32) and opened.x.shape == (ROWS, 2 * LENGTH, 96)
    if not relative:
        assert torch.equal(opened.units, torch.ones(2, dtype=torch.float64))
    assert torch.equal(opened.spread(mask), torch.cat([mask, mask], 1))
    assert opened.index[0].tolist() == [0] * LENGTH + [1] * LENGTH
    keep = opened.attackable(mask)
    assert torch.equal(keep[:, :LENGTH].all(-1), mask) and torch.equal(keep[:, LENGTH:, :32].all(-1), mask)
    assert not keep[:, LENGTH:, 32:].any()
    assert opened.attackable(None)[:, :LENGTH].all()
    same = policy_of(model, at="h").places(x, policy.forward)
    assert same.attackable(None) is None and torch.equal(same.attackable(mask), same.spread(mask))
