"""Attention on matrix tiles: what rounding a tile to bfloat16 could spoil, block edges, the choice of the kernel."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_exact
from ops.attention_checks import formula
from ops.suite import Target, capabilities, check

import aajr_kernels as aajr
from aajr_kernels import Dual
from aajr_kernels.testing.cases.products import attention as attention_case

TILES = [name for name in capabilities() if name.startswith("amx")]
needs_tiles = pytest.mark.skipif(
    not TILES, reason="no capability with matrix tiles is built in and runs here"
)
# blocks hold 64 queries and 256 keys, tiles 16 rows and 32 numbers
EDGES = [
    attention_case("one block", (1, 2, 1, 64, 256, 32, 32)),
    attention_case("one more than a block", (1, 2, 1, 65, 257, 33, 31), causal="lower_right"),
    attention_case("one less than a block", (1, 1, 1, 63, 255, 31, 65), causal=True),
    attention_case("few rows", (1, 2, 2, 4, 300, 17, 16), causal="lower_right", window=270),
    attention_case("blocks without a key", (1, 1, 1, 150, 20, 16, 16), causal="lower_right"),
    attention_case("window across blocks", (1, 2, 1, 140, 340, 16, 40), causal="lower_right", window=70),
    attention_case("negative scale", (1, 2, 1, 20, 40, 24, 24), causal=True, scale=-0.2),
    attention_case("negative scale and bias", (1, 2, 1, 20, 40, 24, 24), scale=-0.2, bias=(2, 20, 40)),
    attention_case("scale of zero", (1, 1, 1, 20, 40, 24, 24), causal=True, scale=0.0),
    attention_case("scale, softcap, bias with tangents", (1, 2, 1, 70, 33, 24, 24), scale=0.3, softcap=2.0,
                   bias=(2, 70, 33), bias_moves=True),
]  # fmt: skip


@needs_tiles
@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize("name", TILES)
def test_block_edges_and_scales(name, case):
    check(case, Target("native", name), 1, torch.bfloat16)


@needs_tiles
@pytest.mark.parametrize("name", TILES)
def test_more_tangents_than_terms_of_a_product(name):
    check(attention_case("K 9", (1, 2, 1, 20, 40, 16, 16)), Target("native", name), 9, torch.bfloat16)


@needs_tiles
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("size", [30.0, 1000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_whose_tangents_have_a_large_mean(name, size, causal):
    """The tangent of the output is (P S')V - mu O. With P S' rounded to bfloat16, errors of 2^-9 mu would be left."""
    heads, rows, keys, width = 2, 80, 300 if not causal else 80, 32
    q, k = torch.randn(2, 1, heads, rows, width), torch.randn(2, 1, heads, keys, width)
    v = torch.randn(2, 1, heads, keys, width)
    k[0, ..., 0] = 1.0
    q[1, ..., 0] = size * math.sqrt(width)  # every tangent of a score gets this mean
    leaves = [t.bfloat16() for t in (q, k, v)]
    with Target("native", name).active():
        mine = [t.clone().requires_grad_() for t in leaves]
        out = aajr.attention(*(Dual(t) for t in mine), causal=causal).stacked
        out_bar = torch.randn_like(out)
        gradients = torch.autograd.grad(out, mine, out_bar)
    wide = [t.double().requires_grad_() for t in leaves]
    primals, tangents = tuple(t[0] for t in wide), tuple(t[1] for t in wide)
    exact = torch.stack(torch.func.jvp(lambda *a: formula(*a, causal=causal), primals, tangents))
    exact_gradients = torch.autograd.grad(exact, wide, out_bar.double())
    for i, label in enumerate(("primal", "tangent")):
        assert_exact(out[i].detach(), exact[i].detach(), label, tolerance=6e-3)
    for label, got, exact_gradient in zip("qkv", gradients, exact_gradients):
        for i in range(2):
            assert_exact(got[i], exact_gradient[i], f"gradient of {label}, {i}", tolerance=1e-2)


@needs_tiles
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize(
    ("dtype", "rows", "tiled"),
    [(torch.bfloat16, 20, True), (torch.bfloat16, 3, False), (torch.float16, 20, False), (torch.float32, 20, False)],
    ids=str,
)  # fmt: skip
def test_problems_that_are_not_for_tiles_go_to_the_vector_kernels(name, dtype, rows, tiled):
    leaves = [torch.randn(2, 1, 2, n, 40, dtype=dtype) for n in (rows, 50, 50)]
    out_bar = torch.randn(2, 1, 2, rows, 40, dtype=dtype)
    results = []
    for capability in (name, name.replace("amx", "avx512")):
        with Target("native", capability).active():
            mine = [t.clone().requires_grad_() for t in leaves]
            out = aajr.attention(*(Dual(t) for t in mine)).stacked
            results.append([out, *torch.autograd.grad(out, mine, out_bar)])
    same = [torch.equal(a, b) for a, b in zip(*results)]
    assert not any(same) if tiled else all(same)


@needs_tiles
@pytest.mark.parametrize("name", TILES)
def test_threads_do_not_change_the_numbers_of_a_run(name, monkeypatch):
    leaves = [torch.randn(2, 1, h, 150, 16).bfloat16() for h in (4, 2, 2)]
    out_bar = torch.randn(2, 1, 4, 150, 16).bfloat16()
    with Target("native", name).active():
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
            runs = []
            for _ in range(3):
                mine = [t.clone().requires_grad_() for t in leaves]
                out = aajr.attention(*(Dual(t) for t in mine), causal=True).stacked
                runs.append([out, *torch.autograd.grad(out, mine, out_bar)])
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
