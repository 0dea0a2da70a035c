"""Tries the faults of a room in a copy of the working tree."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from native_build import ROOT, SUFFIX, find

from mutation.rooms import Room
from mutation.sites import Site
from mutation.worker import ALREADY_RUN, PIPES

__all__ = ["Trial"]

#: a run with a fault may take so many times the processor's time of one without, and so many seconds more
PATIENCE, LEAST = 5, 20
#: the processor's seconds of tests, nearest first, that a fault has to survive
ENOUGH = 60
OPTIONS = "-q -s -x -p no:cacheprovider --no-header -o timeout=0".split()
CHOICE, WITH_SLOW = ("-m", "not slow and not gpu"), ("-m", "not gpu")


class _NoBuild(Exception):
    pass


class Worker:
    """A process of mutation/worker.py."""

    def __init__(self, command: list[str], root: Path, environment: dict[str, str]) -> None:
        (mine, its), (theirs, out) = os.pipe(), os.pipe()
        ends = {PIPES: f"{theirs},{its}"}
        output = root.with_name(f"{root.name}.worker")
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env=environment | ends,
                pass_fds=(theirs, its),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        os.close(theirs)
        os.close(its)
        self.requests, self.answers = os.fdopen(out, "w"), os.fdopen(mine)
        self.output = output
        self.ready = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(request), file=self.requests, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"error: the worker ended:\n{self.output.read_text(encoding='utf-8')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.requests.close()
        self.process.wait()
        self.answers.close()


class Trial:
    """The tests of a room, in its copy under build/mutation.

    Args:
        room: that the faults are of.
    """

    def __init__(self, room: Room) -> None:
        self.room, self.root = room, _copied(room)
        self.folder = self.root.with_name(f"{room.name}.run")
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{self.root}:{ROOT / 'scripts'}",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CMAKE_BUILD_PARALLEL_LEVEL": "1",
            **({"TRITON_INTERPRET": "1"} if room.name == "triton" else {}),  # before anything imports Triton
        }
        # faults may have one length, and come within one second: bytecode is checked by content
        compiled = "-m compileall -q --invalidation-mode checked-hash aajr_kernels".split()
        subprocess.run([sys.executable, *compiled], cwd=self.root, check=True)
        if room.module is not None:
            name = "AAJR_NATIVE_MODULE" if room.module == "_native" else "AAJR_CUDA_MODULE"
            self.environment[name] = str(self.root / "build" / f"{room.module}{SUFFIX}")
            if not self._built():
                raise SystemExit("error: the build fails without a fault.")
        self.collected = None
        if room.traced:
            command = [sys.executable, "-m", "pytest", "-p", "mutation.worker", *OPTIONS, *CHOICE]
            self.collected = Worker([*command, *room.traced], self.root, self.environment)
            self.traced = self._traced(self.collected)

    @functools.cached_property
    def fresh(self) -> Worker:
        """Of the tests that import the sources anew."""
        return Worker([sys.executable, "-m", "mutation.worker"], self.root, self.environment)

    def of(self, site: Site) -> dict[str, Any]:
        """The row of a fault: killed, survived, or invalid where it does not compile."""
        faulty = site.put(self.root)
        tests = self._near(site) if self.collected else self.room.tests(site.path)
        try:
            if site.path.endswith(".py"):
                compile(faulty, site.path, "exec")
            by = self._killer(site, faulty, tests)
            if not by and site.kind == "wrong count" and self.room.processes:
                tests = [next(test for part, test in self.room.processes if part in site.path)]
                by = self._killer(site, faulty, tests)
            state = "killed" if by else "survived"
        except (SyntaxError, _NoBuild):
            state, by = "invalid", "it does not compile"
        by = by or (f"{len(tests)} tests pass" if tests else "no test of the room calls it")
        return {"room": self.room.name, "fault": site.name, "line": site.line, "state": state, "by": by}

    def _killer(self, site: Site, faulty: str, tests: list[str]) -> str:
        """The test that fails with the fault, and passes without it after the same tests; "": none."""
        while tests and (failed := self._failed(site, faulty, tests)):
            if self._are_collected(tests):
                clean = self._failed_collected(tests[: tests.index(failed) + 1] if failed in tests else tests)
            else:
                clean = self._failed_fresh([failed] if "::" in failed else tests)
            if not clean:
                return failed
            print(f"without a fault there is {clean} too", file=sys.stderr)
            if failed not in tests:
                raise SystemExit(f"error: {site.path}: its tests fail without a fault.")
            tests = [test for test in tests if test != failed]
        return ""

    def _failed(self, site: Site, faulty: str, tests: list[str]) -> str:
        file = self.root / site.path
        source = file.read_text(encoding="utf-8")
        worker = self.collected if self._are_collected(tests) else None
        if worker is not None and self._called(site) not in worker.ready["imported"]:
            failed = self._failed_collected(tests, path=str(file), source=source, faulty=faulty)
            if failed != "already run":
                return failed
        with self._in_place(file, faulty):
            return self._failed_fresh(tests)

    def _are_collected(self, tests: list[str]) -> bool:
        return self.collected is not None and tests[0] in self.traced

    @contextlib.contextmanager
    def _in_place(self, file: Path, faulty: str) -> Iterator[None]:
        """The copy with the fault, compiled; then as it was, times of files too, so that nothing is compiled again."""
        build, kept = self.root / "build", self.root.with_name(f"{self.room.name}.kept")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        shutil.copy2(file, kept / "source")
        if self.room.module is not None:
            shutil.copytree(build, kept / "build")
        try:
            file.write_text(faulty, encoding="utf-8")
            if not self._built():
                raise _NoBuild
            yield
        finally:
            os.replace(kept / "source", file)
            if self.room.module is not None:
                shutil.rmtree(build)
                os.replace(kept / "build", build)

    def _failed_collected(self, tests: list[str], **fault: str) -> str:
        assert self.collected is not None
        limit = LEAST + PATIENCE * sum(self.traced[test][0] for test in tests)
        return self._failure(self.collected, limit, tests=tests, **fault)

    def _failed_fresh(self, tests: list[str]) -> str:
        starting = {test.split("::")[0] for _, test in self.room.processes}
        choice = WITH_SLOW if self.room.slow or tests[0].split("::")[0] in starting else CHOICE
        # pytest warns of what is imported before it
        quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
        named = ("-k", self.room.named) if self.room.named else ()
        arguments = [*OPTIONS, *choice, *named, *quiet, f"--basetemp={self.folder / 'base'}", *tests]
        return self._failure(self.fresh, self.room.limit, environment=self.environment, arguments=arguments)

    def _failure(self, worker: Worker, limit: float, **request: Any) -> str:
        """The first failing test, or the other end of the run; "": all pass."""
        status = worker.ask({**request, "folder": str(self.folder), "limit": limit})["status"]
        failed = self.folder / "failed"
        if failed.exists():
            return failed.read_text(encoding="utf-8").split("\n", 1)[0]
        if status in (0, ALREADY_RUN):
            return "already run" if status else ""
        if status < 0:
            ends = {
                signal.SIGXCPU: "time limit",
                signal.SIGKILL: "no end",
            }  # of the processor, and of the clock
            return ends.get(signal.Signals(-status), signal.Signals(-status).name)
        if status == 4:  # of pytest: a conftest.py cannot be imported
            return "import"
        output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"error: status {status}: {output[-3000:]}")

    def _built(self) -> bool:
        """Whether the compiled module of the room is one of the sources as they are."""
        if self.room.module is None:
            return True
        definitions = {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo",
            # a step beyond an array, which other memory may hide, ends the process
            "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -D_GLIBCXX_ASSERTIONS -fsanitize=bounds "
            "-fsanitize-undefined-trap-on-error",
            "AAJR_CUDA_HOST": "ON" if self.room.module == "_cuda_host" else "OFF",
            "AAJR_CUDA": "OFF",
            # a third of the files to compile, and of the tests
            "AAJR_AVX2_ONLY": "ON" if platform.machine() in ("x86_64", "AMD64") else "OFF",
        }
        code = (
            "import sys, pathlib; sys.path.insert(0, 'scripts'); from native_build import build; "
            f"build(pathlib.Path('build').resolve(), {self.room.module!r}, **{definitions!r})"
        )
        command = [sys.executable, "-c", code]
        if (self.root / "build" / "build.ninja").exists():
            command = [str(find("cmake")), "--build", "build", "--target", self.room.module]
        output = self.root.with_name(f"{self.root.name}.build")
        with output.open("wb") as file:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return done.returncode == 0

    # -- which test calls which function -----------------------------------------------------------------------------

    def _traced(self, worker: Worker) -> dict[str, list[Any]]:
        """Test -> its seconds and the functions it calls; tests of files that are as they were are not traced again."""
        file = self.root.with_name("calls.json")  # of all rooms
        package = _digest(sorted(self.root.glob("aajr_kernels/**/*.py")))
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if known.get("package") != package:
            known = {"package": package, "files": {}, "tests": {}}
        path_of = {test: test.split("::", 1)[0] for test in worker.ready["tests"]}
        files = {path: _digest([self.root / path]) for path in set(path_of.values())}
        is_old = {path: known["files"].get(path) == digest for path, digest in files.items()}
        if left := [test for test, path in path_of.items() if not is_old[path] or test not in known["tests"]]:
            trace = self.root.with_name("trace.json")
            if failed := self._failure(worker, 3600, tests=left, trace=str(trace)):
                raise SystemExit(
                    f"error: without a fault there is {failed}:\n{(self.folder / 'failed').read_text()}"
                )
            known["files"] |= files
            known["tests"] |= json.loads(trace.read_text(encoding="utf-8"))
            file.write_text(json.dumps(known), encoding="utf-8")
        return {test: known["tests"][test] for test in path_of}

    def _called(self, site: Site) -> str:
        return f"{site.path}:{site.function(self.root)}"

    def _near(self, site: Site) -> list[str]:
        """Tests that call the function at fault, or any of the module outside of one: those of its name first."""
        called = self._called(site)
        if called.endswith(":0"):
            reach = [
                test
                for test, (_, calls) in self.traced.items()
                if any(c.startswith(called[:-1]) for c in calls)
            ]
        else:
            reach = [test for test, (_, calls) in self.traced.items() if called in calls]
        own = f"test_{Path(site.path).stem}.py::"
        nearest, spent = [], 0.0
        for test in sorted(reach, key=lambda test: (own not in test, self.traced[test][0])):
            nearest.append(test)
            spent += self.traced[test][0]
            if spent > ENOUGH:
                break
        return nearest


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _copied(room: Room) -> Path:
    """A copy of the working tree for the room, with its compiled modules."""
    copy = ROOT / "build" / "mutation" / room.name
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True
    ).stdout.splitlines()
    modules = [p for p in (ROOT / "aajr_kernels").glob("_*") if p.suffix in (".so", ".json")]
    for path in [*listed, *(str(module.relative_to(ROOT)) for module in modules)]:
        source, target = ROOT / path, copy / path
        if source.is_file() and (not target.is_file() or target.read_bytes() != source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return copy
