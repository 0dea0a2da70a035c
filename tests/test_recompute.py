"""Results of norms and activations that are computed again: the same gradients, bit by bit, from fewer kept bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

import aajr_kernels as aajr
from aajr_kernels.ops.norm import reference as norm_reference
from aajr_kernels.recompute import _context
from bench.suites.memory import Files

B, N, C, H = 2, 7, 16, 24
#: op -> its result for a consumer, from x and residual [B, N, C] and the weight and bias of a norm
OPS = {
    "rms_norm": lambda x, r, w, b: aajr.rms_norm(x, C, w),
    "layer_norm": lambda x, r, w, b: aajr.layer_norm(x, C, w, b),
    "add_rms_norm": lambda x, r, w, b: aajr.add_rms_norm(x, r, C, w)[0],
    "add_layer_norm": lambda x, r, w, b: aajr.add_layer_norm(x, r, C, w, b)[0],
    "gelu": lambda x, r, w, b: aajr.gelu(x),
    "silu": lambda x, r, w, b: aajr.silu(x),
    "swiglu": lambda x, r, w, b: aajr.swiglu(x, r),
    "geglu": lambda x, r, w, b: aajr.geglu(x, r, "tanh"),
}


class Kept(saved_tensors_hooks):
    """Count what autograd keeps: bytes of every block of memory once, and of every time something is saved."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.saves = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            self.blocks[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            self.saves += t.nbytes
            self._alive.append(t)  # or its memory might be another's
            return t

        self._alive: list[torch.Tensor] = []
        super().__init__(pack, lambda t: t)

    def __enter__(self) -> Kept:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(self.blocks.values())


def problem(dtype: torch.dtype, k: int) -> list[torch.Tensor]:
    """x, residual ``[1 + K, B, N, C]``, weight and bias of a norm, weights and biases of two linear layers."""
    shapes = [(1 + k, B, N, C)] * 2 + [(C,)] * 2 + [(H, C), (H,), (H, C), (H,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def recomputing(again: bool | None) -> contextlib.AbstractContextManager[object]:
    """The context of that choice, or (None) none of its own."""
    return contextlib.nullcontext() if again is None else aajr.recompute(again, again)


def step(op: str, leaves: list[torch.Tensor], again: bool | None) -> torch.Tensor:
    x, r, w, b, *linear = leaves
    # the result of an op, so that nothing here is kept for being a leaf
    with recomputing(again):
        y = OPS[op](aajr.Dual(x * 2), aajr.Dual(r * 2), w, b)
    one, two = (aajr.linear(y, *linear[i : i + 2]) for i in (0, 2))
    return (aajr.gelu(one) * two).stacked.square().sum()


def gradients(total: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def same(got: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> bool:
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(got, expected))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_bitwise_equal_and_the_result_is_not_kept(op, k, dtype):
    leaves = problem(dtype, k)
    with Kept() as plain:
        total = step(op, leaves, False)
    expected = gradients(total, leaves)
    with Kept() as less:
        total = step(op, leaves, True)
    assert same(gradients(total, leaves), expected)
    bias = C * dtype.itemsize if op.endswith("layer_norm") else 0  # for the second computation
    assert plain.bytes - less.bytes == (1 + k) * B * N * C * dtype.itemsize - bias
    assert any(g is not None and g.any() for g in expected)


def test_the_context_chooses_and_an_inner_one_overrules_it():
    leaves = problem(torch.float32, 1)
    kept = {}
    for name, context, op, again in [
        ("nothing", contextlib.nullcontext(), "rms_norm", None),
        ("norms", aajr.recompute(activations=False), "rms_norm", None),
        ("activations", aajr.recompute(norms=False), "rms_norm", None),
        ("overruled", aajr.recompute(), "rms_norm", False),
    ]:
        with context, Kept() as saved:
            step(op, leaves, again)
        kept[name] = saved.bytes
    assert kept["norms"] < kept["nothing"] == kept["activations"]
    assert kept["overruled"] == kept["nothing"]
    with aajr.recompute(norms=False), Kept() as saved:
        step("swiglu", leaves, None)
    with Kept() as nothing:
        step("swiglu", leaves, None)
    assert saved.bytes < nothing.bytes
    assert _context == {"norms": False, "activations": False}
    with pytest.raises(TypeError, match="recompute: norms must be True or False, got 'all'"):
        aajr.recompute(norms="all")


def test_all_consumers_share_one_computation(monkeypatch):
    calls = []
    original = norm_reference.norm_fwd
    monkeypatch.setattr(norm_reference, "norm_fwd", lambda *a: calls.append(a) or original(*a))
    leaves = problem(torch.float32, 1)
    with aajr.use_backend("reference"):
        total = step("rms_norm", leaves, True)
        assert len(calls) == 1
        first = gradients_retained(total, leaves)
        assert len(calls) == 2
        assert same(gradients(total, leaves), first)  # and again in a second backward
        assert len(calls) == 3


def gradients_retained(total: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True))


def test_parts_of_a_backward():
    """One consumer only, then everything: neither is left waiting for the other."""
    leaves = problem(torch.float32, 1)
    expected = gradients(step("layer_norm", leaves, False), leaves)
    total = step("layer_norm", leaves, True)
    for i in (4, 6, 4):
        (one,) = torch.autograd.grad(total, leaves[i], retain_graph=True)
        assert torch.equal(one, expected[i])
    assert same(gradients(total, leaves), expected)


def test_frozen_weights_keep_nothing_and_ask_nothing():
    leaves = problem(torch.float32, 1)
    for leaf in leaves[4:]:
        leaf.requires_grad_(False)
    expected = torch.autograd.grad(step("rms_norm", leaves, False), leaves[0])
    with Kept() as plain:
        step("rms_norm", leaves, False)
    with Kept() as less:
        total = step("rms_norm", leaves, True)
    assert plain.bytes == less.bytes
    assert torch.equal(torch.autograd.grad(total, leaves[0])[0], expected[0])


def test_a_reshaped_result_is_found_and_a_part_of_it_is_kept():
    x, w, weight = torch.randn(2, B, N, C), torch.ones(C), torch.randn(H, C)
    for leaf in (x, w, weight):
        leaf.requires_grad_()
    results = {}
    for name, cut in {
        "view": lambda y: y.view(-1, C),
        "reshape": lambda y: y.reshape(B * N, C),
        "part": lambda y: y[:, 1:],
    }.items():
        for again in (False, True):
            with Kept() as kept, recomputing(again):
                y = aajr.linear(cut(aajr.rms_norm(aajr.Dual(x * 1), C, w)), weight)
            grads = torch.autograd.grad(y.stacked.square().sum(), (x, w, weight))
            results[name, again] = kept.bytes, grads
        assert same(list(results[name, True][1]), list(results[name, False][1]))
    size = 2 * B * N * C * 4
    for name in ("view", "reshape"):
        assert results[name, False][0] - results[name, True][0] == size
    assert results["part", False][0] == results["part", True][0]


def test_a_result_that_was_written_to_is_kept_as_it_is():
    leaves = problem(torch.float32, 1)
    x, _, w, _, weight, *_ = leaves
    weight_grads = []
    for again in (False, True):
        with recomputing(again):
            y = aajr.rms_norm(aajr.Dual(x * 1), C, w)
        with torch.no_grad():
            y.stacked.mul_(3)
        weight_grads.append(torch.autograd.grad(aajr.linear(y, weight).stacked.sum(), weight)[0])
    assert torch.equal(*weight_grads)


def test_an_input_that_was_written_to_raises():
    leaves = problem(torch.float32, 1)
    x, _, w, _, weight, *_ = leaves
    inner = x * 1
    with aajr.recompute():
        total = aajr.linear(aajr.rms_norm(aajr.Dual(inner), C, w), weight).stacked.sum()
    inner.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, weight)


def test_a_weight_that_was_freed_raises():
    """As FSDP2 frees those of a module that is not yet due in the backward."""
    leaves = problem(torch.float32, 1)
    x, _, w, _, weight, *_ = leaves
    held = (w * 1).detach()
    with aajr.recompute():
        total = aajr.linear(aajr.rms_norm(aajr.Dual(x * 1), C, held), weight).stacked.sum()
    held.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="recompute: a weight of shape .* was freed"):
        torch.autograd.grad(total, weight)


# -- hooks on saved tensors -------------------------------------------------------------------------------------------


def block(x: aajr.Dual, leaves: list[torch.Tensor], again: bool | None) -> aajr.Dual:
    """A pre-norm MLP."""
    w, up, down = leaves
    with recomputing(again):
        y = aajr.rms_norm(x, C, w)
        return x + aajr.linear(aajr.gelu(aajr.linear(y, up)), down)


def mlp() -> tuple[torch.Tensor, list[torch.Tensor]]:
    shapes = [(C,), (H, C), (C, H)]
    return torch.randn(2, B, N, C).requires_grad_(), [torch.randn(s).requires_grad_() for s in shapes]


@contextlib.contextmanager
def offloaded(saves: list[int]) -> Iterator[None]:
    """Copy and count everything, as `save_on_cpu` does where the host is the device."""

    def pack(t: torch.Tensor) -> torch.Tensor:
        saves.append(t.nbytes)
        return t.detach().clone()

    with saved_tensors_hooks(pack, lambda t: t.clone()):
        yield


def test_offloading_moves_fewer_bytes():
    x, leaves = mlp()
    totals, moved = [], []
    for again in (False, True):
        saves: list[int] = []
        with offloaded(saves):
            total = block(aajr.Dual(x * 1), leaves, again).stacked.square().sum()
        totals.append(gradients(total, [x, *leaves]))
        moved.append(sum(saves))
    assert same(totals[1], totals[0])
    assert same(
        totals[0], gradients(block(aajr.Dual(x * 1), leaves, False).stacked.square().sum(), [x, *leaves])
    )
    # neither what the norm gives nor what the activation gives goes anywhere
    assert moved[0] - moved[1] == 2 * B * N * (C + H) * 4


def test_with_save_on_cpu():
    x, leaves = mlp()
    expected = gradients(block(aajr.Dual(x * 1), leaves, False).stacked.square().sum(), [x, *leaves])
    for first, second in ((save_on_cpu, aajr.recompute), (aajr.recompute, save_on_cpu)):
        with first(), second():
            total = block(aajr.Dual(x * 1), leaves, None).stacked.square().sum()
        assert same(gradients(total, [x, *leaves]), expected)


def test_files_of_the_benchmark(tmp_path):
    x, leaves = mlp()
    expected = gradients(block(aajr.Dual(x * 1), leaves, False).stacked.square().sum(), [x, *leaves])
    written = []
    for again in (False, True):
        with Files(tmp_path, leaves, small=1) as files:
            total = block(aajr.Dual(x * 1), leaves, again).stacked.square().sum()
        assert same(gradients(total, [x, *leaves]), expected)
        written.append(files.written)
    assert written[0] - written[1] == 2 * B * N * (C + H) * 4
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 0


def test_with_checkpoints():
    x, leaves = mlp()
    expected = gradients(block(aajr.Dual(x * 1), leaves, False).stacked.square().sum(), [x, *leaves])
    run = lambda again: checkpoint(block, aajr.Dual(x * 1), leaves, again, use_reentrant=False)
    assert same(gradients(run(True).stacked.square().sum(), [x, *leaves]), expected)
    with aajr.recompute():
        total = run(None).stacked.square().sum()
        assert same(gradients(total, [x, *leaves]), expected)


def test_a_checkpoint_whose_second_forward_keeps_something_else_raises():
    x, leaves = mlp()
    with aajr.recompute():
        total = checkpoint(block, aajr.Dual(x * 1), leaves, None, use_reentrant=False).stacked.square().sum()
    with pytest.raises(CheckpointError, match="number of tensors|different metadata"):
        gradients(total, [x, *leaves])
