"""The method with random shapes, masks, K, forms and required gradients, against the formulas of its documentation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from assertions import assert_exact, assert_exact_gradients
from fuzz.examples import fuzzed
from hypothesis import strategies as st
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels.testing import formulas, oracle

BATCH = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def randn(data: Any, *shape: int) -> Tensor:
    seed = data.draw(st.integers(0, 2**16), f"seed of {shape}")
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn_mask(data: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Bool or 0 and 1 of any integer dtype; now and then nothing is included."""
    kind = data.draw(st.sampled_from((None, torch.bool, torch.long, torch.uint8)), "mask")
    if kind is None:
        return None
    count = math.prod(shape)
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), "included")
    return torch.tensor(flags).reshape(shape).to(kind)


def summed(q: Tensor, keep: Tensor, options: dict[str, Any]) -> Tensor:
    """The penalty of q ``[K, *batch]`` as the documentation of `aligned_penalty` words it."""
    if options["unit"] == "sequence":
        q = (q * keep).flatten(2).sum(-1) if q.dim() > 2 else q * keep
        keep = keep.flatten(1).any(1) if keep.dim() > 1 else keep
    gamma, form = options["gamma"], options["form"]
    if form == "squared":
        value = q if gamma is None else F.relu(q - gamma**2)
    else:
        excess = F.relu(q.clamp(min=1e-300).sqrt() - gamma)
        value = torch.where(q > 0, excess if form == "hinge" else excess**2, 0.0)
    value = value * keep
    if options["reduction"] == "none":
        return value
    if options["reduction"] == "sum":
        return value.sum()
    count = options.get("denominator") or max(int(keep.sum()), 1)
    return value.sum() / (len(value) * count)


@fuzzed("random method", quick=25, full=1500)
def test_a_penalty_is_that_of_its_formula(data):
    batch, size, hidden, words = data.draw(BATCH, "batch"), *(data.draw(st.integers(1, 6)) for _ in range(3))
    count = data.draw(st.sampled_from((None, 1, 2, 3)), "K")
    x, v = randn(data, *batch, size), randn(data, *(() if count is None else (count,)), *batch, size)
    if data.draw(st.booleans(), "a zero direction"):
        v[..., :1, :] = 0
    leaves = {
        "x": x,
        "v": v,
        "first": randn(data, hidden, size),
        "weight": randn(data, words, hidden),
        "bias": randn(data, words),
    }
    needed = [name for name in leaves if data.draw(st.booleans(), f"gradient of {name}")]
    options: dict[str, Any] = {
        "metric": data.draw(st.sampled_from(oracle.METRICS), "metric"),
        "unit": data.draw(st.sampled_from(("token", "sequence")), "unit"),
        "reduction": data.draw(st.sampled_from(("mean", "sum", "none")), "reduction"),
        "form": data.draw(st.sampled_from(("squared", "hinge", "hinge2")), "form"),
    }
    gammas = st.sampled_from((0.0, 0.3, 2.0))
    options["gamma"] = data.draw(gammas if options["form"] != "squared" else st.none() | gammas, "gamma")
    if options["reduction"] == "mean" and data.draw(st.booleans(), "denominator"):
        options["denominator"] = data.draw(st.sampled_from((1, 7.5)), "denominator")
    mask = drawn_mask(data, batch)
    keep = torch.ones(batch, dtype=torch.bool) if mask is None else mask.bool()
    streamed = data.draw(st.booleans(), "head")
    labels = None
    if streamed and data.draw(st.booleans(), "labels"):
        labels = data.draw(
            st.lists(st.sampled_from((-100, *range(words))), min_size=keep.numel(), max_size=keep.numel()),
            "labels",
        )
        labels = torch.tensor(labels).reshape(batch)
    cap = data.draw(st.sampled_from((None, 2.0)), "softcap") if streamed else None

    def own() -> dict[str, Tensor]:
        return {name: t.clone().requires_grad_(name in needed) for name, t in leaves.items()}

    def gradients(result: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor | None]:
        wanted = [of[name] for name in needed]
        if not wanted or not result.requires_grad:
            return dict.fromkeys(needed)
        return dict(zip(needed, torch.autograd.grad(result, wanted, allow_unused=True)))

    ours = own()
    policy = lambda z: torch.tanh(F.linear(z, ours["first"]))
    head = aajr.LMHead(ours["weight"], ours["bias"], softcap=cap)
    func, given = (
        (policy, {"head": head, "labels": labels}) if streamed else (lambda z: head.logits(policy(z)), {})
    )
    penalty, primal = aajr.aligned_penalty(
        func, ours["x"], ours["v"], mask=mask, return_primal=True, **given, **options
    )
    theirs = own()
    with oracle.oracle_mode():
        directions = theirs["v"] if count is not None else theirs["v"].unsqueeze(0)
        inner = lambda z: torch.tanh(z @ theirs["first"].mT)
        outer = lambda h: formulas.logits(h, theirs["weight"], theirs["bias"], softcap=cap)
        of_hidden = streamed and options["metric"] == "l2"
        z, z_tan = oracle.jvp(inner if of_hidden else lambda a: outer(inner(a)), theirs["x"], directions)
        expected = summed(oracle.metric_values(z, z_tan, options["metric"]), keep, options)
        if labels is not None:
            losses = F.cross_entropy(
                outer(inner(theirs["x"])).reshape(-1, words), labels.reshape(-1), reduction="none"
            )
            counted = int((labels != -100).sum())
            if options["unit"] == "token":
                counted = options.get("denominator") or counted
            output = losses.sum() / max(counted, 1)
        else:
            output = inner(theirs["x"]) if streamed else outer(inner(theirs["x"]))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    assert_exact(penalty, expected, "penalty", floor=1e-9)
    assert_exact(primal, output, "primal", floor=1e-9)
    pair = (penalty * weights).sum() + primal.sum(), (expected * weights).sum() + output.sum()
    received, right = gradients(pair[0], ours), gradients(pair[1], theirs)
    zeros = {name: torch.zeros_like(leaves[name]) for name in needed}
    assert_exact_gradients(
        *({name: zeros[name] if g is None else g for name, g in each.items()} for each in (received, right))
    )
    assert all(t.grad is None for t in ours.values())


def group_of(x: Tensor, scope: str, agents: Tensor | None) -> Tensor:
    """The group of every token ``[B, ...]``, as an index; groups of different rows differ."""
    tokens = x[..., 0]
    if scope == "token":
        return torch.arange(tokens.numel()).reshape(tokens.shape)
    rows = torch.arange(len(x)).reshape(-1, *(1,) * (tokens.dim() - 1)).expand_as(tokens)
    return rows if scope == "sequence" else rows * 10 + agents


def largest_entries(x: Tensor, groups: Tensor, norm: str) -> Tensor:
    """Euclidean or largest norm of every token's group ``[B, ..., 1]``."""
    result = torch.zeros_like(x[..., :1])
    for index in groups.unique():
        part = x[groups == index]
        result[groups == index] = part.abs().max() if norm == "linf" else part.norm()
    return result


@fuzzed("random method", quick=15, full=1000)
def test_an_ascent_is_projected_steps(data):
    rows, *axes = data.draw(BATCH.filter(lambda shape: len(shape) > 1 or shape[0] > 0), "batch")
    size, steps = data.draw(st.integers(1, 4), "size"), data.draw(st.integers(1, 4), "steps")
    x, target = randn(data, rows, *axes, size), randn(data, rows, *axes, size)
    scope = data.draw(st.sampled_from(("sequence", "token", "agent")), "scope")
    agents = None
    keep = torch.ones(x.shape[:-1], dtype=torch.bool)
    if scope == "agent":
        draws = data.draw(
            st.lists(st.integers(-1, 2), min_size=keep.numel(), max_size=keep.numel()), "agents"
        )
        agents = torch.tensor(draws).reshape(keep.shape)
        keep &= agents >= 0
    mask = drawn_mask(data, tuple(keep.shape))
    keep = keep if mask is None else keep & mask.bool()
    if not keep.any():
        return
    norm, step = data.draw(st.sampled_from(("l2", "linf"))), data.draw(
        st.sampled_from(("normalized", "raw", "sign"))
    )  # fmt: skip
    radius = data.draw(st.sampled_from((0.05, 1.0, 1e4)), "radius")
    automatic = data.draw(st.booleans(), "auto")
    step_size = "auto" if automatic else data.draw(st.sampled_from((0.01, 0.4, 3.0)), "step size")

    def loss(z: Tensor) -> Tensor:
        return (torch.sin(z) * target + 0.3 * z * z.roll(1, -1)).flatten(1).sum(-1)

    trajectory = aajr.ascend(
        loss, x, radius=radius, steps=steps, step_size=step_size, step=step, norm=norm, scope=scope,
        agents=agents, mask=mask, keep_gradients=True,
    )  # fmt: skip
    groups = group_of(x, scope, agents)
    delta = torch.zeros_like(x)
    for t in range(steps + 1):
        point = (x + delta).requires_grad_()
        losses = loss(point)
        (gradient,) = torch.autograd.grad(losses.sum(), point)
        gradient = gradient * keep.unsqueeze(-1)
        assert_exact(trajectory.points[t], point.detach(), f"point {t}")
        assert_exact(trajectory.losses[t], losses.detach(), f"losses {t}")
        assert_exact(trajectory.gradients[t], gradient, f"gradient {t}", floor=1e-9)
        if t == steps:
            break
        size_of = largest_entries(gradient, groups, "l2")
        unit = torch.where(size_of > 0, gradient / size_of.clamp(min=1e-300), 0.0)
        direction = {"normalized": unit, "raw": gradient, "sign": gradient.sign()}[step]
        if automatic:
            moved = trajectory.displacements[t]
            rise = trajectory.losses[t + 1] - losses.detach()
            promised = 0.5 * (gradient * moved).flatten(1).sum(-1)
            assert (rise >= promised - 1e-12 * (1 + losses.detach().abs())).all(), (
                "the loss rises by half the slope"
            )
        else:
            end = delta + step_size * direction
            sizes = largest_entries(end, groups, norm)
            if norm == "linf":
                end = end.clamp(-radius, radius)
            else:
                end = torch.where(sizes > radius, end * radius / sizes.clamp(min=1e-300), end)
            moved = end - delta
        delta = delta + moved
        assert not delta[~keep].any(), "a masked token moved"
        assert (largest_entries(delta, groups, norm) <= radius * (1 + 1e-12)).all(), "outside the ball"


@fuzzed("random method", quick=10, full=500)
def test_directions_have_norm_one(data):
    shape = (*data.draw(BATCH, "batch"), data.draw(st.integers(1, 5), "size"))
    scope = data.draw(st.sampled_from(("token", "sequence")), "scope")
    g = randn(data, *shape) * data.draw(st.sampled_from((1e-300, 1e-20, 1.0, 1e20, 1e300)), "scale")
    missing = data.draw(st.integers(0, len(shape) - 2), "axes that the mask lacks")
    mask = drawn_mask(data, shape[missing:-1])
    keep = torch.ones(shape[:-1], dtype=torch.bool) if mask is None else mask.bool().expand(shape[:-1])
    g[~keep] = math.nan
    unit = aajr.normalize(g, scope, mask)
    assert unit.isfinite().all() and not unit[~keep].any()
    axes = (-1,) if scope == "token" or g.dim() <= 2 else (-2, -1)
    sizes = unit.square().sum(axes)
    some = keep if len(axes) == 1 else keep.any(-1)
    assert torch.allclose(sizes, some.double(), atol=1e-12)
    assert (unit[keep] * g[keep]).ge(0).all()
