"""The exact penalty step against a plain training step and its rivals, on a Llama-style model without a head.

    python bench/step.py --lengths 512 1024 2048 4096 --rows bench/results/cpu.jsonl

A step is forward and backward to every parameter. The plain step is Hugging Face's model under the faster of its sdpa
and eager attention on the loss ``hidden.square().mean()``; the penalty is ``l2`` on the hidden states. All variants of
one length run interleaved in one process, and the minimum and the median over the repetitions are kept; the peak of
the resident memory above that of the built model is taken in a fresh process for each variant and length. No speed is
reported before the gradient of every exact variant agrees with float64 at a small length.

Rows are JSON lines: machine, versions, commit, configuration, milliseconds, ratio to the plain step, peak bytes and
gradient error.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import aajr_kernels as aajr
from aajr_kernels.cli.demos.meter import measure
from aajr_kernels.integrations.transformers import fuse

EXACT = ("ours unmodified", "ours fused", "torch.func.jvp")
VARIANTS = ("plain", *EXACT, "finite differences")


def build(attention: str, dtype: torch.dtype) -> torch.nn.Module:
    """Four Llama blocks, hidden 384, intermediate 1024, 6 query and 2 key heads of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=16384,
        use_cache=False,
    )
    return transformers.LlamaModel._from_config(config, attn_implementation=attention).to(dtype)


def step(variant: str, model: torch.nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One loss and its gradients in ``.grad``."""
    hidden: Callable[[Any], Any] = lambda e: model(inputs_embeds=e).last_hidden_state
    if variant == "plain":
        loss = hidden(x).square().mean()
        loss.backward()
    elif variant.startswith("ours"):
        loss = aajr.aligned_penalty(hidden, x, v, metric="l2")
        loss.backward()
    elif variant == "torch.func.jvp":
        with sdpa_kernel(SDPBackend.MATH):
            loss = torch.func.jvp(hidden, (x,), (v,))[1].square().sum(-1).mean()
            loss.backward()
    elif variant == "finite differences":
        size = 1e-2
        loss = ((hidden(x + size * v) - hidden(x)) / size).square().sum(-1).mean()
        loss.backward()
    else:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    return loss


def problem(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(1, length, 384).to(dtype)
    return x, aajr.normalize(torch.randn(1, length, 384)).to(dtype)


def model_for(variant: str, dtype: torch.dtype, attention: str = "sdpa") -> torch.nn.Module:
    model = build(attention, dtype)
    if variant == "ours fused":
        fuse(model)
    return model


def gradients(model: torch.nn.Module) -> torch.Tensor:
    parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def gradient_errors(length: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of each variant's gradient against float64 forward mode (norms in float64 as well)."""
    x, v = problem(length, dtype)
    exact = build("eager", torch.float64)
    for module in exact.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = _norm_in_float64.__get__(module)
    step("torch.func.jvp", exact, x.double(), v.double())
    truth = gradients(exact)
    errors = {}
    for variant in VARIANTS[1:]:
        model = model_for(variant, dtype)
        step(variant, model, x, v)
        errors[variant] = ((gradients(model) - truth).norm() / truth.norm()).item()
    return errors


def _norm_in_float64(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


def timings(length: int, dtype: torch.dtype, variants: list[str], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every variant, interleaved; plain is timed with both attention implementations."""
    x, v = problem(length, dtype)
    models = {name: model_for(name, dtype) for name in variants}
    models["plain eager"] = model_for("plain", dtype, "eager")
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(repeats + 1):
        for name, model in models.items():
            gc.collect()
            start = time.perf_counter()
            step(name.removesuffix(" eager"), model, x, v)
            elapsed = 1e3 * (time.perf_counter() - start)
            model.zero_grad()
            if i:  # the first round warms caches and allocator
                times[name].append(elapsed)
    return times


def peak(variant: str, length: int, dtype: torch.dtype) -> int | None:
    """Peak memory of one step in this process above the built model, in bytes."""
    model = model_for(variant, dtype)
    step(variant, model, *problem(64, dtype))  # code and small buffers are in place before the measured step
    model.zero_grad()
    _, cost = measure(lambda: step(variant, model, *problem(length, dtype)), torch.device("cpu"))
    return cost.peak_bytes


def peak_in_new_process(variant: str, length: int, dtype: str) -> int | None:
    command = [sys.executable, __file__, "--peak", variant, str(length), "--dtype", dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def environment() -> dict[str, Any]:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], check=False, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "aajr_kernels": aajr.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "aajr_kernels", "bench")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="variants to leave out")
    parser.add_argument("--rows", type=Path, help="append JSON lines to this file")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.peak:
        print(json.dumps(peak(options.peak[0], int(options.peak[1]), dtype)))
        return
    errors = gradient_errors(128, dtype)
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    if any(errors[name] > limit for name in EXACT):
        sys.exit(f"gradient errors {errors} are above {limit}: no speed is reported.")
    variants = [name for name in VARIANTS if name not in options.skip]
    print(
        f"{'S':>6} {'variant':20} {'min ms':>9} {'median':>9} {'ratio':>6} {'peak MB':>8} {'grad error':>10}"
    )
    for length in options.lengths:
        times = timings(length, dtype, variants, options.repeats)
        faster = min(("plain", "plain eager"), key=lambda name: min(times[name]))
        plain = min(times[faster])
        for name in variants:
            sample = times[faster] if name == "plain" else times[name]
            row = {
                "suite": "step",
                "model": "llama 4x384 6/2 heads",
                "metric": "l2",
                "length": length,
                "dtype": options.dtype,
                "backend": "reference",
                "variant": name,
                "attention": ("sdpa" if faster == "plain" else "eager") if name == "plain" else None,
                "min_ms": round(min(sample), 2),
                "median_ms": round(statistics.median(sample), 2),
                "ratio": round(min(sample) / plain, 3),
                "peak_bytes": peak_in_new_process(name, length, options.dtype),
                "gradient_error": errors.get(name),
                "repeats": options.repeats,
                "seed": 0,
                **environment(),
            }
            error = "" if row["gradient_error"] is None else f"{row['gradient_error']:10.1e}"
            print(
                f"{length:6d} {name:20} {row['min_ms']:9.1f} {row['median_ms']:9.1f} {row['ratio']:6.2f} "
                f"{(row['peak_bytes'] or 0) / 2**20:8.0f} {error}",
                flush=True,
            )
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
