"""Folders that were made once: whole, or made anew."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from common.cache import MARK, cached, check_installed


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(range(64)))
    (folder / "config.json").write_text("{}")


def refuse(folder: Path) -> None:
    raise AssertionError("made again")


def test_it_is_made_once_and_anew_when_any_byte_changed(tmp_path):
    folder = cached(tmp_path / "a" / "model", fill)
    assert cached(folder, refuse) == folder
    for name in ("weights", "config.json"):
        content = (folder / name).read_bytes()
        for place in range(len(content)):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.warns(RuntimeWarning, match="is made anew: "):
                cached(folder, fill)
            assert (folder / "weights").read_bytes() == bytes(range(64))
    content = (folder / MARK).read_bytes()
    for place in range(len(content)):
        (folder / MARK).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with (
            warnings.catch_warnings()
        ):  # the checksums may be as they were: damage in the name of the mark's own
            warnings.simplefilter("ignore", RuntimeWarning)
            cached(folder, fill)
        assert (folder / "weights").read_bytes() == bytes(range(64))
        cached(folder, refuse)
    (folder / "weights").unlink()
    with pytest.warns(RuntimeWarning, match="weights does not have its checksum"):
        cached(folder, fill)
    (folder / MARK).write_bytes(b"")  # as earlier versions wrote it: made anew, and no damage
    (folder / "weights").write_bytes(b"")
    cached(folder, fill)
    assert (folder / "weights").read_bytes() == bytes(range(64))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_one_that_fails_is_not_there(tmp_path):
    def fails(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"model could not be written \(No space left"):
        cached(tmp_path / "model", fails)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_package_has_the_checksum_that_it_lists(tmp_path):
    file = Path(pytest.__file__)
    check_installed("pytest", file)
    with pytest.raises(ValueError, match="must list .*other with a checksum, got none"):
        check_installed("pytest", tmp_path / "other")


def test_a_changed_file_of_a_package_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "thing-1.dist-info"
    folder.mkdir()
    (tmp_path / "weights").write_bytes(b"changed")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
    (folder / "RECORD").write_text("weights,sha256=AAAA,7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="weights does not have the checksum of package thing"):
        check_installed("thing", tmp_path / "weights")
