"""The baselines against dense Jacobians, singular values and finite differences of the penalties, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from method.paths import LABELS, B, V, output_loss, small_policy
from torch import nn
from torch.func import functional_call, jacrev, vmap

import aajr_kernels as aajr
from aajr_kernels.method import baselines
from aajr_kernels.method.baselines import METHODS, baseline_penalty, trajectory_baseline
from aajr_kernels.method.trajectory import Trajectory

N, H = 4, 0.3


@pytest.fixture
def policy() -> nn.Module:
    return small_policy(N, 6)


def unit(v):
    return v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1))


def problem():
    x = torch.randn(B, N, dtype=torch.float64)
    return x, unit(torch.randn(B, N, dtype=torch.float64))


def metric_matrix(z, metric):
    if metric == "l2":
        return torch.eye(V, dtype=z.dtype).expand(len(z), V, V)
    p = z.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def truth(method, net, x, u, metric):
    """The penalty of every row as the documentation states it, from dense Jacobians."""
    params = dict(net.named_parameters())

    def call(z):
        return functional_call(net, params, (z[None],))[0]

    def losses(z):
        return F.cross_entropy(vmap(call)(z), LABELS, reduction="none")

    j = vmap(jacrev(call))(x)
    m = metric_matrix(vmap(call)(x), metric)
    form = j.mT @ m @ j
    gradient = jacrev(lambda z: losses(z).sum())
    if method == "aligned":
        return torch.einsum("bi,bij,bj->b", u, form, u)
    if method == "frobenius":
        return form.diagonal(dim1=-2, dim2=-1).sum(-1)
    if method == "random":
        return form.diagonal(dim1=-2, dim2=-1).sum(-1) / N
    if method == "spectral":
        return torch.linalg.eigvalsh(form)[..., -1]
    if method == "input_gradient":
        return gradient(x).square().sum(1)
    if method == "cure":
        return (gradient(x + H * u) - gradient(x)).square().sum(1) / H**2
    change = (vmap(call)(x + H * u) - vmap(call)(x)) / H
    return torch.einsum("bi,bij,bj->b", change, m, change)


def difference_gradient(value, parameter, h=1e-5):
    """Central differences of a scalar, entry by entry; their error is about h² and eps / h, both below 1e-9."""
    actual = torch.zeros_like(parameter)
    flat, store = actual.view(-1), parameter.data.view(-1)
    for i in range(len(flat)):
        at = store[i].item()
        store[i] = at + h
        up = value().item()
        store[i] = at - h
        flat[i] = (up - value().item()) / (2 * h)
        store[i] = at
    return actual


def all_signs(monkeypatch):
    """Makes Hutchinson's draw every sign vector once: its mean is then its expectation."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=N)), dtype=torch.float64)
    monkeypatch.setattr(baselines, "_noise", lambda x, lead, generator: signs[:, None].expand(-1, *x.shape))
    return len(signs)


@pytest.mark.parametrize("metric", ["l2", "fisher"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_value_and_gradients_are_those_of_the_stated_penalty(method, metric, policy, monkeypatch):
    x, u = problem()
    options = dict(loss_fn=lambda x: output_loss(policy(x)), metric=metric, iterations=200, h=H)
    if method == "frobenius":
        options["samples"] = all_signs(monkeypatch)
    rows = baseline_penalty(method, policy, x, u, reduction="none", **options)
    with torch.no_grad():
        expected = truth(method, policy, x, u, metric)
    assert rows.shape == (1, B)
    assert_exact(rows[0], expected, method, tolerance=1e-9)
    mean = baseline_penalty(method, policy, x, u, **options)
    assert_exact(mean, expected.mean(), "mean", tolerance=1e-9)
    parameters = list(policy.parameters())
    grads = torch.autograd.grad(mean, parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            by_differences = difference_gradient(lambda: truth(method, policy, x, u, metric).mean(), p)
            got = torch.zeros_like(p) if g is None else g
            assert_exact(got, by_differences, f"gradient of {method}", tolerance=1e-7, floor=1e-3)
    assert max(g.abs().max() for g in grads if g is not None) > 1e-3


@pytest.mark.parametrize("method", ["frobenius", "random"])
def test_random_directions_are_unbiased(method, policy):
    x, _ = problem()
    samples = 20_000
    generator = torch.Generator().manual_seed(0)
    rows, v = baseline_penalty(
        *(method, policy, x),
        metric="l2",
        samples=samples,
        generator=generator,
        reduction="none",
        return_direction=True,
    )
    with torch.no_grad():
        expected = truth(method, policy, x, None, "l2")
        spread = aajr.aligned_penalty(policy, x, v, metric="l2", reduction="none").std(0)
    assert ((rows[0] - expected).abs() < 4 * spread / math.sqrt(samples)).all()
    assert (spread / expected > 0.1).all()  # single draws are far from it


def test_hutchinson_has_no_variance_on_a_diagonal_form():
    net = nn.Linear(N, N, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.diag(torch.arange(1.0, N + 1)))
    x, _ = problem()
    rows = baseline_penalty("frobenius", net, x, metric="l2", reduction="none")
    assert_exact(rows[0], torch.full((B,), 30.0), "frobenius")


def test_power_iteration_rises_to_the_singular_value_and_warm_starts(policy):
    x, _ = problem()
    with torch.no_grad():
        exact = truth("spectral", policy, x, None, "l2")
    start = torch.randn_like(x)
    values = [
        baseline_penalty("spectral", policy, x, metric="l2", iterations=k, start=start, reduction="none")[0]
        for k in range(12)
    ]
    assert all((b >= a * (1 - 1e-12)).all() for a, b in itertools.pairwise(values))
    assert (values[0] < 0.9 * exact).any() and (values[-1] <= exact * (1 + 1e-12)).all()
    _, v = baseline_penalty("spectral", policy, x, metric="l2", iterations=200, return_direction=True)
    again = baseline_penalty("spectral", policy, x, metric="l2", iterations=0, start=v, reduction="none")
    assert_exact(again[0], exact, "warm start", tolerance=1e-9)


def test_only_attackable_entries_are_moved(policy):
    x, _ = problem()
    mask = torch.tensor([True, False, True, False]).expand(B, N)
    with torch.no_grad():
        j = vmap(jacrev(lambda z: policy(z[None])[0]))(x) * mask.unsqueeze(1)
        top = torch.linalg.matrix_norm(j, 2).square()
    for method in ("random", "frobenius"):
        _, v = baseline_penalty(
            *(method, policy, x), attack_mask=mask, samples=2, return_direction=True, metric="l2"
        )
        assert (v[..., ~mask[0]] == 0).all() and (v[..., mask[0]] != 0).all()
    actual = baseline_penalty(
        *("spectral", policy, x), attack_mask=mask, iterations=200, metric="l2", reduction="none"
    )
    assert_exact(actual[0], top, "restricted spectral norm", tolerance=1e-9)
    loss_fn = lambda x: output_loss(policy(x))
    g = torch.autograd.functional.jacobian(lambda z: loss_fn(z).sum(), x) * mask
    actual = baseline_penalty("input_gradient", None, x, loss_fn=loss_fn, attack_mask=mask, reduction="none")
    assert_exact(actual[0], g.square().sum(1), "restricted gradient")


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
def test_random_directions_have_unit_norm_in_their_scope(scope):
    net = nn.Linear(N, V).double()
    x = torch.randn(2, 6, N, dtype=torch.float64)
    agents = torch.tensor([[0, 0, 1, 1, -1, 1], [1, 1, 1, 0, -1, -1]])
    options = dict(agents=agents, attack_mask=agents >= 0) if scope == "agent" else {}
    _, v = baseline_penalty(
        *("random", net, x), scope=scope, samples=3, return_direction=True, metric="l2", **options
    )
    square = v.square().sum(-1)
    if scope == "sequence":
        assert_exact(square.sum(-1), torch.ones(3, 2), "norms")
    elif scope == "token":
        assert_exact(square, torch.ones(3, 2, 6), "norms")
    else:
        for a in (0, 1):
            assert_exact((square * (agents == a)).sum(-1), torch.ones(3, 2), "norms")
        assert (square[:, agents < 0] == 0).all()


def test_units_forms_and_heads_are_those_of_the_aligned_penalty():
    body, last = nn.Linear(N, 6).double(), nn.Linear(6, V).double()
    net = nn.Sequential(body, nn.Tanh(), last)
    hidden = nn.Sequential(body, nn.Tanh())
    x = torch.randn(B, 2, N, dtype=torch.float64)
    u = unit(torch.randn_like(x))
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for options in (
        dict(unit="token", mask=mask),
        dict(unit="sequence", gamma=0.1, form="hinge2"),
        dict(reduction="sum", gamma=0.2),
    ):
        ours = baseline_penalty("aligned", net, x, u, scope="sequence", **options)
        assert_exact(
            ours, aajr.aligned_penalty(net, x, u, **options | {"unit": options.get("unit", "sequence")})
        )
    for method in ("aligned", "spectral", "finite_difference"):
        options = dict(scope="sequence", unit="token", mask=mask, iterations=50)
        start = dict(start=u) if method == "spectral" else {}
        plain = baseline_penalty(method, net, x, u, **options, **start)
        split = baseline_penalty(method, hidden, x, u, head=last, **options, **start)
        assert_exact(split, plain, method, tolerance=1e-9)
    options = dict(scope="sequence", unit="token", mask=torch.ones_like(mask))
    plain = baseline_penalty("finite_difference", net, x, u, **options)
    split = baseline_penalty("finite_difference", hidden, x, u, head=last, **options)
    assert_exact(split, plain, "a mask that leaves nothing out", tolerance=1e-9)


def test_a_metric_of_ones_own(policy):
    """An output of two parts: a categorical one and one with unit variance."""
    x, u = problem()

    def metric(y):
        return aajr.sensitivity(y[..., :3], "fisher") + aajr.sensitivity(y[..., 3:], "l2")

    j = vmap(jacrev(lambda z: policy(z[None])[0]))(x)
    p = policy(x)[:, :3].softmax(-1)
    m = torch.zeros(B, V, V, dtype=torch.float64)
    m[:, :3, :3] = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    m[:, 3:, 3:] = torch.eye(V - 3, dtype=torch.float64)
    form = j.mT @ m @ j
    aligned = baseline_penalty("aligned", policy, x, u, metric=metric, reduction="none")
    assert_exact(aligned[0], torch.einsum("bi,bij,bj->b", u, form, u), "aligned")
    spectral = baseline_penalty("spectral", policy, x, metric=metric, iterations=300, reduction="none")
    assert_exact(spectral[0], torch.linalg.eigvalsh(form)[:, -1], "spectral", tolerance=1e-8)
    difference = baseline_penalty("finite_difference", policy, x, u, metric=metric, h=1e-6, reduction="none")
    assert_exact(difference, aligned, "difference", tolerance=1e-5)


def test_dropout_has_one_mask_in_all_calls_of_a_measurement():
    net = nn.Sequential(nn.Linear(N, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, V)).double()
    x, u = problem()
    torch.manual_seed(3)
    exact = baseline_penalty("aligned", net, x, u, metric="l2")
    torch.manual_seed(3)
    difference = baseline_penalty("finite_difference", net, x, u, metric="l2", h=1e-6)
    assert_exact(difference, exact, "finite difference", tolerance=1e-4)


def test_gradients_of_parameters_are_off_only_while_directions_are_sought(policy):
    x, u = problem()
    loss_fn = lambda x: output_loss(policy(x))
    for method in METHODS:
        torch.manual_seed(1)
        plain = baseline_penalty(method, policy, x, u, loss_fn=loss_fn)
        torch.manual_seed(1)
        frozen = baseline_penalty(method, policy, x, u, loss_fn=loss_fn, module=policy)
        assert torch.equal(plain, frozen)
        a, b = (torch.autograd.grad(pen, policy[0].weight)[0] for pen in (plain, frozen))
        assert torch.equal(a, b)


def path(x, t=4) -> Trajectory:
    points = x + 0.3 * torch.randn(t + 1, *x.shape, dtype=x.dtype)
    directions = torch.stack([unit(torch.randn_like(x)) for _ in range(t)])
    fill = torch.zeros(t, B)
    return Trajectory(
        x=x,
        points=points,
        directions=directions,
        displacements=points[1:] - points[:-1],
        losses=torch.zeros(t + 1, B),
        gradient_norms=fill.unsqueeze(-1),
        step_sizes=fill,
        projected=fill.bool(),
        radius=1.0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_trajectory_averages_its_steps(method, policy):
    x, _ = problem()
    traj = path(x)
    loss_fn = lambda x: output_loss(policy(x))
    options = dict(loss_fn=loss_fn, metric="l2", iterations=2)
    generator = torch.Generator().manual_seed(5)
    total, aux = trajectory_baseline(
        method, policy, traj, weights=[1, 2, 0, 1], generator=generator, **options
    )
    generator.manual_seed(5)
    expected, start = 0.0, None
    for t, w in ((0, 0.25), (1, 0.5), (3, 0.25)):
        one, start = baseline_penalty(
            *(method, policy, traj.points[t], traj.directions[t]),
            generator=generator,
            start=start if method == "spectral" else None,
            return_direction=True,
            **options,
        )
        expected = expected + w * one
    assert_exact(total, expected, method)
    assert aux["steps"] == [0, 1, 3] and aux["penalties"].shape == (3,)
    assert_exact(total, torch.tensor([0.25, 0.5, 0.25]).double() @ aux["penalties"], "penalties")
    grads = torch.autograd.grad(total, policy[0].weight)[0]
    assert grads.abs().max() > 0
    last, aux = trajectory_baseline(method, policy, traj, steps="last", generator=generator, **options)
    assert aux["steps"] == [3] and last.shape == ()


def test_aligned_is_the_trajectory_penalty(policy):
    x, _ = problem()
    traj = path(x)
    for options in (
        {},
        {"weights": [1.0, 2.0, 0.0, 1.0]},
        {"gamma": 0.3, "form": "hinge"},
        {"steps": "last"},
    ):
        ours, _ = trajectory_baseline("aligned", policy, traj, **options)
        theirs, _ = aajr.trajectory_penalty(policy, x, traj, unit="sequence", **options)
        assert_exact(ours, theirs, str(options))


def test_one_random_step_is_unbiased(policy):
    x, _ = problem()
    traj = path(x)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    full, _ = trajectory_baseline("aligned", policy, traj, weights=weights, metric="l2")
    draws = [
        trajectory_baseline(
            "aligned", policy, traj, steps="random", weights=weights, generator=generator, metric="l2"
        )
        for _ in range(600)
    ]
    counts = torch.zeros(4)
    for _, aux in draws:
        counts[aux["steps"][0]] += 1
    assert counts[2] == 0
    # four standard deviations of a binomial count
    assert ((counts - 600 * weights / 4).abs() <= 4 * (600 * weights / 4 * (1 - weights / 4)).sqrt()).all()
    values = torch.stack([penalty.detach() for penalty, _ in draws])
    assert (values.mean() - full).abs() < 4 * values.std() / math.sqrt(600)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("ridge", {}, "method must be one of aligned"),
        ("aligned", {"u": None}, "u must be given for method 'aligned'"),
        ("cure", {"loss_fn": None}, "loss_fn must be given for method 'cure'"),
        ("random", {"func": None}, "func must be given for method 'random'"),
        ("aligned", {"u": torch.zeros(1, N, dtype=torch.float64)}, "u must have the shape of x"),
        ("spectral", {"start": torch.zeros(1, N, dtype=torch.float64)}, "start must have the shape of x"),
        ("random", {"samples": 0}, "samples must be an integer >= 1"),
        ("spectral", {"iterations": -1}, "iterations must be an integer >= 0"),
        ("cure", {"h": 0.0}, "h must be a positive number"),
        ("aligned", {"x": torch.zeros(3)}, "x must be a plain tensor"),
        ("input_gradient", {"loss_fn": lambda x: x.sum()}, "loss_fn must return one loss per batch row"),
        ("input_gradient", {"loss_fn": lambda x: x.detach().sum(1)}, "does not depend on its input"),
    ],
)
def test_bad_arguments(method, change, message, policy):
    x, u = problem()
    arguments = dict(func=policy, x=x, u=u, loss_fn=lambda x: output_loss(policy(x))) | change
    with pytest.raises(ValueError, match=message):
        baseline_penalty(method, **arguments)


def test_bad_arguments_of_a_trajectory(policy):
    traj = path(problem()[0])
    with pytest.raises(ValueError, match="steps must be one of all, last, random"):
        trajectory_baseline("aligned", policy, traj, steps="first")
    with pytest.raises(ValueError, match="weights must be 4 finite numbers"):
        trajectory_baseline("aligned", policy, traj, weights=[1, 2])
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        trajectory_baseline("aligned", policy, traj, reduction="none")


@pytest.mark.parametrize("method", ["random", "frobenius", "spectral"])
def test_every_call_draws_a_direction_of_its_own(policy, method):
    """Without a generator they come from torch's own, which a call leaves advanced."""
    x = torch.randn(2, 3, 4)
    options = dict(metric="l2", iterations=0, return_direction=True)
    state = torch.get_rng_state()
    (_, first), (_, second) = (baseline_penalty(method, torch.tanh, x, **options) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    _, again = baseline_penalty(method, torch.tanh, x, **options)
    assert torch.equal(first, again)


def test_the_spectral_norm_is_that_of_the_outputs_inside_the_mask():
    """The token left out has the largest one."""
    w, scale = torch.randn(V, N, dtype=torch.float64), torch.tensor([[1.0], [2.0], [9.0]]).double()
    x, mask = torch.randn(B, 3, N, dtype=torch.float64), torch.tensor([True, True, False]).expand(B, 3)
    options = dict(metric="logits", mask=mask, iterations=30, reduction="none")
    exact = torch.full((1, B), (2.0 * torch.linalg.svdvals(w)[0]).item() ** 2, dtype=torch.float64)
    logits = baseline_penalty("spectral", lambda d: (d * scale) @ w.t(), x, **options)
    streamed = baseline_penalty("spectral", lambda d: d * scale, x, head=aajr.LMHead(w), **options)
    for penalty in (logits, streamed):
        assert_exact(penalty, exact, tolerance=1e-6)
