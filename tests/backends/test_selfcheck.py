"""The first-use check: whole kernels pass, broken ones are found, and what is on disk decides without a run.

In Triton's interpreter, where ``auto`` is made to choose the Triton kernels.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.backends import choice, selfcheck, selfcheck_record
from aajr_kernels.backends.errors import BackendUnavailable
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.cli import info
from aajr_kernels.dual import Dual
from aajr_kernels.ops.sensitivity import softmax

pytestmark = pytest.mark.skipif(
    gpu.missing() is not None or not gpu.interpreted(), reason="Triton's interpreter is not in use"
)
DTYPE = torch.bfloat16
#: a norm on a device that need not be there, for `admit`
ON_DEVICE = (
    "norm",
    "rms_norm",
    "triton",
    torch.device("cuda", 0),
    (DTYPE, None, None),
    (2, 40),
    (False, False),
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has checked nothing, and ``auto`` that takes the Triton kernels on a CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "mode", "1")
    monkeypatch.setattr(choice, "_on_cpu", lambda op: "triton")
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process: only the files are left."""
    monkeypatch.setattr(selfcheck, "_passed", set())
    monkeypatch.setattr(selfcheck, "_refused", {})
    selfcheck_record._record.cache_clear()


def rows() -> list[dict]:
    return selfcheck_record.record_of(torch.device("cpu")).rows()


def dual(*shape: int, dtype: torch.dtype = DTYPE) -> Dual:
    return aajr.dual(*torch.randn(2, *shape, dtype=dtype))


def norm(dtype: torch.dtype = DTYPE) -> Dual:
    return aajr.rms_norm(dual(3, 40, dtype=dtype), 40, torch.randn(40, dtype=dtype))


def attend(**options) -> Dual:
    return aajr.attention(dual(1, 4, 5, 16), dual(1, 2, 5, 16), dual(1, 2, 5, 16), **options)


def expected(q, at):
    return torch.ones_like(q), torch.ones(q.shape[1])


CALLS = {
    "rms_norm": norm,
    "layer_norm": lambda: aajr.layer_norm(dual(3, 40), 40, torch.randn(40), torch.randn(40)),
    "add_rms_norm": lambda: aajr.add_rms_norm(dual(3, 40), torch.randn(3, 40, dtype=DTYPE), 40)[0],
    "swiglu": lambda: aajr.swiglu(dual(3, 40), torch.randn(3, 40, dtype=DTYPE)),
    "gelu": lambda: aajr.gelu(dual(3, 40)),
    "linear": lambda: aajr.linear(dual(3, 8, dtype=torch.float32), torch.randn(5, 8), torch.randn(5)),
    "rotary": lambda: aajr.rotary(dual(1, 2, 5, 16), torch.randn(1, 5, 8), torch.randn(1, 5, 8)),
    "sensitivity": lambda: aajr.sensitivity(dual(3, 40), "probs"),
    "softmax": lambda: softmax(dual(3, 40), 0),
    "lm_head_sensitivity": lambda: aajr.lm_head_sensitivity(
        dual(3, 128, dtype=torch.float32), torch.randn(9, 128), labels=torch.arange(3), expected=expected
    ),
    "attention": lambda: attend(causal=True),
}
SLOW = {
    "mask": lambda: attend(mask=torch.rand(1, 1, 5, 5) > 0.3),
    "bias": lambda: attend(mask=torch.randn(4, 1, 5), causal=True, softcap=2.0, window=3),
    "dropout": lambda: attend(dropout=0.1),
    "packed": lambda: aajr.attention(
        dual(4, 5, 16),
        dual(2, 5, 16),
        dual(2, 5, 16),
        causal="lower_right",
        cu_seqlens=torch.tensor([0, 2, 5]),
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_kernels_pass_and_are_not_checked_again(name, monkeypatch):
    call, state = (CALLS | SLOW)[name], torch.get_rng_state()
    call()
    torch.set_rng_state(state)
    with aajr.coverage() as seen:
        monkeypatch.setattr(selfcheck, "admit", None)
        call()
    assert [backend for _, backend in seen.entries if backend in choice.BACKENDS] == ["triton"]
    (row,) = rows()
    assert row["state"] == "passed" and (name in row["key"] or name in SLOW), row


def scaled(index: int, factor: float):
    """Break one result of a launcher."""

    def breaking(function):
        def broken(*args, **kwargs):
            results = list(function(*args, **kwargs))
            if results[index] is not None:
                results[index] = results[index] * factor
            return tuple(results)

        return broken

    return breaking


def one_row(function):
    def broken(*args, **kwargs):
        y, *others = function(*args, **kwargs)
        y[1, 5] = float("nan")
        return y, *others

    return broken


def raising(function):
    def broken(*args, **kwargs):
        raise RuntimeError("PassManager::run failed\nand many lines more")

    return broken


def only_by_itself(function):
    """Wrong where the gradient of the weight is not asked for."""

    def broken(*args):
        results = function(*args)
        return results if args[7] else (results[0] * 1.2, *results[1:])

    return broken


BROKEN = {
    "value": ("norm_fwd", scaled(0, 1.1), "the error of output 0"),
    "gradient of x": ("norm_bwd", scaled(0, 0.9), "the error of the gradient of x"),
    "gradient of weight": ("norm_bwd", scaled(1, 1.1), "the error of the gradient of weight"),
    "gradient of x by itself": ("norm_bwd", only_by_itself, "the gradient of x by itself"),
    "NaN": ("norm_fwd", one_row, "output 0 has NaN"),
    "compilation": ("norm_bwd", raising, "RuntimeError: PassManager::run failed."),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_kernels_are_replaced_with_one_warning_and_raise_by_name(fault, monkeypatch):
    launcher, breaking, text = BROKEN[fault]
    module = choice.implementation("norm", "triton")
    whole = getattr(module, launcher)
    monkeypatch.setattr(module, launcher, breaking(whole))
    with pytest.warns(RuntimeWarning, match="first-use check") as caught, aajr.coverage() as seen:
        norm()
    message = str(caught[0].message)
    assert (
        text in message
        and "Please report" in message
        and "rms_norm" in message
        and "many lines" not in message
    )
    with aajr.coverage() as again:  # warnings are errors
        norm()
    assert list(seen.entries) == list(again.entries) == [("rms_norm", "reference")]
    with aajr.use_backend("triton"), pytest.raises(BackendUnavailable, match="failed their"):
        norm()
    # another dtype is another kind, and a process that comes later believes the file
    monkeypatch.setattr(module, launcher, whole)
    norm(torch.float32)
    forget(monkeypatch)
    monkeypatch.setattr(selfcheck, "difference", None)
    with aajr.use_backend("triton"), pytest.raises(BackendUnavailable):
        norm()
    norm(torch.float32)
    table = info.selfcheck()["Triton's interpreter"]
    assert [row["state"] for row in table["checks"]] == ["failed", "passed"]


def test_nothing_of_the_caller_is_seen_or_changed():
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    state = torch.get_rng_state()
    x, weight = dual(3, 40), torch.randn(40, dtype=DTYPE)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    dual(3, 40), torch.randn(40, dtype=DTYPE)
    with torch.no_grad(), hooks, torch.autocast("cpu", dtype=torch.float16):
        y = aajr.rms_norm(x, 40, weight)
    assert not saved and not y.stacked.requires_grad
    assert torch.equal(torch.get_rng_state(), after)
    assert [row["state"] for row in rows()] == ["passed"]


def test_a_checkpoint_counts_the_same_tensors_twice():
    x = torch.randn(2, 3, 40, dtype=DTYPE, requires_grad=True)

    def step(stack):
        return aajr.gelu(Dual(stack)).stacked

    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all() and rows()


class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, bar):
        return aajr.gelu(Dual(torch.stack([bar, bar]))).primal


def test_no_check_inside_a_backward_or_a_capture(monkeypatch):
    x = torch.randn(3, 40, requires_grad=True)
    Late.apply(x).sum().backward()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selfcheck.admit(False, *ON_DEVICE) == "triton"
    assert not rows() and not selfcheck._passed
    aajr.gelu(dual(3, 40, dtype=torch.float32))
    assert len(rows()) == 1


def test_it_can_be_turned_off_and_leaves_other_backends_alone(monkeypatch):
    monkeypatch.setattr(selfcheck, "admit", None)
    with aajr.use_backend("reference"):
        norm()
    for mode in ("0", ""):  # the interpreter is checked only where that is asked for
        monkeypatch.setattr(selfcheck, "mode", mode)
        norm()


def test_full_memory_is_no_fault_of_the_kernels(monkeypatch):
    def full(kind, repeats):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "difference", full)
        norm()
    assert [row["state"] for row in rows()] == ["open"]
    norm()
    assert [row["state"] for row in rows()] == ["passed"]


def test_a_fault_that_takes_the_device_along_is_said_and_kept(monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    monkeypatch.setattr(selfcheck, "difference", fault)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(RuntimeError, match="device is lost to this process: start it again"):
        selfcheck.admit(False, *ON_DEVICE)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="an illegal memory access"):
        assert selfcheck.admit(False, *ON_DEVICE) == "reference"


def file() -> Path:
    return selfcheck_record.record_of(torch.device("cpu")).file


@pytest.mark.parametrize(
    ("process", "refused"),
    [
        ([platform.node(), 2**22 + 1], True),  # above the largest number of a process
        ([platform.node(), os.getpid()], False),
        (["elsewhere", 2**22 + 1], False),
        ("nonsense", False),
    ],
)
def test_a_process_that_ended_in_a_check_leaves_a_fault(process, refused, monkeypatch):
    norm()
    entry = {"key": rows()[0]["key"], "state": "started", "process": process}
    file().write_text(json.dumps(entry) + "\n")
    forget(monkeypatch)
    if refused:
        with pytest.warns(RuntimeWarning, match="a process ended while it was checked"):
            norm()
    else:
        norm()
        assert [row["state"] for row in rows()] == ["passed"]


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00", b'{"key": "a", "sta', b'[1, 2]\n"a"\n{"key": 3}\n{"state": "passed"}\nnull\n']
)
def test_a_corrupt_file_is_read_as_far_as_it_goes(text, monkeypatch):
    norm()
    good = file().read_bytes()
    file().write_bytes(text)
    forget(monkeypatch)
    assert not [row for row in rows() if row["state"] != "passed"]
    norm()
    assert [row["state"] for row in rows()] == ["passed"]
    file().write_bytes(text + good)
    forget(monkeypatch)
    monkeypatch.setattr(selfcheck, "difference", None)
    norm()


def test_a_folder_that_cannot_be_written_costs_a_check_per_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    norm()
    assert [row["state"] for row in rows()] == ["passed"] and not file().exists()
    forget(monkeypatch)
    assert not rows()
    norm()


def test_sources_are_part_of_the_files_name(monkeypatch, tmp_path):
    before = file().name
    (tmp_path / "package" / "ops").mkdir(parents=True)
    (tmp_path / "package" / "ops" / "a.py").write_text("x = 1")
    monkeypatch.setattr(selfcheck_record, "_PACKAGE", tmp_path / "package")
    selfcheck_record._versions.cache_clear()
    try:
        assert file().name != before
    finally:
        selfcheck_record._versions.cache_clear()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
def test_compiled_code_is_checked_while_it_is_traced():
    @torch.compile(backend="eager", fullgraph=True)
    def step(stack):
        return aajr.gelu(Dual(stack)).stacked

    stack = torch.randn(2, 3, 40)
    assert torch.allclose(step(stack), aajr.gelu(Dual(stack)).stacked)
    assert sorted(row["key"].split("sizes=")[1] for row in rows()) == [
        "() options=('gelu',)",
        "(2,) options=('gelu',)",
    ]


@pytest.mark.slow
def test_two_processes_share_a_file(tmp_path):
    code = (
        "import torch, aajr_kernels as aajr; aajr.use_backend('triton')\n"
        "for kind in (aajr.gelu, aajr.silu, aajr.relu, aajr.tanh, aajr.sigmoid):\n"
        "    kind(aajr.dual(torch.randn(3, 40), torch.randn(3, 40)))\n"
    )
    environment = {
        **os.environ,
        "AAJR_SELFCHECK": "1",
        "TRITON_INTERPRET": "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, env=environment, cwd=root) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(rows()) == 5 and {row["state"] for row in rows()} == {"passed"}
    lines = file().read_text().split("\n")
    assert all(json.loads(line) for line in lines if line)


def test_the_way_float32_is_multiplied_is_part_of_a_kind():
    x = torch.randn(2, 1, 2, 5, 16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            aajr.attention(Dual(x), Dual(x), Dual(x))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    kinds = [row["key"] for row in rows()]
    assert [kind.split("products=")[-1] for kind in kinds] == ["tf32x3", "tf32"]
