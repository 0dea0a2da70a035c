"""The walks of docs/architecture.md: every station is passed, in its order, and none is called from further down."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import aajr_kernels as aajr
from aajr_kernels.backends import cpu as native
from aajr_kernels.dual import Dual

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
STATION = re.compile(r"^\d+\. `([\w/]+)\.py` `([\w.]+)`", re.MULTILINE)
MOST = 9


def stations(title: str) -> list[CodeType]:
    """The code of every station below a title."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    codes = []
    for module, name in STATION.findall(section):
        owner = importlib.import_module("aajr_kernels." + module.replace("/", "."))
        codes.append(inspect.unwrap(functools.reduce(getattr, name.split("."), owner)).__code__)
    assert len(codes) == len(re.findall(r"(?m)^\d+\. ", section)), "a station has a file and a function"
    return codes


def walked(codes: list[CodeType], call: Callable[[], Any]) -> list[tuple[int, list[int]]]:
    """Every entry of a station during a call, and the stations that were open then."""
    entries = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            outer, stack = frame.f_back, []
            while outer is not None:
                if outer.f_code in codes:
                    stack.append(codes.index(outer.f_code))
                outer = outer.f_back
            entries.append((codes.index(frame.f_code), stack))

    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entries


def penalty() -> None:
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    aajr.aligned_penalty(torch.nn.Linear(4, 5), x, v)


def ascent() -> None:
    x = torch.randn(2, 3, 4)
    aajr.ascend(lambda z: z.sin().flatten(1).sum(1), x, radius=1.0, steps=2, init="uniform", restarts=2)


X, K = torch.randn(2, 1, 4, 5, 8), torch.randn(1, 2, 5, 8)


def attention() -> None:
    aajr.attention(Dual(X), K, K, causal=True, softcap=2.0)


needs_native = pytest.mark.skipif(native.missing() is not None, reason="the native CPU module is not built")


@pytest.mark.parametrize(
    ("title", "call"),
    [
        ("`x` through `aligned_penalty`", penalty),
        ("`x` through `ascend`", ascent),
        pytest.param("`q` through `attention`", attention, marks=needs_native),
    ],
)
def test_a_walk_goes_down(title: str, call: Callable[[], None]) -> None:
    codes = stations(title)
    entries = walked(codes, call)
    assert 2 <= len(codes) <= MOST
    assert {station for station, _ in entries} == set(range(len(codes))), "a station is not passed"
    for station, stack in entries:
        assert all(outer < station for outer in stack), f"station {station + 1} is entered from further down"


def holds(value: Any, storage: int) -> bool:
    """Whether an argument is, or contains, a tensor in that memory."""
    if isinstance(value, Dual):
        return holds(value.stacked, storage)
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr() == storage
    return isinstance(value, (tuple, list)) and any(holds(item, storage) for item in value)


def handed(call: Callable[[], Any], q: torch.Tensor) -> list[str]:
    """The modules of the package whose functions get `q` as an argument, in the order of the calls."""
    storage, package = q.untyped_storage().data_ptr(), str(Path(aajr.__file__).parent)
    modules: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(package) or frame.f_code.co_name == "is_dual":
            return
        sys.setprofile(None)  # a look at a Dual is no step of the walk
        names = inspect.getargvalues(frame)
        arguments = [*names.args, *filter(None, (names.varargs, names.keywords))]
        module = Path(name).relative_to(package).as_posix()
        # private names of torch stand below all stations
        known = modules[-1:] == [module] or module == "torch_private.py"
        if not known and any(holds(frame.f_locals.get(a), storage) for a in arguments):
            modules.append(module)
        sys.setprofile(trace)

    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
    return modules


@needs_native
def test_q_is_handed_on_and_never_back() -> None:
    attention()  # loads the backend
    modules = handed(attention, X)
    section = PAGE.read_text(encoding="utf-8").split("## `q` through `attention`\n")[1]
    items = re.split(r"(?m)^\d+\. ", section)[1:]
    station = {module: i for i, item in enumerate(items) for module in re.findall(r"`([\w/]+\.py)`", item)}
    order = [station[module] for module in modules]
    assert order == sorted(order), " -> ".join(modules)
    assert set(order) == set(range(len(items)))
