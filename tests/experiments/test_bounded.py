"""Training at a bound: quantities of the methods against derivatives of torch, what λ follows, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from aajr_kernels.method import baseline_penalty
from experiments import bounded
from experiments.digits.data import Split, load
from experiments.digits.training import Sine, inner_ascent, make_policy

CONFIG = {
    "width": 8,
    "epochs": 12,
    "batch": 32,
    "learning_rate": 0.03,
    "radius": 0.5,
    "inner": {"steps": 3, "step": 0.5},
    "quantile": 0.75,
    "controller": {"rate": 0.2, "window": 90, "weight": 1.0, "span": 50.0},
}


def scene(unit: type[torch.nn.Module] = torch.nn.GELU):
    """A float64 policy and an ascent on seven digits."""
    policy = make_policy(9, 3, unit).double()
    images = load(5, (7, 1, 1)).train
    part = Split(images.x.double(), images.y, images.u.double())
    return policy, part, inner_ascent(CONFIG, policy, part, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("unit", [torch.nn.GELU, Sine])
def test_the_jacobian_is_that_of_torch(unit):
    policy, part, _ = scene(unit)
    expected = torch.stack([torch.func.jacrev(policy)(x) for x in part.x])
    torch.testing.assert_close(bounded.jacobian(policy, part.x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", bounded.METHODS)
def test_quantities_and_their_gradients(method):
    """Against the singular values of the Jacobian by torch, differentiated by torch; and our own exact penalty."""
    policy, _, traj = scene()
    q = bounded.measure(method, policy, traj)
    points, directions = traj.points[:-1].flatten(0, 1), traj.directions.flatten(0, 1)
    weights = torch.linspace(0.5, 2.0, len(points), dtype=torch.float64)
    parameters = dict(policy.named_parameters())

    def oracle(values):
        rows = torch.func.vmap(torch.func.jacrev(lambda x: torch.func.functional_call(policy, values, (x,))))(
            points
        )
        if method == "aligned":
            return (rows @ directions.unsqueeze(-1)).square().sum((1, 2))
        if method == "frobenius":
            return rows.square().sum((1, 2))
        if method == "spectral":
            return torch.linalg.svdvals(rows)[:, 0].square()
        slope = torch.linspace(-4, 4, 100_001, dtype=torch.float64)
        constant = torch.func.vmap(torch.func.grad(torch.nn.functional.gelu))(slope).max()
        norms = [torch.linalg.svdvals(values[f"{layer}.weight"])[0] for layer in (0, 2, 4)]
        return (constant**2 * norms[0] * norms[1] * norms[2]).square().expand(len(points))

    tolerance = dict(rtol=1e-7, atol=1e-9) if method == "layer_product" else dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(q, oracle(parameters), **tolerance)
    ours = torch.autograd.grad((weights * q).sum(), list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(
        (weights * oracle(parameters)).sum(), list(parameters.values()), allow_unused=True
    )
    for name, a, b in zip(parameters, ours, theirs):
        if a is None or b is None:
            # the last bias shifts no derivative; those of the product are its weights'
            assert (a is None or not a.any()) and (b is None or not b.any()), name
        else:
            torch.testing.assert_close(a, b, **tolerance)
    if method == "spectral":
        exact = baseline_penalty(
            *("spectral", policy, points), metric="l2", iterations="exact", reduction="none", module=policy
        )
        torch.testing.assert_close(q, exact.flatten(), rtol=1e-9, atol=1e-11)


def test_what_is_bounded_bounds_the_aligned_quantity():
    policy, _, traj = scene()
    along, top, all_of_them, product = (bounded.measure(m, policy, traj) for m in bounded.METHODS)
    assert (along <= top * (1 + 1e-12)).all() and (top <= all_of_them).all() and (top <= product).all()
    with pytest.raises(ValueError, match="method must be one of aligned, spectral"):
        bounded.measure("cure", policy, traj)


def test_quantile_of():
    values = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    assert [bounded.quantile_of(values, share) for share in (0.25, 0.5, 0.51, 1.0)] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("method", ["aligned", "layer_product"])
def test_a_bound_that_binds_lowers_what_it_bounds(method):
    """The quantile of the validation units falls by a quarter where γ is at half of it."""
    digits = load(7, (160, 64, 1))
    free, none = bounded.train(CONFIG, 2, digits, "none")
    assert none is None
    generator = torch.Generator().manual_seed(0)
    quantile = lambda policy: bounded.quantile_of(
        bounded.roots(CONFIG, policy, digits.validation, generator, method)[0], CONFIG["quantile"]
    )
    gamma, seen = 0.5 * quantile(free), []
    held, multiplier = bounded.train(
        *(CONFIG, 2, digits, method, gamma), on_step=lambda step, at: seen.append(at.facts.get("multiplier"))
    )
    assert len(seen) == CONFIG["epochs"] * 5 and multiplier.facts["multiplier"] == seen[-1] > 0
    assert quantile(held) < quantile(free) / 1.3


def test_minimax_training_lowers_the_loss_under_attack():
    digits = load(7, (160, 40, 1))
    losses = []
    for mix in (0.0, 3.0):
        policy, _ = bounded.train(CONFIG | {"epochs": 6}, 2, digits, "none", mix=mix)
        traj = inner_ascent(CONFIG, policy, digits.train, torch.Generator().manual_seed(1))
        losses.append(traj.losses[-1].mean().item())
    assert losses[1] < losses[0]


def test_lambda_follows_validation_images_and_nothing_else_depends_on_them():
    digits = load(7, (64, 40, 1))
    seen = digits.validation
    others = replace(digits, validation=Split(1 - seen.x, seen.y, seen.u))
    start = make_policy(CONFIG["width"], 2)
    (roots,) = bounded.roots(CONFIG, start, digits.train, torch.Generator().manual_seed(0), "aligned")
    gamma, ends = bounded.quantile_of(roots, 0.75), {}
    for followed in ("validation", "training"):
        for name, parts in (("one", digits), ("other", others)):
            policy, _ = bounded.train(CONFIG | {"epochs": 3}, 2, parts, "aligned", gamma, followed=followed)
            ends[followed, name] = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.equal(ends["training", "one"], ends["training", "other"])
    assert not torch.equal(ends["validation", "one"], ends["validation", "other"])
