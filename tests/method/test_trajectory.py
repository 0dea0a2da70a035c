"""trajectory_penalty against the independent oracle, step by step, in every form."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from assertions import assert_exact
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.testing import oracle

B, N, C, V, HIDDEN, T = 2, 4, 6, 9, 7, 3
MASK = torch.tensor([[True, True, True, False], [True, False, True, True]])
AGENTS = torch.tensor([[0, 0, 1, -1], [1, 1, 1, 0]])


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(C, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, V)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape))

    def hidden(self, x, bias=None):
        h = torch.tanh(self.up(x))
        mixed = h + h.mean(1, keepdim=True)  # tokens see each other
        return self.norm(mixed if bias is None else mixed + bias.unsqueeze(-1))

    def forward(self, x, bias=None):
        return self.head(self.hidden(x, bias))


def problem(scope="token", steps=T, size=0.3, **options):
    policy = Policy()
    x = torch.randn(B, N, C, dtype=torch.float64)
    labels = torch.randint(V, (B, N))
    loss = lambda z: nn.functional.cross_entropy(policy(z).transpose(1, 2), labels, reduction="none").sum(-1)
    options = (
        dict(radius=0.5, steps=steps, step_size=size, scope=scope, agents=AGENTS, keep_gradients=True)
        | options
    )
    return policy, x, labels, aajr.ascend(loss, x, **options)


def unit_by_hand(values, scope):
    """Norm 1 in every group, one group at a time."""
    actual = torch.zeros_like(values)
    for b in range(B):
        tokens = [[i] for i in range(N)]
        if scope == "sequence":
            tokens = [list(range(N))]
        elif scope == "agent":
            tokens = [[i for i in range(N) if AGENTS[b, i] == a] for a in range(2)]
        for group in tokens:
            part = values[b, group]
            if len(group) and part.abs().max() > 0:
                actual[b, group] = part / part.norm()
    return actual


def direction_by_hand(traj, t, kind):
    raw = {
        "ascent": traj.gradients[t],
        "displacement": traj.points[t + 1] - traj.points[t],
        "sign": traj.gradients[t].sign(),
    }[kind]
    return unit_by_hand(raw * (AGENTS >= 0).unsqueeze(-1), traj.scope)


def q_by_hand(policy, points, v, metric="fisher"):
    with oracle.oracle_mode():
        primal, tangents = oracle.jvp(policy, points, v)
    return oracle.metric_values(primal, tangents, metric)


def same_gradients(value, expected, leaves):
    ours = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, retain_graph=True, allow_unused=True)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        a, b = (torch.zeros_like(leaves[i]) if g is None else g for g in (a, b))
        assert_exact(a, b, f"gradient {i}", floor=1e-6)
    assert any(g is not None and g.abs().max() > 0 for g in theirs)


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
@pytest.mark.parametrize("direction", ["ascent", "displacement", "sign"])
@pytest.mark.parametrize("at", [None, "start", "mid", "end"])
def test_all_steps_directions_and_places(scope, direction, at):
    policy, x, _, traj = problem(scope)
    x.requires_grad_()
    pen, aux = aajr.trajectory_penalty(policy, x, traj, direction=direction, at=at, unit="token")
    terms = []
    for t in range(T):
        share = {None: 0.0, "start": 0.0, "mid": 0.5, "end": 1.0}[at]
        delta = (1 - share) * (traj.points[t] - x.detach()) + share * (traj.points[t + 1] - x.detach())
        terms.append(q_by_hand(policy, x + delta, direction_by_hand(traj, t, direction).unsqueeze(0)).mean())
    expected = sum(terms) / T
    assert_exact(pen, expected, "penalty")
    same_gradients(pen, expected, [x, *policy.parameters()])
    assert_exact(aux.q.squeeze(-1), torch.stack(terms).detach(), "q of every step")
    assert torch.equal(aux.steps, torch.arange(T).unsqueeze(-1).expand(T, B))
    assert torch.equal(aux.weights, torch.full((T,), 1 / T, dtype=torch.float64))


def test_last_step_and_weights():
    policy, x, _, traj = problem()
    each = [
        aajr.trajectory_penalty(policy, x, traj, weights=[float(t == s) for s in range(T)])[0]
        for t in range(T)
    ]
    assert len({p.item() for p in each}) == T
    for t in range(T):
        assert_exact(each[t], aajr.aligned_penalty(policy, traj.points[t], traj.directions[t]), f"step {t}")
    assert torch.equal(aajr.trajectory_penalty(policy, x, traj, steps="last")[0], each[-1])
    calls = []
    counted = lambda d: (calls.append(1), policy(d))[1]
    pen, aux = aajr.trajectory_penalty(counted, x, traj, weights=torch.tensor([3.0, 0.0, 1.0]))
    assert_exact(pen, (3 * each[0] + each[2]) / 4, "weighted")
    assert len(calls) == 2 and aux.steps[:, 0].tolist() == [0, 2] and aux.weights.tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    "options", [{}, {"unit": "sequence", "gamma": 0.5, "form": "hinge2"}, {"reduction": "sum"}]
)
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_a_random_step_is_unbiased(monkeypatch, weights, options):
    """Over all draws, weighted with their probabilities, value and gradient are those of all steps."""
    policy, x, _, traj = problem()
    chances = torch.tensor(weights or [1.0] * T, dtype=torch.float64)
    chances = chances / chances.sum()
    whole, _ = aajr.trajectory_penalty(policy, x, traj, weights=weights, **options)
    returned = []

    def drawn(probabilities, number, replacement, generator):
        assert_exact(probabilities, chances, "probabilities")
        assert number == B and replacement
        return torch.tensor(returned[-1])

    monkeypatch.setattr(torch, "multinomial", drawn)
    mean = 0.0
    for steps_now in itertools.product(range(T), repeat=B):
        returned.append(steps_now)
        pen, aux = aajr.trajectory_penalty(policy, x, traj, steps="random", weights=weights, **options)
        mean = mean + pen * chances[list(steps_now)].prod()
        assert aux.steps.tolist() == [list(steps_now)]
    assert_exact(mean, whole, "mean over all draws")
    same_gradients(mean, whole, list(policy.parameters()))


def test_random_steps_are_drawn_as_often_as_their_weights_say():
    _, x, _, traj = problem()
    weights, count = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    flat = lambda d: d.sum(-1, keepdim=True)
    for _ in range(300):
        _, aux = aajr.trajectory_penalty(
            flat, x, traj, steps="random", weights=weights, generator=g, metric="l2"
        )
        count += torch.bincount(aux.steps.flatten(), minlength=T)
    chi2 = ((count - 600 * weights).square() / (600 * weights)).sum()
    assert chi2 < 18.4  # 1 in 10,000 for two degrees of freedom; the seed is fixed
    again = [
        aajr.trajectory_penalty(
            flat, x, traj, steps="random", generator=torch.Generator().manual_seed(4), metric="l2"
        )
        for _ in range(2)
    ]
    assert torch.equal(again[0][1].steps, again[1][1].steps)


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
def test_one_direction_per_agent(scope):
    policy, x, _, traj = problem(scope)
    pen, aux = aajr.trajectory_penalty(policy, x, traj, per_agent=True, unit="token")
    expected = 0.0
    for t in range(T):
        parts = []
        for a in range(2):
            part = traj.gradients[t] * (a == AGENTS).unsqueeze(-1)
            parts.append(unit_by_hand(part, "token" if scope == "token" else "agent"))
        q = q_by_hand(policy, traj.points[t], torch.stack(parts))
        expected = expected + q.mean() / T
        assert_exact(aux.q[t], q.detach().mean((1, 2)), "q of every agent")
    assert_exact(pen, expected, "penalty")
    same_gradients(pen, expected, list(policy.parameters()))
    if scope != "sequence":  # then the joint direction is the sum of the agents'
        joint, _ = aajr.trajectory_penalty(lambda d: policy.up(d), x, traj, metric="l2")
        alone, _ = aajr.trajectory_penalty(lambda d: policy.up(d), x, traj, metric="l2", per_agent=True)
        assert_exact(joint, 2 * alone, "a map token by token")


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": MASK},
        {"gamma": 1.0, "form": "hinge"},
        {"gamma": 0.7, "mask": MASK, "unit": "sequence"},
        {"denominator": 5.0},
        {"per_agent": True, "mask": MASK, "metric": "logits"},
    ],
)
def test_several_points_in_one_forward(options, reduction, weights):
    policy, x, _, traj = problem()
    bias = torch.randn(B, N, dtype=torch.float64)
    if reduction != "mean" and "denominator" in options:
        options = {}
    options = dict(options, reduction=reduction, weights=weights, inputs={"bias": bias})
    calls = []
    counted = lambda d, bias: (calls.append(d.shape[0]), policy(d, bias))[1]
    one, statistics = aajr.trajectory_penalty(counted, x, traj, **options)
    assert calls == [B] * T
    for size, expected in ((2, [2 * B, B]), (3, [3 * B]), (9, [3 * B])):
        calls.clear()
        several, batched = aajr.trajectory_penalty(counted, x, traj, batch_steps=size, **options)
        assert calls == expected
        assert_exact(several, one, "penalty")
        probe = torch.rand_like(one)
        same_gradients((several * probe).sum(), (one * probe).sum(), list(policy.parameters()))
        for name in ("q", "q_max", "active", "weights"):
            assert_exact(getattr(batched, name), getattr(statistics, name), name)
    if reduction == "none":
        assert one.shape == (2 if "per_agent" in options else 1, B) + (() if "unit" in options else (N,))


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("form", ["squared", "hinge", "hinge2"])
def test_hinges_and_statistics(form, unit):
    policy, x, _, traj = problem()
    q = torch.stack([q_by_hand(policy, traj.points[t], traj.directions[t : t + 1])[0] for t in range(T)])
    units, keep = (q * MASK, MASK) if unit == "token" else ((q * MASK).sum(-1), MASK.any(-1))
    gamma = units[:, keep].median().sqrt().item() * 1.01
    units = units[:, keep]
    included = {
        "squared": (units - gamma**2).clamp(min=0),
        "hinge": (units.sqrt() - gamma).clamp(min=0),
        "hinge2": (units.sqrt() - gamma).clamp(min=0) ** 2,
    }[form]
    pen, aux = aajr.trajectory_penalty(policy, x, traj, gamma=gamma, form=form, unit=unit, mask=MASK)
    assert_exact(pen, included.mean(), "penalty")
    same_gradients(pen, included.mean(), list(policy.parameters()))
    above = (units > gamma**2).double().mean(1)
    assert 0 < above.mean() < 1
    assert_exact(aux.active.squeeze(-1), above, "active")
    assert_exact(aux.q.squeeze(-1), units.mean(1).detach(), "q")
    assert_exact(aux.q_max.squeeze(-1), units.amax(1).detach(), "largest q")
    assert (
        not any(v.requires_grad for v in dataclasses.asdict(aux).values() if isinstance(v, torch.Tensor))
        and aux.primal is None
    )


@pytest.mark.parametrize("batch_steps", [1, 3])
def test_the_adversarial_loss_comes_from_the_forward_at_the_last_point(batch_steps):
    policy, x, labels, traj = problem()
    calls = []
    hidden = lambda d: (calls.append(d.shape[0]), policy.hidden(d))[1]
    options = dict(at="end", head=policy.head, return_primal=True, batch_steps=batch_steps)
    pen, aux = aajr.trajectory_penalty(hidden, x, traj, labels=labels, **options)
    assert calls == ([B] * T if batch_steps == 1 else [2 * B, B])
    logits = policy(traj.points[-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_exact(aux.primal, loss, "loss")
    alone, _ = aajr.trajectory_penalty(policy.hidden, x, traj, at="end", head=policy.head)
    assert_exact(pen, alone, "penalty")
    same_gradients(aux.primal + 0.3 * pen, loss + 0.3 * alone, list(policy.parameters()))
    pen, aux = aajr.trajectory_penalty(policy, x, traj, steps="last", at="end", return_primal=True)
    assert_exact(aux.primal, logits, "logits")


def test_the_worst_point_with_the_step_that_led_there():
    policy, x, labels, traj = problem(steps=6)
    losses = traj.losses.clone()
    losses[0, 0] = losses[4, 1] = losses.max() + 1  # one row never gets above its start
    traj = dataclasses.replace(traj, losses=losses)
    worst = traj.worst_index
    assert worst.tolist() == [0, 4]
    pen, aux = aajr.trajectory_penalty(
        policy.hidden, x, traj, steps="worst", head=policy.head, labels=labels, return_primal=True
    )
    points = torch.stack([traj.points[worst[b], b] for b in range(B)])
    v = torch.stack([traj.directions[max(worst[b] - 1, 0), b] for b in range(B)])
    q = q_by_hand(policy, points, v.unsqueeze(0))
    loss = nn.functional.cross_entropy(policy(points).flatten(0, 1), labels.flatten())
    assert_exact(pen, q.mean(), "penalty")
    assert_exact(aux.primal, loss, "loss")
    same_gradients(pen + aux.primal, q.mean() + loss, list(policy.parameters()))
    assert aux.steps.tolist() == [[0, int(worst[1]) - 1]]


def test_gradient_against_finite_differences_of_the_penalty():
    policy, x, _, traj = problem()
    parameters = dict(policy.named_parameters()) | {"x": x}
    x.requires_grad_()
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    start = traj.points - traj.x

    def value():  # a point moves with the clean input: its perturbation is the constant
        moved = dataclasses.replace(traj, points=x.detach() + start)
        return aajr.trajectory_penalty(policy, x, moved, gamma=0.1, form="hinge2", at="mid", per_agent=True)[
            0
        ]

    gradients = torch.autograd.grad(value(), list(parameters.values()), allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions.values()) if g is not None)
    assert abs(oracle.finite_difference(value, parameters, directions) / slope.item() - 1) < 1e-7


def test_the_adversary_is_a_constant_and_a_zero_gradient_costs_nothing():
    policy, x, _, traj = problem()
    x.requires_grad_()
    pen, _ = aajr.trajectory_penalty(policy, x, traj)
    pen.backward()
    assert x.grad.abs().max() > 0 and traj.points.grad is None
    still = aajr.ascend(lambda z: 0 * z.flatten(1).sum(-1), x, radius=1.0, steps=2)
    pen, aux = aajr.trajectory_penalty(policy, x, still, gamma=0.1, form="hinge")
    assert pen == 0 and (aux.active == 0).all()
    assert all(
        g is None or (g == 0).all()
        for g in torch.autograd.grad(pen, list(policy.parameters()), allow_unused=True)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(steps="first"), ValueError, "steps must be one of all, last, random, worst, got 'first'"),
        (dict(direction="up"), ValueError, "direction must be one of"),
        (dict(at="middle"), ValueError, "at must be one of"),
        (dict(steps="worst", at="end"), ValueError, "at does not go with steps='worst'"),
        (dict(weights=[1.0]), ValueError, "weights must be 3 finite numbers >= 0"),
        (dict(weights=[1.0, -1.0, 0.0]), ValueError, "weights must be 3 finite numbers >= 0"),
        (dict(weights=[0.0, 0.0, 0.0]), ValueError, "with a positive sum"),
        (dict(weights=[1.0, math.nan, 0.0]), ValueError, "weights must be 3 finite numbers >= 0"),
        (dict(weights=[1.0, 1.0, 1.0], steps="last"), ValueError, "weights go with steps='all' or 'random'"),
        (dict(batch_steps=0), ValueError, "batch_steps must be an integer >= 1"),
        (dict(inputs=[1]), TypeError, "inputs must be a mapping"),
        (
            dict(inputs={"bias": torch.zeros(5, N)}),
            ValueError,
            "must have the batch of 2 as their first axis",
        ),
        (dict(x=torch.zeros(B, N, C)), ValueError, "x must be the clean input of the trajectory"),
        (dict(traj=None), TypeError, "traj must be a Trajectory, got NoneType: call ascend"),
        (dict(metric="kl"), ValueError, "metric must be one of"),
        (dict(colour="red"), TypeError, "colour"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_argument(change, error, message):
    policy, x, _, traj = problem()
    with pytest.raises(error, match=message) as raised:
        aajr.trajectory_penalty(**(dict(func=policy, x=x, traj=traj) | change))
    assert "\n" not in str(raised.value)


def test_agents_are_needed_for_their_directions():
    policy, x, _, _ = problem()
    traj = aajr.ascend(lambda z: z.flatten(1).sum(-1), x, radius=1.0, steps=1)
    with pytest.raises(ValueError, match="per_agent needs a trajectory with agents"):
        aajr.trajectory_penalty(policy, x, traj, per_agent=True)
