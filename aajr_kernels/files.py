"""Files of a run: written whole or not at all, rows with checksums, and errors that name the file.

Rows are JSON lines. Each ends with its own ``crc32``, over the JSON of the row without it, so that a changed digit is
seen as well as a lost bracket. Files from before have none in any line, and are read as they are.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "append_rows",
    "flush",
    "markdown",
    "one_line",
    "parsed",
    "read_object",
    "read_rows",
    "replace",
    "row_line",
    "sealed",
    "unsealed",
    "write_text",
    "writing",
]

#: name of the checksum in a row
SEAL = "crc32"
#: bytes of the end of a row from the name of its checksum on
_LONGEST_SEAL = 32


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system inside become one sentence that names `path`; their types and numbers stay.

    Raises:
        OSError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        sentence = (
            f"{path} could not be written ({reason}). Files from before are intact: make room, or give a folder that "
            "can be written, and call again."
        )
        raise (OSError(sentence) if error.errno is None else OSError(error.errno, sentence)) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Put what `write` makes in the place of `path`, in one step; a failure or a crash leaves the file as it was.

    Raises:
        OSError: it could not be written.
    """
    made = path.with_name(f".writing-{path.name}")  # its ending tells writers the format
    with writing(path):
        try:
            write(made)
            flush(made)
            os.replace(made, path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """The text of a file, as :func:`replace`."""
    replace(path, lambda made: made.write_bytes(text.encode("utf-8")))


def flush(path: Path) -> None:
    """To the disk; folders too, where the system knows that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(text: str) -> str:
    """Text of somebody else for a line: without line breaks and what a terminal obeys."""
    return "".join(mark if mark.isprintable() else "\ufffd" for mark in " ".join(text.split()))


def markdown(text: str) -> str:
    """Text of somebody else for a Markdown page: one line without what makes a link, HTML or a cell of a table."""
    escaped = html.escape(one_line(text), quote=False)
    return escaped.translate({ord(mark): f"&#{ord(mark)};" for mark in "[]|`*\\"})


# -- rows -----------------------------------------------------------------------------------------------------------


def sealed(row: Mapping[str, Any], allow_nan: bool = False) -> str:
    """A row as JSON with its checksum, on one line."""
    text = json.dumps(row, allow_nan=allow_nan)
    return f'{text[:-1]}{", " if row else ""}"{SEAL}": {zlib.crc32(text.encode())}}}'


def parsed(text: str) -> dict[str, Any]:
    """A JSON object, with its checksum where it has one.

    Raises:
        ValueError: the text is none.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("brackets in brackets, too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, got {type(value).__name__}")
    return value


def unsealed(row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A row that was read, without its checksum, and whether it had one.

    Raises:
        ValueError: it has another one.
    """
    if not row:
        return {}, False
    *names, last = row
    bare = {name: row[name] for name in names}
    if type(row[last]) is int and row[last] == zlib.crc32(json.dumps(bare).encode()):
        return bare, True  # also where the damage is in the name of the checksum
    if SEAL in row:
        raise ValueError("an object that does not have its checksum")
    return dict(row), False


def read_object(path: Path) -> dict[str, Any]:
    """A file with one object, as it was :func:`sealed`; or without a checksum, as earlier versions wrote it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        return unsealed(parsed(path.read_text(encoding="utf-8")))[0]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): put a copy back, or go on from another checkpoint."
        ) from None


def row_line(row: Mapping[str, Any]) -> str:
    """A line for a file that is written anew."""
    return sealed(row) + "\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made if there is none. If that fails, the file is as before.

    Raises:
        OSError: they could not be written.
        ValueError: a number is NaN or infinite.
    """
    with writing(path), path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _LONGEST_SEAL))
        mark = f'"{SEAL}":'.encode()
        # the last line or the first: one of them may be damaged
        is_sealed = not end or mark in file.read() or mark in _first_line(path)
        content = "".join(
            row_line(row) if is_sealed else json.dumps(row, allow_nan=False) + "\n" for row in rows
        ).encode()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a line that a crash tore
                content = b"\n" + content
        try:
            while content:
                content = content[file.write(content) :]
        except BaseException:
            file.truncate(end)
            raise


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def read_rows(
    path: Path, fields: Mapping[str, type], skip: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file that have these fields, and a sentence on each line that is none.

    A last line that a crash tore is left out without a word.

    Args:
        path: of the file.
        fields: names that a row must have, and the types of their values.
        skip: lines at the start that are no rows.

    Raises:
        FileNotFoundError: there is no such file.
    """
    *whole, torn = path.read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    reasons: dict[int, str] = {}
    bare: set[int] = set()
    any_sealed = False
    for number, line in enumerate([*whole, torn], start=1):
        if number <= skip or not line.strip():
            continue
        try:
            row = _object(line, fields)
            rows[number], fits = unsealed(row)
            any_sealed |= SEAL in row
            if not fits:
                bare.add(number)
        except ValueError as error:
            if number <= len(whole) or _ends_in_something_else(line):
                reasons[number] = str(error)
    if any_sealed:  # then all lines were written with one
        for number in bare:
            del rows[number]
            reasons[number] = "an object without its checksum"
    sentences = [
        f"{path.name}, line {number} is no row and was left out: {reason}."
        for number, reason in sorted(reasons.items())
    ]
    return [rows[number] for number in sorted(rows)], sentences


def _object(line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    row = parsed(line.decode("utf-8"))
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise ValueError(f"an object without {name!r} ({kind.__name__})")
    return row


def _ends_in_something_else(line: bytes) -> bool:
    """Whether a line without an end is more than the beginning of a row: a row, and damage behind it."""
    try:
        _, end = json.JSONDecoder().raw_decode(line.decode("utf-8", errors="replace"))
    except ValueError:
        return False
    return end < len(line)
