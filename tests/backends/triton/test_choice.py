"""When the Triton kernels are chosen, and the message where they are not.

Run in processes of their own without Triton's interpreter, where a device is only pretended.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
#: a tensor on a device that is not there: what the choice looks at
PRETENDED = """
import dataclasses, torch
import aajr_kernels as aajr
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu
torch.cuda.is_available = lambda: True

@dataclasses.dataclass
class Fake:
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    shape: tuple = (2, 64)
    __torch_dispatch__ = torch._C._disabled_torch_dispatch_impl
    def is_floating_point(self): return self.dtype.is_floating_point
    def is_complex(self): return self.dtype.is_complex
    is_cuda = property(lambda self: self.device.type == 'cuda')

def fake(device="cuda:0", dtype=torch.bfloat16):
    return Fake(torch.device(device), dtype)

def said(*tensors, op="attention"):
    try:
        return choice.select_backend(op, *tensors)
    except aajr.BackendUnavailable as error:
        return str(error)

choice._has = lambda op, backend: op == "attention"
"""


def python(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_without_a_device_the_name_is_refused_at_once():
    code = (
        "import aajr_kernels as a\ntry: a.use_backend('triton')\nexcept a.BackendUnavailable as e: print(e)"
    )
    said = python(code)
    assert said.startswith("backend 'triton' cannot run here: torch ")
    assert "no CUDA or ROCm device" in said and "TRITON_INTERPRET=1" in said


def test_auto_gives_the_kernels_to_tensors_on_a_device_in_their_dtypes():
    lines = python(
        PRETENDED
        + """
print(said(fake()), said(fake(dtype=torch.float32), None), said(fake(dtype=torch.float16)))
print(said(fake(dtype=torch.float64)), said(fake(), fake(dtype=torch.float64)), said(fake(), fake("cpu")))
print(said(fake(), fake("cuda:1")), said(torch.ones(2, device="meta")), said(fake(), op="abacus"))
print(said(torch.ones(2, dtype=torch.float64)))
avoided = lambda: choice.select_backend("attention", fake(), triton_spills=lambda x: True)
print(avoided())
aajr.use_backend("triton")
print(avoided())
"""
    ).splitlines()
    assert lines[:3] == ["triton " * 2 + "triton", *["reference " * 2 + "reference"] * 2]
    assert lines[3:] == ["reference", "reference", "triton"]  # kernels that spill run where they are named


REFUSED = {
    "fake('cpu')": "got a tensor on cpu: move it to a CUDA or ROCm device, or use backend 'auto'.",
    "fake('meta')": "got a tensor on meta: move it to a CUDA or ROCm device",
    "fake(), fake('cpu')": "got a tensor on cpu: move it to a CUDA or ROCm device",
    "fake(), None, fake('cuda:1')": "got tensors on cuda:0 and on cuda:1: move them to one device",
    "fake(dtype=torch.float64)": "got a tensor of torch.float64: cast it to float32, bfloat16 or float16",
    "fake(dtype=torch.float8_e4m3fn)": "got a tensor of torch.float8_e4m3fn: cast it to float32",
}


def test_a_tensor_the_named_backend_does_not_take_is_refused():
    calls = "".join(f"print(said({tensors}))\n" for tensors in REFUSED)
    said = python(PRETENDED + "aajr.use_backend('triton')\n" + calls).splitlines()
    for line, words in zip(said, REFUSED.values(), strict=True):
        assert line.startswith("attention: backend 'triton' got ") and words in line


@pytest.mark.slow
def test_a_public_op_says_so_too_and_does_not_fall_back():
    said = python(
        PRETENDED
        + """
aajr.use_backend("triton")
x = aajr.dual(torch.ones(2, 4), torch.ones(2, 4))
for call in (lambda: aajr.rms_norm(x, 4), lambda: aajr.swiglu(x, x), lambda: aajr.linear(x, torch.ones(3, 4))):
    try:
        call()
        print("computed")
    except aajr.BackendUnavailable as error:
        print("a tensor on cpu: move it to a CUDA or ROCm device" in str(error))
"""
    )
    assert said.split() == ["True"] * 3


@pytest.mark.slow
def test_importing_the_kernels_touches_no_driver():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("aajr_kernels/backends/triton", "aajr_kernels/ops")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.stem != "__init__" and ("triton" in path.stem or "triton" in path.parts)
    ]
    assert {"aajr_kernels.backends.triton.sums", "aajr_kernels.ops.norm.triton"} <= set(modules)
    said = python(
        f"""
import importlib, torch, triton

class Blocked:
    def __getattr__(self, name):
        raise RuntimeError("the driver was asked for " + name)

def refuse(*args, **kwargs):
    raise RuntimeError("CUDA was initialised")

triton.runtime.driver.set_active(Blocked())
torch.cuda._lazy_init = torch._C._cuda_init = refuse
for name in ("get_device_properties", "get_device_capability", "current_device", "device_count"):
    setattr(torch.cuda, name, refuse)
for name in {modules!r}:
    importlib.import_module(name)
print("imported", len({modules!r}))
"""
    )
    assert said.startswith("imported")


@pytest.mark.slow
def test_the_interpreter_takes_cpu_tensors_and_says_what_else_it_got():
    said = python(
        PRETENDED + "aajr.use_backend('triton')\nprint(said(fake('cpu')), said(fake('cuda:0')))",
        TRITON_INTERPRET="1",
    )
    assert said.startswith(
        "triton attention: backend 'triton' got a tensor on cuda:0: move it to a cpu device"
    )
