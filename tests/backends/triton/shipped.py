"""The configurations that are shipped: what the ops launch for the shapes of transformers, one line each.

Tensors live on torch's ``meta`` device, so that nothing is computed; compiler.py compiles what would be launched. Sizes
that kernels do not specialise on are arbitrary; head dimensions, features and words matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.backends import choice
from aajr_kernels.ops.sensitivity import softmax

ALL = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
STRICT = ("sm_80", "sm_90")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Config:
    """One computation of a public op, forward and backward.

    Attributes:
        name: unique; the key of the budgets.
        op: package under aajr_kernels/ops.
        dtype: of the inputs.
        strict: processors on which no spill is allowed in a hot loop; elsewhere the budget bounds them.
        pinned: architectures on which it is compiled in ``make test``; the others follow in ``make test-all``.
        run: makes meta tensors, calls the op and its backward.
        warpgroups: on sm_90 products of 16 bits are those of warpgroups.
        processors: which take it.
    """

    name: str
    op: str
    dtype: torch.dtype
    strict: tuple[str, ...]
    pinned: tuple[str, ...]
    run: Callable[[], None]
    warpgroups: bool = True
    processors: tuple[str, ...] = ALL


CONFIGS: dict[str, Config] = {}


def meta(*shape: int, dtype: torch.dtype, k: int = 0) -> Tensor:
    """A leaf without memory, with k tangents stacked below it."""
    return torch.empty(*((1 + k, *shape) if k else shape), dtype=dtype, device="meta", requires_grad=True)


def _add(
    op: str,
    label: str,
    dtype: torch.dtype,
    function: Callable[[Callable[..., Tensor]], Dual | Tensor | Sequence[Dual | Tensor]],
    pinned: Sequence[str] = (),
    strict: Sequence[str] = STRICT,
    warpgroups: bool = True,
    tf32: bool = False,
    processors: Sequence[str] = ALL,
) -> None:
    """`function` gets a maker of leaves and returns outputs; gradients of all leaves are asked for.

    With `tf32`, products of float32 take torch's setting of that name.
    """

    def run() -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            step()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def step() -> None:
        leaves: list[Tensor] = []

        def leaf(*shape: int, k: int = 0, dtype: torch.dtype = dtype) -> Tensor:
            leaves.append(meta(*shape, dtype=dtype, k=k))
            return leaves[-1]

        outputs = function(leaf)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        tensors = [y.stacked if isinstance(y, Dual) else y for y in outputs]
        torch.autograd.grad(tensors, leaves, [torch.empty_like(y) for y in tensors])

    name = f"{label} {'tf32' if tf32 else str(dtype).removeprefix('torch.')}"
    assert name not in CONFIGS, name
    strict = () if dtype == FP32 else tuple(strict)
    CONFIGS[name] = Config(name, op, dtype, strict, tuple(pinned), run, warpgroups, tuple(processors))


# ------------------------------------------------------------------------------------------------------ attention
# `spills`: one to six, a hundredth of the loop's time each, where a smaller tile costs more; many at head size 128 with
# a bias, a soft cap or dropout (ops/attention/configs.py says why)
def attention(
    label: str,
    dtype: torch.dtype,
    D: int,
    *,
    pinned: Sequence[str] = (),
    B: int = 2,
    heads: tuple[int, int] = (4, 4),
    N: int = 1024,
    M: int | None = None,
    k: int = 1,
    mask: str = "",
    moves: str = "qkv",
    context: int = 0,
    spills: Sequence[str] = (),
    **options: object,
) -> None:
    def function(leaf: Callable[..., Tensor]) -> Dual:
        keys = M or N
        shapes = {"q": (B, heads[0], N, D), "k": (B, heads[1], keys, D), "v": (B, heads[1], keys, D)}
        if context:
            options["context"] = tuple(leaf(B, heads[1], context, D) for _ in range(2))
            keys += context
        inputs = [leaf(*s, k=k if x in moves else 0) for x, s in shapes.items()]
        q, key, v = (Dual(t) if x in moves else t for x, t in zip("qkv", inputs))
        allowed: Tensor | None = None
        if mask == "padding":
            allowed = torch.empty(B, 1, 1, keys, dtype=torch.bool, device="meta")
        elif mask == "pairs":
            allowed = torch.empty(B, 1, N, keys, dtype=torch.bool, device="meta")
        elif mask == "bias":
            allowed = leaf(1, heads[0], N, keys)
        return aajr.attention(q, key, v, mask=allowed, **options)

    strict = [architecture for architecture in STRICT if D <= 128 and architecture not in spills]
    tf32 = bool(options.pop("tf32", False))
    # heads above 128 leave no room for the rows of a warpgroup
    # float32 heads above 128 do not fit into 99 KB: the op says so
    processors = [x for x in ALL if x != "sm_120" or dtype != FP32 or D <= 128]
    _add("attention", f"attention {label}", dtype, function, pinned, strict, D <= 128, tf32, processors)


attention(
    "D128 causal GQA", BF16, 128, heads=(32, 8), N=4096, causal=True, pinned=("sm_90", "sm_100", "gfx942")
)
attention("D128 full", BF16, 128, pinned=("sm_90",))
attention("D64 causal", BF16, 64, causal=True, pinned=("sm_80", "sm_90"))
attention("D64 full", BF16, 64)
attention("D128 causal", FP16, 128, causal=True)
attention("D64 causal", FP16, 64, causal=True)
attention("D64 causal", FP32, 64, causal=True)
attention("D128 causal", FP32, 128, causal=True)
attention(
    "D128 padding causal GQA", BF16, 128, heads=(32, 8), N=4096, mask="padding", causal=True, spills=STRICT
)
# few programs: each has a query head, and the parts of a key head are added
attention("D128 causal GQA short", BF16, 128, heads=(8, 2), causal=True)
attention("D64 padding", BF16, 64, mask="padding")
# what transformers makes of padding: a mask per query, causality within
attention(
    "D128 mask GQA", BF16, 128, heads=(32, 8), N=4096, mask="pairs", spills=("sm_90",), pinned=("sm_90",)
)
attention("D64 mask", BF16, 64, mask="pairs")
attention("D64 bias", BF16, 64, mask="bias")
attention("D128 bias causal", BF16, 128, mask="bias", causal=True, spills=STRICT)
attention("D128 window", BF16, 128, causal=True, window=256)
attention("D64 window", BF16, 64, causal=True, window=256)
attention("D128 softcap", BF16, 128, causal=True, softcap=50.0, spills=STRICT)
attention("D64 softcap", BF16, 64, causal=True, softcap=50.0)
attention("D128 K3 causal", BF16, 128, k=3, causal=True, spills=STRICT)
attention("D64 K3 causal", BF16, 64, k=3, causal=True)
attention("D64 dropout", BF16, 64, causal=True, dropout=0.1)
attention("D128 dropout", BF16, 128, causal=True, dropout=0.1, spills=("sm_90",))
attention("D128 packed", BF16, 128, B=1, causal=True, spills=STRICT, cu_seqlens=torch.tensor([0, 37, 1024]))
attention("D64 packed", BF16, 64, B=1, causal=True, cu_seqlens=torch.tensor([0, 37, 1024]))
attention("D64 lower right, N 37", BF16, 64, N=37, M=1000, causal="lower_right")
attention("D64 q moves", BF16, 64, moves="q", causal=True, spills=("sm_80",))
attention("D64 v moves", BF16, 64, moves="v", causal=True)
attention(
    "D128 context GQA", BF16, 128, heads=(32, 8), context=3072, causal=True, pinned=("sm_90",), spills=STRICT
)
attention("D64 context", BF16, 64, context=3072, causal=True, pinned=("sm_80",), spills=("sm_80",))
attention("D16 causal", BF16, 16, causal=True)
attention("D32 causal", BF16, 32, causal=True)
attention("D80 causal", BF16, 80, causal=True, spills=("sm_80",))
attention("D96 causal", BF16, 96, causal=True, spills=("sm_80",))
attention("D192 causal", BF16, 192, causal=True)
attention("D256 causal", BF16, 256, causal=True)
attention("D256 causal", FP32, 256, causal=True)
attention("D64 causal", FP32, 64, causal=True, tf32=True)
attention("D128 causal", FP32, 128, causal=True, tf32=True)


# ----------------------------------------------------------------------------------------------------------- rows
def rms(label: str, dtype: torch.dtype, C: int, pinned: Sequence[str] = (), k: int = 1, **options: float):
    def function(leaf):
        return aajr.rms_norm(Dual(leaf(2, 512, C, k=k)), C, leaf(C), 1e-5, **options)

    _add("norm", f"rms_norm {label}", dtype, function, pinned)


def layer(label: str, dtype: torch.dtype, C: int, pinned: Sequence[str] = (), k: int = 1):
    def function(leaf):
        return aajr.layer_norm(Dual(leaf(2, 512, C, k=k)), C, leaf(C), leaf(C))

    _add("norm", f"layer_norm {label}", dtype, function, pinned)


def add_norm(label: str, dtype: torch.dtype, C: int, centred: bool, pinned: Sequence[str] = ()):
    def function(leaf):
        x, residual = Dual(leaf(2, 512, C, k=1)), Dual(leaf(2, 512, C, k=1))
        if centred:
            return aajr.add_layer_norm(x, residual, C, leaf(C), leaf(C))
        return aajr.add_rms_norm(x, residual, C, leaf(C), 1e-5)

    _add("norm", f"add_{'layer' if centred else 'rms'}_norm {label}", dtype, function, pinned)


def pointwise(name: str, dtype: torch.dtype, pinned: Sequence[str] = (), k: int = 1, **options: str):
    def function(leaf):
        return getattr(aajr, name)(Dual(leaf(2, 512, 4096, k=k)), **options)

    label = " ".join([name, *options.values(), *([f"K{k}"] if k > 1 else [])])
    _add("activation", label, dtype, function, pinned)


def gated(name: str, dtype: torch.dtype, pinned: Sequence[str] = (), k: int = 1):
    def function(leaf):
        return getattr(aajr, name)(Dual(leaf(2, 512, 4096, k=k)), Dual(leaf(2, 512, 4096, k=k)))

    _add("activation", name if k == 1 else f"{name} K{k}", dtype, function, pinned)


def rotary(label: str, dtype: torch.dtype, pinned: Sequence[str] = (), R: int = 128, **options: bool):
    def function(leaf):
        cos, sin = (torch.empty(2, 512, R, device="meta") for _ in range(2))
        return aajr.rotary(Dual(leaf(2, 8, 512, 128, k=1)), cos, sin, **options)

    _add("rotary", f"rotary {label}", dtype, function, pinned)


rms("C4096", BF16, 4096, ALL)
rms("C4096", FP16, 4096)
rms("C4096", FP32, 4096, ("sm_90",))
rms("C4096 K3", BF16, 4096, k=3)
rms("C128", BF16, 128)
rms("C896 offset", BF16, 896, offset=1.0)
rms("C16384", BF16, 16384, ("sm_90",))
layer("C768", BF16, 768, ALL)
layer("C768", FP32, 768)
layer("C8192", BF16, 8192)
layer("C1000 K3", BF16, 1000, k=3)
add_norm("C4096", BF16, 4096, False, ("sm_90", "gfx942"))
add_norm("C768", BF16, 768, True, ("sm_90",))
add_norm("C4096", FP32, 4096, False)
gated("swiglu", BF16, ALL)
gated("swiglu", FP32)
gated("swiglu", BF16, k=3)
gated("geglu", BF16, ("sm_90",))
pointwise("gelu", BF16, ALL)
pointwise("gelu", FP32)
pointwise("gelu", BF16, approximate="tanh", pinned=("sm_90",))
pointwise("silu", BF16)
pointwise("silu", BF16, k=3)
pointwise("relu2", BF16)
pointwise("quick_gelu", BF16)
pointwise("tanh", BF16)
pointwise("sigmoid", BF16)
rotary("R128", BF16, ALL)
rotary("R128", FP32)
rotary("R64", BF16, R=64)
rotary("R128 interleaved", BF16, interleaved=True)


# ------------------------------------------------------------------------------------------------------- products
def linear(label: str, dtype: torch.dtype, pinned: Sequence[str] = (), k: int = 1):
    def function(leaf):
        return aajr.linear(Dual(leaf(2, 512, 1024, k=k)), leaf(1024, 1024), leaf(1024))

    _add("linear", f"linear {label}", dtype, function, pinned)


def head(
    metric: str,
    label: str,
    dtype: torch.dtype,
    pinned: Sequence[str] = (),
    C: int = 2048,
    k: int = 1,
    **options,
):
    features = "labelled", "bias", "joint", "tf32", "masked"
    labelled, bias, joint, tf32, masked = (options.pop(x, False) for x in features)
    if joint:
        options["expected"] = lambda q, rows: (torch.empty_like(q), None)

    def function(leaf):
        hidden, weight = Dual(leaf(2, 512, C, k=k)), leaf(32000, C)
        labels = torch.empty(2, 512, dtype=torch.int64, device="meta") if labelled else None
        b = leaf(32000) if bias else None
        mask = torch.empty(2, 512, dtype=torch.bool, device="meta") if masked else None
        return aajr.lm_head_sensitivity(hidden, weight, b, metric=metric, labels=labels, mask=mask, **options)

    # rows that are no multiple of 16 features are not copied in the background; no model has them
    strict = STRICT if C % 16 == 0 else ()
    _add("head", f"head {metric} {label}", dtype, function, pinned, strict, tf32=tf32)


def sensitivity(metric: str, dtype: torch.dtype, pinned: Sequence[str] = (), k: int = 1):
    def function(leaf):
        return aajr.sensitivity(Dual(leaf(2, 512, 32000, k=k)), metric)

    _add("sensitivity", f"sensitivity {metric}" + (f" K{k}" if k > 1 else ""), dtype, function, pinned)


linear("bias", BF16, ("sm_90",))
head("fisher", "C2048", BF16, ALL)
head("fisher", "C2048 labels", BF16, labelled=True, pinned=("sm_90",))
head("fisher", "C2048 joint", BF16, joint=True, pinned=("sm_90",))
head("fisher", "C2048 mask", BF16, labelled=True, masked=True, pinned=("sm_90",))
head("fisher", "C2048 mask", FP32, labelled=True, masked=True)
head("fisher", "C2048 mask", FP32, labelled=True, masked=True, tf32=True)
head("fisher", "C2048", FP32)
head("fisher", "C2048", FP32, tf32=True)
head("fisher", "C2048", FP16)
head("fisher", "C2048 K3", BF16, k=3)
head("fisher", "C2304 softcap", BF16, C=2304, softcap=30.0)
head("fisher", "C1000 bias", BF16, C=1000, bias=True)
head("probs", "C2048", BF16)
head("logits", "C2048", BF16)
sensitivity("fisher", BF16, ("sm_90", "gfx942"))
sensitivity("fisher", FP32)
sensitivity("probs", BF16)
sensitivity("l2", BF16)
sensitivity("fisher", BF16, k=3)
_add("sensitivity", "softmax C4096", BF16, lambda leaf: softmax(Dual(leaf(2, 512, 4096, k=1))))


def shipped() -> dict[str, Config]:
    """Configurations of the ops that have Triton kernels."""
    return {name: config for name, config in CONFIGS.items() if choice._has_module(config.op, "triton")}
