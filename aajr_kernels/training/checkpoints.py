"""Checkpoints: one folder each, whole or not there.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed, which is one atomic operation; its
manifest has size and checksum of every file, and one of its own. Weights are in ``model.safetensors`` under the names
of the parameters, the tensors of optimizer and random generators in ``state.safetensors``, numbers in
``manifest.json``.
"""

from __future__ import annotations

import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import files
from .shards import spread
from .state import pack, unpack
from .wrappers import reshard

__all__ = ["Checkpoint", "Checkpoints", "load_checkpoint", "weights_of"]

#: 1 is as 2, without a checksum of the manifest
FORMAT, READABLE = 2, (1, 2)
MODEL, STATE, MANIFEST = "model.safetensors", "state.safetensors", "manifest.json"


class Damaged(Exception):
    """A checkpoint that cannot be used, and why."""


class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps it was written after.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            manifest = files.parsed((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest.get("format") not in READABLE:
                reads = " and ".join(map(str, READABLE))
                raise Damaged(f"its format is {manifest.get('format')}, this version reads {reads}")
            self._manifest, has_seal = files.unsealed(manifest)
            if self._manifest["format"] == FORMAT and not has_seal:
                raise ValueError("an object without its checksum")
            self.step = int(self._manifest["step"])
            facts = [(name, *_facts(self._manifest["files"][name])) for name in (MODEL, STATE)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
        for name, expected, checksum in facts:
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if size != expected:
                raise Damaged(f"{name} should have {expected} bytes and has {max(size, 0)}")
            if _checksum(path / name) != checksum:
                raise Damaged(f"{name} does not have its checksum")

    @property
    def config(self) -> Any:
        """The configuration it was written under."""
        return self._manifest["config"]

    def weights(self) -> dict[str, Tensor]:
        """By the names of parameters and buffers."""
        return _load(self.path / MODEL)

    def state(self) -> Any:
        """Content passed to :meth:`Checkpoints.save`."""
        return unpack(_load(self.path / STATE), self._manifest["state"])


class Checkpoints:
    """The checkpoints of a training.

    Args:
        folder: made if it is not there.
        keep: so many of the newest stay, None for all.
    """

    def __init__(self, folder: Path, keep: int | None = 2) -> None:
        _safetensors()
        self.folder, self.keep = folder, keep
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def paths(self) -> list[Path]:
        """Oldest first, be they whole or not."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def newest(self) -> Checkpoint | None:
        """The newest whole one; damaged ones before it are named in a warning."""
        for path in reversed(self.paths()):
            try:
                return Checkpoint(path)
            except Damaged as reason:
                warnings.warn(f"checkpoint {path} is skipped: {reason}.", RuntimeWarning, stacklevel=3)
        return None

    def newest_whole(self) -> Checkpoint | None:
        """The newest whole one; None if there are none, whole or not.

        Raises:
            ValueError: all of them are damaged.
        """
        newest = self.newest()
        if newest is None and self.paths():
            raise ValueError(
                f"{self.folder} must hold a whole checkpoint, got {len(self.paths())} and all of them damaged: put a "
                "copy back, or move them away to begin anew."
            )
        return newest

    def to_resume(self, wanted: bool) -> Checkpoint | None:
        """The one that a training goes on from; None starts at the beginning.

        Raises:
            ValueError: there are some, and a training that goes on is not `wanted`; or all of them are damaged.
        """
        if self.paths() and not wanted:
            raise ValueError(
                f"out must be a folder without checkpoints for resume=False, got {self.folder.parent}: give another "
                "one, or continue with resume=True."
            )
        return self.newest_whole()

    def save(self, step: int, weights: Mapping[str, Tensor], state: Any, config: Any = None) -> Path:
        """Write one, and remove what is too old.

        Raises:
            OSError: it could not be written; the others are as they were.
        """
        self.clean()
        target = self.folder / f"step-{step:08d}"
        with files.writing(target):
            self._write(target, step, weights, pack(state), config)
        if self.keep is not None:
            for old in self.paths()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def _write(
        self, target: Path, step: int, weights: Mapping[str, Tensor], packed: tuple[Any, Any], config: Any
    ) -> None:
        tensors, rest = packed
        made = self.folder / f".writing-{os.getpid()}"
        made.mkdir()
        try:
            for name, content in ((MODEL, weights), (STATE, tensors)):
                _save(_separate(content), made / name)
            manifest = {
                "format": FORMAT,
                "step": step,
                "config": config,
                "files": {
                    name: {"bytes": (made / name).stat().st_size, "crc32": _checksum(made / name)}
                    for name in (MODEL, STATE)
                },
                "state": rest,
            }
            (made / MANIFEST).write_text(files.sealed(manifest, allow_nan=True), encoding="utf-8")
            for path in (made / MODEL, made / STATE, made / MANIFEST, made):
                files.flush(path)
            for path in self.paths():
                if path.name >= target.name:  # damaged, or a resumed run would have begun there
                    shutil.rmtree(path)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        files.flush(self.folder)

    def clean(self) -> None:
        """Remove what a crash left half written."""
        for path in self.folder.glob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True)


def weights_of(model: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once however often it is shared; shards where it is sharded."""
    reshard(model)
    kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not trainable_only}
    seen = {id(p) for p in model.parameters()}
    persistent = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers():
        if name in persistent and id(buffer) not in seen:
            kept[name] = buffer.detach()
    return kept


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], where: Path, trainable_only: bool) -> None:
    """Copy them into the tensors of a model, which stay the same objects.

    Raises:
        ValueError: names or shapes differ.
    """
    own = weights_of(model, trainable_only)
    missing, surplus = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or surplus:
        differences = [f"lacks {names[0]} ({len(names)} in all)" for names in (missing,) if names]
        differences += [f"has {names[0]} ({len(names)} in all) too much" for names in (surplus,) if names]
        raise ValueError(
            f"model must be the one that checkpoint {where} was written for, which {' and '.join(differences)}: make "
            "it with the same classes, adapters and frozen parameters."
        )
    for name, value in weights.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"model must be the one that checkpoint {where} was written for: {name} is {tuple(own[name].shape)}, "
                f"there {tuple(value.shape)}."
            )
        own[name].copy_(spread(value, own[name]))


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module) -> int:
    """Put the weights of a checkpoint into a model.

    Args:
        folder: a checkpoint, or the folder that was given to :func:`fit`, whose newest whole one is taken.
        model: made as for the training, sharded or not. Frozen parameters stay as they are if the checkpoint was
            written without.

    Returns:
        The optimizer steps it was written after.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another model's.
    """
    path = Path(folder)
    if (path / MANIFEST).exists():
        try:
            checkpoint: Checkpoint | None = Checkpoint(path)
        except Damaged as reason:
            raise ValueError(f"checkpoint {path} cannot be used: {reason}.") from None
    else:
        inner = path / "checkpoints"
        checkpoints = Checkpoints(inner) if inner.is_dir() else None
        checkpoint = checkpoints.newest_whole() if checkpoints is not None else None
    if checkpoint is None:
        raise FileNotFoundError(f"folder must hold a checkpoint, got {path}, where there is none.")
    weights = checkpoint.weights()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    put_weights(model, weights, checkpoint.path, trainable_only=not frozen <= set(weights))
    return checkpoint.step


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each in memory of its own, as safetensors wants them."""
    separate, seen = {}, set()
    for name, value in tensors.items():
        where = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if where in seen else value.contiguous()
        seen.add(where)
    return separate


def _facts(entry: Mapping[str, int]) -> tuple[int, int]:
    """Bytes and checksum of a file."""
    return entry["bytes"], entry["crc32"]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors.

    Raises:
        OSError: they could not be written.
    """
    from safetensors import SafetensorError

    try:
        _safetensors().save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _load(path: Path) -> dict[str, Tensor]:
    # in memory of their own: those of safetensors are pages of the file, which would keep its room after its removal
    return {name: value.clone() for name, value in _safetensors().load_file(path).items()}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "checkpoints need the package safetensors: pip install 'aajr_kernels[train]', or leave out= away."
        ) from None
    return safetensors.torch


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
