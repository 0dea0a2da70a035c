"""Compile csrc/cuda for every processor and show what the kernels take of it; no GPU is needed.

    python scripts/cuda_budgets.py           build, and compare with the committed csrc/cuda/budgets.json
    python scripts/cuda_budgets.py --write   make what was compiled the budget, and write the table of docs/cuda.md

Rules that hold whatever the budget: no stack and no local memory, so no spills; registers for the largest block that a
launch starts. The build is free of warnings, or it fails. Exit code 1: a kernel breaks a rule or exceeds its budget.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.tables import between  # noqa: E402

BUILD = ROOT / "build" / "cuda-check"
BUDGETS = ROOT / "csrc" / "cuda" / "budgets.json"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- budgets: python scripts/cuda_budgets.py --write -->", "<!-- end of budgets -->"
#: registers of a multiprocessor's quarter of a block are handed out in units of 8 per thread; there are as many in all
REGISTERS = 65536
#: threads of the largest block: AAJR_GLOBAL in csrc/cuda
THREADS = {"norm_bwd_kernel": 256, "column_sum_kernel": 128}
MOST_THREADS = 512

Usage = dict[
    str, dict[str, list[int]]
]  # kernel -> processor -> registers, bytes of stack, bytes of local memory


def find(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    for purelib in sys.path:
        path = Path(purelib) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return None


def why_not() -> str | None:
    """What is missing for a build, or None."""
    tools = {
        "nvcc": shutil.which("nvcc"),
        "cuobjdump": find_cuobjdump(),
        "cmake": find("cmake"),
        "ninja": find("ninja"),
    }
    missing = [name for name, path in tools.items() if path is None]
    return f"{' and '.join(missing)} not found" if missing else None


def build(folder: Path = BUILD) -> tuple[Path, float]:
    """The module for all processors, and the seconds its compilation took."""
    import pybind11

    cmake = str(find("cmake"))
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja')}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(
            "-DAAJR_CUDA=ON",
            "-DAAJR_WERROR=ON",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        ),
    ]
    _run(*configure)
    start = time.monotonic()
    _run(cmake, "--build", str(folder), "--target", "_cuda", "--parallel", "2")
    seconds = time.monotonic() - start
    return folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", seconds


def _run(*command: str) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
    return done.stdout


def usage(module: Path) -> Usage:
    """What every kernel takes on every processor, as the machine code says."""
    text = _run(str(find_cuobjdump()), "--dump-resource-usage", str(module))
    text = subprocess.run(["c++filt"], input=text, text=True, capture_output=True, check=True).stdout
    found: Usage = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(
            r"Function (?:void )?(.+?)\(.*\):", line.replace("(anonymous namespace)::", "")
        ):
            kernel = re.sub(r"aajr::cuda::|\((?:bool|int)\)|__nv_|__", "", match[1]).replace(
                "half", "float16"
            )
        elif match := re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", line):
            found.setdefault(kernel, {})[architecture] = [int(n) for n in match.groups()]
    return dict(sorted(found.items()))


def broken(found: Usage) -> list[str]:
    """Rules that a kernel breaks, as sentences."""
    sentences = []
    for kernel, processors in found.items():
        threads = THREADS.get(kernel.partition("<")[0], MOST_THREADS)
        for processor, (registers, stack, local) in processors.items():
            if stack or local:
                sentences.append(f"{kernel} on {processor}: {stack} bytes of stack, {local} of local memory.")
            if -(-registers // 8) * 8 * threads > REGISTERS:
                sentences.append(
                    f"{kernel} on {processor}: {registers} registers in blocks of {threads} threads."
                )
    return sentences


def exceeded(found: Usage, toolkit: str, budgets: dict[str, Any]) -> list[str]:
    """What is more than the budget of this toolkit, as sentences; another toolkit has none."""
    if toolkit != budgets["toolkit"]:
        return []
    known = budgets["registers"]
    return [
        f"{kernel} on {processor}: {registers} registers, budget {known.get(kernel, {}).get(processor)}."
        for kernel, processors in found.items()
        for processor, (registers, *_) in processors.items()
        if registers > known.get(kernel, {}).get(processor, 0)
    ]


def toolkit_version() -> str:
    """``13.0``."""
    match = re.search(r"release (\d+\.\d+)", _run("nvcc", "--version"))
    assert match is not None
    return match[1]


def table(budgets: dict[str, Any]) -> str:
    """A line for a kernel, a column for a processor: registers per thread."""
    processors = sorted({p for row in budgets["registers"].values() for p in row}, key=lambda p: int(p[3:]))
    lines = [f"| kernel | {' | '.join(processors)} |", f"|---|{'---|' * len(processors)}"]
    for kernel, row in budgets["registers"].items():
        lines.append(f"| `{kernel}` | {' | '.join(str(row.get(p, '')) for p in processors)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the budgets and the table of docs/cuda.md"
    )
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(f"[cuda-budgets] error: {reason}")
    module, seconds = build()
    found, toolkit = usage(module), toolkit_version()
    print(
        f"{len(found)} kernels for {len({p for row in found.values() for p in row})} processors, {seconds:.0f} s"
    )
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"toolkit": "", "registers": {}}
    wrong = broken(found)
    if options.write:
        budgets = {
            "toolkit": toolkit,
            "registers": {k: {p: n[0] for p, n in sorted(row.items())} for k, row in found.items()},
        }
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n")
        between(PAGE, BEGIN, END, table(budgets))
    else:
        wrong += exceeded(found, toolkit, budgets)
    print("\n".join(wrong) or "within the budgets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
