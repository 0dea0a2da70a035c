"""Which kernels calls of every op would compile, length by length: their specialisations, without a compiler.

Run as a process of its own, since Triton decides when it is imported whether kernels are interpreted: prints for every
call the kernels that more than one specialisation is needed of, with what differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from backends.triton.offline import no_device
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual, use_backend
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.sensitivity import softmax

LENGTHS = (1000, 1001, 1007, 1008, 1023, 1024, 1025, 1040, 1099, 1104, 1152, 1153, 1184, 1199, 1200)
B, H, HK, D, C, V = 2, 12, 4, 64, 768, 50257
LOW = torch.bfloat16

Leaf = Callable[..., Tensor]


class _Memory:
    """A tensor as Triton's launch reads it: of meta tensors the address is the offset into their memory."""

    def __init__(self, t: Tensor) -> None:
        self.dtype, self.address = t.dtype, t.storage_offset() * t.element_size()

    def data_ptr(self) -> int:
        return self.address


def specialised(run: Callable[[], None], architecture: str) -> set[tuple[str, tuple[str, ...]]]:
    """Name of every kernel that `run` launches, and what Triton takes for constant of every argument."""
    keys = set()

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        *_, binder = kernel.device_caches[architecture]
        memory = (_Memory(a) if isinstance(a, Tensor) else a for a in args)
        _, arguments, rest = binder(*memory, **options)
        keys.add((kernel.fn.__name__, (*map(str, arguments), str(rest))))

    with no_device(architecture), gpu.recording(record, architecture), use_backend("triton"):
        run()
    return keys


def attention(n: int, leaf: Leaf, mask: str = "", **options: Any) -> Any:
    q, k, v = (Dual(leaf(B, n, heads, D, k=1).transpose(2, 3)) for heads in (H, HK, HK))
    masks = {
        "pairs": lambda: torch.empty(B, 1, n, n, dtype=torch.bool, device="meta"),
        "padding": lambda: torch.empty(B, 1, 1, n, dtype=torch.bool, device="meta"),
        "bias": lambda: leaf(1, H, n, n),
        "dual bias": lambda: Dual(leaf(1, H, n, n, k=1)),
        "bias per query": lambda: leaf(B, H, n, 1),
        "bias of buckets": lambda: leaf(n, n, H).permute(2, 0, 1).unsqueeze(0),
    }
    if mask:
        options["mask"] = masks[mask]()
    return aajr.attention(q, k, v, **options)


def context(n: int, leaf: Leaf) -> Any:
    before = (leaf(B, n + 24, HK, D).transpose(1, 2) for _ in range(2))
    return attention(n, leaf, causal=True, context=tuple(before))


def packed(n: int, leaf: Leaf) -> Any:
    q, k, v = (Dual(leaf(1, n, heads, D, k=1).transpose(2, 3)) for heads in (H, HK, HK))
    return aajr.attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0, 37, n]))


def rotary(n: int, leaf: Leaf, trained: bool = False) -> Any:
    make = leaf if trained else lambda *shape: torch.empty(shape, device="meta")
    return aajr.rotary(Dual(leaf(B, n, H, D, k=1).transpose(2, 3)), make(1, n, D), make(1, n, D))


def head(n: int, leaf: Leaf, joint: bool = False, masked: bool = False, **options: Any) -> Any:
    if masked:
        options["mask"] = torch.empty(B, n, dtype=torch.bool, device="meta")
    if joint:
        options["expected"] = lambda q, rows: (torch.empty_like(q), None)
    labels = torch.empty(B, n, dtype=torch.int64, device="meta")
    hidden = Dual(leaf(B, n, 1024, k=1))
    return aajr.lm_head_sensitivity(hidden, leaf(V, 1024), leaf(V), labels=labels, **options)


def gated(n: int, leaf: Leaf) -> Any:
    gate, up = leaf(B, n, 2 * C, k=1).chunk(2, -1)
    return aajr.swiglu(Dual(gate), Dual(up))


CALLS: dict[str, Callable[[int, Leaf], Any]] = {
    "attention": attention,
    "attention causal": lambda n, leaf: attention(n, leaf, causal=True, window=256, softcap=30.0),
    "attention packed": packed,
    "attention context": context,
    "attention mask of pairs": lambda n, leaf: attention(n, leaf, "pairs"),
    "attention padding": lambda n, leaf: attention(n, leaf, "padding"),
    "attention bias": lambda n, leaf: attention(n, leaf, "bias"),
    "attention dual bias": lambda n, leaf: attention(n, leaf, "dual bias"),
    "attention bias per query": lambda n, leaf: attention(n, leaf, "bias per query"),
    "attention bias of buckets": lambda n, leaf: attention(n, leaf, "bias of buckets"),
    "rms_norm": lambda n, leaf: aajr.rms_norm(Dual(leaf(B, n, C, k=1)), C, leaf(C)),
    "layer_norm": lambda n, leaf: aajr.layer_norm(Dual(leaf(B, n, C, k=1)), C, leaf(C), leaf(C)),
    "rms_norm of heads": lambda n, leaf: aajr.rms_norm(Dual(leaf(B, n, 3 * H, D, k=1)[:, :, :, :H]), D, leaf(D)),
    "layer_norm long": lambda n, leaf: aajr.layer_norm(Dual(leaf(B, n, 9216, k=1)), 9216, leaf(9216)),
    "add_rms_norm": lambda n, leaf: aajr.add_rms_norm(
        Dual(leaf(B, n, C, k=1)), Dual(leaf(B, n, C, k=1)), C, leaf(C)
    ),
    "gelu": lambda n, leaf: aajr.gelu(Dual(leaf(B, n, C, k=1))),
    "swiglu": gated,
    "rotary": rotary,
    "rotary trained": lambda n, leaf: rotary(n, leaf, trained=True),
    "linear": lambda n, leaf: aajr.linear(Dual(leaf(B, n, C, k=1)), leaf(C, C), leaf(C)),
    "linear float32": lambda n, leaf: aajr.linear(
        Dual(leaf(B, n, C, k=1, dtype=torch.float32)), leaf(C, C, dtype=torch.float32), leaf(C, dtype=torch.float32)
    ),
    "head": head,
    "head probs": lambda n, leaf: head(n, leaf, metric="probs", softcap=30.0),
    "head joint": lambda n, leaf: head(n, leaf, joint=True),
    "head mask": lambda n, leaf: head(n, leaf, masked=True),
    "sensitivity": lambda n, leaf: aajr.sensitivity(Dual(leaf(B, n, 32000, k=1))),
    "softmax": lambda n, leaf: softmax(Dual(leaf(B, n, 64, k=1))),
    "softmax along the tokens": lambda n, leaf: softmax(Dual(leaf(B, n, n, k=1))),
}  # fmt: skip


def specialisations(name: str, architecture: str) -> dict[int, set[tuple[str, tuple[str, ...]]]]:
    """By length, of the kernels of a call and of its backward."""

    def run(n: int) -> None:
        leaves: list[Tensor] = []

        def leaf(*shape: int, k: int = 0, dtype: torch.dtype = LOW) -> Tensor:
            stacked = (1 + k, *shape) if k else shape
            leaves.append(torch.empty(stacked, dtype=dtype, device="meta", requires_grad=True))
            return leaves[-1]

        outputs = CALLS[name](n, leaf)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = [y.stacked if isinstance(y, Dual) else y for y in outputs]
        torch.autograd.grad(tensors, leaves, [torch.empty_like(y) for y in tensors])

    return {n: specialised(lambda: run(n), architecture) for n in LENGTHS}


def differences(by_length: dict[int, set[tuple[str, tuple[str, ...]]]]) -> list[str]:
    """One line for every kernel that the first length did not compile."""
    first, *rest = by_length
    compiled, lines = set(by_length[first]), []
    for n in rest:
        for name, key in sorted(by_length[n] - compiled):
            old = min(
                (k for other, k in compiled if other == name),
                key=lambda k: sum(a != b for a, b in zip(k, key)),
                default=(),
            )
            changed = [f"argument {i}: {a} -> {b}" for i, (a, b) in enumerate(zip(old, key)) if a != b]
            lines.append(f"{name} at {n}: {'; '.join(changed) or 'not launched before'}")
        compiled |= by_length[n]
    return lines


if __name__ == "__main__":
    print(
        json.dumps(
            {
                architecture: {name: differences(specialisations(name, architecture)) for name in CALLS}
                for architecture in ("sm_80", "sm_90")
            }
        )
    )
