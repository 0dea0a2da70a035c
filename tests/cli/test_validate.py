"""`aajr validate` passes, fails and refuses when it should, and its oracle is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from backends import cuda_host
from typer.testing import CliRunner

import aajr_kernels
from aajr_kernels import BackendUnavailable
from aajr_kernels.backends import choice, cuda
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.cli import main
from aajr_kernels.ops.activation import reference as activation
from aajr_kernels.ops.attention import reference as attention
from aajr_kernels.ops.linear import reference as linear
from aajr_kernels.ops.norm import reference as norm
from aajr_kernels.testing import budgets
from aajr_kernels.testing.cases import OPS
from aajr_kernels.testing.cases.case import problem
from aajr_kernels.testing.checks import validate_all
from aajr_kernels.testing.targets import DTYPES, Target, find_targets

REFERENCE = Target("reference", "cpu")
#: public names that are not operations on Duals
NOT_OPS = {
    *(
        "BackendUnavailable",
        "Coverage",
        "Dual",
        "LMHead",
        "StabilityReport",
        "Trajectory",
        "UnsupportedOperation",
        "ascend",
        "backends",
        "coverage",
        "dual",
        "graphed",
    ),
    *("is_dual", "jvp", "normalize", "inject", "unpack", "use_backend", "integrations", "nn", "training"),
    *("lm_kl", "lm_loss", "recompute", "stability_report", "strict", "trajectory_penalty", "tuple_arguments"),
}


def invoke(*arguments: str):
    return CliRunner().invoke(main.app, ["validate", *arguments])


def report(*arguments: str, exit_code: int = 0):
    result = invoke("--json", *arguments)
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def perturbed(function, index, change):
    """`function` with one of its results changed."""

    def wrong(*args, **kwargs):
        results = list(function(*args, **kwargs))
        results[index] = None if results[index] is None else change(results[index])
        return tuple(results)

    return wrong


# -------------------------------------------------------------------------------------------------- it passes
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_exact_in_float64(op):
    (row,) = validate_all([op], {"float64": [REFERENCE]}, seed=0)
    assert row.result == "pass", row.failures
    assert row.cases == len(OPS[op]) >= 3
    assert row.worst_error < 1e-10


def test_every_public_op_is_validated():
    assert set(OPS) == set(aajr_kernels.__all__) - NOT_OPS


@pytest.mark.slow
def test_low_dtypes_pass_within_their_budget():
    result = report("--op", "linear")
    assert result["passed"]
    for backend in {row["backend"] for row in result["rows"]}:
        dtypes = [dtype for dtype in DTYPES if backend == "reference" or dtype != "float64"]
        assert [row["dtype"] for row in result["rows"] if row["backend"] == backend] == dtypes
    for row in result["rows"]:
        assert row["result"] == "pass" and row["budget_share"] <= 1 and row["worst"]
        assert row["worst_error"] <= 64 * torch.finfo(DTYPES[row["dtype"]]).eps
    available = {name for name, reason in choice.backends().items() if reason is None}
    assert {row["backend"] for row in result["rows"]} == available
    refused = {f"float64 on {row['backend']} on {row['device']}" for row in result["rows"]}
    refused -= {name for name in refused if "reference" in name}
    assert set(result["left_out"]) == set(choice.backends()) - available | refused
    # two minutes on Triton's interpreter, which tests/ops/test_suite.py has at smaller sizes
    named = [word for name in sorted(available - {"triton"}) for word in ("--backend", name)]
    dtypes = [word for name in DTYPES if name != "float64" for word in ("--dtype", name)]
    result = report("--op", "layer_norm", "--op", "sensitivity", *named, *dtypes)
    assert {row["backend"] for row in result["rows"]} == available - {"triton"}
    assert len(result["rows"]) == 2 * 3 * len(available - {"triton"}) and result["passed"]
    for row in result["rows"]:
        assert row["result"] == "pass" and row["worst_error"] <= 64 * torch.finfo(DTYPES[row["dtype"]]).eps


@pytest.mark.parametrize("backend", ["reference", "native", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_policy_passes_in_bfloat16(backend):
    if (reason := choice.backends()[backend]) is not None:
        pytest.skip(reason)
    (row,) = report("--op", "aligned_penalty", "--dtype", "bfloat16", "--backend", backend)["rows"]
    assert row["cases"] == 5 and row["result"] == "pass"


def test_table_and_verdict():
    result = invoke("--op", "silu", "--dtype", "float32", "--dtype", "float64", "--backend", "reference")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] == ["silu"]]
    cases = len(OPS["silu"])
    assert [row[:4] for row in rows] == [["silu", d, "reference", str(cases)] for d in ("float64", "float32")]
    assert {row[-1] for row in rows} == {"pass"}
    assert [line for line in lines if line.strip()][-1].startswith(
        f"Passed: {2 * cases} cases of 1 ops, reference on cpu;"
    )


def test_numbers_depend_on_the_seed_alone():
    backend = ("--backend", "reference")

    def numbers(seed):
        rows = report("--op", "gelu", "--op", "silu", "--dtype", "float32", "--seed", seed, *backend)["rows"]
        return [(row["worst_error"], row["budget_share"], row["worst"]) for row in rows]

    first = numbers("3")
    assert numbers("3") == first != numbers("4")
    alone = report("--op", "silu", "--dtype", "float32", "--seed", "3", *backend)["rows"][0]
    assert alone["worst_error"] == first[1][0]  # whatever else is validated


# --------------------------------------------------------------------------------------------------- it fails
@pytest.mark.parametrize(
    ("op", "module", "name", "index", "tensor"),
    [
        ("rms_norm", norm, "norm_bwd", 1, "gradient of weight"),
        ("layer_norm", norm, "norm_bwd", 2, "gradient of bias"),
        ("linear", linear, "linear_bwd", 0, "gradient of x"),
        ("swiglu", activation, "gated_bwd", 1, "gradient of up"),
        ("attention", attention, "attention_bwd", 1, "gradient of k"),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_planted_wrong_gradient(monkeypatch, op, module, name, index, tensor, dtype):
    error = 1e-6 if dtype == "float64" else 0.3
    monkeypatch.setattr(module, name, perturbed(getattr(module, name), index, lambda g: g * (1 + error)))
    result = invoke("--op", op, "--dtype", dtype, "--backend", "reference")
    assert result.exit_code == 1, result.output
    assert f"{op} {dtype} reference:" in result.output
    assert tensor in result.output
    assert "FAIL" in result.output
    assert result.output.strip().splitlines()[-1].startswith(f"Failed: {op} (1 of 1 rows)")


def test_forgotten_second_derivative(monkeypatch):
    """The classic: a backward that drops the tangent's contribution to the primal."""

    def forgetful(y_bar, x, kind):
        _, slope = activation.derivatives(kind, x[0], 1)
        return y_bar * slope

    monkeypatch.setattr(activation, "pointwise_bwd", forgetful)
    result = report(
        "--op", "tanh", "--op", "linear", "--dtype", "float32", "--backend", "reference", exit_code=1
    )
    assert not result["passed"]
    assert {row["op"]: row["result"] for row in result["rows"]} == {"linear": "pass", "tanh": "fail"}
    failures = next(row["failures"] for row in result["rows"] if row["op"] == "tanh")
    assert failures and all(
        "gradient of x, primal:" in failure for failure in failures
    )  # that of its tangents is right


def test_wrong_gradient_deep_in_a_policy(monkeypatch):
    monkeypatch.setattr(norm, "norm_bwd", perturbed(norm.norm_bwd, 1, lambda g: g * (1 + 1e-7)))
    failures = report("--op", "aligned_penalty", "--dtype", "float64", exit_code=1)["rows"][0]["failures"]
    assert any("gradient of norm1:" in failure for failure in failures)
    assert not any("gradient of shift3:" in failure for failure in failures)


def test_wrong_tangent_nan_and_exception_are_failures(monkeypatch):
    right = linear.linear_fwd

    def outcome(forward):
        monkeypatch.setattr(linear, "linear_fwd", forward)
        (row,) = report("--op", "linear", "--dtype", "float32", "--backend", "reference", exit_code=1)["rows"]
        assert row["result"] == "fail"
        return row

    def halved(*args):
        y = right(*args)
        y[1:] /= 2
        return y

    assert any("output, tangents" in failure for failure in outcome(halved)["failures"])
    row = outcome(lambda *args: right(*args) * float("nan"))
    assert row["budget_share"] is None and any("NaN" in failure for failure in row["failures"])

    def broken(*args):
        raise IndexError("out of [range]")

    row = outcome(broken)
    assert len(row["failures"]) == row["cases"] and "IndexError: out of [range]" in row["failures"][0]


# ------------------------------------------------------------------------------------------------- it refuses
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "conv"), ["--op", "'conv'", *OPS]),
        (("--dtype", "int8"), ["--dtype", "'int8'", *DTYPES]),
        (("--backend", "tpu"), ["--backend", "'tpu'", *choice.BACKENDS]),
        (("--device", "gpu"), ["--device", "'gpu'", "auto", "cpu", "cuda"]),
        (("--seed", "-1"), ["--seed"]),
    ],
)
def test_unknown_arguments(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device():
    result = invoke("--device", "cuda", "--op", "relu")
    assert result.exit_code == 2
    assert "no such device" in result.output


def unwrapped(output: str) -> str:
    """The text of an error panel on one line."""
    return " ".join(output.replace("│", " ").split())


def test_missing_backend(monkeypatch):
    monkeypatch.setattr(gpu, "_interpreted", lambda: False)
    monkeypatch.setattr(choice, "_missing", {"native": "no compiler", "cuda": "not built"}.get)
    result = invoke("--backend", "native")
    assert result.exit_code == 2
    assert "native cannot run here: no compiler." in unwrapped(result.output)
    targets, left_out = find_targets(None, "cpu")
    assert targets == [REFERENCE]
    assert left_out["native"] == "no compiler" and "need a CUDA" in left_out["triton"]
    monkeypatch.setattr(gpu, "_interpreted", lambda: True)
    targets, _ = find_targets(["triton"], "cpu")
    assert str(targets[0]) == "triton on cpu"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_bfloat16_on_the_interpreter_is_validated_only_where_it_computes_it():
    """This process repairs the interpreter (backends/triton/interpreter.py), that of a user does not."""
    code = "from aajr_kernels.testing.targets import DTYPES, Target\n"
    code += "print([dtype for dtype in DTYPES if Target('triton', 'cpu').why_not(dtype) is None])"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['float32', 'float16']"
    if not torch.cuda.is_available():
        here = [dtype for dtype in DTYPES if Target("triton", "cpu").why_not(dtype) is None]
        assert here == ["float32", "bfloat16", "float16"]


# --------------------------------------------------------------------------------------------- other backends
@pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not()))
def test_a_backend_of_some_ops_skips_the_others(monkeypatch):
    with cuda_host.loaded():
        result = report(
            "--op", "rms_norm", "--op", "silu", "--backend", "cuda", "--dtype", "float32", "--device", "cpu"
        )
    assert {(row["op"], row["result"]) for row in result["rows"]} == {
        ("rms_norm", "pass"),
        ("silu", "skipped"),
    }
    monkeypatch.setattr(cuda, "module", lambda: SimpleNamespace(host=False))
    monkeypatch.setattr(choice, "_missing", lambda name: None)
    with pytest.raises(BackendUnavailable, match="cuda cannot run here: its kernels need a CUDA device"):
        find_targets(["cuda"], "cpu")


@pytest.fixture
def native(monkeypatch):
    """A second backend that has the linear layer alone, made of the reference's."""
    module = ModuleType("native")
    module.linear_fwd, module.linear_bwd = linear.linear_fwd, linear.linear_bwd
    original = choice.implementation

    def implementation(op, backend):
        if backend != "native":
            return original(op, backend)
        if op != "linear":
            raise BackendUnavailable(f"op {op!r} has no 'native' backend.")
        return module

    monkeypatch.setattr(choice, "_missing", {"triton": "no triton", "cuda": "not built"}.get)
    monkeypatch.setattr(choice, "implementation", implementation)
    return module


def test_every_available_backend_gets_rows(native):
    result = report("--op", "linear", "--op", "silu", "--dtype", "float64", "--dtype", "float32")
    rows = {(row["op"], row["dtype"], row["backend"]): row["result"] for row in result["rows"]}
    assert rows == {
        ("linear", "float64", "reference"): "pass",  # the only one that computes it
        ("linear", "float32", "reference"): "pass",
        ("linear", "float32", "native"): "pass",
        ("silu", "float64", "reference"): "pass",
        ("silu", "float32", "reference"): "pass",
        ("silu", "float32", "native"): "skipped",
    }
    assert set(result["left_out"]) == {"triton", "cuda", "float64 on native on cpu"}
    native.linear_bwd = perturbed(native.linear_bwd, 1, lambda g: g * 1.01)
    result = report("--op", "linear", "--dtype", "float32", exit_code=1)
    assert [(row["backend"], row["result"]) for row in result["rows"]] == [
        ("reference", "pass"),
        ("native", "fail"),
    ]


def test_a_backend_that_has_no_such_op_or_dtype_is_refused(native):
    result = invoke("--op", "silu", "--dtype", "float32", "--backend", "native")
    assert result.exit_code == 2
    assert "op 'activation' has no 'native' backend" in unwrapped(result.output)
    result = invoke("--op", "linear", "--dtype", "float64", "--backend", "native")
    assert result.exit_code == 2
    assert "only the reference backend computes float64" in unwrapped(result.output)


def test_falling_back_is_a_failure(native, monkeypatch):
    monkeypatch.setattr(choice, "select_backend", lambda op, *tensors, **options: "reference")
    (row,) = report("--op", "linear", "--dtype", "float32", "--backend", "native", exit_code=1)["rows"]
    assert "ran on reference, not native" in row["failures"][0]


# ------------------------------------------------------------------------------------------------- the oracle
@pytest.mark.parametrize("op", OPS)
def test_oracle_agrees_with_finite_differences(op):
    """Tangents against differences of values, and gradients against differences of ⟨cotangent, output⟩."""
    kinks = op in ("relu", "relu2")  # which a difference must not straddle
    for case in OPS[op][: 1 if kinks else 3]:
        p = problem(case, 2, torch.float64)
        count = len(p.inputs)
        leaves = [*p.inputs, *p.params]
        moves = [torch.randn_like(t) for t in leaves]

        @torch.no_grad()
        def total(step, case=case, p=p, leaves=leaves, moves=moves, count=count):
            moved = [t + step * move for t, move in zip(leaves, moves)]
            return (p.cotangent * case.exact(moved[:count], moved[count:])).sum().item()

        expected = sum((move * g).sum().item() for move, g in zip(moves, p.exact.gradients))
        h = 1e-6 if kinks else 1e-4
        slope = (8 * (total(h) - total(-h)) - (total(2 * h) - total(-2 * h))) / (12 * h)
        assert slope == pytest.approx(expected, rel=1e-7, abs=1e-7), str(case)


def test_oracle_tangents_agree_with_differences_of_values():
    for op in ("linear", "rms_norm", "layer_norm", "gelu", "swiglu", "rotary", "attention"):
        case = OPS[op][1]
        p = problem(case, 1, torch.float64)

        @torch.no_grad()
        def value(step, case=case, p=p):
            moved = [torch.cat([t[:1] + step * t[1:], t[1:]]) for t in p.inputs]
            return case.exact(moved, p.params)[0]

        h = 1e-4
        slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        torch.testing.assert_close(slope, p.exact.y[1], rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the budgets
def test_budgets():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    off = exact + torch.tensor([0.0, 5e-10])
    assert budgets.error_of(exact, exact) == budgets.Error(0.0, 0.0)
    assert budgets.error_of(off, exact).share == pytest.approx(1.0, rel=1e-4)
    # twice the eager error plus four units in the last place of the size, 5
    eager = exact + torch.tensor([0.01, 0.0])
    wrong = exact + torch.tensor([0.0, 0.02 + 20 * 2**-7])
    assert budgets.error_of(wrong, exact, eager, dtype=torch.bfloat16).share == pytest.approx(1.0)
    overflow = torch.tensor([float("inf"), 4.0])
    assert budgets.error_of(wrong, exact, overflow, dtype=torch.bfloat16).share > 1  # excuses nothing


def test_what_is_missing_or_stray_is_an_error():
    exact = torch.ones(3, dtype=torch.float64)
    for actual in (None, exact * float("nan"), exact.reshape(3, 1)):
        assert budgets.error_of(actual, exact).share == float("inf")
    assert budgets.error_of(exact, None).share == float("inf")
    assert budgets.error_of(exact * 0, None).share == 0
    assert budgets.error_of(None, exact * 0).share == 0
    # rounding where a gradient vanishes is measured by the size of the others
    assert budgets.error_of(exact * 1e-12, exact * 0).share == float("inf")
    floor = 3**0.5  # the norm of a tensor of ones
    assert budgets.error_of(exact * 1e-12, exact * 0, floor=floor).share == pytest.approx(0.01)
