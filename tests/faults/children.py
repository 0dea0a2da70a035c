"""Work in forks of the test that die or fail at a chosen point, and are gone afterwards whatever happened."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

import aajr_kernels

#: what Python says before it touches a file
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
PACKAGE = str(Path(aajr_kernels.__file__).parent)
DIED = 37


class Child:
    """A fork that does `work`; exit status 0, 1 after an OSError, 2 after another error."""

    def __init__(self, work: Callable[[], object]) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code, said = 0, ""
            try:
                warnings.simplefilter("ignore")
                torch.set_num_threads(
                    1
                )  # the threads of the parent are not in a fork, which would wait for them
                said = str(work())
            except OSError as error:
                code, said = 1, str(error)
            except BaseException as error:
                code, said = 2, f"{type(error).__name__}: {error}"
            sys.setprofile(None)
            os.write(write_end, said.encode()[:60000])
            os._exit(code)
        os.close(write_end)
        self._pipe = os.fdopen(read_end, "rb")

    def result(self, limit: float = 120.0) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it) and what it returned or said.

        Raises:
            TimeoutError: it went on for longer than `limit` seconds, and was ended.
        """
        with self._pipe as pipe:
            is_over, said = bool(select.select([pipe], [], [], limit)[0]), b""
            if not is_over:
                os.kill(self.pid, signal.SIGKILL)
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if not is_over:
            raise TimeoutError(f"a process went on for {limit} s after the fault: {said.decode()}")
        return code, said.decode()

    def stop(self) -> None:
        """End it if it is there."""
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._pipe.close()


def in_a_child(work: Callable[[], object]) -> tuple[int, str]:
    """:meth:`Child.result` of one."""
    return Child(work).result()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system ends writes at so many bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Points:
    """Counts the points a process passes, and acts at one of them.

    Args:
        number: of the point at which to act, from 1; 0 for none.
        act: what happens there.
    """

    def __init__(self, number: int = 0, act: Callable[[], object] = lambda: os._exit(DIED)) -> None:
        self.number, self.act, self.passed = number, act, 0

    def _reach(self) -> None:
        self.passed += 1
        if self.passed == self.number:
            self.act()

    def operations(self, out: Path) -> Points:
        """On the files of a folder."""
        return self._audited(out, OPERATIONS)

    def failing_operations(self, out: Path) -> Points:
        """On the files of a folder, but for the beginning of a removal, at which nothing is done that can fail."""
        return self._audited(out, OPERATIONS - {"shutil.rmtree"})

    def renames(self, out: Path) -> Points:
        """Of what was written, into its place."""
        return self._audited(out, {"os.rename"})

    def _audited(self, out: Path, events: set[str]) -> Points:
        def hook(event: str, arguments: tuple) -> None:
            if event in events and arguments and str(arguments[0]).startswith(str(out)):
                self._reach()

        sys.addaudithook(hook)
        return self

    def calls(self) -> Points:
        """Of functions of the package."""

        def hook(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                self._reach()

        sys.setprofile(hook)
        return self
