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
    versions = _table("Versions", "package", "version")
    for name, version in facts["versions"].items():
        versions.add_row(name, Text(version) if version else Text("not installed", "dim"))
        if name == "torch":
            tested = facts["torch"]["tested"]
            words = "tested" if tested else f"untested: {facts['torch']['range']} are"
            versions.add_row("", Text(words, "green" if tested else "yellow"))
    console.print(versions)

    devices = _table("Devices", "device", "what")
    cpu = facts["cpu"]
    threads = f"{cpu['threads']} threads of {cpu['usable_cpus']} CPUs"
    devices.add_row("cpu", Text(f"{cpu['model']}, {cpu['capability']}, {threads}"))
    for gpu in facts["accelerators"]:
        size = f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        devices.add_row(
            gpu["device"], Text(f"{gpu['name']}, {gpu['kind']}, capability {gpu['capability']}, {size}")
        )
    if facts["no_accelerator"]:
        devices.add_row("cuda", _missing("none", facts["no_accelerator"]))
    console.print(devices)

    backends = _table(f"Backends (chosen: {facts['chosen_backend']})", "backend", "status")
    for name, reason in facts["backends"].items():
        backends.add_row(name, _missing("missing", reason) if reason else Text("available", "green"))
    console.print(backends)

    for device, record in facts["selfcheck"].items():
        console.print(_selfcheck_table(device, record))
    console.print(_native_table(facts))
    console.print(_cuda_table(facts))


def _selfcheck_table(device: str, record: dict[str, Any]) -> Table:
    table = _table(f"First-use checks on {device}", "kernels", "result")
    passed = [check for check in record["checks"] if check["state"] == "passed"]
    table.add_row(f"{len(passed)} kinds", Text("passed", "green"))
    for check in record["checks"]:
        if check["state"] != "passed":
            table.add_row(Text(check["key"]), _missing(check["state"], check.get("reason") or "no result"))
    table.add_row("file", record["file"])
    return table


def _native_table(facts: dict[str, Any]) -> Table | Text:
    module, build = facts["native"], facts["build"]
    if module is None:
        return Text(f"Native CPU kernels: none. {facts['backends']['native']}", "yellow")
    table = _table("Native CPU kernels", "what", "value")
    able = [name for name, runs in module["capabilities"].items() if runs]
    unable = [name for name, runs in module["capabilities"].items() if not runs]
    table.add_row("capability in use", Text(module["capability"], "green"))
    table.add_row(
        "built in", ", ".join(able) + (f"; not on this processor: {', '.join(unable)}" if unable else "")
    )
    table.add_row(
        "threads", f"{module['threads']}, {'of OpenMP' if module['openmp'] else 'its own: no OpenMP'}"
    )
    table.add_row(
        "compiler", module["compiler"] + (f", {build['compiler']}" if build.get("compiler") else "")
    )
    if took := (build.get("seconds") or {}).get("native"):
        table.add_row("build took", _seconds(took))
    table.add_row("file", module["file"])
    return table


def _seconds(took: dict[str, float]) -> str:
    return f"{took['wall']:.0f} s, {took['processor']:.0f} s of processor time"


def _cuda_table(facts: dict[str, Any]) -> Table | Text:
    module = facts["cuda"]
    if module is None:
        return Text(f"CUDA C++ kernels: none. {facts['backends']['cuda']}", "dim")
    table = _table("CUDA C++ kernels (experimental: chosen by name)", "what", "value")
    table.add_row("architectures", ", ".join(module["architectures"]) or "the CPU, for tests")
    table.add_row("toolkit", module["toolkit"])
    if took := (facts["build"].get("seconds") or {}).get("cuda"):
        table.add_row("build took", _seconds(took))
    table.add_row("file", module["file"])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _missing(what: str, reason: str) -> Text:
    return Text.assemble((f"{what}: ", "yellow"), reason)
