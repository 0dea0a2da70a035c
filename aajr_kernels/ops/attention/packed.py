"""Packed sequences: the offsets of several sequences that lie one after another along the positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...backends import capture
from ...torch_private import version_of

Bounds = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Packed:
    """Offsets of the sequences' queries and keys.

    Attributes:
        starts: int64, on the device of the queries.
        bounds: the same as numbers; None while a CUDA graph is captured, which cannot wait for them.
    """

    starts: tuple[Tensor, Tensor]
    bounds: Bounds | None

    def sizes(self) -> list[tuple[int, int]]:
        """Queries and keys of every sequence, none where they are not known."""
        if self.bounds is None:
            return []
        return [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in pieces(self.bounds)]


def packed_sequences(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    device: torch.device,
    masked: bool,
    cu_seqlens: Tensor | Sequence[Tensor] | None,
) -> Packed | None:
    """Checked offsets; None without packed sequences.

    Checking them waits for the device where they live on one, once for a tensor that is not written in between. While a
    CUDA graph is captured their values go unchecked, and they have to be on the device already.
    """
    if cu_seqlens is None:
        return None
    if masked:
        raise ValueError(
            "attention: mask must be None with cu_seqlens, whose sequences attend within themselves: use causal and "
            "window, or pad the sequences and pass only the mask."
        )
    if len(q_shape) > 4 or any(n != 1 for n in q_shape[:-3]):
        raise ValueError(
            f"attention: q must be [H, N, D] or [1, H, N, D] with cu_seqlens, got {q_shape}: lay the sequences one "
            "after another along the positions."
        )
    if isinstance(cu_seqlens, (tuple, list)):
        if len(cu_seqlens) != 2:
            raise ValueError(
                f"attention: cu_seqlens must be a tensor of offsets or a pair (cu_seqlens_q, cu_seqlens_k), got "
                f"{len(cu_seqlens)} values."
            )
        named = [
            ("cu_seqlens_q", cu_seqlens[0], "queries", q_shape[-2]),
            ("cu_seqlens_k", cu_seqlens[1], "keys", k_shape[-2]),
        ]
    else:
        if q_shape[-2] != k_shape[-2]:
            raise ValueError(
                f"attention: q and k must have equally many positions with one cu_seqlens, got {q_shape[-2]} and "
                f"{k_shape[-2]}: pass a pair (cu_seqlens_q, cu_seqlens_k)."
            )
        named = [("cu_seqlens", cu_seqlens, "positions", q_shape[-2])]
    for name, x, *_ in named:
        _check_tensor(name, x)
    offsets = [x for _, x, *_ in named]
    if capture.reads_no_value(device):
        for name, x, *_ in named:
            if x.device != device:
                raise ValueError(
                    f"attention: {name} must be on {device} while a CUDA graph is captured, got {x.device}: copy it "
                    "before the capture."
                )
        bounds = None
    else:
        numbers = [_numbers(*arguments) for arguments in named]
        bounds = numbers[0], numbers[-1]
    if offsets[0].shape != offsets[-1].shape:
        raise ValueError(
            "attention: cu_seqlens_q and cu_seqlens_k must be of equally many sequences, got "
            f"{len(offsets[0]) - 1} and {len(offsets[-1]) - 1}."
        )
    starts = [x.to(device, torch.int64) for x in offsets]
    return Packed((starts[0], starts[-1]), bounds)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"attention: {name} must be an int32 or int64 tensor, got {type(value).__name__}.")
    if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1 or not value.numel():
        raise ValueError(
            f"attention: {name} must be an int32 or int64 tensor [sequences + 1], got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )


#: offsets on a device -> their version and their numbers, which the host waits for once
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _values(offsets: Tensor) -> list[int]:
    """The numbers in a tensor: of one on a device those that were read before, if it has not been written since."""
    if offsets.device.type == "cpu" or torch.compiler.is_compiling() or offsets.is_inference():
        return offsets.tolist()
    version, values = _read.get(offsets, (None, []))
    if version != version_of(offsets):
        values = offsets.tolist()
        _read[offsets] = version_of(offsets), values
    return values


def _numbers(name: str, value: Tensor, what: str, size: int) -> list[int]:
    bounds = _values(value)
    if bounds[0] != 0 or bounds[-1] != size:
        raise ValueError(
            f"attention: {name} must begin with 0 and end with the number of {what}, {size}, got {bounds[0]} and "
            f"{bounds[-1]}."
        )
    if any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"attention: {name} must be ascending offsets, got a sequence of negative length.")
    return bounds


def pieces(bounds: Bounds) -> list[tuple[slice, slice]]:
    """Query and key positions of every sequence."""
    rows, keys = ([slice(*pair) for pair in itertools.pairwise(x)] for x in bounds)
    return list(zip(rows, keys))
