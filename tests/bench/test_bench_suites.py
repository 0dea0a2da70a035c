"""Every suite of `python -m bench` at tiny sizes: its gates are green, and red for a wrong kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from toy_bench import FACTS

import aajr_kernels
from aajr_kernels.ops.norm import reference as norm
from bench import __main__ as bench
from bench import gate
from bench.case import Selection
from bench.roofline import Ceilings, Decoder
from bench.run import peak_in_new_process, run_case
from bench.suites import SUITES, head, method, models, step


# ------------------------------------------------------------------------------------------------- the real suites
@pytest.fixture
def tiny(monkeypatch):
    for size in models.SIZES:
        monkeypatch.setitem(models.SIZES, size, Decoder(48, 1, 6, 2, 40))
    monkeypatch.setattr(models, "SMOLLM2", Decoder(48, 1, 6, 2, 40))
    monkeypatch.setitem(models.WORDS, "smollm2", 61)
    # seconds, and half a minute for what PyTorch has to get right
    monkeypatch.setattr("bench.run.measured", lambda device, dtype: Ceilings(1e12, 1e10))
    monkeypatch.setattr(step, "compiled", lambda scalar: scalar)
    for module in (head, step):
        monkeypatch.setattr(module, "VOCABULARY", 61)
    monkeypatch.setattr(head, "HIDDEN", 24)


def names(suite: str) -> list[str]:
    return [f"{suite}:{family}" for family in SUITES[suite].families]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suite", ["attention", "norm", "activation", "rotary", "head"])
def test_ops_pass_their_gates(tiny, suite, dtype):
    cases = SUITES[suite].cases(Selection((dtype,), (19,)))
    assert [f"{case.suite}:{case.family}" for case in cases] == names(suite)
    for case in cases:
        verdict = gate.check(case)
        assert not verdict.failures and not verdict.left_out
        for variant in case.variants:
            assert bool(verdict.ops[variant.name]) == variant.name.startswith(
                ("dual", "fisher", "context", "streamed")
            )


@pytest.mark.parametrize("family", SUITES["step"].families)
def test_steps_pass_their_gates(tiny, family):
    pytest.importorskip("transformers")
    for dtype in ("float32", "bfloat16") if family == "llama" else ("float32",):
        (case,) = SUITES["step"].cases(Selection((dtype,), (12,), (family,)))
        verdict = gate.check(case)
        assert not verdict.failures and not verdict.left_out
        for peer in ("torch.func.jvp", "double backward"):
            error = verdict.errors.get(peer)  # both are wrong through layer_norm
            assert error is None or (error < 1e-5 if family.startswith("llama") else error > 0.05)
        if family in ("llama", "gpt2"):
            ops = (
                {"attention", "rms_norm", "rotary", "swiglu"}
                if family == "llama"
                else {"attention", "layer_norm"}
            )
            assert ops <= set(verdict.ops["exact, fused"]) and verdict.ops["plain"] == {}


@pytest.mark.parametrize("family", SUITES["method"].families)
def test_the_method_passes_its_gate(tiny, monkeypatch, family):
    pytest.importorskip("transformers")
    if "lora" in family:
        pytest.importorskip("peft")
    monkeypatch.setattr(
        method, "compiled", lambda loss: loss
    )  # half a minute for what PyTorch has to get right
    (case,) = SUITES["method"].cases(Selection(("float32",), (12,), (family,)))
    verdict = gate.check(case)
    assert not verdict.failures and not verdict.left_out
    ops = {"attention", "rms_norm", "rotary", "swiglu", "lm_head_sensitivity"}
    usual = {"adversarial", "adversarial, compiled", "adversarial, hook"}
    for variant in case.variants:
        ran = verdict.ops[variant.name]
        expected = ops if variant.name != "adversarial, places" else {"attention", "lm_head_sensitivity"}
        assert ran == {} if variant.name in usual else expected <= set(ran), variant.name


def test_a_name_stands_for_several_suites_and_some_run_only_when_named():
    assert {c.suite for c in bench._cases(["ops"], None, None)} == {"norm", "activation", "rotary"}
    usual = {c.suite for c in bench._cases(None, None, None)}
    assert "memory" not in usual and {"attention", "head", "step", "method"} <= usual
    assert {c.suite for c in bench._cases(["memory"], None, None)} == {"memory"}


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize(
    "name",
    [
        "attention:d64",
        "norm:layer_norm",
        "activation:swiglu",
        "rotary",
        "head:fisher",
        "step:llama",
        "step:gpt2",
    ],
)
def test_forward_and_backward_apart(tiny, name, part):
    pytest.importorskip("transformers")
    for case in bench._cases([name], ["float32"], "12", part=part):
        verdict = gate.check(case)
        assert not verdict.failures and not verdict.left_out, case.name
        shown = [v for v in case.variants if v.name in ("plain", "dual", "fisher", "exact, fused")]
        assert len(shown) == 2 and case.part == part and not any(v.bounds for v in case.variants)
        for variant in shown:
            run = variant.make(12)
            first, second = ([None if g is None else g.clone() for g in run.call()] for _ in range(2))
            assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(first, second))
            assert (len(first) == 1) == (part == "forward" or name in ("activation", "rotary"))


def test_a_wrong_forward_is_red_where_it_is_timed_alone(monkeypatch):
    right = norm.norm_fwd
    monkeypatch.setattr(
        norm,
        "norm_fwd",
        lambda *args, **kwargs: (lambda out: (1.01 * out[0], *out[1:]))(right(*args, **kwargs)),
    )
    (case,) = SUITES["norm"].cases(Selection(("float32",), (19,), ("rms_norm",), "forward"))
    with aajr_kernels.use_backend("reference"):
        outcome = run_case(case, FACTS)
    assert outcome.rows == [] and "dual" in outcome.failures[0]


@pytest.mark.slow
def test_a_row_says_which_part_it_is_of(tiny):
    (case,) = bench._cases(["norm:rms_norm"], ["float32"], "12", part="backward")
    outcome = run_case(case, FACTS, repeats=1)
    assert {row.config["part"] for row in outcome.rows} == {"backward"}
    assert "rms_norm float32 12 backward dual" in {row.name.split(":")[1] for row in outcome.rows}
    assert "part" not in SUITES["norm"].cases(Selection(("float32",), (12,)))[0].config


def test_a_wrong_kernel_turns_its_cases_red(monkeypatch):
    right = norm.norm_bwd

    def wrong(*args, **kwargs):
        results = list(right(*args, **kwargs))
        results[0] = 1.01 * results[0]
        return tuple(results)

    monkeypatch.setattr(norm, "norm_bwd", wrong)
    (case,) = SUITES["norm"].cases(Selection(("float32",), (19,), ("rms_norm",)))
    with aajr_kernels.use_backend("reference"):
        outcome = run_case(case, FACTS)
    assert outcome.rows == [] and "dual" in outcome.failures[0]


def test_the_whole_run_has_the_cases_of_the_issue():
    keys = {(c.suite, c.family, c.dtype, c.length) for s in SUITES.values() for c in s.cases(Selection())}
    for family in ("llama", "gpt2"):
        assert {("step", family, *pair) for pair in step.BOUNDS} <= keys
    assert ("step", "memory", "float32", 8192) in keys
    cases = step.cases(Selection(None, (512, 1024), ("llama",)))
    assert [(c.dtype, c.length) for c in cases] == [("float32", 512), ("float32", 1024)]
    cases = step.cases(Selection(("bfloat16",), None, ("llama",)))
    assert [(c.dtype, c.length) for c in cases] == [("bfloat16", 2048)]


def test_a_row_says_which_share_was_computed(tiny):
    pytest.importorskip("transformers")
    (case,) = SUITES["method"].cases(Selection(("float32",), (32,), ("context",)))
    rows = {row.variant: row.computed for row in run_case(case, FACTS, repeats=1, peak=False).rows}
    assert rows["adversarial"] == {} and rows["with penalty"]["tokens"] == 0.25
    shared = rows["with penalty, shared context"]
    calls = method.STEPS + 1  # the points of the ascent, and the one of loss and penalty
    assert shared["positions"] == pytest.approx((24 + calls * 8) / (calls * 32), abs=1e-4)
    assert shared["tokens"] == 1.0 and 0.1 < shared["arithmetic"] < 0.6
    whole, eighth = Selection(("float32",), (32,), ("context", "context-eighth")), []
    for other in SUITES["method"].cases(whole):
        eighth += [(other.family, v.key) for v in other.variants]
    assert len({key for _, key in eighth}) == len(eighth)  # the gate judges each of them


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.slow
def test_peak_in_a_fresh_process(monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    (case,) = SUITES["rotary"].cases(Selection(("float32",), (2048,)))
    peak = peak_in_new_process(case, case.variant("dual"))
    assert 2 * 2 * 2048 * 2048 * 4 * 0.9 < peak < 3e9  # the gradient at least
