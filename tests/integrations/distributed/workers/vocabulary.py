"""The streamed head with a split vocabulary against the whole one: dtype, words."""

from __future__ import annotations

import itertools

import torch
from shared import BOUND, begin, end
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import aajr_kernels as aajr
from aajr_kernels.ops.head import counted

rank, world, (precision, size, *more) = begin()
dtype, words = getattr(torch, precision), int(size)
mesh = init_device_mesh("cpu", (world,))
generator = torch.Generator().manual_seed(5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


worst = 0.0
full = [(None, 1.0, None), (random(words), 1.0, None), (random(words), 0.7, 3.0)]
for k, metric, (bias, scale, softcap), learn in itertools.product(
    (0, 1, 3), ("fisher", "probs", "logits", "l2"), full, (False, True)
):
    if k == 0 and not learn:
        continue
    stack, weight = random(1 + k, 2, 7, 16), random(words, 16)
    # an offset that all logits' tangents share; a larger one of the logits themselves would cost anyone digits
    stack[0] -= stack[0].mean(-1, keepdim=True)
    weight += 1.0
    labels = torch.randint(words, (2, 7), generator=generator) if learn else None
    if labels is not None:
        labels[0, :3] = -100
    # tokens that do not count are left out, or follow the others where their number stays on the device
    counted._is_known = lambda device: k != 3
    mask = random(2, 7) < 0.0 if bias is not None else None
    q_bar, nll_bar = random(k, 2, 7), random(2, 7)

    def run(
        h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, labels: torch.Tensor | None = labels
    ) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (h, w, b) if t is not None]
        b = leaves[2] if b is not None else None
        sensitivities = aajr.lm_head_sensitivity(
            *(aajr.Dual(leaves[0]), leaves[1], b),
            metric=metric,
            scale=scale,
            softcap=softcap,
            labels=labels,
            mask=mask,
        )
        q, nll = sensitivities if isinstance(sensitivities, tuple) else (sensitivities, None)
        total = (q * q_bar.to(q)).sum() + (0.0 if nll is None else (nll * nll_bar.to(nll)).sum())
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results = [q, *([] if nll is None else [nll]), *grads]
        results = [torch.zeros_like(leaves[0]) if g is None else g for g in results]
        return [(r.full_tensor() if isinstance(r, DTensor) else r).detach() for r in results]

    def reordered(first: int) -> list[torch.Tensor]:
        """The whole head with the words from `first` on before the others; gradients in the usual order."""
        w, b = (None if t is None else t.roll(-first, 0) for t in (weight, bias))
        moved = None if labels is None else torch.where(labels < 0, labels, (labels - first) % words)
        results = run(stack, w, b, moved)
        after_h = len(results) - (1 if b is None else 2)
        return [r.roll(first, 0) if i >= after_h else r for i, r in enumerate(results)]

    split = [None if t is None else distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias)]
    # Of a token's cotangents Σ z̄ = 0, and all rows of the weight have an offset: what is left of h's gradient has
    # the rounding of larger sums, which depends on the order of the words. Every process adds its own words first,
    # so the error that rounding is allowed is the worst of these orders on the whole vocabulary.
    orders = [reordered(first) for first in range(0, words, -(-words // world))]
    expected = orders[0]
    wide = [None if t is None else t.double() for t in (stack, weight, bias)]
    exact = run(*wide)
    h = distribute_tensor(stack, mesh, [Shard(1)]) if "sequence" in more else stack
    first, second = run(h, *split), run(h, *split)
    for a, b in zip(first, second):
        assert torch.equal(a, b)  # the same bits every time
    for i, (a, b, c, *others) in enumerate(zip(first, expected, exact, *orders[1:], strict=True)):
        if b.numel() and float(b.abs().max()) > 0:
            # against float64: where rounding costs more than the bound, twice what it costs the whole vocabulary
            error, own = relative(a, c), max(relative(x, c) for x in (b, *others))
            budget = max(BOUND[dtype], 2 * own + 4 * torch.finfo(dtype).eps)
            assert error <= budget, (k, metric, bias is None, softcap, learn, i, error, own)
            worst = max(worst, relative(a, b))
        else:
            assert not b.numel() or float(a.abs().max()) == 0
if rank == 0:
    print(f"split vocabulary of {words} words, {precision}: {worst:.1e}")

# whole weights as DTensors, and a split hidden state with whole weights
weight, stack = random(words, 16), random(2, 2, 7, 16)
q = aajr.lm_head_sensitivity(aajr.Dual(stack), weight)
for w, h in (
    (distribute_tensor(weight, mesh, [Replicate()]), stack),
    (weight, distribute_tensor(stack, mesh, [Shard(1)])),
):
    actual = aajr.lm_head_sensitivity(aajr.Dual(h), w)
    assert relative(actual, q) <= BOUND[dtype]
end()
