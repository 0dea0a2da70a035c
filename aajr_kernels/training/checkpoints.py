"""Checkpoints: one folder each, whole or not there.

A checkpoint is written into a hidden folder, flushed to the disk, and renamed, which is one atomic operation; its
manifest has size and checksum of every file. Weights are in ``model.safetensors`` under the names of the parameters,
the tensors of optimizer and random generators in ``state.safetensors``, numbers in ``manifest.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .shards import spread
from .state import pack, unpack
from .wrappers import reshard

__all__ = ["Checkpoint", "Checkpoints", "load_checkpoint", "weights_of"]

FORMAT = 1
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
            self._manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files, self.step = self._manifest["files"], int(self._manifest["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"its {MANIFEST} cannot be read ({type(error).__name__})") from None
        if self._manifest.get("format") != FORMAT:
            raise Damaged(f"its format is {self._manifest.get('format')}, this version reads {FORMAT}")
        for name, facts in files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if size != facts["bytes"]:
                raise Damaged(f"{name} should have {facts['bytes']} bytes and has {max(size, 0)}")
            if _checksum(path / name) != facts["crc32"]:
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

    def to_resume(self, wanted: bool) -> Checkpoint | None:
        """The one that a training goes on from; None starts at the beginning.

        Raises:
            ValueError: there are some, and a training that goes on is not `wanted`.
        """
        if not self.paths():
            return None
        if not wanted:
            raise ValueError(
                f"out must be a folder without checkpoints for resume=False, got {self.folder.parent}: give another "
                "one, or continue with resume=True."
            )
        return self.newest()

    def save(self, step: int, weights: Mapping[str, Tensor], state: Any, config: Any = None) -> Path:
        """Write one, and remove what is too old."""
        save_file = _safetensors().save_file
        self.clean()
        tensors, rest = pack(state)
        target = self.folder / f"step-{step:08d}"
        made = self.folder / f".writing-{os.getpid()}"
        made.mkdir()
        try:
            for name, content in ((MODEL, weights), (STATE, tensors)):
                save_file(_separate(content), made / name)
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
            (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            for path in (made / MODEL, made / STATE, made / MANIFEST, made):
                _flush(path)
            for path in self.paths():
                if path.name >= target.name:  # damaged, or a resumed run would have begun there
                    shutil.rmtree(path)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        _flush(self.folder)
        if self.keep is not None:
            for old in self.paths()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return target

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
        checkpoint = Checkpoints(inner).newest() if inner.is_dir() else None
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


def _load(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = _safetensors().load_file(path)
    return loaded


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


def _flush(path: Path) -> None:
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
