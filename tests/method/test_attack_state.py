"""State that an attack leaves as it was: parameters, random states, training flags, statistics; and its results."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import aajr_kernels as aajr

B, N, C = 2, 3, 8


class Net(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)
        self.drop, self.frozen = nn.Dropout(p), nn.Linear(C, C)
        self.frozen.requires_grad_(False)
        self.drop.eval() if p == 0 else None

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(x)))) + self.frozen(x)


def row_loss(net):
    return lambda x: net(x).square().flatten(1).sum(-1)


def test_parameters_are_left_alone():
    net, x = Net(), torch.randn(B, N, C)
    net.a.weight.grad = torch.ones(C, C)
    flags = [p.requires_grad for p in net.parameters()]
    for module in (None, net, [net.a, net.b]):
        aajr.ascend(row_loss(net), x, radius=1.0, steps=2, module=module)
        assert [p.requires_grad for p in net.parameters()] == flags
        assert (net.a.weight.grad == 1).all()
        assert all(p.grad is None for name, p in net.named_parameters() if name != "a.weight")


@pytest.mark.parametrize("named", [False, True])
def test_no_weight_gradient_is_computed(named):
    """A step is three products forward and three to the input; those to the weights would be three more."""
    net, x = Net(p=0.0), torch.randn(B, N, C)
    product = 2 * B * N * C * C
    with FlopCounterMode(display=False) as counter:
        aajr.ascend(
            row_loss(net),
            x,
            radius=1.0,
            steps=3,
            step_size=0.1,
            evaluate_last=False,
            module=net if named else None,
        )
    assert counter.get_total_flops() == 3 * (3 + 3) * product


class Scale(torch.autograd.Function):
    needed: list[tuple[bool, ...]] = []

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        Scale.needed.append(ctx.needs_input_grad)
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum()


def test_functions_in_python_skip_weight_gradients_where_the_module_is_named():
    net = nn.Module()
    net.w = nn.Parameter(torch.tensor(2.0))
    loss = lambda x: Scale.apply(x, net.w).flatten(1).sum(-1)
    Scale.needed.clear()
    named = aajr.ascend(loss, torch.zeros(B, N, C), radius=1.0, steps=2, step_size=0.1, module=net)
    assert Scale.needed == [(True, False)] * 2
    anonymous = aajr.ascend(loss, torch.zeros(B, N, C), radius=1.0, steps=2, step_size=0.1)
    assert torch.equal(named.points, anonymous.points) and net.w.grad is None


def test_one_dropout_mask_for_the_attack_and_for_what_follows():
    net, x = Net(), torch.randn(B, N, C)
    loss = row_loss(net)
    state = torch.get_rng_state()
    traj = aajr.ascend(loss, x, radius=0.3, steps=4, step_size=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    for t in range(5):
        torch.set_rng_state(state)
        assert torch.equal(loss(traj.points[t]).detach(), traj.losses[t])
    assert not torch.equal(loss(traj.points[0]), traj.losses[0])  # the masks do differ from call to call


def test_random_starts_differ_from_call_to_call():
    net, x = Net(p=0.0), torch.randn(B, N, C)
    options = dict(radius=1.0, steps=1, step_size=0.1, init="uniform")
    a, b = (aajr.ascend(row_loss(net), x, **options) for _ in range(2))
    assert not torch.equal(a.points[0], b.points[0])
    torch.manual_seed(7)
    c = aajr.ascend(row_loss(net), x, **options)
    torch.manual_seed(7)
    assert torch.equal(c.points, aajr.ascend(row_loss(net), x, **options).points)


def test_eval_mode_and_its_end():
    net, x = Net(), torch.randn(B, N, C)
    net.b.eval()
    flags = [m.training for m in net.modules()]
    seen = []
    loss = lambda z: (seen.append([m.training for m in net.modules()]), row_loss(net)(z))[1]
    traj = aajr.ascend(loss, x, radius=1.0, steps=1, step_size=0.1, module=net, eval_mode=True)
    assert not any(map(any, seen)) and [m.training for m in net.modules()] == flags
    net.eval()
    assert torch.equal(row_loss(net)(traj.points[0]), traj.losses[0])


def test_running_statistics_are_put_back():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(N * C), nn.Linear(N * C, 1))
    before = {name: b.clone() for name, b in net.named_buffers()}
    x = torch.randn(B, N, C)
    aajr.ascend(lambda z: net(z).squeeze(-1), x, radius=1.0, steps=2, module=net)
    assert len(before) == 3 and all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    aajr.ascend(lambda z: net(z).squeeze(-1), x, radius=1.0, steps=2)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])  # the module is not named


def test_everything_is_put_back_after_an_exception():
    net, x = Net(), torch.randn(B, N, C)
    flags = [(p.requires_grad, p.grad) for p in net.parameters()], [m.training for m in net.modules()]
    calls = []

    def loss(z):
        calls.append(1)
        if len(calls) == 2:
            torch.rand(3)
            raise KeyboardInterrupt
        return row_loss(net)(z)

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        aajr.ascend(loss, x, radius=1.0, steps=3, module=net, eval_mode=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == (
        [(p.requires_grad, p.grad) for p in net.parameters()],
        [m.training for m in net.modules()],
    )


def test_under_autocast_training_goes_on_as_without_an_attack():
    net, x = Net(p=0.0), torch.randn(B, N, C)
    dtypes = []
    net.a.register_forward_hook(lambda m, a, y: dtypes.append(y.dtype))
    gradients = []
    for attack in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if attack:
                traj = aajr.ascend(row_loss(net), x, radius=1.0, steps=2)
            loss = row_loss(net)(x).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert set(dtypes) == {torch.bfloat16} and traj.directions.dtype == torch.float32
    assert len(gradients[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_arithmetic_of_the_attack_does_not_follow_autocast():
    net, x = Net(p=0.0), torch.randn(B, N, C)
    agents = torch.tensor([[0, 0, 1], [1, 0, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traj = aajr.ascend(row_loss(net), x, radius=1.0, steps=2, step_size=0.7, scope="agent", agents=agents)
        _, aux = aajr.trajectory_penalty(
            lambda d: d * 2.0,
            x,
            traj,
            metric="l2",
            unit="sequence",
            per_agent=True,
            weights=[1.0, 2.0],
            batch_steps=2,
        )
    for b in range(B):
        for a in range(2):
            length = traj.directions[:, b, agents[b] == a].flatten(1).norm(dim=-1)
            assert torch.allclose(length, torch.ones(2), rtol=0, atol=1e-6)
            last = (traj.points[-1] - x)[b, agents[b] == a].norm()
            assert abs(last - 1.0) < 1e-6  # two steps of 0.7 end on the ball
    assert torch.allclose(aux.q, torch.full((2, 2), 4.0), rtol=0, atol=1e-5)


def test_under_activation_checkpointing():
    net, x = Net(), torch.randn(B, N, C)
    plain = aajr.ascend(row_loss(net), x, radius=1.0, steps=3)
    recomputed = lambda z: checkpoint(net, z, use_reentrant=False).square().flatten(1).sum(-1)
    for module in (None, net):
        assert torch.equal(
            aajr.ascend(recomputed, x, radius=1.0, steps=3, module=module).points, plain.points
        )


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # by Dynamo, of its input
def test_a_compiled_loss():
    net, x = Net(p=0.0), torch.randn(B, N, C)
    compiled = torch.compile(row_loss(net), backend="aot_eager", fullgraph=True)
    traj = aajr.ascend(compiled, x, radius=1.0, steps=2, module=net)
    expected = aajr.ascend(row_loss(net), x, radius=1.0, steps=2)
    assert torch.allclose(traj.points, expected.points, rtol=0, atol=1e-6)
    row_loss(net)(x).sum().backward()
    assert net.a.weight.grad is not None
