"""Resources of a compiled kernel, read from its machine code; no device is needed.

Registers, shared and tensor memory, matrix instructions, and spills: in the whole kernel, and in the innermost loops
that hold matrix instructions, where they cost time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backends.triton import loops
from triton import knobs
from triton.runtime.cache import get_cache_manager

#: kind of matrix instruction -> how the assembly language, PTX or AMD's, writes it; one for one in machine code
_KINDS = {
    "wgmma": re.compile(r"\bwgmma\.mma_async\b"),  # HGMMA: warpgroups, sm_90
    "mma": re.compile(r"\bmma\.sync\b"),  # HMMA: warps
    "tcgen05": re.compile(r"\btcgen05\.mma\b"),  # UTCHMMA: tensor memory, sm_100
    "mfma": re.compile(r"^\s+v_mfma"),  # AMD
}
_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b|^v_mfma")
_SPILLS = re.compile(r"\b(LDL|STL)\b|^scratch_(load|store)")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one kernel.

    Attributes:
        registers: per thread; on AMD vector registers, the accumulation registers included.
        stack: bytes of local memory per thread.
        spills: instructions that store to or load from it.
        hot_spills: those of them in the innermost loops with matrix instructions, in any loop where there are none.
        shared: bytes per program.
        columns: of tensor memory per program.
        matrix: matrix instructions by kind: "wgmma" (sm_90's), "mma", "tcgen05" (sm_100's), "mfma".
        serialized: the assembler waits after every warpgroup product.
        products: ``tl.dot`` in the kernel; small ones may become other instructions.
    """

    registers: int
    stack: int
    spills: int
    hot_spills: int
    shared: int
    columns: int = 0
    matrix: dict[str, int] = dataclasses.field(default_factory=dict)
    serialized: bool = False
    products: int = 0


def resources(kernel: Any) -> Resources:
    """The resources of a ``triton.compiler.CompiledKernel``, kept beside it in Triton's cache."""
    version = hashlib.sha256(Path(__file__).read_bytes() + Path(loops.__file__).read_bytes()).hexdigest()[:12]
    cache, name = get_cache_manager(kernel.hash), f"resources-{version}.json"
    known = cache.get_file(name)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text()))
    usage = _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)
    usage = dataclasses.replace(usage, products=kernel.asm["ttir"].count("tt.dot "))
    cache.put(json.dumps(dataclasses.asdict(usage)), name, binary=False)
    return usage


def _matrix(text: str) -> dict[str, int]:
    lines = text.splitlines()
    counts = {kind: sum(bool(pattern.search(line)) for line in lines) for kind, pattern in _KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _spills(text: str, dialect: loops.Dialect) -> tuple[int, int]:
    """Everywhere, and in the hot loops."""
    graph = loops.blocks(text, dialect)

    def count(lines: Iterable[str]) -> int:
        return sum(bool(_SPILLS.search(line)) for line in lines)

    every = (line for block in graph for line in block.instructions)
    return count(every), count(loops.hot(graph, lambda line: bool(_MATRIX.search(line))))


@functools.cache
def _path(tool: str) -> str:
    return str(getattr(knobs.nvidia, tool).path)  # a look-up that runs the tool to know its version


def machine_code(kernel: Any, tool: str = "nvdisasm", option: str = "-c") -> str:
    """Output of a tool for NVIDIA's binaries on a kernel; the disassembly, where none is named."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_path(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(kernel: Any) -> Resources:
    used = Counter(
        {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", machine_code(kernel, "cuobjdump", "-res-usage"))}
    )
    matrix = _matrix(kernel.asm["ptx"])
    stack = used["STACK"] + used["LOCAL"]
    # the disassembler takes half a second to start, and without a stack there is nothing to find
    spills, hot_spills = _spills(machine_code(kernel), loops.SASS) if stack else (0, 0)
    return Resources(
        registers=used["REG"],
        stack=stack,
        spills=spills,
        hot_spills=hot_spills,
        shared=kernel.metadata.shared,
        columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        matrix=matrix,
        serialized="wgmma" in matrix and "serialized" in _assembler_log(kernel),
    )


def _assembler_log(kernel: Any) -> str:
    """Messages of ptxas: kept by offline.py where it compiled the kernel; otherwise ptxas runs again."""
    log: str | None = getattr(kernel, "assembler_log", None)
    if log:
        return log
    text = kernel.asm["ptx"]
    (architecture,) = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        command = [_path("ptxas"), "-v", f"--gpu-name={architecture}", str(source)]
        command += ["-o", str(Path(folder, "kernel.cubin"))]
        command += [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _amd(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]
    said = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spills, hot_spills = _spills(text, loops.AMDGCN)
    return Resources(
        registers=said["vgpr_count"],
        stack=said["private_segment_fixed_size"],
        spills=spills,
        hot_spills=hot_spills,
        shared=kernel.metadata.shared,
        matrix=_matrix(text),
    )
