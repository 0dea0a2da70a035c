"""The streamed head in Triton where only some tokens count: their number stays on the device, blocks are left out.

tests/ops/test_head_counted.py holds the mathematics for every backend.
"""

from __future__ import annotations

import pytest
import torch
from backends.triton import test_head
from backends.triton.test_head import DEVICE, T, compare, ours, passes, problem, random_labels, results, small

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.head import counted, triton_launch
from aajr_kernels.ops.head import triton as kernels

pytestmark = test_head.pytestmark
__all__ = ["passes", "small"]  # fixtures


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """As on a GPU: nothing knows how many tokens count."""
    monkeypatch.setattr(counted, "_is_known", lambda device: False)


def some(tokens=T, every=5):
    return torch.arange(tokens, device=DEVICE) % every == 1


@pytest.mark.parametrize("metric", ["l2", "logits", "fisher", "probs"])
def test_mask_and_labels(small, metric):
    """Of 70 tokens 14 count for q and 10 for their loss, which leaves out the second block of tokens."""
    labels = random_labels().masked_fill(~some(every=7), -100)
    compare(problem(), metric=metric, labels=labels, mask=some())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask(small, dtype):
    compare(problem(dtype=dtype, k=2, bias=False), mask=some(), scale=0.3)


@pytest.mark.parametrize("metric", ["fisher", "logits"])
def test_more_tangents_than_a_launch_takes(small, metric):
    small.setattr(triton_launch, "TANGENTS", 2)
    compare(problem(tokens=9, k=3), metric=metric, mask=some(9, 2), softcap=2.0)


def test_labels_without_tangents(small):
    labels = random_labels().masked_fill(~some(every=3), -100)
    compare(problem(k=0), labels=labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_joint(small, passes, dtype, blocks):
    tokens = 150
    kept = 1 << 30 if blocks == 1 else 4 * 2 * 256 * 128
    for name in ("_KEPT_LEAST", "_KEPT_MOST"):
        small.setattr(kernels, name, kept)
    mask = some(tokens)
    labels = random_labels(tokens).masked_fill(some(tokens, 2), -100)
    expected = lambda bars: lambda q, rows: (2.0 * bars[:1, rows], 2.0 * bars[1, rows])
    compare(problem(tokens, dtype=dtype), expected=expected, labels=labels, mask=mask)
    assert passes == ["head_joint"]


def test_nothing_is_computed_where_no_token_counts(small):
    labels = torch.full((T,), -100, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        cotangent = torch.randn(2, T, device=DEVICE)
        mask = torch.zeros(T, dtype=torch.bool, device=DEVICE)
        got = results(ours, problem(dtype=dtype), cotangent, labels=labels, mask=mask)
        assert not any(t.any() for t in got)


def test_what_does_not_count_may_hold_anything(small):
    """And two runs agree to the last bit."""
    tensors, cotangent, mask = problem(), torch.randn(1, T, device=DEVICE), some()
    clean = results(ours, tensors, cotangent, mask=mask)
    tensors[0][:, ~mask] = torch.nan
    for _ in range(2):
        for a, b in zip(clean, results(ours, tensors, cotangent, mask=mask)):
            assert torch.equal(a, b)


def test_launches_do_not_depend_on_the_number_of_tokens_that_count(small):
    """A captured graph takes another mask: no number in it is one of the host's."""
    launch, seen = gpu.launch, []

    def note(kernel, grid, device, *args, **constants):
        numbers = tuple(x for x in args if not isinstance(x, torch.Tensor))
        seen[-1].append((kernel.fn.__name__, grid, repr(numbers), tuple(sorted(constants.items()))))
        launch(kernel, grid, device, *args, **constants)

    small.setattr(gpu, "launch", note)
    for every in (2, 30):
        seen.append([])
        results(ours, problem(), torch.randn(1, T, device=DEVICE), mask=some(every=every))
    assert seen[0] == seen[1]
    assert {"_head_rows_kernel", "_head_weight_kernel"} <= {name for name, *_ in seen[0]}


@pytest.mark.skipif(DEVICE != "cpu", reason="counts products in Triton's interpreter")
def test_blocks_in_which_nothing_counts_form_no_products(small):
    """Two blocks of 64 tokens against one, of which 3 count: blocks of 32 rows and steps of 32 rows."""
    from triton.runtime.interpreter import InterpreterBuilder

    dot, formed = InterpreterBuilder.create_dot, []
    small.setattr(InterpreterBuilder, "create_dot", lambda *args: formed.append(1) or dot(*args))
    counts = []
    for mask in (torch.ones(128, dtype=torch.bool), some(128, 50)):
        formed.clear()
        results(ours, problem(tokens=128, words=128, size=32, bias=False), torch.randn(1, 128), mask=mask)
        counts.append(len(formed))
    # forward and cotangents: 2 stacks, words of two tiles; then rows of h and steps over rows of the weight
    logits, rows, steps = 2 * 2 * 2, 2 * 4, 2 * 4 * 4
    assert counts == [2 * logits + rows * 4 + steps, logits + 2 * 4 + 2 * 4]


def test_a_captured_joint_form_takes_any_mask(small, passes):
    """Expected cotangents stay in proportion to what arrives, also where no token counts; no value is read."""
    small.setattr(kernels, "_KEPT_LEAST", 1 << 20)
    tensors, labels = problem(tokens=40), random_labels(40)
    expected = lambda q, rows: (torch.full_like(q, 2.0), torch.ones(q.shape[-1], device=DEVICE))
    bars = torch.stack([torch.full((40,), 2.0), torch.ones(40)]).to(DEVICE)

    def run(mask):
        return results(
            ours, tensors, bars, mask=mask, expected=expected, labels=labels.masked_fill(~mask, -100)
        )

    masks = some(40, 3), torch.zeros(40, dtype=torch.bool, device=DEVICE)
    outside = [run(mask) for mask in masks]
    with small.context() as patch:
        patch.setattr(test_head.function.capture, "is_capturing", lambda device: True)
        patch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("read a value"))
        captured = [run(mask) for mask in masks]
    for a, b in zip(outside, captured):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert passes == ["head_joint"] * 4
