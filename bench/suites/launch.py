"""Suite `launch`: microseconds of the host for a call of the Triton backend, on any machine.

Where there is no device, Triton's own launcher runs on a driver that does nothing (:mod:`..stub`) and tensors are on
the CPU; on a device nothing waits for it. Nothing is computed that could be compared: the gate sees no gradients.
Ratios are to an autograd Function that does nothing, of as many tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.integrations.transformers import fuse

from ..case import Case, Gradients, Run, Selection, Suite, Variant
from ..stub import stub

BATCH, HEADS, HEAD, FEATURES = 1, 4, 64, 256
EMPTY = "an empty Function"
#: milliseconds: (family, variant) -> bound
BOUNDS = {
    ("attention-forward", "launcher"): 0.030,
    ("attention-backward", "launcher"): 0.070,
    ("norm-forward", "launcher"): 0.012,
    ("norm-backward", "launcher"): 0.020,
    ("attention-forward", "public"): 0.080,
    ("attention-backward", "public"): 0.190,
    ("norm-forward", "public"): 0.050,
    ("norm-backward", "public"): 0.120,
    ("llama", "fused layer"): 1.0,
}
_ONES: Gradients = [torch.ones(1)]


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].detach()

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.saved_tensors)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=_device()).requires_grad_()


def _heads(length: int) -> list[Tensor]:
    """Queries, keys and values, stacked, as a model has them: heads next to features."""
    return [_leaf(2, BATCH, length, HEADS, HEAD).transpose(2, 3) for _ in range(3)]


def _again(out: Tensor, leaves: list[Tensor]) -> Callable[[], object]:
    return functools.partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)


def _attention(backward: bool, variant: str, length: int) -> Callable[[], object]:
    tensors = [x.detach().requires_grad_() for x in _heads(length)]
    if variant == EMPTY:
        return _again(_Empty.apply(*tensors), tensors) if backward else lambda: _Empty.apply(*tensors)
    if variant == "public":
        duals: Any = [aajr.Dual(x) for x in tensors]
        call: Callable[[], Any] = functools.partial(aajr.attention, *duals, causal=True)
        return _again(call().stacked, tensors) if backward else call
    from aajr_kernels.ops.attention.options import Options

    launchers, options = choice.implementation("attention", "triton"), Options(HEAD**-0.5, offset=0)
    q, k, v = (x.detach() for x in tensors)
    if not backward:
        return lambda: launchers.attention_fwd(q, k, v, None, options)
    out, stats, mu = launchers.attention_fwd(q, k, v, None, options)
    args = torch.ones_like(out), q, k, v, None, out, stats, mu, options, (True, True, True, False)
    return lambda: launchers.attention_bwd(*args)


def _norm(backward: bool, variant: str, length: int) -> Callable[[], object]:
    x, weight = _leaf(2, BATCH, length, FEATURES), _leaf(FEATURES)
    if variant == EMPTY:
        return _again(_Empty.apply(x, weight), [x, weight]) if backward else lambda: _Empty.apply(x, weight)
    if variant == "public":
        call = functools.partial(aajr.rms_norm, aajr.Dual(x), FEATURES, weight, 1e-6)
        return _again(call().stacked, [x, weight]) if backward else call
    launchers, x, weight = choice.implementation("norm", "triton"), x.detach(), weight.detach()
    forward = functools.partial(launchers.norm_fwd, x, weight, None, 1e-6, 0.0, False, None)
    if not backward:
        return forward
    y, stats, _ = forward()
    return lambda: launchers.norm_bwd(y, x, weight, stats, 0.0, False, True, True, False, None)


def _launch(variant: str, length: int) -> Callable[[], object]:
    """The kernel of a norm's forward by itself, as Triton and as `launch` start it; the norm's launcher replays it."""
    launches: list[Any] = []
    with gpu.traced(lambda kernel, compiled, *launch: launches.append((kernel, *launch))):
        _norm(False, "launcher", length)()
    (kernel, grid, args, options) = launches[0]
    if variant == "kernel[grid]":
        return lambda: kernel[grid](*args, **options)
    return lambda: gpu.launch(kernel, grid, args[0].device, *args, **options)


def _layer(fused: bool) -> Any:
    """A Llama of one layer, in float32 and so small that a processor multiplies its matrices in no time."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model: Any = transformers.LlamaModel(config).to(_device())
    if fused:
        with aajr.use_backend("auto"):  # its replacements are verified, which the stub cannot compute
            fuse(model)
    return model


def _llama(variant: str, length: int) -> Callable[[], object]:
    """Forward and backward of a decoder layer, the gradients of its parameters included."""
    dual, model = variant == "fused layer", _layer(variant == "fused layer")
    hidden = torch.randn(*((2,) if dual else ()), BATCH, length, 32, device=_device()).requires_grad_()
    inputs = [hidden, *model.layers.parameters()]
    if variant == EMPTY:
        bar = torch.ones_like(hidden)
        return lambda: torch.autograd.grad(_Empty.apply(*inputs), inputs, bar)
    tables = model.rotary_emb(hidden, torch.arange(length, device=hidden.device)[None])

    def step() -> object:
        out = model.layers[0](aajr.Dual(hidden) if dual else hidden, position_embeddings=tables)
        stacked = out.stacked if dual else out
        return torch.autograd.grad(stacked, inputs, torch.ones_like(stacked))

    return step


_CALLS: dict[str, tuple[Callable[[str, int], Callable[[], object]], tuple[str, ...]]] = {
    "attention-forward": (functools.partial(_attention, False), (EMPTY, "launcher", "public")),
    "attention-backward": (functools.partial(_attention, True), (EMPTY, "launcher", "public")),
    "norm-forward": (functools.partial(_norm, False), (EMPTY, "launcher", "public")),
    "norm-backward": (functools.partial(_norm, True), (EMPTY, "launcher", "public")),
    "launch": (_launch, ("kernel[grid]", "launch")),
    "llama": (_llama, (EMPTY, "plain layer", "fused layer")),
}


@functools.cache
def _on_stub() -> contextlib.AbstractContextManager[None]:
    """The rest of the process is on the Triton backend, and on the stub where there is no device."""
    if gpu.interpreted():
        raise RuntimeError("suite launch times compiled kernels: unset TRITON_INTERPRET.")
    context = contextlib.nullcontext() if torch.cuda.is_available() else stub()
    context.__enter__()
    aajr.use_backend("triton")
    return context  # the cache keeps it: collected, it would end


def _nothing(length: int) -> Gradients:
    return _ONES


def cases(selection: Selection) -> list[Case]:
    made = []
    for family, (calls, variants) in _CALLS.items():

        def make(length: int, variant: str, calls: Any = calls) -> Run:
            _on_stub()
            call = calls(variant, length)

            def run() -> Gradients:
                call()
                return _ONES

            for _ in range(3):  # the third call is replayed
                call()
            return Run(run)

        runs = [
            Variant(
                name,
                functools.partial(make, variant=name),
                _nothing,
                peak=False,
                bounds={"ms": BOUNDS[family, name]} if (family, name) in BOUNDS else {},
            )
            for name in variants
        ]
        if selection.wants(family):
            config = {"heads": HEADS, "head size": HEAD, "features": FEATURES}
            made.append(
                selection.case(
                    "launch",
                    family,
                    "float32" if family == "llama" else "bfloat16",
                    4 if family == "llama" else 32,
                    runs,
                    base=variants[:1],
                    config=config,
                    repeats=300,
                    seconds=0.0004,  # the minimum counts: short enough that nothing interrupts it
                    device=_device(),
                    why="of the host",
                )
            )
    return made


SUITE = Suite(
    "launch",
    "Host time of a call of the Triton backend, of a driver that does nothing where there is no device.",
    tuple(_CALLS),
    cases,
    usual=False,
    parts=False,
)
