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
import sys
import time
from pathlib import Path
from typing import Any

from native_build import ROOT, SUFFIX, build, run

sys.path.insert(0, str(ROOT))

from common.pages import between, table

FOLDER = ROOT / "build" / "cuda-check"
BUDGETS = ROOT / "csrc" / "cuda" / "budgets.json"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- budgets: python scripts/cuda_budgets.py --write -->", "<!-- end of budgets -->"
#: registers of a multiprocessor; a thread gets them in units of 8
REGISTERS = 65536
#: threads of the largest block: AAJR_GLOBAL in csrc/cuda
THREADS = {"norm_bwd_kernel": 256, "column_sum_kernel": 128}
MOST_THREADS = 512

#: kernel -> processor -> registers, bytes of stack, bytes of local memory
Usage = dict[str, dict[str, list[int]]]


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    inside = "triton/backends/nvidia/bin/cuobjdump"
    paths = [
        shutil.which("cuobjdump"),
        *(str(Path(p) / inside) for p in sys.path if (Path(p) / inside).exists()),
    ]
    return next((path for path in paths if path), None)


def usage(module: Path) -> Usage:
    """Resources of every kernel on every processor, from the machine code."""
    text = run("c++filt", input=run(str(find_cuobjdump()), "--dump-resource-usage", str(module)))
    kernels: Usage = {}
    architecture = kernel = ""
    for line in text.replace("(anonymous namespace)::", "").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (?:void )?(.+?)\(.*\):", line):
            kernel = re.sub(r"aajr::cuda::|\((?:bool|int)\)|__nv_|__", "", match[1]).replace(
                "half", "float16"
            )
        elif match := re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", line):
            kernels.setdefault(kernel, {})[architecture] = [int(n) for n in match.groups()]
    return dict(sorted(kernels.items()))


def broken(kernels: Usage, budgets: dict[str, dict[str, int]] | None) -> list[str]:
    """Rules that a kernel breaks and budgets that it exceeds, as sentences; None: there are no budgets."""
    sentences = []
    for kernel, processors in kernels.items():
        threads = THREADS.get(kernel.partition("<")[0], MOST_THREADS)
        for processor, (registers, stack, local) in processors.items():
            if stack or local:
                sentences.append(f"{kernel} on {processor}: {stack} bytes of stack, {local} of local memory.")
            if -(-registers // 8) * 8 * threads > REGISTERS:
                sentences.append(
                    f"{kernel} on {processor}: {registers} registers in blocks of {threads} threads."
                )
            if budgets is not None and registers > (most := budgets.get(kernel, {}).get(processor, 0)):
                sentences.append(f"{kernel} on {processor}: {registers} registers, budget {most}.")
    return sentences


def markdown(registers: dict[str, dict[str, int]]) -> str:
    """A line for a kernel, a column for a processor: registers per thread."""
    processors = sorted({p for row in registers.values() for p in row}, key=lambda p: int(p[3:]))
    rows = [[f"`{kernel}`", *(row.get(p, "") for p in processors)] for kernel, row in registers.items()]
    return table(["kernel", *processors], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the budgets and the table of docs/cuda.md"
    )
    options = parser.parse_args()
    programs = {"nvcc": shutil.which("nvcc"), "cuobjdump": find_cuobjdump()}
    if missing := [name for name, path in programs.items() if path is None]:
        raise SystemExit(
            f"[cuda-budgets] error: {' and '.join(missing)} not found: install the CUDA toolkit."
        )
    start = time.monotonic()
    build(FOLDER, "_cuda", AAJR_CUDA="ON", AAJR_WERROR="ON", CMAKE_BUILD_TYPE="Release")
    kernels = usage(FOLDER / f"_cuda{SUFFIX}")
    processors = {p for row in kernels.values() for p in row}
    print(f"{len(kernels)} kernels for {len(processors)} processors, {time.monotonic() - start:.0f} s")
    release = re.search(r"release (\d+\.\d+)", run("nvcc", "--version"))
    assert release is not None
    if options.write:
        registers = {kernel: {p: n[0] for p, n in sorted(row.items())} for kernel, row in kernels.items()}
        BUDGETS.write_text(json.dumps({"toolkit": release[1], "registers": registers}, indent=1) + "\n")
        between(PAGE, BEGIN, END, markdown(registers))
    known: dict[str, Any] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    # another toolkit has no budgets
    wrong = broken(kernels, known["registers"] if known.get("toolkit") == release[1] else None)
    print("\n".join(wrong) or "within the budgets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
