"""Suite `gpu` of `python -m bench` at tiny sizes on a CPU, the roofline model, and the ceilings of a device."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from backends import cuda_host
from toy_bench import invoke

from aajr_kernels.backends import cuda
from bench import gate, roofline, row
from bench.__main__ import Model
from bench.case import Run, Selection
from bench.roofline import DEVICES, Attention, Ceilings, Decoder
from bench.row import Row
from bench.run import run_case
from bench.suites import SUITES, attention, gpu, models

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FAMILIES = SUITES["gpu"].families
H100 = DEVICES["h100"]


# --------------------------------------------------------------------------------------------- it runs, tiny, here
@pytest.fixture
def tiny(monkeypatch):
    """The suite as it is, small and on the CPU."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    for name, value in {"FEATURES": 64, "WORDS": 61, "HIDDEN": 24}.items():
        monkeypatch.setattr(gpu, name, value)
    shapes = {
        name: dataclasses.replace(shape, B=1, H=4, HK=2 if shape.H != shape.HK else 4, D=16)
        for name, shape in gpu.SHAPES.items()
    }
    monkeypatch.setattr(gpu, "SHAPES", shapes)
    limits = Ceilings(1e12, 1e10)  # measured once, below
    monkeypatch.setattr("bench.run.measured", lambda device, dtype: limits)
    monkeypatch.setattr(models, "sizes", lambda kind, length: Decoder(48, 1, 6, 2, 40))
    gate._judged.clear()
    yield
    gate._judged.clear()


#: one of each kind every day
DAILY = ("causal-forward", "rms_norm-backward", "head", "step", "launches")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in DAILY else [pytest.mark.slow]) for f in FAMILIES]
)
def test_every_family_passes_its_gate_and_gives_rows(tiny, family):
    if family == "step":
        pytest.importorskip("transformers")
    (case,) = gpu.cases(Selection(("bfloat16",), (19,), (family,)))
    case = dataclasses.replace(case, gate_length=13)
    outcome = run_case(case, row.environment(), repeats=1, peak=False)
    assert not outcome.failures
    assert set(outcome.left_out) <= {"cuDNN"}  # torch has it for CUDA alone
    rows = {one.variant: one for one in outcome.rows}
    ours = next(name for name in rows if name in ("dual", "fisher", "exact, fused", "Triton"))
    assert rows[ours].ops and (family == "launches" or not rows[next(iter(rows))].ops)
    assert all(one.min_ms > 0 and one.timing == "calls" for one in outcome.rows)
    rated = any(variant.flops or variant.bytes for variant in case.variants)
    assert all(
        one.ceilings == ({"gflop_per_s": 1000, "gb_per_s": 10} if rated else {}) for one in outcome.rows
    )
    if family != "launches":
        assert all(variant.work for variant in case.variants if variant.name != gpu.step.FINITE)


def test_in_float32_the_gate_is_sharp(tiny):
    for family in ("full-forward", "causal-backward", "rotary-forward", "rms_norm-backward"):
        (case,) = gpu.cases(Selection(("float32",), (9,), (family,)))
        verdict = gate.check(case)
        assert not verdict.failures and max(verdict.errors.values()) < 2e-6


def test_a_wrong_forward_is_red(tiny, monkeypatch):
    (case,) = gpu.cases(Selection(("float32",), (9,), ("causal-forward",)))
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **o: right(*a, **o) * 1.001)
    assert "dual" in gate.check(case).failures[0]


@pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))
@pytest.mark.parametrize("family", ["launches", "layer_norm-backward"])
def test_kernels_in_cuda_are_measured_beside_the_others(tiny, family):
    with cuda_host.loaded():
        (case,) = gpu.cases(Selection(("float32",), (5,), (family,)))
        outcome = run_case(case, row.environment(), repeats=1, peak=False)
    assert not outcome.failures
    (ours,) = [one for one in outcome.rows if "CUDA C++" in one.variant]
    assert set(ours.ops.values()) == {"cuda"}


def test_the_bounds_of_kernels_in_cuda(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: None)
    cases = gpu.cases(Selection(families=("launches", "rms_norm-forward", "swiglu-forward")))
    bounds = {(c.family, c.length): dict(v.bounds) for c in cases for v in c.variants if v.backend == "cuda"}
    assert {key for key, bound in bounds.items() if bound} == {("launches", 64), ("rms_norm-forward", 8192)}
    assert bounds["launches", 64] == {"ratio": pytest.approx(1 / 3)}
    assert bounds["rms_norm-forward", 8192] == {"copy_ratio": pytest.approx(1 / 0.85)}


# ----------------------------------------------------------------------------------------------------- its bounds
def test_the_cases_of_the_suite_are_those_that_were_promised(monkeypatch):
    monkeypatch.setattr(gpu, "on_h100", lambda: True)
    cases = {case.family: case for case in gpu.cases(Selection())}
    assert set(cases) == set(FAMILIES)
    bounds = {(f, v.name): dict(v.bounds) for f, case in cases.items() for v in case.variants if v.bounds}
    copies = {
        (f"{name}-{part}", "dual"): {"copy_ratio": 1.25}
        for name in gpu.ROWS
        for part in ("forward", "backward")
    }
    assert bounds == {
        ("full-forward", "dual"): {"ms": 7.0},
        ("full-backward", "dual"): {"ms": 28.0},
        ("causal-forward", "dual"): {"ratio": 3.3},
        ("causal-backward", "dual"): {"ratio": 5.0},
        **copies,
        ("head", "fisher"): {"ratio": 2.2},
        ("step", "exact, fused"): {"ratio": 2.4, "peak_ratio": 2.2},
    }
    assert cases["full-forward"].config == {
        "B": 1,
        "H": 24,
        "HK": 24,
        "D": 128,
        "causal": False,
        "part": "forward",
    }
    assert cases["causal-backward"].length == 4096 and cases["head"].config["V"] == 128256
    monkeypatch.setattr(gpu, "on_h100", lambda: False)
    (case,) = gpu.cases(Selection(None, None, ("full-forward",)))
    assert not any(v.bounds for v in case.variants)  # milliseconds mean nothing elsewhere


class Streams:
    """The streams and graphs of a device that is not there: what runs on a stream, and what a graph captures."""

    def __init__(self, monkeypatch, refused: str = "") -> None:
        self.current, self.seen, self.refused = "default", [], refused
        for name in ("Stream", "CUDAGraph"):
            monkeypatch.setattr(
                torch.cuda, name, lambda name=name: SimpleNamespace(name=name, replay=self.replay)
            )
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr("bench.run._wait", lambda device: None)

    def replay(self) -> None:
        self.seen.append(("replay", self.current))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, id(stream)
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        with self.stream(stream):
            yield
        if self.refused and self.refused in self.seen[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")

    def variant(self, variant):
        """Its inputs and forward, and every call, are seen with their streams."""

        def make(length):
            self.seen.append((variant.name, "made", self.current))
            run = variant.make(length)
            return Run(lambda: self.seen.append((variant.name, "called", self.current)) or run.call())

        return dataclasses.replace(variant, make=make)


def on_pretended_device(monkeypatch, refused: str = ""):
    """Streams, and the outcome of a backward of rows."""
    streams = Streams(monkeypatch, refused)
    (case,) = gpu.cases(Selection(("float32",), (9,), ("gelu-backward",)))
    variants = tuple(streams.variant(v) for v in case.variants)
    monkeypatch.setattr(gate, "check", lambda case: gate.Verdict())
    outcome = run_case(
        dataclasses.replace(case, variants=variants, device="pretended"), row.environment(), repeats=2
    )
    return streams, outcome


def test_forward_and_backward_run_on_the_stream_that_captures_them(tiny, monkeypatch):
    streams, outcome = on_pretended_device(monkeypatch)
    runs = [seen for seen in streams.seen if seen[0] != "replay"]
    assert [seen[:2] for seen in runs[:2]] == [("plain", "made"), ("plain", "called")]
    (stream,) = {seen[-1] for seen in runs}
    assert stream != "default" and ("dual", "made", stream) in runs
    assert {seen[1] for seen in streams.seen if seen[0] == "replay"} == {"default"}
    assert {one.timing for one in outcome.rows} == {"graph"} and all(one.min_ms for one in outcome.rows)


def test_a_capture_that_fails_is_a_failure_and_no_time_of_the_host(tiny, monkeypatch):
    _, outcome = on_pretended_device(monkeypatch, refused="dual")
    plain, dual = outcome.rows
    assert plain.timing == "graph" and plain.min_ms
    assert dual.min_ms is None and "could not be captured: operation not permitted" in dual.failure
    _, outcome = on_pretended_device(monkeypatch, refused="plain")
    assert not outcome.rows and "could not be captured" in outcome.failures[0]


@pytest.mark.slow
def test_shares_of_the_ceilings_and_bounds_by_them(tiny, monkeypatch):
    (case,) = gpu.cases(Selection(("float32",), (9,), ("gelu-forward",)))
    dual = dataclasses.replace(case.variants[1], bounds={"copy_ratio": 1.25, "ms": 1e4})
    case = dataclasses.replace(case, variants=(case.variants[0], dual), device="pretended", graph=False)
    monkeypatch.setattr("bench.run._wait", lambda device: None)
    for reachable, passed in ((1.0, True), (1e18, False)):
        limits = Ceilings(1e12, reachable)
        monkeypatch.setattr("bench.run.measured", lambda device, dtype, limits=limits: limits)
        outcome = run_case(case, row.environment(), repeats=1, peak=False)
        one = outcome.rows[1]
        assert one.byte_share == pytest.approx(1e9 * one.gb_per_s / reachable, rel=1e-2)
        assert one.ceilings["gflop_per_s"] == 1000 and one.passed is passed and one.flop_share is None
        assert Row.parse(one.line()) == one


def test_ceilings_are_rates_of_a_product_and_a_copy():
    rates = roofline.measure("cpu", "float32", size=64, numbers=4096, seconds=0.01)
    assert 1e6 < rates.flops < 1e14 and 1e6 < rates.bytes < 1e13


def test_a_cpu_without_instructions_for_a_dtype_computes_in_float32(monkeypatch):
    rates = {"float32": 2e11, "bfloat16": 1e10}
    monkeypatch.setattr(roofline, "measure", lambda device, dtype, **sizes: Ceilings(rates[dtype], 2e10))
    roofline.measured.cache_clear()
    try:
        assert roofline.measured("cpu", "bfloat16") == Ceilings(2e11, 2e10)
    finally:
        roofline.measured.cache_clear()


def test_rows_from_before_a_field_have_its_default():
    (old, *_) = row.read_rows(RESULTS / "cpu.jsonl")
    assert old.ceilings == {} and old.timing == "calls" and old.byte_share is None


# ------------------------------------------------------------------------------------------------------ the model
def test_attention_counts_products():
    shape = Attention(1, 24, 24, 8192, 8192, 128)
    assert shape.product == 2.0 * 24 * 8192**2 * 128
    (forward,) = shape.forward()
    assert forward.flops == 6 * shape.product == 3 * dataclasses.replace(shape, K=0).forward()[0].flops
    assert sum(work.flops for work in shape.backward()) == 24 * shape.product
    assert sum(work.flops for work in dataclasses.replace(shape, D=64).backward()) == 21 * shape.product / 2
    causal = dataclasses.replace(shape, causal=True)
    assert causal.product == pytest.approx(shape.product / 2, rel=1e-3)
    three = dataclasses.replace(shape, K=3).forward()[0]
    assert three.flops == 14 * shape.product and three.bytes == 2 * forward.bytes
    # the figures that the kernels aim from: 5.2 ms and 22 to 28 ms at 480 TFLOP/s
    assert 1e3 * roofline.seconds(shape.forward(), H100) == pytest.approx(5.2, abs=0.1)
    assert 20 < 1e3 * roofline.seconds(shape.backward(), H100) < 28


def test_rows_are_bound_by_memory_and_products_by_arithmetic():
    norm = roofline.stream("norm", 2 * 8192 * 4096, False)
    assert norm.bytes == 2 * 2 * 2 * 2 * 8192 * 4096
    assert norm.seconds(H100) == pytest.approx(norm.bytes / (0.9 * 3.35e12))
    (product,) = roofline.linear(8192, 4096, 4096, False)
    assert product.flops == 2 * 2.0 * 8192 * 4096**2
    assert product.seconds(H100) == pytest.approx(product.flops / (0.7 * 989.4e12))
    assert len(roofline.linear(8, 4, 4, True)) == 2
    plain, fisher = roofline.plain_head(4096, 2048, 128256), roofline.head(4096, 2048, 128256)
    assert sum(w.flops for w in fisher) == 8 / 3 * sum(w.flops for w in plain)


def test_a_step_with_a_tangent_costs_about_twice_the_plain_one():
    sizes = models.sizes("llama-1b", 4096)
    assert sizes == Decoder(2048, 16, 32, 8, 8192) and models.sizes("llama-1b", 128).layers == 2
    plain, exact = (roofline.seconds(sizes.step(4096, k), H100) for k in (0, 1))
    assert 2.0 < exact / plain < 2.6
    parameters = 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    products = sum(w.flops for w in sizes.step(4096, 0) if w.kind == "product")
    assert products == 6 * 4096 * parameters


def test_a_context_without_tangents_takes_two_thirds_of_the_products():
    shape = Attention(1, 6, 2, 512, 512, 64, causal=True, context=1536)
    assert shape.context_product == 2.0 * 6 * 512 * 1536 * 64
    flops = lambda kernels: sum(work.flops for work in kernels)
    assert flops(shape.forward()) == 6 * shape.product + 4 * shape.context_product
    assert flops(shape.backward()) == pytest.approx(21 * shape.product + 14 * shape.context_product)
    attack = dataclasses.replace(shape, K=0)
    assert flops(attack.forward()) == 2 * shape.product + 2 * shape.context_product
    assert flops(attack.backward(to_context=False)) == 5 * shape.product + 3 * shape.context_product
    assert flops(attack.backward()) == 5 * shape.product + 5 * shape.context_product


def test_a_step_with_a_shared_context_by_count():
    """Against the products of linear layers, written out: attack 2 per position and point, training 3 of each stack."""
    sizes, words, length, points = Decoder(384, 4, 6, 2, 1024), 32000, 2048, 3
    per_layer = 2.0 * (2 * 384**2 + 2 * 384 * 128 + 3 * 384 * 1024)
    products = lambda kernels: sum(work.flops for work in kernels if work.kind == "product")
    for part in (1, 4, 8):
        rest = length // part
        step = roofline.MethodStep(sizes, words, length, rest, points)
        head = 2.0 * 384 * words * rest * (2 * points + 6)
        whole = length * per_layer * 4 * (2 * points + 6) + head
        context = (length - rest) * 3 * (3 * per_layer + 2.0 * 2 * 384 * 128)
        shared = rest * per_layer * 4 * (2 * points + 6) + context + head
        assert products(step.penalty(shared=False)) == pytest.approx(whole)
        assert products(step.penalty(shared=True)) == pytest.approx(whole if part == 1 else shared)
        adversarial = length * per_layer * 4 * (2 * points + 3) + head * (2 * points + 3) / (2 * points + 6)
        assert products(step.adversarial()) == pytest.approx(adversarial)
        logits = 2.0 * 384 * words * length * (2 * points + 3)
        assert products(step.usual()) == pytest.approx(length * per_layer * 4 * (2 * points + 3) + logits)


def test_the_command_predicts_steps_with_a_context():
    text = invoke("method:context-eighth", "--model", "h100", "--dtype", "bfloat16")
    assert "Modelled, not measured" in text and "with penalty, shared context" in text


def test_the_command_names_every_device_of_the_model():
    assert set(get_args(Model)) == set(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_the_command_predicts_and_says_so(name):
    text = invoke("--model", name)
    assert f"Modelled, not measured: {DEVICES[name].name}" in text and "Assumed: attention at" in text
    for family in FAMILIES:
        assert (f"gpu:{family} " in text) == (family != "launches")
    assert "min ms" not in text


def test_predictions_of_some_families_and_lengths():
    text = invoke("gpu:causal-forward", "--model", "h100", "--lengths", "1024,2048", "--dtype", "float16")
    assert text.count("gpu:causal-forward") == 2 * 4 and "gpu:head" not in text
    (case,) = gpu.cases(Selection(None, None, ("causal-forward",)))
    times = {v.name: roofline.seconds(v.work, H100) for v in case.variants}
    assert times["dual"] / times["flash"] == pytest.approx(3, rel=0.01)


def test_what_cannot_be_modelled_or_run_says_what_to_do(monkeypatch):
    text = lambda *a: " ".join(invoke(*a, exit_code=2).replace("│", " ").split())
    assert "'tpu' is not one of 'a100', 'h100'" in text("--model", "tpu")
    assert "nothing of method is modelled" in text("method", "--model", "h100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA or ROCm device" in text("gpu") and "--model h100" in text("gpu:step")
    assert "gpu:step" in invoke("--list")
