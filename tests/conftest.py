"""Settings shared by the whole suite: offline, seeded, few threads, and uninitialised memory that shows.

Tests marked ``gpu`` are skipped, with the reason, where there is no device.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("AAJR_SELFCHECK", "0")  # the tests are the check

import pytest
import torch

# Without a device Triton's kernels run in its interpreter; they decide so when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Both keep tables keyed by torch.empty and its relatives: they have to see the true ones, before the patch below.
import torch._dynamo

import aajr_kernels  # noqa: F401
from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu

pytest_plugins = ["integration_rows"]

#: cases of each op in the shared suite that run under compute-sanitizer too
SANITIZED = 4
NAN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pytest_configure(config: pytest.Config) -> None:
    # The tests are small: more threads cost more than they bring, above all beside other workers.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    if gpu.interpreted() and gpu.missing() is None:
        from backends.triton import interpreter

        interpreter.patch()


#: files of tests/backends/triton that need no device: they compile, or look at the choice of the kernels
DEVICELESS = ("test_compile.py", "test_loops.py", "test_choice.py")


def _mark_for_the_device(items: list[pytest.Item]) -> None:
    """Where there is a device, tests of its kernels run on it: `-m gpu` chooses them, compute-sanitizer a few."""
    seen: dict[tuple[str, str], int] = {}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        own = item.path.parent.parts[-2:] == ("backends", "triton") and item.path.name not in DEVICELESS
        backend = getattr(parameters.get("target"), "backend", "")
        if own or backend in ("triton", "cuda"):
            item.add_marker("gpu")
        if not own and "gpu" in item.keywords and parameters.get("k") == 1:
            op = getattr(parameters.get("case"), "op", "")
            if op and parameters.get("dtype") == torch.bfloat16:
                seen[op, backend] = seen.get((op, backend), 0) + 1
                if seen[op, backend] <= SANITIZED:
                    item.add_marker("sanitizer")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if unnamed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"a test needs an id that is the same in every process, got {unnamed[0]}")
    if torch.cuda.is_available():
        _mark_for_the_device(items)
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def chosen_anew() -> None:
    """Every test has its backends chosen anew, also after one that replaced a part of the choice."""
    choice._found.clear()


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def allocate_nan(*args: Any, **kwargs: Any) -> Any:
        result = allocate(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype in NAN_DTYPES:
            with torch.no_grad():
                result.fill_(float("nan"))
        return result

    allocate_nan.__name__ = getattr(allocate, "__name__", "empty")
    return allocate_nan


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its relatives return with NaN, so that an element that was not written is seen.

    An explicit patch: ``torch.use_deterministic_algorithms``, the only way to make torch fill it, would also change
    which kernels run, and a TorchFunctionMode would switch off fast paths and change what torch.compile traces.
    """
    # a process group that a test started cleared the table, and the patches below were in it when it came back
    if torch.empty not in torch._dynamo.trace_rules.get_torch_obj_rule_map():
        torch._dynamo.trace_rules.clear_lru_cache()
        torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
