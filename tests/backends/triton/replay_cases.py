"""Replayed calls of launchers start the same kernels with the same arguments as the launchers themselves.

Triton's own launcher runs on a driver that does nothing (bench/stub.py). Results are not computed: every launch is
compared, down to addresses and tensor maps. test_replay.py runs this file in a process without the interpreter.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import operator_calls
from torch import Tensor

from aajr_kernels.backends import choice
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.backends.triton import replay
from aajr_kernels.ops.attention import configs
from bench.stub import ARCHITECTURE, stub

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module", autouse=True)
def _on_stub() -> Iterator[None]:
    with stub():
        yield


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    replay._calls.clear()


class Log:
    """Launches on the stub: the kernel's handle, grid and arguments, tensor maps as address, sizes and strides."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.backends.nvidia import driver as nvidia
        from triton.runtime import driver

        self.launches: list[tuple[Any, ...]] = []
        self.maps: list[tuple[Any, Any]] = []
        fill = next(name for name in vars(driver.active.utils) if name.startswith("fill_tma_descriptor"))
        filled, started = getattr(driver.active.utils, fill), nvidia.CudaLauncher.__call__

        def make(*args: Any) -> Any:
            tensor_map = filled(*args)
            self.maps.append((tensor_map, ("map", args[0], *args[5], *args[6])))
            return tensor_map

        @functools.wraps(started)
        def start(launcher: Any, *args: Any) -> None:
            started(launcher, *args)
            # grid, stream, function | packed metadata, metadata, hooks | arguments
            self.launches.append((*args[:3], *args[4:5], *self._plain(args[9:])))

        patch.setattr(driver.active.utils, fill, make)
        patch.setattr(nvidia.CudaLauncher, "__call__", start)

    def _plain(self, args: Any) -> Iterator[Any]:
        for x in args:
            if isinstance(x, Tensor):
                yield x.data_ptr()
            elif hasattr(x, "block_shape"):
                yield from (("map", x.base.data_ptr(), *x.shape, *x.strides), *x.shape, *x.strides)
            elif type(x).__name__ == "PyCUtensorMap":
                yield next(where for tensor_map, where in self.maps if tensor_map is x)
            else:
                yield x

    def of(self, call: Callable[[], Any]) -> tuple[list[tuple[Any, ...]], list[Tensor | None]]:
        self.launches = []
        results = call()
        results = list(results) if isinstance(results, tuple) else [results]
        return self.launches, results


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


def agree(log: Log, launcher: Any, args: tuple[Any, ...]) -> int:
    """Number of launches, after comparing what the decorated launcher starts with what it starts itself."""
    for call in replay._calls.values():
        if isinstance(
            call, replay.Call
        ):  # kept memory has addresses of its own, which tell one tensor from another
            call.steps = [(step, []) for step, _ in call.steps]
    expected, expected_results = log.of(lambda: launcher.__wrapped__(*args))
    launched, results = log.of(lambda: launcher(*args))
    assert len(launched) == len(expected) and len(results) == len(expected_results)
    moved: dict[int, int] = {}  # address of an output -> address in its place
    spans = []
    for a, b in zip(expected_results, results):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            spans.append((b.data_ptr(), a.data_ptr(), a.untyped_storage().nbytes()))
    memory = [x.untyped_storage() for x in args if isinstance(x, Tensor)]
    inputs = [(x.data_ptr(), x.nbytes()) for x in memory]
    for one, other in zip(expected, launched):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            if isinstance(a, tuple) and a and a[0] == "map":
                assert b[0] == "map" and a[2:] == b[2:]
                a, b = a[1], b[1]
            if not (isinstance(a, int) and isinstance(b, int) and a != b and min(a, b) > 1 << 20):
                assert a == b and type(a) is type(b)
                continue
            assert not any(start <= x < start + size for x in (a, b) for start, size in inputs)
            assert moved.setdefault(b, a) == a
            for start, there, size in spans:
                assert not start <= b < start + size or b - start == a - there
    return len(launched)


def launcher_of(func: Any) -> Any:
    """The decorated launcher of an operator."""
    name = operator_calls.name_of(func).removeprefix("aajr::triton_")
    for op in operator_calls.OPS:
        module = choice.implementation(op, "triton")
        for launcher in (getattr(module, name, None), getattr(module, f"_{name}", None)):
            if hasattr(launcher, "__wrapped__"):
                return launcher
    raise AssertionError(name)


@pytest.mark.slow
@pytest.mark.parametrize("op", operator_calls.OPS)
def test_every_launcher_starts_the_same_kernels_when_it_is_replayed(op, log):
    replayed = set()
    for func, args in operator_calls.calls_on("triton", BF16, ops=(op,)):
        launcher, args = launcher_of(func), operator_calls.plain(args)
        for _ in range(2):  # as it is, recorded
            launcher(*args)
        if any(isinstance(call, replay.Call) for call in replay._calls.values()):
            replayed.add(func)
            agree(log, launcher, args)
            agree(log, launcher, args)
        replay._calls.clear()
    assert replayed


def norm_args(x: Tensor, weight: bool = True, eps: float = 1e-6, centred: bool = False) -> tuple[Any, ...]:
    w = torch.ones(x.shape[-1], dtype=x.dtype) if weight else None
    return x, w, None, eps, 0.0, centred, None


def attention_args(*tensors: Tensor, offset: int | None = 0, scale: float = 0.5) -> tuple[Any, ...]:
    return *tensors, None, scale, None, offset, None, 0.0, False, *[None] * 5


def after_context(length: int) -> tuple[Any, ...]:
    return *attention_args(heads(4), heads(2), heads(2))[:-2], heads(2, length)[:1], heads(2, length)[:1]


def heads(h: int, n: int = 32, d: int = 16, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(2, 1, n, h, d, dtype=dtype).transpose(2, 3)


def norm() -> Any:
    from aajr_kernels.ops.norm.triton import norm_fwd

    return norm_fwd


def attention() -> Any:
    from aajr_kernels.ops.attention.triton import _attention_fwd

    return _attention_fwd


def replays(launcher: Any, args: tuple[Any, ...], times: int = 3) -> None:
    """Call it until it is replayed."""
    for _ in range(times):
        launcher(*args)
    assert any(isinstance(call, replay.Call) for call in replay._calls.values())


def rows(*shape: int, dtype: torch.dtype = BF16, before: int = 0) -> Tensor:
    """Numbers that begin `before` elements after an aligned address."""
    return torch.randn(before + torch.Size(shape).numel()).to(dtype)[before:].view(shape)


#: what a kernel specialises on or a launcher looks at -> the arguments of two calls that differ in it only
NORMS = {
    "dtype": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 64, dtype=torch.float16))),
    "alignment": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 64, before=1))),
    "rows": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 9, 64))),
    "columns": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 48))),
    "strides": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 64, 8).mT)),
    "tangents": (norm_args(rows(2, 8, 64)), norm_args(rows(3, 8, 64))),
    "a missing weight": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 64), weight=False)),
    "a number": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 64), eps=1e-5)),
    "a switch": (norm_args(rows(2, 8, 64)), norm_args(rows(2, 8, 64), centred=True)),
    "the type of a number": (norm_args(rows(2, 8, 64), eps=1.0), norm_args(rows(2, 8, 64), eps=True)),
}
GROUPED = attention_args(heads(4), heads(2), heads(2))
ATTENTIONS = {
    "causality": (GROUPED, attention_args(heads(4), heads(2), heads(2), offset=None)),
    "groups": (GROUPED, attention_args(heads(4), heads(4), heads(4))),
    "keys without tangents": (GROUPED, attention_args(heads(4), heads(2)[:1], heads(2))),
    "a context": (GROUPED, after_context(7)),
    "the length of a context": (after_context(7), after_context(6)),
    "alignment, and with it tensor maps": (
        GROUPED,
        attention_args(rows(2, 1, 4, 32, 16, before=4), heads(2), heads(2)),
    ),
}


@pytest.mark.parametrize(
    ("kind", "part"), [(f, p) for f, table in ((norm, NORMS), (attention, ATTENTIONS)) for p in table]
)
def test_another_signature_gets_its_own_kernels(kind, part, log):
    launcher = kind()
    one, other = (NORMS if kind is norm else ATTENTIONS)[part]
    replays(launcher, one)
    for _ in range(3):
        agree(log, launcher, other)
        agree(log, launcher, one)


def test_new_memory_moves_every_address_and_tensor_map(log):
    for _ in range(5):
        agree(log, norm(), norm_args(rows(2, 8, 64)))
        agree(log, attention(), attention_args(heads(4), heads(2), heads(2)))


def test_parts_of_one_memory_are_told_apart(log):
    """Queries, keys and values of one projection at first, and each in memory of its own later."""
    joint = torch.randn(2, 1, 32, 12, 16, dtype=BF16).transpose(2, 3)
    together = [joint[:, :, 4 * i : 4 * i + 4] for i in range(3)]
    agree(log, attention(), attention_args(*together))
    attention()(*attention_args(*together))  # is recorded, on copies
    agree(log, attention(), attention_args(*together))
    apart = [torch.empty_strided(x.shape, x.stride(), dtype=BF16).copy_(x) for x in together]
    agree(log, attention(), attention_args(*apart))


def test_the_way_float32_is_multiplied_is_part_of_a_signature(log):
    args = attention_args(*(heads(2, dtype=FP32) for _ in range(3)))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        replays(attention(), args)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for _ in range(3):
            agree(log, attention(), args)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_processor_is_part_of_a_signature():
    replays(norm(), norm_args(rows(2, 8, 64)))
    with gpu.dry_run("sm_80") as launched:  # a recorder hears of what would be launched
        norm()(*norm_args(rows(2, 8, 64)))
    assert len(launched) == 1


def test_tiles_and_the_environment_count_after_forget(log, monkeypatch):
    args = attention_args(heads(4), heads(2), heads(2))
    replays(attention(), args)
    with configs.trial("fwd", (64, 32, 4, 1)):
        agree(log, attention(), args)
        agree(log, attention(), args)
        agree(log, attention(), args)
    agree(log, attention(), args)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not gpu.interpreted()
    gpu.forget()
    assert gpu.interpreted()
    monkeypatch.undo()
    gpu.forget()


def test_no_recording_while_a_graph_is_captured(log, monkeypatch):
    args = norm_args(rows(2, 8, 64))
    monkeypatch.setattr(replay.capture, "is_capturing", lambda device: True)
    for _ in range(3):
        agree(log, norm(), args)
    assert not replay._calls
    monkeypatch.undo()
    replays(norm(), args)
    monkeypatch.setattr(replay.capture, "is_capturing", lambda device: True)
    agree(Log(monkeypatch), norm(), args)


def test_profilers_hear_of_every_launch():
    from triton import knobs

    args, heard = norm_args(rows(2, 8, 64)), []
    replays(norm(), args)
    hook = heard.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        norm()(*args)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert [data.get()["name"] for data in heard] == ["_norm_fwd_kernel"]


def test_modes_of_torch_see_the_operator():
    args = norm_args(rows(2, 8, 64))
    replays(norm(), args)
    with operator_calls.Recorder() as recorder:
        y, stats, summed = norm()(*args)
    assert [operator_calls.name_of(func) for func, _ in recorder.calls] == ["aajr::triton_norm_fwd"]
    assert y.shape == (2, 8, 64) and stats.shape == (2, 8) and summed is None


def test_the_operator_of_compiled_code_is_replayed():
    for _ in range(3):
        torch.ops.aajr.triton_norm_fwd(*norm_args(rows(2, 8, 64)))
    assert isinstance(next(iter(replay._calls.values())), replay.Call)


def _values(x: Tensor) -> Tensor:
    return torch.full((int(x[0].item()),), 1.0)


@pytest.mark.parametrize("launcher", [_values, lambda x: x[x > 1], lambda x: x, lambda x: x + _ONES])
def test_what_a_recorder_cannot_follow_runs_itself(launcher):
    call = replay.replayed(launcher)
    for value in range(4):
        assert torch.equal(call(torch.full((3,), float(value))), launcher(torch.full((3,), float(value))))
    assert list(replay._calls.values()) == [False]


_ONES = torch.ones(3)


def _in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x)
    total.copy_(x)
    total[1:] += y[1:]
    return total, torch.zeros_like(x).add_(total.sum())


def _views(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (a, b), wide = torch.stack([x, y]).unbind(0), torch.cat([x, 2 * y]).view(2, -1)
    return torch.cat([a, wide[1], b]), wide.t().to(torch.float64)


@pytest.mark.parametrize("launcher", [_in_place, _views])
def test_operations_of_torch_are_repeated(launcher):
    call = replay.replayed(launcher)
    for value in range(5):
        args = [torch.arange(4.0) + value, torch.arange(4.0) * value]
        for ours, own in zip(call(*args), launcher(*args)):
            assert torch.equal(ours, own) and ours.stride() == own.stride() and ours.dtype == own.dtype
    assert isinstance(next(iter(replay._calls.values())), replay.Call)


def test_memory_is_freed_when_the_last_step_is_done_that_needs_it():
    seen: list[weakref.ref[Tensor]] = []

    def launcher(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(3):
            total += torch.mul(x, 2.0)
        return total

    call, mul = replay.replayed(launcher), torch.ops.aten.mul.Tensor
    for _ in range(3):
        call(torch.ones(4))
    (recorded,) = (call for call in replay._calls.values() if isinstance(call, replay.Call))
    alive = []
    for step, _ in recorded.steps:
        if isinstance(step, replay.Operation) and step.func is mul:

            def counted(*args: Any) -> Tensor:
                alive.append(sum(one() is not None for one in seen))
                result = mul(*args)
                seen.append(weakref.ref(result))
                return result

            step.func = counted
    assert torch.equal(call(torch.ones(4)), torch.full((4,), 6.0)) and alive == [0, 0, 0]


def test_fillings_and_parts_of_results_are_replayed():
    def launcher(x: Tensor, value: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        wide = torch.zeros(2, 3, dtype=torch.float64)
        return torch.empty_like(x).fill_(value), wide[1], None, wide.t()

    call = replay.replayed(launcher)
    for _ in range(4):
        filled, part, none, turned = call(torch.ones(3), 7.0)
        assert torch.equal(filled, torch.full((3,), 7.0)) and none is None
        assert torch.equal(part, torch.zeros(3, dtype=torch.float64))
        assert turned.stride() == (1, 3) and part.data_ptr() == turned.data_ptr() + 24
    assert any(isinstance(recorded, replay.Call) for recorded in replay._calls.values())


def test_the_oldest_signatures_go(monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 4)
    for n in range(1, 9):
        norm()(*norm_args(rows(2, n, 64)))
    assert [key[2][1] for key in replay._calls] == [5, 6, 7, 8]


def test_signatures_of_every_step_stay_while_lengths_come_once(monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 4)
    for n in range(1, 30):
        for length in (100, 200, n):
            for _ in range(3 if n == 1 else 1):
                norm()(*norm_args(rows(2, length, 64)))
    assert {100, 200} < {key[2][1] for key in replay._calls} and len(replay._calls) == 4


def test_where_triton_lacks_a_part_it_launches_itself(log, monkeypatch):
    monkeypatch.setattr(replay, "direct", lambda *launch: None)
    for _ in range(4):
        agree(log, norm(), norm_args(rows(2, 8, 64)))
    assert list(replay._calls.values()) == [False]


def test_threads_keep_their_addresses(monkeypatch):
    """Replays of one signature at a time in several threads, each on memory of its own."""
    args = [norm_args(rows(2, 8, 64)) for _ in range(4)]
    replays(norm(), args[0])
    (call,) = (call for call in replay._calls.values() if isinstance(call, replay.Call))
    (launch,) = (step for step, _ in call.steps if isinstance(step, replay.Launch))
    run, seen, start = launch.run, set(), threading.Barrier(len(args))

    def watched(*values: Any) -> None:
        seen.add((threading.current_thread().name, values[9]))
        run(*values)

    def work(mine: tuple[Any, ...]) -> None:
        start.wait()
        with gpu.recording(None, ARCHITECTURE):
            for _ in range(200):
                norm()(*mine)

    monkeypatch.setattr(launch, "run", watched)
    threads = [threading.Thread(target=work, args=(mine,), name=str(i)) for i, mine in enumerate(args)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {(str(i), mine[0].data_ptr()) for i, mine in enumerate(args)}
