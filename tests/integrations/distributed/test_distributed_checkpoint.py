"""torch.distributed.checkpoint: a training that was saved goes on as if it had not been interrupted."""

from __future__ import annotations

import pytest
from integrations.distributed.processes import launch, needs_gloo

pytestmark = [needs_gloo, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor"])
def test_the_same_processes_continue_with_the_same_bits(kind, tmp_path):
    launch("checkpoint", 2, tmp_path, kind, "save", str(tmp_path), "float32")
    launch("checkpoint", 2, tmp_path, kind, "same", str(tmp_path), "float32")


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 4), ("tensor", 4), ("tensor", 2), ("ddp", 2)])
def test_other_processes_continue(kind, world, tmp_path):
    """Saved by two under FSDP2, continued by four, or under another way of spreading the model."""
    launch("checkpoint", 2, tmp_path, "fsdp2", "save", str(tmp_path), "float64")
    launch("checkpoint", world, tmp_path, kind, "resume", str(tmp_path), "float64")
