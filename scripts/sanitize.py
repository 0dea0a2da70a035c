"""Build the native module, and the CUDA kernels for the CPU, with sanitizers, and run the kernel tests with them.

AddressSanitizer and UndefinedBehaviourSanitizer look on:

    python scripts/sanitize.py [--jobs N] [pytest arguments]
    python scripts/sanitize.py --minutes 30    # changed arguments of the entries, for that long
    python scripts/sanitize.py --races         # instead ThreadSanitizer over the self-test, without Python

The modules go to build/sanitize and do not touch the installed ones. The sanitizer's library has to be loaded before
Python itself, so the tests run under LD_PRELOAD; leaks are not looked for, because the interpreter keeps memory until
it ends. Any report ends the test process. Linux, with g++ or clang++.

ThreadSanitizer must have compiled all code whose threads share memory; the OpenMP library, Python and torch are not. So
it looks at the program aajr_selftest (csrc/tests) in a build whose kernels start their own threads: several threads
call every kernel at once, and each call shares its work among threads.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from native_build import ROOT, SUFFIX, build, find, run

sys.path.insert(0, str(ROOT))

from common.trust import count

FOLDER = ROOT / "build" / "sanitize"
FUZZ = "tests/backends/test_argument_fuzz.py"
TESTS = [
    "tests/backends/cpu",
    "tests/backends/test_cuda.py",
    "tests/backends/test_entries.py",
    FUZZ,
    "tests/ops",
]
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "AAJR_NATIVE_MODULE": str(FOLDER / f"_native{SUFFIX}"),
    "AAJR_CUDA_MODULE": str(FOLDER / f"_cuda_host{SUFFIX}"),
}
DEFINITIONS = {
    # without optimisation the vector code would be too slow to test, with all of it too slow to compile
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1",
    "AAJR_SANITIZE": "address,undefined",
    "AAJR_EMULATED": "ON",
    "AAJR_CUDA_HOST": "ON",
}

CALLERS, THREADS = 4, 3


def races() -> int:
    """Build the self-test with ThreadSanitizer and run it; the exit status."""
    folder = ROOT / "build" / "thread"
    definitions = {**DEFINITIONS, "AAJR_SANITIZE": "thread", "AAJR_OPENMP": "OFF", "AAJR_SELFTEST": "ON"}
    build(folder, "aajr_selftest", **{**definitions, "AAJR_CUDA_HOST": "OFF"})
    command = [str(folder / "aajr_selftest"), "--callers", str(CALLERS), "--threads", str(THREADS)]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    print(done.stdout, end="")
    if done.returncode == 0:
        problems = sum(line.startswith("pass ") for line in done.stdout.splitlines())
        count("races", callers=CALLERS, threads_each=THREADS, problems=problems, reports=0)
    return done.returncode


def library(compiler: str, *names: str) -> str:
    """Path of the first of these libraries that the compiler knows."""
    for name in names:
        path = Path(run(compiler, f"-print-file-name={name}").strip())
        if path.is_absolute():
            return str(path.resolve())
    raise SystemExit(f"[sanitize] error: the compiler has no {names[0]}.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", default="1", help="test processes")
    parser.add_argument("--minutes", default="0", help=f"run {FUZZ} for so many minutes instead")
    parser.add_argument("--races", action="store_true", help="run the self-test under ThreadSanitizer")
    parser.add_argument("tests", nargs="*", help=f"pytest arguments instead of {' '.join(TESTS)}")
    options, rest = parser.parse_known_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("[sanitize] error: the sanitizers are set up for Linux only.")
    compiler = next(
        (
            path
            for name in (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")
            if (path := find(name))
        ),
        None,
    )
    if compiler is None:
        raise SystemExit("[sanitize] error: no C++ compiler was found: install g++ or clang++.")
    if options.races:
        return races()
    build(FOLDER, **DEFINITIONS)
    # AddressSanitizer, and the C++ library whose exceptions it has to find when it starts
    address = library(compiler, "libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan.so")
    preloaded = f"{address} {library(compiler, 'libstdc++.so.6', 'libstdc++.so')}"
    tests = options.tests or ([FUZZ] if float(options.minutes) else TESTS)
    workers = ["-n", options.jobs] if options.jobs != "1" else []
    # a report goes to the terminal, also from a process that it ends; the limit is for tests without sanitizers
    settings = ["-q", "-p", "no:cacheprovider", "-o", "timeout=1800", "--capture=sys"]
    arguments = [*settings, "-m", "not slow and not gpu", *workers]
    command = [sys.executable, "-m", "pytest", *arguments, *tests, *rest]
    environment = {
        **os.environ,
        **SETTINGS,
        "LD_PRELOAD": preloaded,
        "AAJR_FUZZ_MINUTES": options.minutes,
    }
    results, begin = FOLDER / "results.xml", time.monotonic()
    status = subprocess.run(
        [*command, f"--junitxml={results}"], cwd=ROOT, env=environment, check=False
    ).returncode
    if status == 0:
        (suite,) = ElementTree.parse(results).getroot()
        passed = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
        count(
            "sanitized", minutes=math.floor((time.monotonic() - begin) / 60), tests_passed=passed, reports=0
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
