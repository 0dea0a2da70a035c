"""The simulation of the order of programs: greedy shares, what launches compute, and the table of the documentation."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from aajr_kernels.ops.attention.options import visible_pairs
from common import pages

pytest.importorskip("triton", reason="triton is not installed")

from bench import schedule


def test_share():
    assert schedule.share([1] * 8, 4) == 1
    assert schedule.share([3, 1, 1, 1], 2) == 1
    assert schedule.share([1, 1, 1, 3], 2) == 0.75
    assert schedule.share([5], 4) == 0.25


@pytest.mark.parametrize(
    "shape",
    [
        schedule.Shape(2, 4, 2, 1000),
        schedule.Shape(2, 4, 2, 1000, window=300),
        schedule.Shape(3, 4, 4, 1000, causal=False, head_size=64),
        schedule.Shape(2, 4, 2, 500, context=700),
        schedule.Shape(2, 4, 2, 500, window=450, context=400),
        schedule.Shape(2, 4, 2, 500, causal=False, context=400),
    ],
    ids=str,
)
def test_every_block_of_every_head_is_computed_once_and_its_loop_covers_what_it_sees(shape):
    own = visible_pairs(shape.length, shape.length, 0 if shape.causal else None, shape.window)
    offset = shape.context if shape.causal else None
    of_context = visible_pairs(shape.length, shape.context, offset, shape.window)
    for launch in schedule.launches(shape):
        of_keys = launch.name not in ("forward", "queries")
        pairs = of_context if "context" in launch.name else own if of_keys else own + of_context
        places = Counter((program.head, program.block) for program in launch.programs)
        assert set(places.values()) == {1}
        heads, blocks = (1 + max(place[i] for place in places) for i in (0, 1))
        assert len(places) == heads * blocks
        assert heads == shape.batch * (launch.parts * shape.key_heads if of_keys else shape.heads)
        tiles = sum(program.time - 1 for program in launch.programs)
        assert (
            pairs * shape.batch * shape.heads
            <= tiles * launch.tile
            <= 2.5 * pairs * shape.batch * shape.heads
        )


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("length", [2048, 4096])
def test_the_heaviest_blocks_start_first_and_the_device_is_busy(batch, length):
    for launch in schedule.launches(schedule.Shape(batch, 32, 8, length)):
        times = [program.time for program in launch.programs]
        if batch == 1:  # one section of heads
            assert times == sorted(times, reverse=True)
        assert schedule.share(times) > max(0.96, schedule.share(launch.blocks_first()))


@pytest.mark.parametrize("window", [None, 700])
def test_the_keys_of_a_context_that_most_queries_see_start_first(window):
    shape = schedule.Shape(1, 32, 8, 1024, window=window, context=1024)
    launches = [launch for launch in schedule.launches(shape) if "context" in launch.name]
    assert [launch.name for launch in launches] == ["values of the context", "keys of the context"]
    for launch in launches:
        times = [program.time for program in launch.programs]
        assert times == sorted(times, reverse=True) and (window is None) == (times[0] == times[-1])


def test_few_programs_share_the_query_heads_of_a_key_head():
    parts = {
        length: {launch.parts for launch in schedule.launches(schedule.Shape(1, 32, 8, length))} - {1}
        for length in (1024, 2048, 4096)
    }
    assert parts == {1024: {4}, 2048: {2}, 4096: set()}


def test_the_documentation_has_the_table(tmp_path):
    copy = shutil.copy(schedule.PAGE, tmp_path / "triton.md")
    assert not pages.between(copy, schedule.BEGIN, schedule.END, schedule.table()), (
        "python -m bench.schedule --write writes it"
    )
