"""A shared context is the whole sequence: trajectory, loss, penalty and all gradients, in float64, for every family."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import zoo
from integrations.transformers.subjects import tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import padding

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import SharedContext, fuse, shared_context
from aajr_kernels.integrations.transformers import context as context_module
from aajr_kernels.integrations.transformers.context_keys import Joined
from aajr_kernels.method import trajectory_baseline
from aajr_kernels.training import policy_of

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # its name until 5.23

ROWS, LENGTH = 3, 13
#: attackable from here on in each row: rows start at different tokens
FIRST = (7, 9, 6)
START = min(FIRST)
EXACT = 1e-12
FAMILIES = ("llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "smollm3")
#: those whose fused form is among the quick tests
FUSED = ("llama", "gpt2")


class _Wide(TorchFunctionMode):
    """float64 where a model rounds to float32 inside: norms, softmax, angles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@functools.cache
def family(name: str, fused: bool = False) -> nn.Module:
    if name in ("gemma", "smollm3"):
        model = tiny(name)
    else:
        model = zoo._decoder(name, "eager" if name == "gemma2" else "sdpa").model
    model = copy.deepcopy(model).double()
    if fused:
        fuse(model)
    return model


@functools.cache
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, attackable tokens and labels, which name tokens behind the first attackable one only."""
    generator = torch.Generator().manual_seed(5)
    x = 0.7 * torch.randn(ROWS, LENGTH, 32, generator=generator, dtype=torch.float64)
    mask = torch.arange(LENGTH) >= torch.tensor(FIRST)[:, None]
    mask[:, 11] = False
    labels = torch.randint(zoo.VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[:, :START] = -100
    labels[1, :10] = -100
    return x, mask, labels


def padded(side: str) -> tuple[Tensor | None, Tensor | None]:
    """A padding and, on the left, the positions that generation would take."""
    if side == "none":
        return None, None
    attended = padding((LENGTH, LENGTH - 3, LENGTH - 1), side, LENGTH)
    return attended.long(), (attended.long().cumsum(-1) - 1).clamp(min=0) if side == "left" else None


def step(func: Any, x: Tensor, model: nn.Module, head: Any, labels: Tensor, mask: Tensor) -> Any:
    """A training step: its trajectory, loss and penalty, and the penalty of three directions."""
    loss_fn = aajr.lm_loss(func, head=head, labels=labels)
    options = dict(radius=0.8, steps=2, step_size=0.3, mask=mask, scope="token")
    traj = aajr.ascend(loss_fn, x.detach(), module=model, **options)
    penalty, aux = aajr.trajectory_penalty(
        func, x, traj, head=head, labels=labels, return_primal=True, mask=labels != -100, batch_steps=2
    )
    v = torch.stack([traj.directions[0], traj.directions[1], traj.directions[0].flip(-1) * mask[..., None]])
    several = aajr.aligned_penalty(func, x, v, head=head, mask=labels != -100, metric="logits")
    return traj, aux.primal, penalty, several


def gradients(model: nn.Module, x: Tensor, total: Tensor) -> dict[str, Tensor]:
    names = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    found = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    return {name: g for name, g in zip(names, found) if g is not None}


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    error = float((got - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
    assert error <= EXACT, f"{name} is off by {error:.1e}"


def compare(model: nn.Module, attended: Tensor | None, positions: Tensor | None) -> None:
    x, mask, labels = batch()
    policy = policy_of(model)
    inputs = {"attention_mask": attended, "position_ids": positions}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if attended is not None:
        mask, labels = mask & attended.bool(), labels.where(attended.bool(), -100)

    def whole(
        z: Any,
    ) -> Any:  # several points of the batch, as trajectory_penalty gives them with batch_steps
        n = z.shape[0] // ROWS
        return policy.forward(z, **{name: value.repeat(n, 1) for name, value in inputs.items()})

    results = {}
    for kind in ("whole", "shared"):
        leaf = x.clone().requires_grad_()
        with _Wide():
            if kind == "whole":
                traj, *terms = step(whole, leaf, model, policy.head, labels, mask)
            else:
                context = shared_context(model.base_model, leaf, mask=mask, **inputs)
                assert context.start == START
                cut = context.suffix(labels), context.suffix(mask)
                assert [t.shape[1] for t in (context.x, *cut)] == [LENGTH - START] * 3
                traj, *terms = step(context, context.x, model, policy.head, *cut)
            results[kind] = (
                traj,
                terms,
                gradients(model, leaf, sum(w * t for w, t in zip((1.0, 0.7, 0.3), terms))),
            )
    (traj, terms, grads), (near, parts, partial) = results["whole"], results["shared"]
    assert (traj.points[-1] - traj.points[0]).norm() > 0.1
    assert_close(near.points, traj.points[:, :, START:], "the trajectory")
    assert_close(near.losses, traj.losses, "losses of the ascent")
    for name, got, expected in zip(("loss", "penalty", "penalty of three"), parts, terms):
        assert expected > 0
        assert_close(got, expected, name)
    assert partial.keys() == grads.keys()
    assert grads["x"][:, :START].norm() > 0
    for name, expected in grads.items():
        assert_close(partial[name], expected, f"the gradient of {name}")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        # among the quick tests every second family is padded
        pytest.param(name, side, marks=() if (i + j) % 2 else pytest.mark.slow)
        for i, name in enumerate(FAMILIES)
        for j, side in enumerate(("left", "none"))
    ],
)
def test_every_family(name, side):
    compare(family(name), *padded(side))


@pytest.mark.parametrize(
    "name", [name if name in FUSED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_fused_family(name):
    compare(family(name, fused=True), *padded("right" if name == "gemma2" else "none"))


@pytest.mark.parametrize(("side", "fused"), [("right", False), ("left", True)])
def test_padding(side, fused):
    compare(family("llama", fused), *padded(side))


def test_logits_of_the_whole_model_and_of_the_context():
    model, (x, _, _) = family("llama"), batch()
    context = shared_context(model, x, start=5, output=True)
    with _Wide():
        expected = model(inputs_embeds=x).logits
        for got, part in ((context.output, expected[:, :5]), (context(context.x), expected[:, 5:])):
            assert got.shape == part.shape
            assert (got - part).norm() <= 1e-6 * part.norm()  # the context was computed outside
    assert context.output.requires_grad
    assert shared_context(model, x, start=5).output is None


def test_nothing_is_kept_without_a_context():
    model, (x, _, _) = family("llama"), batch()
    context = shared_context(model, x, start=0)
    assert context.output is None and context.x.shape == x.shape
    assert torch.equal(context(x), model(inputs_embeds=x, use_cache=False).logits)


def test_the_last_layer_forms_keys_and_values_only():
    model, (x, _, _) = family("llama"), batch()
    ran: list[int] = []
    products = [layer.mlp for layer in model.model.layers]
    hooks = [mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, mlp in enumerate(products)]
    context_module.check_split(SharedContext, model.model, x)
    ran.clear()
    try:
        shared_context(model.model, x, start=5)
        assert ran == [0]
        shared_context(model.model, x, start=5, output=True)
        assert ran == [0, 0, 1]
    finally:
        for hook in hooks:
            hook.remove()


def test_the_cache_does_not_grow():
    model, (x, _, _) = family("mistral"), batch()
    context = shared_context(model.model, x, start=START)
    with torch.no_grad():
        first = context(context.x)
        shapes = [t.shape for t in context._cache.tensors()]
        assert torch.equal(context(context.x), first)
    assert [t.shape for t in context._cache.tensors()] == shapes


def test_fused_attention_takes_the_context_apart(monkeypatch):
    model, (x, _, _) = family("llama", fused=True), batch()
    context = shared_context(model.model, x, start=START)
    expected = context(aajr.dual(context.x, torch.ones_like(context.x)))

    def refuse(*_: Any) -> None:
        raise AssertionError("keys were concatenated")

    monkeypatch.setattr(Joined, "stacked", property(refuse))
    got = context(aajr.dual(context.x, torch.ones_like(context.x)))
    assert torch.equal(got.stacked, expected.stacked)
    monkeypatch.undo()
    parts = Joined(torch.ones(2, 3, 4, 5), aajr.dual(torch.ones(2, 3, 6, 5), torch.ones(2, 3, 6, 5)))
    assert parts.shape == parts.primal.shape == (2, 3, 10, 5) and parts.device == parts.stacked.device
    assert float(parts.tangent.sum()) == 2 * 3 * 6 * 5


def test_an_attack_sees_constants_and_the_loss_does_not(monkeypatch):
    model, (x, mask, labels) = family("llama"), batch()
    context = shared_context(model.model, x, start=START)
    detached: list[bool] = []
    own = type(context._cache).for_suffix

    def spy(self: Any, repeats: int, is_detached: bool) -> Any:
        detached.append(is_detached)
        return own(self, repeats, is_detached)

    monkeypatch.setattr(type(context._cache), "for_suffix", spy)
    loss_fn = aajr.lm_loss(context, head=model.lm_head, labels=context.suffix(labels))
    aajr.ascend(loss_fn, context.x, radius=1.0, steps=2, mask=context.suffix(mask))
    assert detached and all(detached)
    detached.clear()
    loss_fn(context.x)
    assert detached == [False]
    with torch.no_grad():
        loss_fn(context.x)
    assert detached == [False, True]


def test_activation_checkpointing_keeps_the_context():
    model = copy.deepcopy(family("llama"))
    fused = copy.deepcopy(model)
    fuse(fused)
    x, mask, labels = batch()
    for one in (model, fused):
        one.train()
        results = []
        for enabled in (False, True):
            if enabled:
                one.gradient_checkpointing_enable()
            leaf = x.clone().requires_grad_()
            context = shared_context(one.model, leaf, mask=mask)
            cut = context.suffix(labels), context.suffix(mask)
            _, *terms = step(context, context.x, one, one.lm_head, *cut)
            results.append(gradients(one, leaf, sum(terms)))
            assert one.model.layers[0].gradient_checkpointing is enabled
            assert "forward" not in one.model.layers[0].__dict__ or one is fused
        plain, checkpointed = results
        assert plain.keys() == checkpointed.keys()
        for name in plain:
            assert_close(checkpointed[name], plain[name], name)


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(family("llama")), config).double().eval()
    x, mask, labels = batch()
    base = model.get_base_model()
    results = []
    for func in (lambda z: base.model(inputs_embeds=z).last_hidden_state[:, START:], None):
        with _Wide():
            cut = labels[:, START:]
            context = shared_context(base.model, x, mask=mask)
            point = x if func else context.x
            v = torch.ones_like(x) * mask[..., None]
            penalty = aajr.aligned_penalty(
                func or context, point, v if func else context.suffix(v), head=base.lm_head, mask=cut != -100
            )
            results.append(gradients(model, x.clone().requires_grad_(), penalty))
    assert len(results[0]) == 12 and results[0].keys() == results[1].keys()
    for name in results[0]:
        assert_close(results[1][name], results[0][name], name)


def test_baselines_and_diagnostics():
    model, (x, mask, labels) = family("llama"), batch()
    with _Wide():
        context = shared_context(model.model, x, mask=mask)
    results = []
    for func, cut in ((policy_of(model).forward, 0), (context, START)):
        loss_fn = aajr.lm_loss(func, head=model.lm_head, labels=labels[:, cut:])
        options = dict(radius=0.8, steps=1, step_size=0.3, mask=mask[:, cut:])
        with _Wide():
            traj = aajr.ascend(loss_fn, x[:, cut:], module=model, **options)
            more = dict(loss_fn=loss_fn, head=model.lm_head, module=model, mask=mask[:, cut:])
            values = [
                trajectory_baseline(method, func, traj, **more)[0] for method in ("cure", "finite_difference")
            ]
            report = aajr.stability_report(loss_fn, traj.x, traj, module=model)
        results.append((*values, report.kappa, report.slopes))
        found = torch.autograd.grad(values[0], model.model.layers[0].self_attn.k_proj.weight)
        results[-1] += found
    for whole, shared in zip(*results):
        assert (shared - whole).norm() <= 1e-11 * whole.norm()  # differences over 0.01
    assert all(whole.detach().norm() > 0 for whole in (results[0][0], results[0][-1]))


def test_dropout_has_one_mask_of_the_context_in_a_step():
    model = copy.deepcopy(family("gpt2")).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    x, mask, labels = batch()
    values = []
    for _ in range(2):
        context = shared_context(model.transformer, x, mask=mask)
        loss_fn = aajr.lm_loss(context, head=model.lm_head, labels=context.suffix(labels))
        traj = aajr.ascend(
            loss_fn, context.x, radius=0.8, steps=2, mask=context.suffix(mask), module=model, step_size=0.3
        )
        assert torch.equal(loss_fn(traj.points[-1]), traj.losses[-1])
        values.append(traj.losses[0])
    assert not torch.equal(*values)


def test_the_check_leaves_no_trace():
    model = copy.deepcopy(family("gpt2")).train()
    x, _, _ = batch()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with aajr.coverage() as ran:
        context_module.check_split(SharedContext, model.transformer, x)
    assert torch.equal(torch.get_rng_state(), before) and not ran.entries
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
