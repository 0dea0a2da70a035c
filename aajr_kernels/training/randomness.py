"""The states of the random generators, as tensors and numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["capture", "generator_for", "restore", "seed"]


def capture(device: torch.device, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Of torch on the CPU and on `device`, of Python, of NumPy if it is there, and of other generators."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(*_index(device))
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    state["generators"] = [g.get_state() for g in generators]
    return state


def restore(
    state: Mapping[str, Any], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
    """Put them back; what is not in `state` is left as it is."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], *_index(device))
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))
    for generator, value in zip(generators, state["generators"]):
        generator.set_state(value)


def seed(value: int) -> None:
    """All global generators."""
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


def generator_for(value: int, step: int, part: int, device: torch.device) -> torch.Generator:
    """A generator that depends only on these numbers, not on earlier draws."""
    mixed = random.Random(f"{value}/{step}/{part}").getrandbits(63)  # a string is hashed alike everywhere
    return torch.Generator(device).manual_seed(mixed)


def _index(device: torch.device) -> tuple[Any, ...]:
    return () if device.type == "mps" else (device,)
