"""The scaling page: what the model counts is what real steps send, and the page says what the model says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integrations.distributed.processes import launch, needs_gloo
from typer.testing import CliRunner

from bench.scaling import MODELS, Layout, Shape, collectives, memory, operations, saved_in_a_layer, sent
from bench.scaling import scaling as command
from common.command import application

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "tensor", "more"),
    [
        (2, 1, []),
        (4, 1, []),
        (2, 1, ["recompute"]),
        (1, 2, []),
        (1, 4, ["sequence"]),
        (1, 2, ["sequence", "recompute"]),
        (1, 2, ["recompute"]),
        (2, 2, []),
        (2, 2, ["sequence", "recompute"]),
    ],
)
def test_the_counted_collectives_are_those_of_a_step(data, tensor, more, tmp_path):
    print(launch("scaling", data * tensor, tmp_path, str(data), str(tensor), *more))


def test_the_sizes_are_those_of_the_models():
    billions = {name: shape.parameters / 1e9 for name, shape in MODELS.items()}
    assert billions == pytest.approx({"8B": 8.03, "32B": 32.8, "70B": 70.6, "405B": 405.9}, rel=2e-3)


def test_the_penalty_gathers_no_parameters():
    layout = Layout(data=64, tensor=8)
    without = replace(layout, tangents=0)
    shape = MODELS["70B"]
    costs = [
        [sent(collectives(shape, one), one, axis) for axis in ("data", "tensor")] for one in (without, layout)
    ]
    assert costs[0][0] == costs[1][0] > 0
    # of four forwards and four backwards one of each is doubled, and of each layer computed again one
    assert 1.2 < costs[1][1] / costs[0][1] < 1.3
    assert operations(shape, without) < operations(shape, layout)
    assert memory(shape, layout)["activations"] == 2 * memory(shape, without)["activations"]


def test_the_saved_activations_are_those_of_a_layer():
    """Bytes that a fused Llama layer keeps for its backward, one process, against the model's."""
    transformers = pytest.importorskip("transformers")
    import aajr_kernels as aajr
    from aajr_kernels.integrations.transformers import fuse

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    body = transformers.LlamaModel(config)
    fuse(body)
    tokens, kept = 2 * 32, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter) and t.numel() >= tokens * 2 * 8:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    def saved(layers: int) -> int:
        kept.clear()
        whole = body.layers
        body.layers = whole[:layers]
        x, v = torch.randn(2, 2, 32, 64).unbind(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = body(inputs_embeds=aajr.dual(x, v), use_cache=False).last_hidden_state
        body.layers = whole
        parameters = {p.untyped_storage().data_ptr() for p in body.parameters()}
        assert y.num_tangents == 1
        return sum(size for place, (size, _) in kept.items() if place not in parameters)

    shape = Shape("tiny", 2, 64, 4, 2, 16, 160, 50)
    counted = saved_in_a_layer(shape, Layout(batch=2, length=32, width=4, sequence=False), 2)
    assert saved(2) - saved(1) == pytest.approx(counted, rel=0.05)


def test_the_page_has_the_numbers_of_the_model():
    result = CliRunner().invoke(application(command), [])
    assert result.exit_code == 0
    rows = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 15
    assert "\n".join(rows) in PAGE.read_text()
    assert "modelled" in PAGE.read_text()


def test_longer_rows_send_and_compute_more():
    result = CliRunner().invoke(
        application(command), ["--length", "8192", "--attack", "1", "--tangents", "2"]
    )
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if line.startswith("| 70B | 8 |"))
    layout = Layout(1, 8, 1, 8192, 2, 1)
    over = sent(collectives(MODELS["70B"], layout), layout, "tensor") / 1e9
    assert f"/ {over:.0f} |" in line and f"/ {operations(MODELS['70B'], layout) / 1e15:.2f} |" in line


def test_the_operations_of_a_plain_step_are_six_a_parameter_and_token():
    shape, layout = MODELS["8B"], Layout(attack=0, tangents=0, length=1024, recompute=False, sequence=False)
    products = shape.parameters - shape.words * shape.hidden  # the table of embeddings is only read
    again = 2 * shape.words * shape.hidden  # the head's logits are formed twice
    pairs = 3.5 * 2 * layout.length * shape.heads * shape.head_dim * shape.layers
    expected = layout.tokens * (6 * products + again + pairs)
    assert operations(shape, layout) == pytest.approx(expected, rel=1e-4)
    shared = replace(layout, tensor=8)
    assert operations(shape, shared) == pytest.approx(expected / 8, rel=1e-3)
    twice = replace(layout, tangents=1)
    assert 1.9 < operations(shape, twice) / operations(shape, layout) < 2.1


def test_ring_algorithms():
    layout = Layout(data=4, tensor=1, sequence=False)
    shape = MODELS["8B"]
    gathered = [c for c in collectives(shape, layout) if c.kind == "all_gather"]
    bytes_ = sum(c.count * c.size for c in gathered)
    assert math.isclose(sent(gathered, layout, "data"), 0.75 * bytes_)
