"""stability_report against dense Hessians, Jacobians and singular values in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_exact
from method.paths import LABELS, B, N, V, output_loss, problem, steps_of
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method import probes
from aajr_kernels.method.stability import stability_report, step_condition
from aajr_kernels.method.trajectory import Trajectory


def hessian(loss_fn, p, row):
    def one(z):
        return loss_fn(torch.cat([p[:row], z[None], p[row + 1 :]]))[row]

    return torch.autograd.functional.hessian(one, p[row])


def unit(v):
    return v / v.norm()


@pytest.mark.parametrize("samples", [2, 5])
def test_kappas_are_the_largest_curvatures_of_the_dense_hessian(policy, samples):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 2.0)
    report = stability_report(loss_fn, x, traj, samples=samples)
    expected, positive, slopes = torch.zeros(3, 4, B).double()
    for t in range(4):
        for b in range(B):
            delta = traj.displacements[t, b]
            d = unit(delta)
            for j in range(samples):
                p = traj.points[t] + j / (samples - 1) * traj.displacements[t]
                along = d @ hessian(loss_fn, p, b) @ d
                expected[t, b] = max(expected[t, b], -along)
                positive[t, b] = max(positive[t, b], along)
            p = traj.points[t].clone().requires_grad_()
            slopes[t, b] = torch.autograd.grad(loss_fn(p)[b], p)[0][b] @ delta
    assert (expected > 0).any() and (expected == 0).any()  # both kinds of curvature occur
    assert_exact(report.kappa, expected, "kappa")
    assert (positive > 0).any() and (positive == 0).any()
    assert_exact(report.kappa_positive, positive, "positive kappa")
    assert report.summary()["kappa_positive_max"] == pytest.approx(positive.max().item())
    assert_exact(report.slopes, slopes, "slopes")
    assert_exact(report.displacement_norms, traj.displacements.norm(dim=-1), "displacement norms")
    held = step_condition(expected, traj.displacements.norm(dim=-1), slopes)
    assert torch.equal(report.violated, ~held)
    assert report.violated.any() and held.any()
    assert torch.equal(report.gains, traj.losses[1:] - traj.losses[:-1])


def test_differences_of_gradients_converge_to_the_mean_curvature(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.5)
    exact = stability_report(loss_fn, x, traj, samples=65)
    difference = stability_report(loss_fn, x, traj, samples=65, curvature="difference")
    # a mean over 1/64 of the segment lies above its minimum by at most the change of the curvature over it
    assert (difference.kappa <= exact.kappa * (1 + 1e-9) + 1e-12).all()
    assert (exact.kappa - difference.kappa).abs().max() < 0.05 * exact.kappa.max()
    # the largest value between two samples lies above both by O(1/64²)
    assert (difference.kappa_positive <= exact.kappa_positive * (1 + 1 / 64**2) + 1e-12).all()
    error = (exact.kappa_positive - difference.kappa_positive).abs().max()
    assert error < 0.05 * exact.kappa_positive.max()
    assert_exact(difference.slopes, exact.slopes, "slopes")


def test_differences_are_exact_on_a_quadratic():
    h = torch.randn(B, N, N, dtype=torch.float64)
    h = h + h.mT
    loss_fn = lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, h, x)
    x = torch.randn(B, N, dtype=torch.float64)
    traj = steps_of(loss_fn, x, 0.3)
    d = traj.displacements / traj.displacements.norm(dim=-1, keepdim=True)
    expected = (-torch.einsum("tbi,bij,tbj->tb", d, h, d)).clamp(min=0)
    assert (expected > 0).any()
    for samples in (2, 4):
        report = stability_report(loss_fn, x, traj, samples=samples, curvature="difference")
        assert_exact(report.kappa, expected, "kappa")


def test_a_linear_loss_has_no_curvature_and_no_largest_step():
    w = torch.randn(N, dtype=torch.float64)
    x = torch.randn(B, N, dtype=torch.float64)
    loss_fn = lambda x: x @ w
    report = stability_report(loss_fn, x, steps_of(loss_fn, x, 0.3))
    assert (report.kappa == 0).all() and torch.isinf(report.eta_max).all()
    assert not report.violated.any() and not report.non_monotone.any()
    assert report.summary()["eta_max_smallest"] == math.inf
    assert report.to_dict()["summary"]["eta_max_smallest"] is None


@pytest.mark.parametrize("step", ["raw", "normalized", "sign"])
def test_eta_max_is_where_an_unprojected_step_on_a_quadratic_stops_gaining(step):
    h = -torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64))
    loss_fn = lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, h, x)
    x = torch.randn(B, N, dtype=torch.float64)
    torch.manual_seed(1)
    small = steps_of(loss_fn, x, 0.01, t=1, step=step)
    bound = stability_report(loss_fn, x, small).eta_max[0]
    g = small.points[0] @ h
    move = {"raw": g, "normalized": g / g.norm(dim=1, keepdim=True), "sign": g.sign()}[step]
    for factor, gains in ((0.999, True), (1.001, False)):  # on a quadratic the bound is sharp
        after = loss_fn(small.points[0] + factor * bound.unsqueeze(1) * move)
        assert ((after > small.losses[0]) == gains).all()


def test_eta_max_of_projected_steps():
    x = torch.randn(B, 4, N, dtype=torch.float64)
    loss_fn = lambda x: -0.5 * x.square().flatten(1).sum(1)  # curvature -1 in every direction

    def ball(delta):
        return delta / delta.flatten(1).norm(dim=1).reshape(-1, 1, 1).clamp(min=0.2) * 0.2

    norms = torch.rand(4, B, 4, dtype=torch.float64) + 0.5
    norms[:, :, 2] = 0  # a token that may not be attacked does not move
    traj = steps_of(loss_fn, x, 1.0, project=ball, step="normalized")
    assert traj.projected.any()
    values = vars(traj) | {"gradient_norms": norms, "scope": "token"}
    report = stability_report(loss_fn, x, Trajectory(**values))
    smallest = norms[:, :, [0, 1, 3]].amin(-1)
    here = report.projected & report.moved
    assert_exact(report.eta_max[here], 2 * smallest[here], "eta_max")
    sign = stability_report(loss_fn, x, Trajectory(**(values | {"step": "sign"})))
    assert torch.isnan(sign.eta_max[here]).all()
    raw = stability_report(loss_fn, x, Trajectory(**(values | {"step": "raw"})))
    assert_exact(raw.eta_max[here], torch.full_like(smallest, 2.0)[here], "eta_max")


def test_two_starts_separate_by_the_powers_of_a_quadratic():
    h = torch.randn(B, N, N, dtype=torch.float64)
    h = h + h.mT
    loss_fn = lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, h, x)
    x, offset = torch.randn(2, B, N, dtype=torch.float64)
    traj = steps_of(loss_fn, x, 0.3)
    report = stability_report(loss_fn, x, traj, nearby=offset)
    step = torch.eye(N, dtype=torch.float64) + 0.3 * h
    apart = [offset]
    for _ in range(4):
        apart.append(torch.einsum("bij,bj->bi", step, apart[-1]))
    norms = torch.stack(apart).norm(dim=-1)
    assert_exact(report.expansion, norms[1:] / norms[:-1], "expansion")
    assert report.summary()["expansion"] == pytest.approx(report.expansion.mean().item())
    values, vectors = torch.linalg.eigh(h)
    top = stability_report(loss_fn, x, traj, nearby=0.1 * vectors[:, :, -1], curvature="none").expansion
    assert_exact(top, (1 + 0.3 * values[:, -1]).abs().expand(4, B), "along an eigenvector", tolerance=1e-9)
    # a drawn offset has the length that was asked for; a linear loss keeps the distance
    generator = torch.Generator().manual_seed(3)
    linear = lambda x: x @ torch.arange(1.0, N + 1, dtype=torch.float64)
    flat = stability_report(
        *(linear, x, steps_of(linear, x, 0.3, step="normalized")), nearby=0.01, generator=generator
    )
    assert_exact(flat.expansion, torch.ones(4, B), "of a linear loss", tolerance=1e-9)
    assert generator.get_state().ne(torch.Generator().manual_seed(3).get_state()).any()


@pytest.mark.parametrize("step", ["raw", "normalized", "sign"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_two_starts_in_a_ball(step, scope):
    """Against two ascents from those starts, moved into the ball by hand; tokens that stay put do not separate."""
    net = nn.Sequential(nn.Linear(N, 7), nn.Tanh(), nn.Linear(7, V)).double()
    x, offset = torch.randn(2, B, 4, N, dtype=torch.float64)
    loss_fn = lambda x: output_loss(net(x).mean(1))
    mask = torch.tensor([[1, 1, 0, 1]] * B)
    options = dict(radius=0.5, steps=3, step_size=0.4, step=step, scope=scope, mask=mask)
    traj = aajr.ascend(loss_fn, x, **options)
    report = stability_report(loss_fn, x, traj, nearby=0.1 * offset)
    assert report.projected.any() or step == "raw"
    delta = 0.1 * offset * mask.unsqueeze(-1)
    axes = (2,) if scope == "token" else (1, 2)

    def inside(delta):
        norm = delta.norm(dim=axes, keepdim=True)
        return delta * (0.5 / norm.clamp(min=0.5))

    delta, expected = inside(delta), []
    for t in range(3):
        before = (x + delta - traj.points[t]).flatten(1).norm(dim=1)
        p = (x + delta).requires_grad_()
        g = torch.autograd.grad(loss_fn(p).sum(), p)[0] * mask.unsqueeze(-1)
        size = g.norm(dim=axes, keepdim=True)
        move = {"raw": g, "normalized": g / size.where(size > 0, 1.0), "sign": g.sign()}[step]
        delta = inside(delta + 0.4 * move)
        expected.append((x + delta - traj.points[t + 1]).flatten(1).norm(dim=1) / before)
    assert_exact(report.expansion, torch.stack(expected), "expansion", tolerance=1e-9)


def test_steps_that_cannot_be_repeated_are_refused(policy):
    loss_fn, x = problem(policy)
    box = lambda delta: delta.clamp(-0.1, 0.1)
    traj = aajr.ascend(loss_fn, x, radius=1.0, steps=3, step_size=0.5, project=box)
    with pytest.raises(ValueError, match="lead elsewhere .*project="):
        stability_report(loss_fn, x, traj, nearby=0.05)
    report = stability_report(loss_fn, x, traj, nearby=0.05, project=box)
    assert report.expansion[0].isfinite().all()  # later steps may end in one corner of the box
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="nearby must be a positive length"):
            stability_report(loss_fn, x, traj, nearby=bad)
    with pytest.raises(ValueError, match="nearby must be a length, or an offset of the shape of x"):
        stability_report(loss_fn, x, traj, nearby=x[:1])


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_smoothness_at_gamma_where_the_threshold_is_met_by_every_unit(scope, unit):
    """A linear policy and loss, the same for every token: q along the segment follows from q along u."""
    net = nn.Linear(N, V, bias=False).double()
    slope = torch.randn(N, dtype=torch.float64)
    loss_fn = lambda x: (x @ slope).mean(1)
    x = torch.randn(B, 4, N, dtype=torch.float64)
    agents = torch.tensor([[0, 1, 1, 0]] * B) if scope == "agent" else None
    traj = aajr.ascend(loss_fn, x, radius=9.0, steps=2, step_size=0.1, scope=scope, agents=agents)
    q = (traj.directions @ net.weight.mT).square().sum(-1)  # [T, B, 4], all alike
    gamma = (q.sum(-1) if unit == "sequence" else q).max().sqrt().item()
    scale = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    report = stability_report(
        *(loss_fn, x, traj), func=net, metric="l2", gamma=gamma, unit=unit, output_bounds=(0.5 * scale, scale)
    )
    whole = q.sum(-1) / traj.directions.flatten(2).square().sum(-1)
    assert_exact(report.gauss_newton, 0.5 * scale * whole, "first term", tolerance=1e-9)
    assert_exact(report.smoothness_at_gamma, report.smoothness, "at gamma", tolerance=1e-9)


def test_alignment_and_fractions():
    x = torch.zeros(2, 2, dtype=torch.float64)
    h = -torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64))
    loss_fn = lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, h, x)
    report = stability_report(
        loss_fn, x, steps_of(loss_fn, x, 3.0)
    )  # overshoots and turns round at every step
    assert_exact(report.alignment, -torch.ones(3, 2), "alignment")
    assert report.non_monotone.all() and report.violated.all()
    summary = report.summary()
    assert summary["non_monotone_fraction"] == summary["violated_fraction"] == 1.0
    assert summary["unexplained_fraction"] == 0.0
    calm = stability_report(loss_fn, x, steps_of(loss_fn, x, 1.5)).summary()
    assert calm["non_monotone_fraction"] == calm["violated_fraction"] == 0.0


def test_rows_that_do_not_move_are_left_out():
    x = torch.randn(2, N, dtype=torch.float64)
    loss_fn = lambda x: -x.square().sum(1)
    traj = steps_of(loss_fn, x, 5.0)
    still = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(traj).items()}
    still["points"][:, 1] = x[1]
    still["displacements"][:, 1] = 0
    still["directions"][:, 1] = 0
    report = stability_report(loss_fn, x, Trajectory(**still))
    assert not report.moved[:, 1].any() and not report.violated[:, 1].any()
    assert (report.kappa[:, 1] == 0).all() and torch.isinf(report.eta_max[:, 1]).all()
    assert torch.isnan(report.alignment[:, 1]).all()
    assert report.summary()["violated_fraction"] == 1.0  # of row 0 only


def jacobian(policy, p):
    return torch.autograd.functional.jacobian(lambda z: policy(z[None])[0], p)


def test_sandwich_and_spectral_norm_against_singular_values(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.3)
    report = stability_report(
        *(loss_fn, x, traj), func=policy, output_loss=output_loss, power_iterations=60, curvature="none"
    )
    assert report.kappa is None and report.unexplained is None
    for t in range(4):
        for b in range(B):
            p = traj.points[t, b]
            j = jacobian(policy, p)
            y_bar = torch.autograd.functional.jacobian(
                lambda y: F.cross_entropy(y[None], LABELS[b : b + 1]), policy(p[None])[0]
            )
            g = j.mT @ y_bar
            assert_exact(report.sandwich_lower[t, b], g.norm() / y_bar.norm(), "lower")
            assert_exact(report.sandwich_middle[t, b], (j @ unit(g)).norm(), "middle")
            assert_exact(
                report.spectral_norm[t, b], torch.linalg.matrix_norm(j, 2), "spectral", tolerance=1e-6
            )
    assert (report.sandwich_lower <= report.sandwich_middle * (1 + 1e-12)).all()
    assert (report.sandwich_middle <= report.spectral_norm * (1 + 1e-6)).all()
    assert (report.sandwich_lower < 0.95 * report.sandwich_middle).any()


def test_a_generator_draws_the_first_direction(policy):
    """One round of the power iteration still depends on it: equal seeds, equal bits, whatever else is drawn."""
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.3)
    options = dict(func=policy, output_loss=output_loss, power_iterations=1, curvature="none")
    first, same, other = (
        stability_report(loss_fn, x, traj, **options, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.spectral_norm, same.spectral_norm)
    assert not torch.equal(first.spectral_norm, other.spectral_norm)


def test_sandwich_of_an_attack_on_some_tokens_stays_among_them():
    net = nn.Linear(2 * N, V).double()
    func = lambda x: net(x.flatten(1))
    loss_fn = lambda x: output_loss(func(x))
    x = torch.randn(B, 2, N, dtype=torch.float64)
    mask = torch.tensor([[1, 0]] * B).unsqueeze(-1).expand(B, 2, N)
    traj = steps_of(loss_fn, x, 0.3, mask=mask)
    options = dict(func=func, output_loss=output_loss, power_iterations=60, curvature="none")
    report = stability_report(loss_fn, x, traj, **options)
    top = torch.linalg.matrix_norm(net.weight[:, :N].detach(), 2).expand(4, B)
    assert_exact(report.spectral_norm, top, "spectral norm", tolerance=1e-6)
    assert (report.sandwich_middle <= top * (1 + 1e-9)).all()


@pytest.mark.parametrize("metric", ["fisher", "logits"])
def test_smoothness_bounds_the_curvature_and_is_what_it_says(policy, metric):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4)
    options = dict(samples=33, func=policy, metric=metric, gamma=0.7, unit="sequence")
    report = stability_report(loss_fn, x, traj, **options)
    assert (report.kappa <= report.smoothness).all()
    assert_exact(report.smoothness, report.gauss_newton + report.second_order, "sum")
    factor = {"fisher": 1.0, "logits": 0.5}[metric]
    assert_exact(report.gauss_newton, factor * report.sensitivity.square(), "first term")
    assert_exact(report.smoothness_at_gamma, factor * 0.49 + report.second_order, "at gamma")
    for t in (0, 3):
        for b in range(B):
            d = unit(traj.displacements[t, b])
            q, bends = [], []
            for s in torch.linspace(0, 1, 33, dtype=torch.float64):
                p = traj.points[t, b] + s * traj.displacements[t, b]
                z_tan, prob = jacobian(policy, p) @ d, policy(p[None])[0].softmax(-1)
                spread = prob @ z_tan.square() - (prob @ z_tan) ** 2
                q.append(spread if metric == "fisher" else z_tan.square().sum())
                along = lambda s, p=p, d=d: policy((p + s * d)[None])[0]
                _, bend = torch.func.jvp(
                    lambda s: torch.func.jvp(along, (s,), (torch.ones_like(s),))[1],
                    (torch.tensor(0.0, dtype=torch.float64),),
                    (torch.tensor(1.0, dtype=torch.float64),),
                )
                bends.append(bend.norm())
            assert_exact(report.sensitivity[t, b], max(q).sqrt(), "sensitivity")
            # means over 1/32 of the segment against values at their ends, which may miss the peak by O(1/32²)
            assert report.second_order[t, b] <= math.sqrt(2) * max(bends) * (1 + 1 / 32**2)
            assert report.second_order[t, b] >= 0.9 * math.sqrt(2) * max(bends)


def test_hinge_active_fraction_per_row_and_per_token():
    net = nn.Linear(N, V).double()
    x = torch.randn(B, 4, N, dtype=torch.float64)
    loss_fn = lambda x: net(x).square().flatten(1).sum(1)
    traj = steps_of(loss_fn, x, 0.1)
    q = (traj.directions @ net.weight.mT).square().sum(-1)  # [T, B, 4]
    mask = torch.tensor([[True, True, True, False]] * B)
    gamma = q[..., :3].median().item() ** 0.5 * 1.001
    options = dict(func=net, metric="l2", gamma=gamma, curvature="none", output_mask=mask)
    by_token = stability_report(loss_fn, x, traj, unit="token", **options).hinge_active
    assert_exact(by_token, (q[..., :3] > gamma**2).double().mean(-1), "per token")
    assert 0 < by_token.mean() < 1
    by_row = stability_report(loss_fn, x, traj, unit="sequence", **options).hinge_active
    assert_exact(by_row, (q[..., :3].sum(-1) > gamma**2).double(), "per row")


def test_head_and_model_output_mean_the_same(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.4)
    plain = stability_report(loss_fn, x, traj, func=policy, curvature="none", gamma=1.0)
    wrapped = stability_report(
        *(loss_fn, x, traj), func=lambda x: SimpleNamespace(logits=policy(x)), curvature="none", gamma=1.0
    )
    split = stability_report(
        *(loss_fn, x, traj), func=policy[:2], head=policy[2], curvature="none", gamma=1.0
    )
    capped = stability_report(
        *(loss_fn, x, traj),
        func=policy[:2],
        head=aajr.LMHead(policy[2].weight, policy[2].bias, 2.0, softcap=3.0),
        curvature="none",
    )
    by_hand = stability_report(
        *(loss_fn, x, traj), func=lambda x: 3 * torch.tanh(2 * policy(x) / 3), curvature="none"
    )
    for name in ("smoothness", "sensitivity"):
        assert_exact(getattr(wrapped, name), getattr(plain, name), name)
        assert_exact(getattr(split, name), getattr(plain, name), name)
        assert_exact(getattr(capped, name), getattr(by_hand, name), name)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5)])
def test_norms_of_rows_do_not_mix_them(shape):
    """Rows of very different sizes: none of them enters the norm of another."""
    rows = torch.randn(shape) * torch.tensor([1e-30, 1.0, 1e25]).reshape(3, *[1] * (len(shape) - 1))
    expected = rows.double().flatten(1).norm(dim=1).float()
    torch.testing.assert_close(probes.row_norm(rows).float(), expected)
    torch.testing.assert_close(probes.row_unit(rows).flatten(1).norm(dim=1), torch.ones(3))
