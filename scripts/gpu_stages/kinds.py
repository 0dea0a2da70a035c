"""The kinds of calls that are compiled, compared and timed: trials of the first-use check, at real sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from aajr_kernels.backends import cuda, selfcheck
from aajr_kernels.backends.selfcheck import Kind

BF16, F32 = torch.bfloat16, torch.float32


class Sized(NamedTuple):
    """A kind and its number of rows, tokens or positions."""

    name: str
    kind: Kind
    length: int


def _attention(
    name: str,
    size: int = 128,
    length: int = 2048,
    *,
    dtype: torch.dtype = BF16,
    group: int = 4,
    k: int = 1,
    causal: bool = True,
    mask: tuple[torch.dtype, tuple[bool, ...]] | None = None,
    capped: bool = False,
    windowed: bool = False,
    packed: bool = False,
    context: bool = False,
) -> Sized:
    stacks = (1 + k,) * 3
    sizes = (*stacks, group, size, size, *((1 if mask[0] == torch.bool else 1 + k,) if mask else ()))
    features = (capped, causal, windowed, packed, False, False, *(mask or (None, ())), context)
    kind = Kind("attention", "attention", "triton", torch.device("cuda"), (dtype,) * 3, sizes, features)
    return Sized(f"attention {name}", kind, length)


def _rows(
    label: str,
    op: str,
    name: str,
    dtypes: tuple[Any, ...],
    sizes: tuple[int, ...],
    features: tuple[Any, ...],
    length: int,
) -> Sized:
    return Sized(
        f"{name} {label}".strip(),
        Kind(op, name, "triton", torch.device("cuda"), dtypes, sizes, features),
        length,
    )


def kinds(dry: bool) -> list[Sized]:
    """All, in order of value; a dry run has one of each op, small, most on the reference."""
    pairs, padding = (torch.bool, (True, False, True, True)), (torch.bool, (True, False, False, True))
    bias = (BF16, (False, True, True, True))
    low = (BF16, None, BF16, None)
    rms, head = ("norm", "rms_norm", low), ("head", "lm_head_sensitivity")
    every = [
        _attention("D128 causal", length=4096),
        _rows("2048", *rms, (2, 2048), (False, False, False), 4096),
        _rows("", "activation", "swiglu", (BF16, BF16), (2, 2), ("silu",), 65536),
        _rows("", "rotary", "rotary", (BF16, BF16, BF16), (2, 64, 64), (False,), 4096),
        _rows(
            "joint",
            *head,
            (BF16, BF16, None),
            (2, 2048),
            ("fisher", False, True, False, False, True, False),
            1024,
        ),
        _attention("D64 causal", 64),
        _attention("D128 full", group=1, causal=False),
        _attention("D128 pair mask", causal=False, mask=pairs),
        _attention("D64 padding", 64, causal=False, mask=padding),
        _attention("D128 bias", mask=bias),
        _attention("D128 window", windowed=True),
        _attention("D128 softcap", capped=True),
        _attention("D128 packed", packed=True),
        _attention("D128 context", context=True),
        _attention("D64 K=3", 64, k=3),
        _attention("D96", 96),
        _attention("D256", 256, 1024),
        _attention("D64 float32", 64, 1024, dtype=F32),
        *(_rows(f"{size}", *rms, (2, size), (False, False, False), 2048) for size in (768, 8192, 16384)),
        _rows("1024", "norm", "layer_norm", (BF16, None, BF16, BF16), (2, 1024), (True, False, False), 4096),
        _rows(
            "2048",
            "norm",
            "add_rms_norm",
            (BF16, BF16, BF16, None),
            (2, 2, 2048),
            (False, False, False),
            4096,
        ),
        _rows("2048, input passed on", *rms, (2, 2048), (False, False, True), 4096),
        _rows("2048 K=3, offset", *rms, (4, 2048), (False, True, False), 2048),
        _rows("", "activation", "gelu", (BF16,), (2,), ("gelu",), 65536),
        _rows(
            "two passes",
            *head,
            (BF16, BF16, BF16),
            (2, 768),
            ("probs", True, False, True, True, False, False),
            1024,
        ),
        *(
            _rows(metric, "sensitivity", "sensitivity", (BF16,), (2, 32000), (metric,), 512)
            for metric in ("fisher", "probs", "l2")
        ),
        _rows("", "sensitivity", "softmax", (F32,), (2, 4096), ("",), 512),
        _rows("", "linear", "linear", (F32, F32, F32), (2, 2048), (True,), 2048),
    ]
    if cuda.missing() is None:
        every += [
            Sized(f"{one.name}, CUDA C++", one.kind._replace(backend="cuda"), one.length)
            for one in every
            if one.kind.name in ("rms_norm", "layer_norm", "sensitivity")
        ]
    if not dry:
        return every
    first: dict[str, Sized] = {}
    for one in every:
        first.setdefault(one.kind.op, one)
    return [_tiny(one) for one in first.values()]


def _tiny(one: Sized) -> Sized:
    """In float32 on the CPU: in the interpreter, attention on the reference."""
    kind = one.kind._replace(
        device=torch.device("cpu"),
        backend="reference" if one.kind.op in ("attention", "head", "rotary") else "triton",
        dtypes=tuple(None if dtype is None else F32 for dtype in one.kind.dtypes),
        sizes=tuple(min(size, 32) for size in one.kind.sizes),
    )
    return Sized(one.name, kind, 9)


def both_passes(kind: Kind, length: int, backend: str) -> Callable[[], Any]:
    """Forward and backward of a trial, on the same operands at every call."""
    operands, run = selfcheck.trial_of(kind, length)
    leaves = [
        x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in operands.values()
    ]
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    bars: list[torch.Tensor] = []

    def call() -> Any:
        outputs = [t for t in run(backend, *leaves) if t is not None]
        if not bars:
            bars.extend(selfcheck.cotangent(t.shape, t.device).to(t.dtype) for t in outputs)
        return torch.autograd.grad(outputs, inputs, bars, allow_unused=True)

    return call
