"""Which backends, on which device, in which dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import choice, cuda
from ..backends.errors import BackendUnavailable
from ..backends.triton import launch as gpu

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Target:
    """A backend and the device it is validated on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"

    def why_not(self, dtype: str) -> str | None:
        """Why this dtype cannot be validated here, or None if it can."""
        if dtype == "float64" and self.backend != "reference":
            return "only the reference backend computes float64"
        if dtype == "bfloat16" and self.backend == "triton":
            from ..backends.triton import probe  # brings Triton along

            if not probe.exact_bfloat16():
                return "Triton's interpreter computes wrong bfloat16 products"
        try:
            x = torch.ones(2, 2, dtype=DTYPES[dtype], device=self.device)
            (x @ x).exp().sum()
        except (RuntimeError, NotImplementedError) as error:
            return f"torch {torch.__version__} does not compute it on {self.device} ({error})"
        return None


def find_targets(names: Sequence[str] | None, device: str) -> tuple[list[Target], dict[str, str]]:
    """The backends to validate, each on its device, and why the others are left out.

    Args:
        names: backends that must be validated; None for every one that can run.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: the accelerator for what runs there, if there is one.

    Returns:
        Targets, and a reason for every backend that is not among them (only if `names` is None).

    Raises:
        BackendUnavailable: a named backend cannot run here or on that device.
    """
    reasons = choice.backends()
    targets, left_out = [], {}
    for name in choice.BACKENDS if names is None else names:
        where = _device(name, device)
        reason = reasons[name] or _misplaced(name, where)
        if reason is None:
            targets.append(Target(name, where))
        elif names is None:
            left_out[name] = reason
        else:
            raise BackendUnavailable(f"{name} cannot run here: {reason}.")
    return targets, left_out


def _device(backend: str, device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() and backend != "native" else "cpu"


def _misplaced(backend: str, device: str) -> str | None:
    if backend == "native" and device != "cpu":
        return "its kernels are made for the CPU, use --device cpu or auto"
    if backend == "triton" and device == "cpu" and not gpu.interpreted():
        return "its kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1 to be interpreted on the CPU"
    if backend == "cuda" and device == "cpu" and not cuda.module().host:
        return "its kernels need a CUDA device"
    return None
