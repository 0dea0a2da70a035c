"""Build the native module, and the CUDA kernels for the CPU, with sanitizers, and run the kernel tests with them.

AddressSanitizer and UndefinedBehaviourSanitizer look on:

    python scripts/sanitize.py [--jobs N] [pytest arguments]

The modules go to build/sanitize and leave the installed ones alone. The sanitizer's library has to be loaded before
Python itself, so the tests run under LD_PRELOAD; leaks are not looked for, because the interpreter keeps memory until
it ends. Any report ends the test process. Linux, with g++ or clang++.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
TESTS = ["tests/native", "tests/ops", "tests/test_native.py"]
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def fail(message: str) -> None:
    raise SystemExit(f"[sanitize] error: {message}")


def tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        fail(f"{name} was not found: run `make setup`, or install it.")
    return str(path)


def compiler() -> str:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        fail("no C++ compiler was found: install g++ or clang++.")
    return str(path)


def build() -> tuple[Path, Path]:
    """Compile what changed; the native module, and that of the CUDA kernels."""
    import pybind11

    configure = [
        *(tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        # without optimisation the vector code would be too slow to test, with all of it too slow to compile
        *("-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1"),
        *("-DAAJR_SANITIZE=address,undefined", "-DAAJR_EMULATED=ON", "-DAAJR_CUDA_HOST=ON"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    subprocess.run([tool("cmake"), "--build", str(BUILD)], check=True, env=environment)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return BUILD / f"_native{suffix}", BUILD / f"_cuda_host{suffix}"


def library(*names: str) -> str:
    """Path of the first of these libraries that the compiler knows."""
    for name in names:
        done = subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        if Path(done.stdout.strip()).is_absolute():
            return str(Path(done.stdout.strip()).resolve())
    fail(f"the compiler has no {names[0]}.")
    return ""


def preloaded() -> str:
    """AddressSanitizer, and the C++ library whose exceptions it has to find when it starts."""
    address = library("libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan.so")
    return f"{address} {library('libstdc++.so.6', 'libstdc++.so')}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", default="1", help="test processes")
    parser.add_argument("tests", nargs="*", help=f"pytest arguments instead of {' '.join(TESTS)}")
    options, rest = parser.parse_known_args()
    if not sys.platform.startswith("linux"):
        fail("the sanitizers are set up for Linux only.")
    try:
        native, cuda = build()
    except subprocess.CalledProcessError as error:
        fail(f"the build failed ({error}).")
    environment = {
        **os.environ,
        **SETTINGS,
        "LD_PRELOAD": preloaded(),
        "AAJR_NATIVE_MODULE": str(native),
        "AAJR_CUDA_MODULE": str(cuda),
    }
    workers = ["-n", options.jobs] if options.jobs != "1" else []
    # a report goes to the terminal, also from a process that it ends
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--capture=sys", *workers]
    command = [sys.executable, "-m", "pytest", *arguments, *(options.tests or TESTS), *rest]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
