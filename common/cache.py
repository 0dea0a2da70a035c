"""Folders of files that were computed or converted once: used again while they are as they were made."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from aajr_kernels.files import flush, read_object, sealed, writing

#: the file with the checksums of the others
MARK = "complete"


def cached(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, filled by `make` unless it is there and whole; one that is damaged is made anew, with a warning.

    Args:
        folder: its place.
        make: writes files, without folders, into an empty folder.

    Raises:
        OSError: it could not be written; no folder is there then.
    """
    if folder.exists():
        reason = _damage(folder)
        if reason is None:
            return folder
        if reason:
            warnings.warn(f"{folder} is made anew: {reason}.", RuntimeWarning, stacklevel=2)
    made = folder.with_name(f".writing-{os.getpid()}-{folder.name}")
    with writing(folder):
        try:
            made.mkdir(parents=True)
            make(made)
            facts = {path.name: _facts(path) for path in sorted(made.iterdir())}
            (made / MARK).write_text(sealed(facts), encoding="utf-8")
            for path in (*made.iterdir(), made):
                flush(path)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _damage(folder: Path) -> str | None:
    """Why it cannot be used; empty where an earlier version made it, without checksums; None: it can be used."""
    try:
        if not (folder / MARK).read_bytes():
            return ""
        facts = read_object(folder / MARK)
    except (OSError, ValueError) as error:
        return f"its file {MARK} cannot be read ({error})"
    for name, expected in facts.items():
        path = folder / name
        if not path.is_file() or _facts(path) != expected:
            return f"{name} does not have its checksum"
    return None


def _facts(path: Path) -> list[int]:
    """Bytes and checksum."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return [path.stat().st_size, value]


def check_installed(package: str, file: Path) -> None:
    """Compare a file of an installed package with the SHA-256 that the package lists for it.

    Args:
        package: its name in the registry.
        file: of it.

    Raises:
        ValueError: it differs, or the package does not list it.
    """
    for listed in importlib.metadata.files(package) or ():
        if listed.hash is not None and Path(str(listed.locate())).resolve() == file.resolve():
            digest = sha256()
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
            if base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode() == listed.hash.value:
                return
            raise ValueError(
                f"{file} does not have the checksum of package {package}: pip install --force-reinstall --no-deps "
                f"{package} brings it again."
            )
    raise ValueError(f"package {package} must list {file} with a checksum, got none: install it with pip.")
