"""Masks as structure: masks that transformers would write out as ``[B, 1, N, M]`` stays causal, window and padding.

transformers describes a mask by a function of (batch, head, query, key) indices, composed from a few well-known parts.
Where the parts are recognised, attention receives ``causal=`` and ``window=`` and at most a ``[B, 1, 1, M]`` mask of
the padding, so that memory stays linear in the sequence length. Any other composition (packed sequences, bidirectional
windows, image blocks) is written out as the boolean mask that transformers' sdpa would use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch

from ...backends import capture

__all__ = ["Visibility", "mask_builder"]


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees; travels through the model where a mask tensor would.

    Attributes:
        causal: as in :func:`aajr_kernels.ops.attention.attention`.
        window: number of keys seen, the query's own included, or None.
        mask: bool ``[B|1, 1, N|1, M]``, True = attend, or None.
    """

    causal: bool | str = False
    window: int | None = None
    mask: torch.Tensor | None = None

    #: with `contiguous`: the part of a prepared mask's interface that generate() and the models ask for, where a cache
    #: of fixed size has its masks made ahead of the model
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Visibility:
        return self


def _cell(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _is(function: Any, template: FunctionType) -> bool:
    """Whether `function` is another closure of the same code as `template`."""
    return getattr(function, "__code__", None) is template.__code__


def mask_builder(masking: ModuleType) -> Callable[..., Visibility]:
    """The mask function to register, for the functions of ``transformers.masking_utils``."""
    causal, bidirectional = masking.causal_mask_function, masking.bidirectional_mask_function
    overlay, both = masking.sliding_window_overlay(1), masking.and_masks(causal)

    def structure(function: Any) -> tuple[bool, int | None] | None:
        """(causal, window) of a mask function, or None where it is made of anything else."""
        if function is bidirectional:
            return False, None
        if function is causal:
            return True, None
        if torch.compiler.is_compiling():  # which cannot look into closures
            return None
        if _is(function, overlay):
            return False, _cell(function, "sliding_window")
        if not _is(function, both):
            return None
        parts = [structure(part) for part in _cell(function, "mask_functions")]
        if None in parts:
            return None
        windows = [part[1] for part in parts if part is not None and part[1] is not None]
        return any(part[0] for part in parts if part is not None), min(windows, default=None)

    def build(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Any = causal,
        attention_mask: torch.Tensor | Visibility | None = None,
        device: Any = "cpu",
        use_vmap: bool = False,
        local_size: int | None = None,
        allow_is_causal_skip: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> Visibility:
        """Visibility of `kv_length` keys from `kv_offset` for `q_length` queries from `q_offset`."""
        if isinstance(attention_mask, Visibility):  # made ahead of the model
            return attention_mask
        shape = structure(mask_function)
        compiling = torch.compiler.is_compiling()
        if shape is None and compiling and allow_is_causal_skip and local_size is not None:
            # transformers lets a mask be skipped only if it is causal with a plain window, or made of chunks
            shape = (True, local_size) if getattr(config, "attention_chunk_size", None) is None else None
        alignment = _alignment(q_length, kv_length, q_offset, kv_offset)
        if shape is None or (shape[0] and alignment is None) or (shape[1] is not None and not shape[0]):
            mask = masking.sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
                device=device,
            )
            return Visibility(mask=_smallest(mask))
        is_causal, window = shape
        padding = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + kv_length].bool()
            # reading the values costs a synchronisation, once per forward: worth it for a mask that is not needed
            unread = compiling or capture.reads_no_value(padding.device)
            padding = None if not unread and bool(padding.all()) else padding[:, None, None, :]
        if window is not None and window >= kv_length:
            window = None
        return Visibility(alignment if is_causal and alignment is not None else False, window, padding)

    return build


def _alignment(q_length: int, kv_length: int, q_offset: Any, kv_offset: Any) -> str | None:
    """How the causal diagonal lies, or None where only a written-out mask can say."""
    if isinstance(q_offset, torch.Tensor) or isinstance(kv_offset, torch.Tensor):
        return None  # a static cache: its length is data
    shift = q_offset - kv_offset
    if shift == kv_length - q_length:
        return "lower_right"
    return "upper_left" if shift == 0 else None


def _smallest(mask: torch.Tensor) -> torch.Tensor:
    """`mask` without the axes along which it was merely expanded."""
    for axis, (size, stride) in enumerate(zip(mask.shape, mask.stride())):
        if stride == 0 and size > 1:
            mask = mask.narrow(axis, 0, 1)
    return mask
