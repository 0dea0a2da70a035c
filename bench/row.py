"""The row of a benchmark: one variant of one case, measured once; the schema of bench/results."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aajr_kernels import files
from common import machine

from . import allocator


@dataclass(frozen=True)
class Row:
    """One line of a results file.

    Attributes:
        suite, family, config, length, variant: the case; `config` holds sizes and options.
        device, dtype: of the tensors.
        backend: of our ops: ``native``, ``reference``, ``triton``, several joined by ``+``; ``torch`` if none ran.
        ops: our op -> the backend it ran on.
        min_ms, median_ms: forward and backward over `repeats` interleaved runs; None where only memory was measured.
        base, ratio: the variant that `min_ms` is divided by, and the quotient.
        gflop_per_s, gb_per_s: arithmetic (attention, head) or traffic (element-wise ops) that has to be done, over
            `min_ms`.
        peak_bytes: peak memory of one call above inputs and parameters, in a fresh process.
        gradient_bytes: the part of it that the gradients themselves take, where a bound needs it.
        peak_ratio: peak_bytes over those of the base.
        gradient_error: relative error of all gradients together against float64, at a small length.
        bounds: quantity -> its largest value: ``ratio``, ``peak_ratio``, ``extra_bytes`` (the peak without the
            gradients), ``over X`` (the ratio to the variant X) or ``ratio of X`` (that of the peer X, measured in the
            same run).
        passed: whether all bounds hold; None without bounds.
        repeats: timed runs of this variant; 0 where only memory was measured.
        seed: of the inputs.
        machine, cpu: architecture and processor.
        torch_capability, native_capability: instruction sets in use by torch and by the native module.
        threads: of torch, which are those of the native module.
        settings: the environment variables of :data:`SETTINGS` that were set.
        allocator: of memory, while timing: :func:`.allocator.in_use`.
        python, torch, transformers, aajr_kernels: versions.
        commit, dirty: of the checkout, and whether its code was changed since; None outside a checkout.

    Rows from before these fields have their defaults:
        device_name, triton: name of the accelerator; version of Triton.
        timing: ``graph`` where calls were replayed from a captured CUDA graph, else ``calls``.
        flop_share, byte_share: gflop_per_s and gb_per_s over the ceilings.
        ceilings: of the device, measured in the same run: ``gflop_per_s`` of a large product in the dtype, ``gb_per_s``
            of a copy.
        round_ratios: this variant over the base, round by round, for intervals.
        computed: of what there is, the share that one call computed: ``tokens`` in the head, ``positions`` of forwards
            with a shared context, ``arithmetic`` of these forwards, modelled by count; empty where nothing could be
            left out. :func:`aajr_kernels.coverage` counts.
        failure: why there are no numbers, such as "out of memory"; empty where there are.
    """

    suite: str
    family: str
    config: dict[str, Any]
    length: int
    variant: str
    device: str
    dtype: str
    backend: str
    ops: dict[str, str]
    min_ms: float | None
    median_ms: float | None
    base: str | None
    ratio: float | None
    gflop_per_s: float | None
    gb_per_s: float | None
    peak_bytes: int | None
    gradient_bytes: int | None
    peak_ratio: float | None
    gradient_error: float | None
    bounds: dict[str, float]
    passed: bool | None
    repeats: int
    seed: int
    machine: str
    cpu: str | None
    torch_capability: str
    native_capability: str | None
    threads: int
    settings: dict[str, str]
    allocator: str
    python: str
    torch: str
    transformers: str | None
    aajr_kernels: str
    commit: str | None
    dirty: bool | None
    device_name: str | None = None
    triton: str | None = None
    timing: str = "calls"
    flop_share: float | None = None
    byte_share: float | None = None
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    round_ratios: list[float] = dataclasses.field(default_factory=list)
    computed: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @property
    def case_key(self) -> tuple[object, ...]:
        """Equal for rows of the same case on the same kind of machine; commit and versions may differ."""
        config = json.dumps(self.config, sort_keys=True)
        capabilities = (self.torch_capability, self.native_capability, self.threads)
        where = (self.device, self.device_name, self.cpu, *capabilities)
        return (self.suite, self.family, config, self.length, self.dtype, *where)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for rows that measure the same."""
        return (*self.case_key, self.variant)

    @property
    def name(self) -> str:
        """Case and variant in words."""
        part = f" {self.config['part']}" if "part" in self.config else ""
        return f"{self.suite}:{self.family} {self.dtype} {self.length}{part} {self.variant}"

    @property
    def share_of_roof(self) -> float | None:
        """Of the machine's limit at the row's arithmetic intensity; None where the limits were not measured."""
        return max((share for share in (self.flop_share, self.byte_share) if share is not None), default=None)

    @property
    def extra_bytes(self) -> int | None:
        """Peak memory beside the gradients."""
        return None if self.peak_bytes is None else self.peak_bytes - (self.gradient_bytes or 0)

    def line(self) -> str:
        """The row as one line of JSON, with its checksum."""
        return files.sealed(dataclasses.asdict(self))

    @classmethod
    def parse(cls, line: str) -> Row:
        """The row of one line.

        Raises:
            ValueError: it is no JSON object with the fields of this class, each of its type, only those with defaults
                may be missing; or it does not have its checksum.
        """
        values, _ = files.unsealed(files.parsed(line))
        hints = typing.get_type_hints(cls)
        optional = list(hints)[list(hints).index("device_name") :]  # the fields with defaults
        if wrong := sorted((set(values) ^ set(hints)) - (set(optional) - set(values))):
            raise ValueError(
                f"a row must have exactly the fields of Row; missing or unknown: {', '.join(wrong)}."
            )
        for name, hint in hints.items():
            if name in values and not _fits(values[name], hint):
                raise ValueError(f"{name} of a row must be {hint}, got {values[name]!r}.")
        return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        of = typing.get_args(hint)[1]
        return isinstance(value, dict) and (of is Any or all(_fits(v, of) for v in value.values()))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


class Entry(NamedTuple):
    """A row and its place: the name of its file, and the line from 1."""

    row: Row
    file: str
    line: int


def read_entries(path: Path, name: str | None = None) -> list[Entry]:
    """The rows of a results file, which is called `name` in them and in messages.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no row; the message has its number.
    """
    entries, name = [], name or path.name
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                entries.append(Entry(Row.parse(line.decode("utf-8")), name, number))
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from error
    return entries


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; errors as of :func:`read_entries`."""
    return [entry.row for entry in read_entries(path)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same, the last one."""
    return list({row.key: row for row in rows}.values())


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a results file, which is made if there is none; if that fails, it is as before."""
    files.append_rows(path, map(dataclasses.asdict, rows))


def environment() -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
    return {**machine.describe(), "allocator": allocator.in_use()}
