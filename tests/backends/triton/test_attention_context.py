"""Triton kernels of attention with a context beyond the shared suite, which checks them against float64."""

from __future__ import annotations

import collections

import pytest
import torch
from ops.op_checks import stacks
from ops.suite import DEVICES, Target
from torch import Tensor

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.attention.options import Options

triton_module = pytest.importorskip("aajr_kernels.ops.attention.triton", reason="triton is not installed")

DEVICE = DEVICES["triton"]
pytestmark = [
    pytest.mark.skipif(Target("triton").why_not("attention") is not None, reason="Triton cannot run here"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
ALL = (True,) * 6


def operands(
    n: int, context: int, k: int = 1, size: int = 16
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries, keys and values of `n` positions and a context, of two query heads and a key head."""
    shapes = [(1, heads, n, size) for heads in (2, 1, 1)]
    q, key, value = (stacks(*shape, k=k).float().to(DEVICE) for shape in shapes)
    before, after = (stacks(1, 1, context, size, k=0).float().to(DEVICE) for _ in range(2))
    return (q, key, value), (before, after)


def after(options: Options, context: tuple[Tensor, Tensor]) -> Options:
    return options._replace(context_k=context[0], context_v=context[1])


def joined(context: Tensor, own: Tensor) -> Tensor:
    """Keys or values of a context before the others, with the zeros that the kernels do without."""
    zeros = torch.zeros_like(context).expand(own.shape[0] - 1, *context.shape[1:])
    return torch.cat([torch.cat([context, zeros]), own], 3)


@pytest.mark.parametrize("window", [None, pytest.param(50, marks=pytest.mark.slow)])
def test_dropout_and_bias_are_those_of_the_keys_put_together(window):
    """The mask of dropout is a function of the place of a key among all of them."""
    (q, k, v), context = operands(9, 40)
    bias = 0.5 * torch.randn(2, 1, 2, 9, 49, device=DEVICE)
    seed = torch.tensor(11, device=DEVICE)
    whole = Options(0.3, offset=40, window=window, dropout=0.4, drawn=seed)
    options, keys = after(whole, context), [joined(*pair) for pair in zip(context, (k, v))]
    got, expected = (
        triton_module.attention_fwd(q, k, v, bias, options),
        triton_module.attention_fwd(q, *keys, bias, whole),
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    bar = torch.randn_like(got[0])
    mine = triton_module.attention_bwd(bar, q, k, v, bias, *got, options=options, needs=ALL)
    q_bar, *bars, bias_bar = triton_module.attention_bwd(
        bar, q, *keys, bias, *expected, options=whole, needs=ALL[:4]
    )
    own, before = [x[:, :, :, 40:] for x in bars], [x[:1, :, :, :40] for x in bars]
    for one, other in zip(mine, (q_bar, *own, bias_bar, *before), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter tells which products it forms")
@pytest.mark.parametrize(
    ("tangents", "forward", "backward"),
    [(1, {"fwd": 4}, {"kv": 8, "q": 6}), (0, {"fwd": 2}, {"kv": 4, "q": 3})],
    ids=["tangents", "none"],
)
def test_products_against_a_tile_of_the_context(tangents, forward, backward, monkeypatch):
    """Keys in one tile, so that a context in a second one costs what is asked for: 4 instead of 6, 14 instead of 21."""
    from triton.runtime.interpreter import interpreter_builder

    counts: collections.Counter[str] = collections.Counter()
    create, launch = interpreter_builder.create_dot, triton_module.launch
    kernel = ""

    def counted(*args, **kwargs):
        counts[kernel] += 1
        return create(*args, **kwargs)

    def named(of, *args, **kwargs):
        nonlocal kernel
        kernel = of.fn.__name__.removeprefix("_attention_").removeprefix("bwd_").removesuffix("_kernel")
        launch(of, *args, **kwargs)

    monkeypatch.setattr(interpreter_builder, "create_dot", counted)
    monkeypatch.setattr(triton_module, "launch", named)

    def products(context: bool) -> collections.Counter[str]:
        counts.clear()
        (q, k, v), before = operands(9, 20, k=tangents)
        q, options = q[:, :, :1], Options(0.3, offset=20 if context else 0)
        options = after(options, before) if context else options
        got = triton_module.attention_fwd(q, k, v, None, options)
        needs = ALL if context else ALL[:4]
        triton_module.attention_bwd(got[0], q, k, v, None, *got, options=options, needs=needs)
        return collections.Counter(counts)

    without = products(False)
    assert products(True) - without == collections.Counter({**forward, **backward})


def test_only_the_gradients_that_are_needed_are_computed():
    (q, k, v), context = operands(9, 20)
    options = after(Options(0.3, offset=20), context)
    saved = triton_module.attention_fwd(q, k, v, None, options)

    def launched(*needs: bool) -> list[str]:
        with gpu.dry_run("interpreter") as kernels:
            bars = triton_module.attention_bwd(saved[0], q, k, v, None, *saved, options=options, needs=needs)
        assert [bar is not None for bar in bars] == [need and i != 3 for i, need in enumerate(needs)]
        return [kernel.fn.__name__.split("_")[3] for kernel in kernels if "_bwd_" in kernel.fn.__name__]

    no = False
    assert launched(True, no, no, no, no, no) == ["q"]
    assert launched(no, no, no, no, True, no) == launched(no, True, no, no, no, no) == ["kv"]
    assert launched(*ALL) == ["kv", "kv", "q"]


def test_nothing_as_long_as_the_context_is_allocated_for_a_forward():
    (q, k, v), context = operands(3, 4000)
    inputs = {x.untyped_storage().data_ptr() for x in (q, k, v, *context)}

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, result.numel())
            return result

    with gpu.dry_run("interpreter") as kernels, Allocations() as seen:
        triton_module._attention_fwd.__wrapped__(q, k, v, None, *after(Options(0.3, offset=4000), context))
    assert len(kernels) == 1 and 0 < seen.largest < context[0].numel()


@pytest.mark.slow
def test_two_runs_are_bitwise_equal():
    (q, k, v), context = operands(20, 40, k=2)
    options = after(Options(0.3, offset=40), context)
    results = []
    for _ in range(2):
        out = triton_module.attention_fwd(q, k, v, None, options)
        needs = (True, True, True, False, True, True)
        bars = triton_module.attention_bwd(
            torch.ones_like(out[0]), q, k, v, None, *out, options=options, needs=needs
        )
        results.append([x for x in (*out, *bars) if x is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
