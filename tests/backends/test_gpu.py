"""On a GPU: every op against the float64 oracle, and a model against the same model on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from assertions import relative_error
from typer.testing import CliRunner
from zoo import ENTRIES

import aajr_kernels as aajr
from aajr_kernels.cli.main import app

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_op_is_within_its_budget(dtype):
    result = CliRunner().invoke(app, ["validate", "--device", "cuda", "--dtype", dtype])
    assert result.exit_code == 0, result.output


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_small_attention_with_every_kind_of_input(dtype):
    q, k = (aajr.dual(*torch.randn(2, 1, h, 37, 16, device="cuda", dtype=dtype)) for h in (4, 2))
    mask = torch.rand(1, 1, 37, 37, device="cuda") > 0.2
    out = aajr.attention(q, k, k, mask=mask, causal=True)
    assert out.stacked.isfinite().all() and out.tangent.abs().max() > 0


@pytest.mark.parametrize("k", [1, 3])
def test_a_model_gives_what_it_gives_on_the_cpu(k):
    subject = next(entry for name, entry in ENTRIES.items() if entry.decoder)().double()
    v = torch.randn(k, *subject.x.shape, dtype=torch.float64)
    outcomes = []
    for device in ("cpu", "cuda"):
        subject.model.to(device)
        pen = aajr.aligned_penalty(subject.tensor, subject.x.to(device), v.to(device), metric="fisher")
        gradients = torch.autograd.grad(pen, list(subject.parameters.values()), allow_unused=True)
        outcomes.append([pen.cpu(), *(g.cpu() for g in gradients if g is not None)])
    assert all(relative_error(a, b, floor=1e-6) < 1e-6 for a, b in zip(*outcomes))


def replayed(step: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """A step, captured in a CUDA graph, gives what it gave outside, bit by bit, as often as it is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which must not happen while a graph is captured
        expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_a_whole_step_is_captured_in_a_cuda_graph():
    """Nothing in a step waits for the device or allocates outside the graph's pool; replays repeat it bit by bit."""
    subject = next(entry for name, entry in ENTRIES.items() if entry.decoder)().to(torch.bfloat16)
    model = subject.model.to("cuda")
    x, v = (torch.randn(2, 40, subject.x.shape[-1], device="cuda", dtype=torch.bfloat16) for _ in "xv")
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="cuda").tril()
    weights = list(subject.parameters.values())

    def step() -> tuple[torch.Tensor, ...]:
        penalty = aajr.aligned_penalty(
            lambda d: model(inputs_embeds=d, attention_mask=mask, use_cache=False), x, v, metric="fisher"
        )
        gradients = torch.autograd.grad(penalty, weights, allow_unused=True)
        return (penalty.detach(), *(g for g in gradients if g is not None))

    replayed(step)


def test_packed_attention_is_captured_in_a_cuda_graph():
    """The graph is of all lengths: other offsets in the same memory are other sequences."""
    q = torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    offsets = torch.tensor([0, 1, 200, 200, 300], device="cuda", dtype=torch.int32)

    def step() -> tuple[torch.Tensor, ...]:
        out = aajr.attention(*(aajr.Dual(q),) * 3, causal=True, cu_seqlens=offsets).stacked
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), q)

    replayed(step)


def test_a_head_that_keeps_its_logits_is_captured():
    weight, head = (
        (0.05 * torch.randn(n, 1024, device="cuda")).bfloat16().requires_grad_() for n in (1024, 3000)
    )
    x, v = torch.randn(2, 2, 150, 1024, device="cuda").bfloat16()

    def step() -> tuple[torch.Tensor, ...]:
        penalty = aajr.aligned_penalty(
            lambda d: aajr.linear(d, weight), x, v, metric="fisher", head=aajr.LMHead(head)
        )
        return penalty.detach(), *torch.autograd.grad(penalty, (weight, head))

    replayed(step)


def test_an_attack_with_the_penalty_along_it_is_replayed_on_other_inputs():
    subject = next(entry for name, entry in ENTRIES.items() if entry.decoder)().to(torch.bfloat16)
    model = subject.model.to("cuda")
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="cuda").tril()
    forward = lambda x: model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = lambda y: forward(y).float().square().mean((1, 2))
        traj = aajr.ascend(loss, x, radius=0.2, steps=2, step_size=0.1, module=model)
        penalty, _ = aajr.trajectory_penalty(forward, x, traj)
        penalty.backward()
        return penalty

    inputs = torch.randn(3, 2, 40, subject.x.shape[-1], device="cuda", dtype=torch.bfloat16)
    replay = aajr.graphed(step, (inputs[0],), module=model)
    for x in inputs[1:]:
        ours = [replay(x).clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        theirs = [step(x).detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        model.zero_grad()
