"""Tensor parallelism with the styles of torch, alone and under FSDP2, and the head split over its vocabulary."""

from __future__ import annotations

import pytest
from integration_rows import said
from integrations.distributed.processes import launch, needs_gloo

pytestmark = needs_gloo
slow = pytest.mark.slow


@pytest.mark.integration(
    "tensor parallel, two processes", "columns and rows, and sequence parallel", "one process"
)
@slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["hand", "llama"])
@pytest.mark.parametrize("more", [[], ["sequence"]], ids=["columns and rows", "and sequence"])
def test_two_processes_agree_with_one(name, more, precision, tmp_path, record_property):
    record_property("error", said(launch("tensor", 2, tmp_path, name, precision, "1", *more)))


@pytest.mark.integration("tensor parallel, four processes", "and sequence parallel, float32", "one process")
@slow
@pytest.mark.parametrize("name", ["hand", "llama"])
def test_four_processes_agree_with_one(name, tmp_path, record_property):
    record_property("error", said(launch("tensor", 4, tmp_path, name, "float32", "1", "sequence")))


@pytest.mark.integration("FSDP2 and tensor parallel", "two by two processes, float32", "one process")
@slow
@pytest.mark.parametrize("more", [[], ["sequence"]], ids=["columns and rows", "and sequence"])
@pytest.mark.parametrize("name", ["hand", "llama"])
def test_under_fsdp2_in_four_processes(name, more, tmp_path, record_property):
    record_property("error", said(launch("tensor", 4, tmp_path, name, "float32", "2", *more)))


@pytest.mark.integration("tensor parallel, activation checkpointing", "and under FSDP2", "one process")
@slow
@pytest.mark.parametrize(("data", "world"), [("1", 2), ("2", 4)])
def test_with_activation_checkpointing(data, world, tmp_path, record_property):
    record_property(
        "error", said(launch("tensor", world, tmp_path, "llama", "float32", data, "sequence", "checkpoint"))
    )


@slow
@pytest.mark.parametrize("more", ["fuse", "probs", "optimizer"])
def test_fused_models_other_metrics_and_optimizers(more, tmp_path):
    launch("tensor", 2, tmp_path, "llama", "float32", "1", "sequence", more)


@slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("words", "world"), [("97", 2), ("97", 4), ("5", 4)])
def test_a_split_vocabulary_agrees_with_a_whole_one(words, world, precision, tmp_path):
    launch("vocabulary", world, tmp_path, precision, words, *(["sequence"] if precision == "float64" else []))


@slow
def test_a_model_that_transformers_spread(tmp_path):
    pytest.importorskip("transformers")
    launch("hugging_face", 2, tmp_path, str(tmp_path / "model"))


@slow
def test_errors(tmp_path):
    launch("errors", 2, tmp_path)


@slow
def test_the_plan_of_the_configuration(tmp_path):
    launch("tensor", 2, tmp_path, "llama", "float32", "1", "library")


@slow
def test_the_objective_of_a_training_step(tmp_path):
    launch("objective", 2, tmp_path)
