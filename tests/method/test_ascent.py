"""ascend against projected gradient ascent written out by hand in float64, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_exact
from torch import nn

import aajr_kernels as aajr

B, N, C = 3, 4, 5
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
AGENTS = torch.tensor([[0, 0, 1, 2], [2, 2, -1, 0], [1, 1, 1, 1]])


class Victim(nn.Module):
    """A smooth loss per row that mixes its tokens, so that every row has curvature of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(N * C, 7)
        self.out = nn.Linear(7, 1)
        self.double()

    def forward(self, x):
        return torch.sin(2 * self.out(torch.tanh(self.up(x.flatten(1)))).squeeze(-1))


def problem():
    return Victim(), torch.randn(B, N, C, dtype=torch.float64)


# -- projected gradient ascent by hand, one batch row and one group at a time


def groups_by_hand(scope, row):
    """Lists of tokens of one batch row that share a norm."""
    if scope == "sequence":
        return [list(range(N))]
    if scope == "token":
        return [[i] for i in range(N)]
    return [[i for i in range(N) if AGENTS[row, i] == a] for a in range(int(AGENTS.max()) + 1)]


def ascent_by_hand(loss, x, radius, sizes, step, norm, scope, mask):
    points, directions, norms, losses = [x], [], [], []
    delta = torch.zeros_like(x)
    for size in [*sizes, None]:
        point = (x + delta).requires_grad_()
        value = loss(point)
        losses.append(value.detach())
        if size is None:
            break
        (g,) = torch.autograd.grad(value.sum(), point)
        delta, u, lengths = delta.clone(), torch.zeros_like(x), []
        for b in range(B):
            free = [i for i in range(N) if mask is None or mask[b, i]]
            if scope == "agent":
                free = [i for i in free if AGENTS[b, i] >= 0]
            for group in groups_by_hand(scope, b):
                members = [i for i in group if i in free]
                part = g[b, members]
                length = math.sqrt(sum(float(v) ** 2 for v in part.flatten()))
                lengths.append(length)
                if not members:
                    continue
                u[b, members] = part / length
                move = {"raw": part, "normalized": part / length, "sign": part.sign()}[step]
                moved = delta[b, members] + size * move
                if norm == "linf":
                    moved = moved.clamp(-radius, radius)
                else:
                    far = math.sqrt(sum(float(v) ** 2 for v in moved.flatten()))
                    moved = moved * min(1.0, radius / far)
                delta[b, members] = moved
        points.append(x + delta)
        directions.append(u)
        norms.append(torch.tensor(lengths, dtype=x.dtype).reshape(B, -1))
    return [torch.stack(v) for v in (points, directions, norms, losses)]


@pytest.mark.parametrize("scope", ["sequence", "token", "agent"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("step", ["normalized", "raw", "sign"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_every_step_norm_and_scope_against_ascent_by_hand(step, norm, scope, mask):
    loss, x = problem()
    agents = AGENTS if scope == "agent" else None
    larger = 20 if step == "raw" else 1
    for radius, size in ((0.05, 0.2 * larger), (5.0, 0.01)):  # the ball is met; it is not
        traj = aajr.ascend(
            loss,
            x,
            radius=radius,
            steps=4,
            step_size=size,
            step=step,
            norm=norm,
            scope=scope,
            mask=mask,
            agents=agents,
        )
        points, directions, norms, losses = ascent_by_hand(
            loss, x, radius, [size] * 4, step, norm, scope, mask
        )
        for name, ours, theirs in (
            ("points", traj.points, points),
            ("directions", traj.directions, directions),
            ("displacements", traj.displacements, points.diff(dim=0)),
            ("gradient norms", traj.gradient_norms, norms),
            ("losses", traj.losses, losses),
        ):
            assert_exact(ours, theirs, name, tolerance=1e-11)
        assert traj.projected.any() == (radius < 1)
        assert torch.equal(traj.step_sizes, torch.full((4, B), size, dtype=x.dtype))
        assert len(traj) == 4 and traj.scope == scope


def test_sizes_of_steps_and_radii_by_row_and_step():
    loss, x = problem()
    sizes = 0.02 + 0.1 * torch.rand(3, B, dtype=x.dtype)
    radii = torch.tensor([0.05, 0.1, 0.2], dtype=x.dtype)
    whole = aajr.ascend(loss, x, radius=radii, steps=3, step_size=sizes)
    by_group = aajr.ascend(
        loss, x, radius=radii.reshape(B, 1).expand(B, N), steps=3, step_size=sizes, scope="token"
    )
    for b in range(B):
        alone = aajr.ascend(
            loss, x[b : b + 1], radius=radii[b].item(), steps=3, step_size=sizes[:, b : b + 1]
        )
        assert_exact(whole.points[:, b], alone.points[:, 0], "points", tolerance=1e-12)
        alone = aajr.ascend(
            loss, x[b : b + 1], radius=radii[b].item(), steps=3, step_size=sizes[:, b : b + 1], scope="token"
        )
        assert_exact(by_group.points[:, b], alone.points[:, 0], "points", tolerance=1e-12)
    assert torch.equal(whole.step_sizes, sizes)
    one_each = aajr.ascend(loss, x, radius=1.0, steps=2, step_size=sizes[0])
    assert torch.equal(one_each.step_sizes, sizes[:1].expand(2, B))


@pytest.mark.parametrize("shape", [(B, C), (B, 2, 3, C)])
def test_inputs_of_other_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64)
    loss = lambda z: (z * x.flip(0)).sin().flatten(1).sum(-1)
    traj = aajr.ascend(loss, x, radius=0.2, steps=2, step_size=0.15, scope="token")
    delta = traj.points[-1] - x
    assert traj.points.shape == (3, *shape) and traj.gradient_norms.shape == (2, B, math.prod(shape[1:-1]))
    assert_exact(delta.norm(dim=-1), torch.full(shape[:-1], 0.2, dtype=x.dtype), "norm of every token")


def test_a_projection_of_ones_own():
    loss, x = problem()
    box = lambda delta: (x + delta).clamp(-0.5, 0.5) - x
    traj = aajr.ascend(
        loss, x, radius=0.4, steps=3, step_size=0.3, norm="linf", step="sign", project=box, mask=MASK
    )
    kept = lambda delta: torch.where(MASK.unsqueeze(-1), delta, 0.0)
    delta = kept(box(torch.zeros_like(x)))  # the start is projected too
    assert (delta != 0).any()
    for t in range(4):
        assert_exact(traj.points[t], x + delta, f"point {t}", tolerance=1e-12)
        point = (x + delta).requires_grad_()
        (g,) = torch.autograd.grad(loss(point).sum(), point)
        delta = kept((x + (delta + 0.3 * g.sign()).clamp(-0.4, 0.4)).clamp(-0.5, 0.5) - x)
    alone = aajr.ascend(
        loss, x, radius=math.inf, steps=2, step_size=0.3, project=lambda d: d.clamp(-0.1, 0.1)
    )
    assert (alone.points[-1] - x).abs().max() <= 0.1 + 1e-12 and alone.projected.all()
    with pytest.raises(ValueError, match="project must return a perturbation of shape"):
        aajr.ascend(loss, x, radius=1.0, steps=1, project=lambda d: d.sum())


def test_the_best_of_several_runs_row_by_row():
    loss, x = problem()
    options = dict(radius=0.5, steps=3, step_size=0.1, scope="token", keep_gradients=True)
    g = torch.Generator().manual_seed(5)
    best = aajr.ascend(loss, x, restarts=4, generator=g, **options)
    g = torch.Generator().manual_seed(5)
    runs = [aajr.ascend(loss, x, **options)]
    runs += [aajr.ascend(loss, x, init="uniform", generator=g, **options) for _ in range(3)]
    reached = torch.stack([run.losses.amax(0) for run in runs])
    winner = reached.argmax(0)
    assert len(winner.unique()) > 1  # the rows disagree
    assert_exact(best.worst_loss, reached.amax(0), "largest loss", tolerance=1e-12)
    for b in range(B):
        run = runs[int(winner[b])]
        for name in ("points", "directions", "displacements", "losses", "gradient_norms", "gradients"):
            assert_exact(getattr(best, name)[:, b], getattr(run, name)[:, b], name, tolerance=1e-12)
    assert best.evaluations == (16, 0)


def test_the_worst_point_of_every_row():
    loss, x = problem()
    traj = aajr.ascend(
        loss, x, radius=30.0, steps=7, step_size=6.0
    )  # far too long: the loss goes up and down
    index = traj.losses.argmax(0)
    assert torch.equal(traj.worst_index, index) and (index < 7).any()
    assert torch.equal(traj.worst_loss, traj.losses.amax(0))
    for b in range(B):
        assert torch.equal(traj.worst[b], traj.points[index[b], b])
    assert_exact(loss(traj.worst), traj.worst_loss, "loss at the worst point")


def test_the_last_evaluation_can_be_left_out_and_gradients_kept():
    loss, x = problem()
    whole = aajr.ascend(loss, x, radius=1.0, steps=3, step_size=0.1)
    calls = []
    counted = lambda z: (calls.append(z.requires_grad), loss(z))[1]
    short = aajr.ascend(counted, x, radius=1.0, steps=3, step_size=0.1, evaluate_last=False)
    assert calls == [True] * 3 and short.evaluations == (3, 0) and whole.evaluations == (3, 1)
    assert torch.equal(short.points, whole.points) and torch.equal(short.losses[:-1], whole.losses[:-1])
    assert short.losses[-1].isnan().all() and torch.equal(short.worst, short.points[-1])
    kept = aajr.ascend(loss, x, radius=1.0, steps=3, step_size=0.1, keep_gradients=True)
    for t in range(4):
        point = kept.points[t].clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(point).sum(), point)
        assert_exact(kept.gradients[t], g, f"gradient {t}", tolerance=1e-12)
    assert whole.gradients is None


def test_everything_is_detached_and_the_input_is_not_touched():
    loss, x = problem()
    x.requires_grad_()
    before = x.detach().clone()
    traj = aajr.ascend(loss, x, radius=1.0, steps=2, keep_gradients=True)
    tensors = [value for value in vars(traj).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 8 and not any(value.requires_grad for value in tensors)
    assert torch.equal(x.detach(), before) and x.grad is None
    with torch.no_grad():
        assert torch.equal(aajr.ascend(loss, x, radius=1.0, steps=2).points, traj.points)
    with torch.inference_mode():
        inside = aajr.ascend(loss, x, radius=1.0, steps=2)
        of_inference = aajr.ascend(loss, x + 0, radius=1.0, steps=2)
    assert torch.equal(inside.points, traj.points) and torch.equal(of_inference.points, traj.points)
    (
        inside.points * torch.ones((), requires_grad=True, dtype=x.dtype)
    ).sum().backward()  # may be saved for backward


def test_low_precision_inputs():
    loss, x = problem()
    loss = loss.float()
    wide = aajr.ascend(loss, x.float(), radius=0.5, steps=3, step_size=0.2)
    low = aajr.ascend(lambda z: loss(z.float()), x.bfloat16(), radius=0.5, steps=3, step_size=0.2)
    assert low.points.dtype == low.directions.dtype == torch.bfloat16
    # x and the points are rounded to 8 bits each, relative to numbers up to about 3
    assert (low.points[-1].float() - wide.points[-1]).abs().max() < 3 * 4 * 2**-8
    assert_exact(low.directions.float().flatten(2).norm(dim=-1), torch.ones(3, B), "length", tolerance=2**-8)


# -- documented values and errors


@pytest.mark.parametrize("step_size", ["auto", 0.1])
@pytest.mark.parametrize("step", ["normalized", "raw", "sign"])
def test_a_zero_gradient_goes_nowhere(step, step_size):
    x = torch.randn(2, 3, 4)
    flat = lambda z: (z[:1] * 1.0).flatten(1).sum(-1).repeat(2) * torch.tensor([1.0, 0.0])
    traj = aajr.ascend(flat, x, radius=0.5, steps=2, step=step, step_size=step_size)
    assert torch.equal(traj.points[:, 1], x[1].expand(3, 3, 4))
    assert (traj.points[-1, 0] != x[0]).any()
    assert (traj.directions[:, 1] == 0).all() and (traj.gradient_norms[:, 1] == 0).all()
    assert all(torch.isfinite(value).all() for value in (traj.points, traj.step_sizes, traj.losses))


def test_a_row_with_nothing_to_attack_stays():
    loss, x = problem()
    for step_size in ("auto", 0.1):
        traj = aajr.ascend(loss, x, radius=1.0, steps=2, mask=MASK, step_size=step_size, init="uniform")
        assert torch.equal(traj.points[:, 2], x[2].expand(3, N, C))
        assert ((traj.points - x)[:, ~MASK] == 0).all() and (traj.directions[:, ~MASK] == 0).all()
        assert ((traj.points - x)[1:, MASK] != 0).all()


def test_nan_in_the_gradient_of_what_may_not_be_attacked_does_not_count():
    x = torch.randn(2, 3, 4)
    x[:, 2] = 0.0
    loss = lambda z: z[:, :2].flatten(1).square().sum(-1) + 0 * z[:, 2].norm(dim=-1).sqrt()
    mask = torch.tensor([True, True, False]).expand(2, 3)
    traj = aajr.ascend(loss, x, radius=0.1, steps=2, mask=mask)
    assert torch.isfinite(traj.points).all() and torch.isfinite(traj.gradient_norms).all()
    with pytest.raises(ValueError, match="gradient that is NaN or infinite at the start"):
        aajr.ascend(loss, x, radius=0.1, steps=2)


def test_tiny_gradients_keep_their_direction():
    x = torch.zeros(1, 1, 2)
    for step_size in ("auto", 0.3):
        traj = aajr.ascend(
            lambda z: 1e-30 * (3 * z[..., 0] + 4 * z[..., 1]).sum(-1),
            x,
            radius=0.5,
            steps=1,
            step_size=step_size,
        )
        assert torch.allclose(traj.directions[0, 0, 0], torch.tensor([0.6, 0.8]), atol=1e-6, rtol=0)


def loss_of_nothing(x):
    return x.new_ones(B)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(radius=0.0), ValueError, "radius must be positive, got 0.0"),
        (dict(radius=-1), ValueError, "radius must be positive, got -1"),
        (dict(radius=math.nan), ValueError, "radius must be positive, got nan"),
        (dict(radius="big"), TypeError, "radius must be a number or a floating point tensor, got str"),
        (
            dict(radius=torch.tensor([1.0, 0.0, 1.0])),
            ValueError,
            "radius must be positive everywhere, got 0.0",
        ),
        (dict(radius=torch.ones(B, 2)), ValueError, "radius must be a number, .* got shape \\(3, 2\\)"),
        (dict(radius=math.inf), ValueError, "radius must be finite for step_size='auto'"),
        (dict(steps=0), ValueError, "steps must be an integer >= 1, got 0"),
        (dict(steps=1.5), ValueError, "steps must be an integer >= 1"),
        (dict(restarts=0), ValueError, "restarts must be an integer >= 1"),
        (dict(max_backtracks=-1), ValueError, "max_backtracks must be an integer >= 0"),
        (dict(step="newton"), ValueError, "step must be one of"),
        (dict(norm="l1"), ValueError, "norm must be one of"),
        (dict(scope="word"), ValueError, "scope must be one of"),
        (dict(init="one"), ValueError, "init must be one of"),
        (dict(step_size="adam"), ValueError, "step_size must be 'auto'"),
        (dict(step_size=0.0), ValueError, "step_size must be positive and finite, got 0.0"),
        (dict(step_size=None), TypeError, "step_size must be 'auto', a number or a floating point tensor"),
        (dict(step_size=torch.ones(4)), ValueError, "step_size must be a number, .* got shape"),
        (dict(step_size=-torch.ones(B)), ValueError, "step_size must be positive and finite everywhere"),
        (dict(scope="agent"), ValueError, "agents must be given with scope='agent'"),
        (dict(agents=MASK), TypeError, "agents must be an integer tensor"),
        (dict(agents=AGENTS[:2]), ValueError, "agents must have shape \\(3, 4\\)"),
        (dict(agents=AGENTS * 0 - 1), ValueError, "nothing to attack"),
        (dict(mask=MASK & False), ValueError, "nothing to attack"),
        (dict(mask=MASK.float()), TypeError, "mask must be a bool or integer tensor"),
        (dict(mask=MASK[:, :3]), ValueError, "mask must have shape \\(3, 4\\)"),
        (dict(x=torch.zeros(B, N, dtype=torch.long)), TypeError, "x must be a plain floating point tensor"),
        (dict(x=torch.zeros(B)), ValueError, "x must be \\[B, ..., C\\]"),
        (dict(x=torch.zeros(0, N, C)), ValueError, "x must be .* not empty"),
        (dict(loss_fn=None), TypeError, "loss_fn must be callable, got NoneType"),
        (dict(loss_fn=lambda z: z.sum()), ValueError, "one loss per batch row, shape \\(3,\\), got \\(\\)"),
        (
            dict(loss_fn=lambda z: 1.0),
            TypeError,
            "loss_fn must return a floating point tensor of losses, got float",
        ),
        (dict(loss_fn=loss_of_nothing), ValueError, "does not depend on its input"),
        (dict(loss_fn=lambda z: nn.Linear(1, 1)(torch.ones(B, 1)).sum(-1)), ValueError, "does not depend on"),
        (
            dict(loss_fn=lambda z: z.flatten(1).sum(-1) / 0),
            ValueError,
            "a loss that is NaN or infinite at the start",
        ),
        (dict(evaluate_last=False), ValueError, "evaluate_last=False goes with a given step_size"),
        (dict(evaluate_last=False, step_size=1.0, restarts=2), ValueError, "evaluate_last=False goes with"),
        (dict(eval_mode=True), ValueError, "eval_mode needs module="),
        (dict(module="net"), TypeError, "module must be an nn.Module or several of them, got str"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_argument(change, error, message):
    loss, x = problem()
    arguments = dict(loss_fn=loss, x=x, radius=1.0, steps=2) | change
    with pytest.raises(error, match=message) as raised:
        aajr.ascend(**arguments)
    assert "\n" not in str(raised.value)


def test_a_loss_that_overflows_on_the_way():
    x = torch.full((1, 1, 1), 80.0)
    burst = lambda z: z.flatten(1).sum(-1).exp()  # infinite in float32 above 88.7
    with pytest.raises(ValueError, match="a loss that is NaN or infinite on the way: take smaller steps"):
        aajr.ascend(burst, x, radius=50.0, steps=2, step_size=20.0)
    traj = aajr.ascend(burst, x, radius=50.0, steps=4)  # 'auto' steps back from where it is not finite
    assert torch.isfinite(traj.losses).all() and (traj.losses.diff(dim=0) >= 0).all()
    assert traj.losses[-1] > traj.losses[0]


def test_agents_are_labels_of_any_size() -> None:
    """Memory and time follow the number of agents, not their numbers; the attack does not depend on them."""
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 4), torch.randn(4)
    few = torch.tensor([[0, 0, 1, 2, 1], [0, 2, 2, -1, 1], [-1, 0, 1, 2, -1]])
    attack = dict(radius=1.0, steps=2, scope="agent", init="uniform")
    runs = []
    for low, middle, high, nobody in ((0, 1, 2, -1), (7, 10**6, 2**63 - 1, -(2**63)), (1, 2**40, 2**41, -5)):
        agents = few.clone()
        for place, label in enumerate((low, middle, high)):
            agents[few == place] = label
        agents[few < 0] = nobody
        generator = torch.Generator().manual_seed(1)
        traj = aajr.ascend(lambda z: (z @ w).tanh().sum(1), x, agents=agents, generator=generator, **attack)
        penalty = aajr.trajectory_penalty(
            lambda z: (z @ w).tanh().unsqueeze(-1), x, traj, metric="l2", per_agent=True
        )
        runs.append((traj.points, traj.losses, penalty[0]))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_projection_that_only_rounds_moves_nothing(size):
    x = torch.randn(2, 3, 4)
    wave = lambda z: z.square().sum((1, 2))
    options = dict(radius=size, steps=2, step_size=0.2 * size, scope="sequence")
    rounding = aajr.ascend(wave, x, project=lambda delta: delta / 3 * 3, **options)
    halving = aajr.ascend(wave, x, project=lambda delta: delta / 2, **options)
    assert not rounding.projected.any() and halving.projected.all()
