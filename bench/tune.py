"""`python -m bench.tune`: measures tiles of the attention kernels on the device, for the table in configs.py.

Every candidate is compared with the default tile first; one that is wrong, does not compile or does not fit is left
out. Times are of one kernel at a time, on inputs as a language model has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.ops.attention import configs
from aajr_kernels.ops.attention.options import Options
from common.command import fail, run

#: kernels and which gradients of q, k, v make the backward launch them
NEEDS = {
    "fwd": None,
    "dq": (True, False, False, False),
    "dk": (False, True, False, False),
    "dv": (False, False, True, False),
    "dkv": (False, True, True, False),
}
QUERY_SIDE = ("fwd", "dq")
HEADS, KEY_HEADS = 16, 4


def candidates(kernel: str, arch: str) -> Iterator[configs.Sizes]:
    """Tiles worth trying. A group of 4 warps multiplies 64 rows at a time from sm_90 on, fewer would be idle."""
    for own, other, warps, stages in itertools.product((64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if other <= own and (arch not in ("sm_90", "sm_100") or own >= 16 * warps):
            yield (own, other, warps, stages) if kernel in QUERY_SIDE else (other, own, warps, stages)


def calls(
    kernel: str, head: int, causal: bool, length: int, dtype: torch.dtype, device: str
) -> Callable[[], Any]:
    """A call whose time is the kernel's (with the pass over rows in the backward); returns its results."""
    from aajr_kernels.ops.attention import triton as launchers

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 1, heads, length, head) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    options, needs = Options(head**-0.5, offset=0 if causal else None), NEEDS[kernel]
    if needs is None:
        return lambda: launchers.attention_fwd(q, k, v, None, options)[:1]
    saved = launchers.attention_fwd(q, k, v, None, options)
    bar = torch.randn(saved[0].shape, generator=generator).to(device, dtype)
    return lambda: launchers.attention_bwd(bar, q, k, v, None, *saved, options=options, needs=needs)


def median(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, over 0.2 s of them."""
    return 1e3 * float(Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median)


def measure(
    kernel: str,
    head: int,
    causal: bool,
    sizes: Iterable[configs.Sizes] | None = None,
    *,
    length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    timer: Callable[[Callable[[], Any]], float] = median,
) -> dict[configs.Sizes, float | str]:
    """Tile -> milliseconds, or why it is left out.

    Args:
        kernel: a key of NEEDS.
        head: head size; stands for all of its class (up to 64, 128, 256).
        causal: whether keys above the diagonal are hidden.
        sizes: tiles in place of :func:`candidates`.
        length, dtype, device: of the inputs.
        timer: milliseconds of a call.
    """
    arch = gpu.architecture(torch.device(device))
    call, results = calls(kernel, head, causal, length, dtype, device), {}
    expected = call()
    for tile in candidates(kernel, arch) if sizes is None else sizes:
        try:
            with configs.trial(kernel, tile):
                error = difference(call(), expected)
                right = error < 4 * torch.finfo(dtype).eps
                results[tile] = timer(call) if right else f"differs from the default by {error:.1e}"
        except Exception as reason:  # of the compiler, the driver or memory: this tile is not for this device
            results[tile] = f"{type(reason).__name__}: {reason}".partition("\n")[0]
    return results


def difference(results: Any, expected: Any) -> float:
    """Largest relative difference of any result, infinite where one is NaN."""
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(results, expected)
        if isinstance(a, Tensor)
    ]
    return max(error if error == error else float("inf") for error in errors)


def tune() -> None:
    """Time the tiles of every attention kernel, for heads of 64 and 128 in bfloat16, beside those of the table.

    A better one belongs into ops/attention/configs.py; scripts/kernel_budgets.py then shows what it compiles to.

    Exit code 2: there is no device.
    """
    if not torch.cuda.is_available():
        fail(
            "tiles are measured on a CUDA or ROCm device, and torch sees none: edit ops/attention/configs.py and run "
            "scripts/kernel_budgets.py."
        )
    arch = gpu.architecture(torch.device("cuda"))
    for head, causal, kernel in itertools.product((64, 128), (False, True), NEEDS):
        # one kernel for keys and values up to 64, two above
        if kernel in QUERY_SIDE or (kernel == "dkv") == (head <= 64):
            usual = tuple(configs.tile(kernel, arch, torch.bfloat16, head, head, causal))
            results = measure(kernel, head, causal)
            times = {tile: time for tile, time in results.items() if isinstance(time, float)}
            best = sorted(times, key=lambda tile: times[tile])[:3]
            print(
                f"{arch} {kernel}, heads of {head}, {'causal' if causal else 'full'}: "
                + ", ".join(
                    f"{tile} {times[tile]:.3f} ms" for tile in dict.fromkeys([*best, usual]) if tile in times
                )
                + f"; the table has {usual}; {len(results) - len(times)} of {len(results)} left out"
            )


if __name__ == "__main__":
    run(tune, "bench.tune", "bench")
