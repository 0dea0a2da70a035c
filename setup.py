"""Build of the optional native CPU module; everything else is declared in pyproject.toml.

`aajr_kernels._native` is built through CMake and Ninja when csrc/bindings.cpp is there and a C++ compiler is found.
Otherwise the package installs as pure Python. Either way aajr_kernels/_build_info.json records what happened, for
`aajr info` and for error messages. AAJR_NATIVE=0 skips the native module, AAJR_NATIVE=1 makes its absence an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WISH = os.environ.get("AAJR_NATIVE", "auto")


def find_compiler() -> str | None:
    """Path of the C++ compiler CMake would take: $CXX, else the usual names."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    return next((path for name in names if (path := shutil.which(name))), None)


def why_not_native() -> str | None:
    """One sentence saying why the native module is left out, or None when it can be built."""
    if WISH == "0":
        return "it was left out at installation (AAJR_NATIVE=0)"
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return "this source tree holds no native sources (csrc/bindings.cpp)"
    if find_compiler() is None:
        return "no C++ compiler was found at installation: install g++ or clang++ and reinstall the package"
    return None


REASON = why_not_native()
if REASON is not None and WISH == "1":
    raise SystemExit(f"AAJR_NATIVE=1 asks for the native module, but {REASON}.")


def write_build_info(package_dir: str, **entries: Any) -> None:
    """Record how the installation was built, beside the package's modules."""
    path = Path(package_dir) / "_build_info.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"python": sys.version.split()[0], **entries}, indent=1) + "\n")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        target = ROOT if self.editable_mode else Path(self.build_lib)
        write_build_info(str(target / "aajr_kernels"), native=False, reason=REASON or "it was not built")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source_dir = Path(self.get_finalized_command("build_py").get_package_dir("aajr_kernels"))
        target = ROOT / source_dir if self.editable_mode else Path(self.build_lib) / "aajr_kernels"
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        compiler = find_compiler()
        try:
            self._cmake(library)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"its compilation with {compiler} failed ({error})"
            write_build_info(str(target), native=False, reason=reason, compiler=compiler)
            if WISH == "1":
                raise SystemExit(f"The native module was asked for (AAJR_NATIVE=1), but {reason}.") from error
            raise CompileError(reason) from error
        write_build_info(str(target), native=True, reason=None, compiler=compiler)

    def _cmake(self, library: Path) -> None:
        import pybind11  # a build requirement, see setup_requires below

        build = Path(self.build_temp).resolve()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("AAJR_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    # optional: a failed compilation leaves a working package on the reference backend and a recorded reason
    ext_modules=[] if REASON else [Extension("aajr_kernels._native", [], optional=True)],
    # read by the isolated build as its further requirements; a pure-Python build needs none of them
    setup_requires=[] if REASON else ["pybind11>=2.13", "cmake>=3.24", "ninja"],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
