"""The exact spectral norm and the product of the layers' norms: singular values and known Lipschitz products."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_exact
from method.paths import B, N, V, output_loss, problem, small_policy, steps_of
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.method import baseline_penalty, stability_report, trajectory_baseline
from aajr_kernels.method.baselines import LARGEST
from aajr_kernels.method.lipschitz import CONSTANTS, layer_product


def jacobians(net, x):
    """``[B, outputs, inputs]``."""
    rows = [
        torch.autograd.functional.jacobian(lambda z: net(z[None])[0], row, create_graph=True) for row in x
    ]
    return torch.stack(rows).reshape(len(x), -1, x[0].numel())


def metric_matrix(z, metric):
    if metric == "l2":
        return torch.eye(V, dtype=z.dtype).expand(len(z), V, V)
    p = z.softmax(-1)
    fisher = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return fisher if metric == "fisher" else fisher @ fisher


@pytest.mark.parametrize("metric", ["l2", "fisher", "probs"])
def test_the_exact_spectral_penalty_and_its_gradients(policy, metric):
    x = torch.randn(B, N, dtype=torch.float64)
    rows = baseline_penalty("spectral", policy, x, metric=metric, iterations="exact", reduction="none")
    j, m = jacobians(policy, x), metric_matrix(policy(x), metric)
    expected = torch.linalg.eigvalsh(j.mT @ m @ j)[:, -1]
    assert_exact(rows[0], expected, "largest eigenvalue")
    if metric == "l2":
        assert_exact(rows[0].sqrt(), torch.linalg.svdvals(j)[:, 0], "largest singular value")
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    parameters = list(policy.parameters())
    ours = torch.autograd.grad(rows[0] @ weights, parameters, allow_unused=True)
    others = torch.autograd.grad(expected @ weights, parameters, allow_unused=True)
    for a, b in zip(ours, others):
        zero = torch.zeros(1, dtype=torch.float64)
        a, b = (zero if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-9, atol=1e-12)
    assert max(g.abs().max() for g in ours if g is not None) > 1e-3
    few = baseline_penalty("spectral", policy, x, metric=metric, iterations=1, reduction="none")
    assert (few <= rows * (1 + 1e-12)).all() and (few < 0.999 * rows).any()


def test_the_exact_direction_is_where_an_attack_may_go():
    net = nn.Linear(2 * N, V).double()
    func = lambda x: net(x.flatten(2) if x.dim() == 4 else x.flatten(1))
    x = torch.randn(B, 2, N, dtype=torch.float64)
    mask = torch.tensor([[1, 0]] * B)
    rows, v = baseline_penalty(
        *("spectral", func, x),
        metric="l2",
        iterations="exact",
        attack_mask=mask,
        reduction="none",
        return_direction=True,
    )
    top = torch.linalg.svdvals(net.weight[:, :N])[0]
    assert_exact(rows[0].sqrt(), top.expand(B), "of the first token")
    assert (v[:, 1] == 0).all()
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.ones(B, dtype=torch.float64))


def test_the_report_has_the_exact_norm(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.3)
    report = stability_report(
        *(loss_fn, x, traj), func=policy, output_loss=output_loss, power_iterations="exact", curvature="none"
    )
    expected = torch.stack([torch.linalg.svdvals(jacobians(policy, p))[:, 0] for p in traj.points[:-1]])
    assert_exact(report.spectral_norm, expected, "spectral norm")
    assert (report.sandwich_middle <= report.spectral_norm * (1 + 1e-12)).all()


def network(*units: nn.Module) -> nn.Sequential:
    widths = [N, 7, 9, 6][: len(units) + 1]
    layers = [layer for a, b, unit in zip(widths, widths[1:], units) for layer in (nn.Linear(a, b), unit)]
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(widths[-1], V)).double()


def test_the_product_is_that_of_the_singular_values_and_so_are_its_gradients():
    net = network(nn.Tanh(), nn.LeakyReLU(-1.5), nn.Sigmoid())
    weights = [p for p in net.parameters() if p.dim() == 2]
    expected = math.prod(torch.linalg.svdvals(w)[0] for w in weights) * 1.5 * 0.25
    product = layer_product(net)
    assert_exact(product, expected, "product")
    for a, b in zip(torch.autograd.grad(product, weights), torch.autograd.grad(expected, weights)):
        assert_exact(a, b, "gradient", tolerance=1e-9)
        assert a.abs().max() > 1e-3
    head = aajr.LMHead(nn.Linear(V, 11).double().weight, None, -2.0, softcap=3.0)
    with_head = layer_product(net, head)
    assert_exact(with_head, expected * 2 * torch.linalg.svdvals(head.weight)[0], "with a head")


def test_layers_that_line_up_make_it_the_norm_itself():
    """diag(1, 2, 3) · diag(2, 1, 4): 12, both as the product and as ‖J‖₂; turned by a rotation, it is a bound only."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity(), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        net[2].weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 4.0])))
    x = torch.randn(B, 3, dtype=torch.float64)
    options = dict(metric="l2", module=net, reduction="none")
    for method, more in (("layer_product", {}), ("spectral", {"iterations": "exact"})):
        rows = baseline_penalty(method, net, x, **options, **more)
        assert_exact(rows, torch.full((1, B), 144.0, dtype=torch.float64), method)
    with torch.no_grad():
        net[2].weight.copy_(torch.diag(torch.tensor([4.0, 1.0, 2.0])))
    assert baseline_penalty("layer_product", None, x, **options)[0, 0].item() == pytest.approx(144.0)
    exact = baseline_penalty("spectral", net, x, iterations="exact", **options)
    assert exact[0, 0].item() == pytest.approx(36.0)


@pytest.mark.parametrize("metric", sorted(LARGEST))
@pytest.mark.parametrize("unit", [nn.GELU, nn.SiLU, nn.ELU], ids=lambda u: u.__name__)
def test_it_bounds_every_other_penalty_at_every_point(metric, unit):
    net = network(unit(), unit())
    x = 3 * torch.randn(20, N, dtype=torch.float64)
    options = dict(metric=metric, module=net, reduction="none", unit="sequence")
    bound = baseline_penalty("layer_product", None, x, **options)
    exact = baseline_penalty("spectral", net, x, iterations="exact", **options)
    assert (exact <= bound).all() and exact.max() > 1e-6 and (bound == bound[0, 0]).all()


def test_the_largest_q_of_a_metric_is_reached():
    """Two outputs that are equally likely, changed in opposite directions."""
    z = torch.tensor([[0.0, 0.0, -60.0]], dtype=torch.float64)
    change = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64) / 2**0.5
    for metric, largest in LARGEST.items():
        assert aajr.sensitivity(aajr.dual(z, change), metric).item() == pytest.approx(largest)


@pytest.mark.parametrize(
    "layer",
    [
        *(pytest.param(c, id=c.__name__) for c in CONSTANTS if c is not nn.Unflatten),
        pytest.param(lambda: nn.GELU("tanh"), id="GELU-tanh"),
        pytest.param(lambda: nn.ELU(2.5), id="ELU-2.5"),
    ],
    ids=str,
)
def test_constants_are_the_largest_slopes(layer):
    unit = layer()
    if isinstance(unit, (nn.Flatten, nn.Dropout)):
        unit = unit.eval()
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64).requires_grad_()
    flat = isinstance(unit, nn.Flatten)
    slopes = torch.autograd.grad((unit(x[None])[0] if flat else unit(x)).sum(), x)[0].abs().max().item()
    assert slopes <= (constant := layer_product(nn.Sequential(unit)).item()) * (1 + 1e-7)
    assert slopes >= constant * (1 - 1e-3)


def test_dropout_scales_what_it_keeps():
    layer = nn.Sequential(nn.Dropout(0.2))
    assert layer_product(layer).item() == pytest.approx(1.25)
    assert layer_product(layer.eval()).item() == 1.0 and layer_product(nn.Sequential()).item() == 1.0


def test_in_float32_and_bfloat16_and_as_a_trajectory_penalty(policy):
    loss_fn, x = problem(policy)
    traj = steps_of(loss_fn, x, 0.3)
    product = layer_product(policy).item()
    penalty, aux = trajectory_baseline("layer_product", None, traj, metric="l2", module=policy, gamma=1.0)
    assert penalty.item() == pytest.approx(product**2 - 1) and aux["direction"] is None
    hinge = dict(metric="l2", module=policy, gamma=1.0, form="hinge", mask=torch.ones(B, dtype=torch.bool))
    assert baseline_penalty("layer_product", None, x, **hinge).item() == pytest.approx(product - 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        low = small_policy().to(dtype)
        low.load_state_dict({k: v.to(dtype) for k, v in policy.state_dict().items()})
        value = layer_product(low)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(product, rel=tolerance)
    point = x.float()
    exact = baseline_penalty("spectral", policy.float(), point, metric="l2", iterations="exact")
    expected = torch.linalg.svdvals(jacobians(policy, point))[:, 0].square().mean()
    assert exact.item() == pytest.approx(expected.item(), rel=1e-5)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_known_is_refused(policy, monkeypatch):
    x = torch.randn(B, N, dtype=torch.float64)
    for layer in (Sine(), Doubled(3, 3), nn.LayerNorm(3), nn.MultiheadAttention(4, 2)):
        with pytest.raises(
            aajr.UnsupportedOperation, match=type(layer).__name__ + " is not known: put it into"
        ):
            layer_product(nn.Sequential(nn.Linear(3, 3), layer))
    monkeypatch.setitem(CONSTANTS, Sine, 1.0)
    assert layer_product(nn.Sequential(Sine())).item() == 1.0
    for options, message in (
        (dict(module=None), "module must be the network for method 'layer_product'"),
        (dict(module=policy, metric=lambda y: y), "metric must be one of l2, logits, fisher, probs for"),
        (dict(module=policy, iterations="exakt"), "iterations must be one of exact, got 'exakt'"),
    ):
        with pytest.raises(ValueError, match=message):
            baseline_penalty("layer_product", None, x, **options)
    with pytest.raises(ValueError, match="power_iterations must be one of exact"):
        stability_report(problem(policy)[0], x, steps_of(problem(policy)[0], x, 0.1), power_iterations="all")
