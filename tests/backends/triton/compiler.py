"""A process that compiles configurations for processors that need not be there, and what asks it to.

Triton decides when it is imported whether its kernels are interpreted, which they are in the tests; compiling is
therefore done beside them. Questions and answers are lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]


class Compiler:
    """One process, started at the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            path = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
            environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "backends.triton.compiler"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        return self._process

    def ask(self, module: str, config: str, architecture: str) -> dict[str, dict[str, Any]]:
        """The resources of every kernel that a configuration launches, by the kernel's name.

        Args:
            module: has ``CONFIGS``, by name.
            config: a name in it.
            architecture: ``"sm_90"``, ``"gfx942"``...

        Raises:
            RuntimeError: the configuration cannot be compiled; with what the process said.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([module, config, architecture]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            self._said.seek(0)
            raise RuntimeError(
                f"the compiler ended with {status} on {config} for {architecture}:\n{self._said.read()[-4000:]}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{config} does not compile for {architecture}:\n{answer['error']}")
        return answer["kernels"]

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.communicate()
        self._said.close()


def _answer(module: str, config: str, architecture: str) -> dict[str, Any]:
    from backends.triton.offline import offline
    from backends.triton.resources import resources

    from aajr_kernels import use_backend

    try:
        with offline(architecture) as compiled, use_backend("triton"):
            importlib.import_module(module).CONFIGS[config].run()
        kernels: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for kernel in {kernel.hash: kernel for kernel in compiled}.values():
            seen[kernel.name] = seen.get(kernel.name, 0) + 1  # one kernel in several specialisations
            name = kernel.name if seen[kernel.name] == 1 else f"{kernel.name} {seen[kernel.name]}"
            kernels[name] = asdict(resources(kernel))
        return {"kernels": kernels}
    except Exception:  # whatever the compiler raises belongs to the answer
        return {"error": traceback.format_exc()[-4000:]}


def main() -> None:
    # answers go to the true standard output, what compilers print elsewhere
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
