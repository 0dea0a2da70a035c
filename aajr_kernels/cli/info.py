"""`aajr info`: installed versions, devices, and why a backend is missing."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import torch_private
from ..backends import choice, cuda, selfcheck_record
from ..backends import cpu as native

#: of a table: names and values
Rows = list[tuple[str, "str | Text"]]
PACKAGES = ("aajr_kernels", "torch", "triton", "transformers", "numpy", "peft", "gguf")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Versions, devices, backends and why one is missing."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console())


def collect() -> dict[str, Any]:
    """Everything `aajr info` reports, as plain data; imports none of the packages whose versions it reads."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
        "torch": {"tested": torch_private.is_tested(), "range": torch_private.tested_range()},
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
        },
        "accelerators": accelerators(),
        "no_accelerator": None if torch.cuda.is_available() else why_no_accelerator(),
        "backends": choice.backends(),
        "selfcheck": selfcheck(),
        "chosen_backend": os.environ.get("AAJR_BACKEND", "auto"),
        "native": native_info(),
        "cuda": cuda_info(),
        "build": native.build_info(),
    }


def package_version(name: str) -> str | None:
    """Version of an installed package, or None. torch tells its own, with the local part that names the build."""
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def accelerators() -> list[dict[str, Any]]:
    """CUDA and ROCm devices that torch can use."""
    if not torch.cuda.is_available():
        return []
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "kind": kind,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def selfcheck() -> dict[str, Any]:
    """Results of first-use checks on disk, by device; without a device those of Triton's interpreter, if any."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    records = {record.device: record for record in map(selfcheck_record.record_of, devices)}
    return {
        name: {"file": str(record.file), "checks": record.rows()}
        for name, record in records.items()
        if record.rows()
    }


def why_no_accelerator() -> str:
    """One sentence with the reason why torch sees no CUDA or ROCm device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"torch is built for {toolkit} but finds no usable device: check the driver and CUDA_VISIBLE_DEVICES"
    )


def native_info() -> dict[str, Any] | None:
    """Facts about the native CPU module, or None if it cannot run; the backends give the reason."""
    return None if choice.backends()["native"] else native.info()


def cuda_info() -> dict[str, Any] | None:
    """Facts about the CUDA module, or None if it was not built or cannot be loaded; the backends give the reason."""
    try:
        return cuda.info()
    except (ImportError, ValueError):
        return None


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts as tables."""
    versions: Rows = []
    for name, version in facts["versions"].items():
        versions.append((name, version or Text("not installed", "dim")))
        if name == "torch":
            tested = facts["torch"]["tested"]
            words = "tested" if tested else f"untested: {facts['torch']['range']} are"
            versions.append(("", Text(words, "green" if tested else "yellow")))
    cpu = facts["cpu"]
    threads = f"{cpu['threads']} threads of {cpu['usable_cpus']} CPUs"
    devices: Rows = [("cpu", f"{cpu['model']}, {cpu['capability']}, {threads}")]
    for gpu in facts["accelerators"]:
        size = f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        name = f"{gpu['name']}, {gpu['kind']}, capability {gpu['capability']}, {size}"
        devices.append((gpu["device"], name))
    if facts["no_accelerator"]:
        devices.append(("cuda", _missing("none", facts["no_accelerator"])))
    backends: Rows = [
        (name, _missing("missing", reason) if reason else Text("available", "green"))
        for name, reason in facts["backends"].items()
    ]
    console.print(_table("Versions", "package", "version", versions))
    console.print(_table("Devices", "device", "what", devices))
    console.print(_table(f"Backends (chosen: {facts['chosen_backend']})", "backend", "status", backends))
    for device, record in facts["selfcheck"].items():
        others = [check for check in record["checks"] if check["state"] != "passed"]
        passed = f"{len(record['checks']) - len(others)} kinds"
        checks: Rows = [(passed, Text("passed", "green"))]
        checks += [(c["key"], _missing(c["state"], c.get("reason") or "no result")) for c in others]
        checks.append(("file", record["file"]))
        console.print(_table(f"First-use checks on {device}", "kernels", "result", checks))
    seconds = facts["build"].get("seconds") or {}
    if facts["native"] is None:
        console.print(Text(f"Native CPU kernels: none. {facts['backends']['native']}", "yellow"))
    else:
        rows = _of_native(facts["native"], facts["build"]) + _of_build(facts["native"], seconds.get("native"))
        console.print(_table("Native CPU kernels", "what", "value", rows))
    if facts["cuda"] is None:
        console.print(Text(f"CUDA C++ kernels: none. {facts['backends']['cuda']}", "dim"))
    else:
        architectures = ", ".join(facts["cuda"]["architectures"]) or "the CPU, for tests"
        rows = [("architectures", architectures), ("toolkit", facts["cuda"]["toolkit"])]
        rows += _of_build(facts["cuda"], seconds.get("cuda"))
        console.print(_table("CUDA C++ kernels (experimental: chosen by name)", "what", "value", rows))


def _of_native(module: dict[str, Any], build: dict[str, Any]) -> Rows:
    able = [name for name, runs in module["capabilities"].items() if runs]
    unable = [name for name, runs in module["capabilities"].items() if not runs]
    compiler = ", ".join(filter(None, (module["compiler"], build.get("compiler"))))
    return [
        ("capability in use", Text(module["capability"], "green")),
        ("built in", ", ".join(able) + (f"; not on this processor: {', '.join(unable)}" if unable else "")),
        ("threads", f"{module['threads']}, {'of OpenMP' if module['openmp'] else 'its own: no OpenMP'}"),
        ("compiler", compiler),
    ]


def _of_build(module: dict[str, Any], took: dict[str, float] | None) -> Rows:
    seconds = took and f"{took['wall']:.0f} s, {took['processor']:.0f} s of processor time"
    return [*([("build took", seconds)] if seconds else []), ("file", module["file"])]


def _table(title: str, name: str, value: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for column in (name, value):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _missing(what: str, reason: str) -> Text:
    return Text.assemble((f"{what}: ", "yellow"), reason)
