"""A process that has imported what the tests need, and forks for every fault.

Two kinds. As a plugin of pytest (``-p mutation.worker``) it has collected the tests: a child swaps the code of the
functions at fault and runs the tests that it is told. As a module (``python -m mutation.worker``) it has imported
torch only: a child imports the faulty sources, and runs pytest. Requests and answers are lines of JSON on two pipes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from mutation.swap import live, swap

#: numbers of the pipes' ends, with a comma between
PIPES = "AAJR_MUTATION_PIPES"
#: a child's exit status where the fault is in a statement that has run already
ALREADY_RUN = 77
#: the processor's seconds that a test with a fault may take: without one they take a few
LONGEST = 30
#: seconds of a clock to a second of the processor that a child may take: others are at work too
WAITING = 20

Request = dict[str, Any]


def serve(run: Callable[[Request], int], **ready: object) -> None:
    """Answer every request by the end of a child, until the pipe is closed."""
    numbers = (int(number) for number in os.environ[PIPES].split(","))
    with os.fdopen(next(numbers)) as requests, os.fdopen(next(numbers), "w") as answers:
        print(json.dumps(ready), file=answers, flush=True)
        for line in requests:
            request = json.loads(line)
            print(json.dumps({"status": _in_a_child(run, request)}), file=answers, flush=True)


def _in_a_child(run: Callable[[Request], int], request: Request) -> int:
    """Exit status; of a child beyond its time or ended by a signal, the signal's number with a minus."""
    folder = Path(request["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            limit = math.ceil(request["limit"])
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["TMPDIR"] = str(folder)
            status = run(request)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + WAITING * request["limit"]
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it left behind
    if not done:
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


class FirstFailure:
    """Ends the process at the first failure, and leaves the test's name in the folder of the request.

    Args:
        folder: of the request.
        longest: the processor's seconds after which a test is taken for one without end.
    """

    def __init__(self, folder: str, longest: float = math.inf) -> None:
        self.file, self.longest = Path(folder) / "failed", longest

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        _, last = resource.getrlimit(resource.RLIMIT_CPU)
        end = min(spent.ru_utime + spent.ru_stime + self.longest, last - 10)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(end), last))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._end(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._end(report)

    def _end(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.file.write_text(f"{report.nodeid}\n{report.longreprtext}")
            os._exit(1)


# -- the plugin -------------------------------------------------------------------------------------------------------


class Calls:
    """Functions of the sources that were called, as `path:first line`."""

    def __init__(self, root: Path, package: str) -> None:
        self.start, self.package = f"{root}/", f"{root}/{package}/"
        self.codes: set[CodeType] = set()

    def __enter__(self) -> Calls:
        threading.settrace(self._call)
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)

    def _call(self, frame: Any, event: str, argument: object) -> None:
        self.codes.add(frame.f_code)

    def names(self) -> list[str]:
        own = [code for code in self.codes if code.co_filename.startswith(self.package)]
        return sorted(f"{code.co_filename[len(self.start) :]}:{code.co_firstlineno}" for code in own)


_at_import: Calls | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _at_import
    _at_import = Calls(config.rootpath, "aajr_kernels").__enter__()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    assert _at_import is not None
    _at_import.__exit__()
    items = {item.nodeid: item for item in session.items}
    functions = live(_at_import.package)
    gc.collect()
    gc.freeze()  # children share the memory of what is there

    def run(request: Request) -> int:
        session.config.option.basetemp = str(Path(request["folder"]) / "base")
        tests = [items[name] for name in request["tests"]]
        if "trace" in request:
            return _trace(tests, request)
        if "path" in request and not swap(
            functions, *(request[part] for part in ("source", "faulty", "path"))
        ):
            return ALREADY_RUN
        session.config.pluginmanager.register(FirstFailure(request["folder"], LONGEST))
        return _run(tests)

    serve(run, tests=list(items), imported=_at_import.names())
    os._exit(0)


def _run(items: list[pytest.Item]) -> int:
    for item, following in zip(items, [*items[1:], None]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return 0


def _trace(items: list[pytest.Item], request: Request) -> int:
    """Write how long each test takes, and which functions it calls."""
    items[0].config.pluginmanager.register(FirstFailure(request["folder"]))
    tests: dict[str, Any] = {}
    for item, following in zip(items, [*items[1:], None]):
        start = time.process_time()
        with Calls(item.config.rootpath, "aajr_kernels") as calls:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        tests[item.nodeid] = [time.process_time() - start, calls.names()]
    Path(request["trace"]).write_text(json.dumps(tests))
    return 0


# -- the module -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Imports what the faulty sources and the tests import, beside themselves."""
    for name in ("torch._dynamo", "transformers"):
        importlib.import_module(name)

    def run(request: Request) -> int:
        os.environ.update(request["environment"])
        return pytest.main(request["arguments"], plugins=[FirstFailure(request["folder"], LONGEST)])

    serve(run)


if __name__ == "__main__":
    main()
