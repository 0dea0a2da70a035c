"""Build of the optional compiled modules; everything else is declared in pyproject.toml.

`aajr_kernels._native` is built through CMake and Ninja when its sources and a C++ compiler are there. Otherwise, or
when the compilation fails, the package installs as pure Python and runs on the reference backend. Either way
aajr_kernels/_build_info.json records what happened, for `aajr info` and for error messages.

`aajr_kernels._cuda` is built beside it where there is a CUDA compiler; no device is looked for, and without the module
everything else works.

AAJR_NATIVE=0 skips the compiled modules, AAJR_NATIVE=1 makes the absence of the native one an error. AAJR_CUDA=OFF
skips the CUDA module, AAJR_CUDA=ON makes its absence an error; AUTO leaves it out beside a torch that is built without
CUDA. AAJR_CUDA_ARCHITECTURES names its processors ("90-real;120"; "present": those of this machine, the default of an
editable install). AAJR_CMAKE_ARGS adds options for CMake, CXX names
the compiler, CMAKE_BUILD_PARALLEL_LEVEL the number of jobs (two otherwise).

Wheels are reproducible: with one SOURCE_DATE_EPOCH (`make dist` takes the time of the commit), one compiler and one
Python, two builds are equal byte by byte, whatever folder, time and umask they have.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("AAJR_NATIVE", "auto")
CUDA = os.environ.get("AAJR_CUDA", "AUTO").upper()
CMAKE = (3, 24)
# an editable install keeps this folder, so that the next one compiles only what changed
EDITABLE_BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def find(name: str) -> str | None:
    """Path of an executable: of this Python environment, activated or not, or from PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_compiler() -> str | None:
    """Path of the C++ compiler CMake would take: $CXX, else the usual names."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def why_not_native() -> str | None:
    """One sentence saying why the native module is left out, or None when it can be built."""
    if NATIVE == "0":
        return "it was left out at installation (AAJR_NATIVE=0)"
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return "this source tree holds no native sources (csrc/bindings.cpp)"
    if os.name == "nt":
        return "its kernels use the vector types of g++ and clang++, which the Windows compiler does not have"
    if find_compiler() is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named} was not found" if named else "no C++ compiler was found"
        return f"{missing} at installation: install g++ or clang++ and reinstall the package"
    return None


REASON = why_not_native()
if REASON is not None and NATIVE == "1":
    raise SystemExit(f"AAJR_NATIVE=1 asks for the native module, but {REASON}.")


def why_not_cuda() -> str | None:
    """One sentence saying why AUTO does not even look for a CUDA compiler; the rest is for CMake to say."""
    if CUDA != "AUTO":
        return None
    # read and not imported: a torch that cannot be loaded must not end an installation
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if version is None or not version.exists():  # an isolated build: it may be any
        return None
    facts = runpy.run_path(str(version))
    if facts.get("cuda", "") is not None:
        return None
    return f"torch {facts['__version__']} is built without CUDA (AAJR_CUDA=ON builds it all the same)"


if CUDA not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"AAJR_CUDA={CUDA} is unknown: choose AUTO, ON or OFF.")
if CUDA == "ON" and REASON is not None:
    raise SystemExit(f"AAJR_CUDA=ON asks for the CUDA module, but nothing is compiled: {REASON}.")


def build_requirements() -> list[str]:
    """Requirements of an isolated build beside setuptools; tools that this machine has are not downloaded."""
    missing = []
    for tool, minimum, requirement in (("cmake", CMAKE, "cmake>=3.24"), ("ninja", (1, 10), "ninja>=1.10")):
        try:
            answer = subprocess.run(
                [find(tool) or tool, "--version"], capture_output=True, text=True, check=True
            )
            version = re.search(r"(\d+)\.(\d+)", answer.stdout)
            new_enough = version is not None and (int(version[1]), int(version[2])) >= minimum
        except (OSError, subprocess.CalledProcessError):
            new_enough = False
        if not new_enough:
            missing.append(requirement)
    return ["pybind11>=2.13", *missing]


def write_build_info(package: Path, **entries: Any) -> None:
    """Record how the installation was built, beside the package's modules."""
    package.mkdir(parents=True, exist_ok=True)
    facts = {"python": sys.version.split()[0], **entries}
    (package / "_build_info.json").write_text(json.dumps(facts, indent=1) + "\n")


def file_of(module: str) -> str:
    return f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def remove_module(package: Path, module: str = "_native") -> None:
    """Delete the module that an earlier build left in a source tree: it would be older than its Python side."""
    (package / file_of(module)).unlink(missing_ok=True)


def put_in_place(built: Path, library: Path) -> None:
    """A new file, never new contents in one that a running process has mapped."""
    library.parent.mkdir(parents=True, exist_ok=True)
    library.unlink(missing_ok=True)
    shutil.copy2(built, library)


def first_error(output: str) -> str:
    """The line of a failed build that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[i + 1 : i + 4])[:300]
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return line[:300]
    return lines[-1][:300] if lines else "it printed nothing"


class BuildFailed(Exception):
    """A step of the native build ended with an error; the message is one line."""


def run(*command: str) -> None:
    """Run a step of the build, its output passed on."""
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be started ({error})") from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise BuildFailed(first_error(done.stdout))


@contextlib.contextmanager
def timed(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    """Add to `seconds` what a part of the build takes: on the wall clock, and on all processors together."""
    import resource  # Unix, as every build is

    def now() -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"wall": time.monotonic(), "processor": used.ru_utime + used.ru_stime}

    start = now()
    yield
    spent = seconds.setdefault(part, dict.fromkeys(start, 0.0))
    for clock, end in now().items():
        spent[clock] = round(spent[clock] + end - start[clock], 1)


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "aajr_kernels"
        if self.editable_mode and REASON:
            for module in ("_native", "_cuda"):
                remove_module(package, module)
        write_build_info(package, native=False, reason=REASON or "it was not built")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "aajr_kernels"
        compiler = find_compiler()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        remove_module(package, "_cuda")
        self.seconds: dict[str, dict[str, float]] = {}
        try:
            with timed(self.seconds, "native"):
                build = self._configure()
                self._build(build, "_native", library)
        except BuildFailed as error:
            reason = f"its compilation with {compiler} failed: {error}"
            remove_module(package)
            write_build_info(package, native=False, reason=reason, compiler=compiler)
            if NATIVE == "1":
                raise SystemExit(f"The native module was asked for (AAJR_NATIVE=1), but {reason}") from error
            if CUDA == "ON":
                raise SystemExit(f"The CUDA module was asked for (AAJR_CUDA=ON), but {error}") from error
            raise CompileError(reason) from error
        cuda = self._cuda(build, package)
        # times differ between builds of one wheel, and say nothing to who installs it
        times = {"seconds": self.seconds} if self.editable_mode else {}
        write_build_info(package, native=True, reason=None, compiler=compiler, **cuda, **times)

    def _cuda(self, build: Path, package: Path) -> dict[str, Any]:
        """Build the CUDA module if CMake found its requirements; returns the result for the record.

        It is no Extension of its own, so that setuptools does not copy it from a temporary folder.
        """
        try:
            record: dict[str, Any] = json.loads((build / "cuda.json").read_text())
        except OSError:
            record = {"cuda": False, "cuda_reason": "this source tree holds no CUDA sources (csrc/cuda)"}
        if not record["cuda"]:
            return {"cuda": False, "cuda_reason": why_not_cuda() or record["cuda_reason"]}
        try:
            with timed(self.seconds, "cuda"):
                self._build(build, "_cuda", package.resolve() / file_of("_cuda"))
        except BuildFailed as error:
            reason = f"its compilation failed: {error}"
            if CUDA == "ON":
                raise SystemExit(f"The CUDA module was asked for (AAJR_CUDA=ON), but {reason}") from error
            return {"cuda": False, "cuda_reason": reason}
        return record

    def _build(self, build: Path, target: str, library: Path) -> None:
        run(find("cmake") or "cmake", "--build", str(build), "--target", target)
        put_in_place(build / "out" / library.name, library)

    def _configure(self) -> Path:
        """The build folder."""
        try:
            import pybind11
        except ImportError as error:
            raise BuildFailed("pybind11 is not installed: pip install 'pybind11>=2.13'") from error
        build = EDITABLE_BUILD if self.editable_mode else Path(self.build_temp).resolve()
        default = "present" if self.editable_mode else ""
        architectures = os.environ.get("AAJR_CUDA_ARCHITECTURES", default)
        run(
            *(find("cmake") or "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find('ninja') or 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            # constant, or every build would link again
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # written out, because the folder remembers what an earlier build was given
            *("-DAAJR_OPENMP=ON", "-DAAJR_EMULATED=OFF", "-DAAJR_SANITIZE=", "-DAAJR_CUDA_HOST=OFF"),
            f"-DAAJR_CUDA={'OFF' if why_not_cuda() else CUDA}",
            f"-DAAJR_CUDA_ARCHITECTURES={architectures}",
            *os.environ.get("AAJR_CMAKE_ARGS", "").split(),
        )
        return build


class Wheel(bdist_wheel):
    def write_wheelfile(self, wheelfile_base: str, *arguments: Any, **options: Any) -> None:
        """Also give every file of the wheel one of two modes: those of the source tree depend on a umask."""
        super().write_wheelfile(wheelfile_base, *arguments, **options)
        for path in Path(wheelfile_base).parent.rglob("*"):
            if path.is_file():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


setup(
    # optional: a failed compilation leaves a working package on the reference backend and a recorded reason
    ext_modules=[] if REASON else [Extension("aajr_kernels._native", [], optional=True)],
    # read by the isolated build as its further requirements; a pure-Python build needs none of them
    setup_requires=[] if REASON else build_requirements(),
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
