"""torch.compile of penalty steps on models of transformers: one graph, exact gradients, no recompiles, clear errors."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracle_losses
import pytest
import torch
from assertions import (
    assert_exact,
    assert_exact_gradients,
    assert_gradients_within_budget,
    assert_within_budget,
)
from integrations.transformers.subjects import tiny
from test_zoo import MODEL_ULPS, SCALAR_ULPS, eagerly, problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from zoo import Subject

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # raised by Dynamo
]
MODELS = ("llama-sdpa", "gpt2-sdpa", "bert-sdpa")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fused(subject: Subject, really: bool) -> contextlib.AbstractContextManager[Any]:
    return fuse(subject.model) if really else contextlib.nullcontext()


def compiled(
    function: Callable[..., Any], backend: str
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def outcome(subject: Subject, v: torch.Tensor, probe: torch.Tensor, backend: str) -> tuple[Any, ...]:
    """Loss, penalty, primal and all gradients of a compiled step; and the graphs it took."""

    def loss(x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        penalty, output = aajr.aligned_penalty(
            subject.output, x, v, metric=subject.metric, mask=subject.mask, return_primal=True
        )
        primal = subject.pick(output)
        return penalty + (probe * primal).sum(), penalty, primal

    step, counter = compiled(loss, backend)
    x, v = subject.x.clone().requires_grad_(), v.clone().requires_grad_()
    total, penalty, primal = step(x, v)
    gradients = oracle_losses.gradients_of(total, {**subject.parameters, "x": x, "v": v})
    return oracle_losses.Outcome(total, penalty, primal, torch.empty(0), gradients), counter


def check_float32(name: str, fuse_it: bool, backend: str) -> float:
    """Penalty, output and the gradient of every parameter, the input and the direction, against float64.

    Returns:
        The relative error of all gradients together.
    """
    subject, v, exact, probe = problem(name, 1)
    eager = eagerly(subject, v, probe)
    with fused(subject, fuse_it), aajr.coverage() as seen:
        actual, counter = outcome(subject, v[0], probe, backend)
    single = lambda gradients: {k: g[0] if k == "v" and g is not None else g for k, g in gradients.items()}
    expected, reference = single(exact.gradients), single(eager.gradients)
    assert_within_budget(actual.penalty, eager.penalty, exact.penalty, "penalty", ulps=SCALAR_ULPS)
    assert_within_budget(actual.primal, eager.primal, exact.primal, "primal")
    again = lambda: single(eagerly(subject, v, probe, moved=True).gradients)
    assert_gradients_within_budget(actual.gradients, reference, expected, ulps=MODEL_ULPS, redraw=again)
    assert counter.frame_count == 1
    ran = {backend for op, backend in seen.entries if op in ("attention", "linear", "layer_norm", "rms_norm")}
    assert ran == {"native" if aajr.backends()["native"] is None else "reference"}
    known = [k for k, g in expected.items() if g is not None]
    off, size = (
        torch.cat([f(k).double().flatten() for k in known]).norm()
        for f in (lambda k: actual.gradients[k] - expected[k], expected.__getitem__)
    )
    return float(off / size)


def operators(counter: CompileCounterWithBackend) -> set[str]:
    """Names of our operators in the graphs."""
    names = set()
    for graph in counter.graphs:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                names |= {str(n.target) for n in module.graph.nodes if str(n.target).startswith("aajr.")}
    return names


def step_of(model: torch.nn.Module, streamed: bool = False) -> Callable[..., torch.Tensor]:
    """Loss and penalty of one batch, from logits or through the streamed head."""

    def loss(x, v, mask, labels):
        if streamed:
            body = lambda d: (
                model.model(inputs_embeds=d, attention_mask=mask, use_cache=False).last_hidden_state
            )
            head = aajr.LMHead(model.lm_head.weight)
            penalty, loss = aajr.aligned_penalty(
                body, x, v, head=head, labels=labels, mask=mask, return_primal=True
            )
            return loss + 0.1 * penalty
        policy = lambda d: model(inputs_embeds=d, attention_mask=mask, use_cache=False)
        penalty, output = aajr.aligned_penalty(policy, x, v, mask=mask, return_primal=True)
        return output.logits.square().mean() + 0.1 * penalty

    return loss


def batch(length: int, padded: bool = True) -> tuple[Any, ...]:
    """x, v, mask (padded on the left) and labels."""
    x, v = torch.randn(2, 2, length, 32).unbind()
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    return x.requires_grad_(), v.requires_grad_(), mask if padded else None, torch.randint(97, (2, length))


def agrees(
    model: torch.nn.Module, step: Any, eager: Any, arguments: tuple[Any, ...], tolerance: float
) -> None:
    """The compiled step gives the loss and all gradients of the eager one."""
    leaves = {"x": arguments[0], "v": arguments[1], **dict(model.named_parameters())}
    expected, actual = eager(*arguments), step(*arguments)
    assert_exact(actual, expected, tolerance=tolerance)
    expected_gradients, got = (
        oracle_losses.gradients_of(expected, leaves),
        oracle_losses.gradients_of(actual, leaves),
    )
    assert expected_gradients["x"].any() and expected_gradients["v"].any()
    # the bias of the keys shifts every score of a row alike: its gradient is zero but for rounding
    for name in [name for name in expected_gradients if name.endswith("self.key.bias")]:
        residue, _ = got.pop(name), expected_gradients.pop(name)
        assert (
            residue.norm()
            < 10 * tolerance * expected_gradients[name.replace("self.key", "self.query")].norm()
        )
    assert_exact_gradients(got, expected_gradients, tolerance=tolerance)


def test_our_ops_are_operators_of_one_graph():
    """A block by hand, its head streamed: quick, since nothing of transformers is traced."""
    q, up, down, head = (torch.randn(s).requires_grad_() for s in ((8, 8), (24, 8), (8, 24), (19, 8)))

    def loss(x, v):
        d = aajr.dual(x, v)
        y = aajr.rms_norm(aajr.linear(d, q), 8)
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        y = d + aajr.attention(heads, heads * 2, heads.sin(), causal=True).transpose(1, 2).flatten(2)
        y = y + aajr.linear(aajr.gelu(aajr.linear(aajr.layer_norm(y, 8), up)), down)
        return aajr.lm_head_sensitivity(y, head).sum()

    x, v = (t.requires_grad_() for t in torch.randn(2, 2, 5, 8).unbind())
    leaves = dict(x=x, v=v, q=q, up=up, down=down, head=head)
    step, counter = compiled(loss, "aot_eager")
    expected, actual = loss(x, v), step(x, v)
    assert_exact(actual, expected, tolerance=1e-6)
    expected_gradients = oracle_losses.gradients_of(expected, leaves)
    assert_exact_gradients(oracle_losses.gradients_of(actual, leaves), expected_gradients, tolerance=1e-5)
    assert counter.frame_count == 1
    if aajr.backends()["native"] is None:
        names = {name.removeprefix("aajr.native_").removesuffix(".default") for name in operators(counter)}
        assert {"attention_fwd", "norm_fwd", "pointwise_fwd", "head_fwd"} <= names


@slow
def test_a_fused_llama_is_one_graph_of_our_kernels():
    model = tiny("llama", num_hidden_layers=1)
    with fuse(model):
        step, counter = compiled(step_of(model), "aot_eager")
        agrees(model, step, step_of(model), batch(13), 1e-5)
    assert counter.frame_count == 1
    if aajr.backends()["native"] is None:
        names = {name.removeprefix("aajr.native_").removesuffix(".default") for name in operators(counter)}
        assert {"attention_fwd", "norm_fwd", "rotate", "gated_fwd", "sensitivity_fwd"} <= names


@pytest.mark.integration(
    "torch.compile: {name}", "inductor, one graph, forward and backward", "float64 oracle"
)
@slow
@pytest.mark.parametrize("fuse_it", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_inductor(name, fuse_it, record_property):
    record_property("error", check_float32(name, fuse_it, "inductor"))


@slow
@pytest.mark.parametrize("streamed", [False, True], ids=["logits", "streamed head"])
def test_lengths_beyond_the_second_do_not_compile_again(streamed):
    """Padded on the left: two graphs, for the first length and for all others.

    Inductor itself compiles sums of up to 4,096 numbers on a CPU apart: here those of less than 22 tokens' logits.
    """
    model = tiny("llama", num_hidden_layers=1)
    with fuse(model):
        step, counter = compiled(step_of(model, streamed), "inductor")
        for length in (23, 27):
            agrees(model, step, step_of(model, streamed), batch(length), 1e-5)
        assert counter.frame_count == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (31, 48, 61):
                agrees(model, step, step_of(model, streamed), batch(length), 1e-5)
    assert counter.frame_count == 2


@slow
@pytest.mark.parametrize("name", MODELS)
def test_lengths_of_unmodified_models(name):
    """One layer, by inductor: queries that are a part of a projection (GPT-2) and those of their own, in any length."""
    subject = problem(name, 1)[0]
    model, width = copy.deepcopy(subject.model), subject.x.shape[-1]
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            del module[1:]

    def loss(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        penalty: torch.Tensor = aajr.aligned_penalty(
            lambda d: subject.pick(model(inputs_embeds=d)), x, v, metric=subject.metric
        )
        return penalty

    step, counter = compiled(loss, "inductor")
    for length in (23, 27, 31, 48):
        with torch._dynamo.config.patch(error_on_recompile=length > 27):
            x, v = torch.randn(2, 2, length, width).unbind()
            agrees(model, step, loss, (x.requires_grad_(), v.requires_grad_()), 1e-5)
    assert counter.frame_count == 2


@slow
def test_parts_of_a_wider_projection_in_any_length():
    """Saved tensors of these ops have gaps, which inductor may close (Phi-3's gate and up come so)."""
    weight = torch.nn.Parameter(torch.randn(3 * 32, 32) / 6)

    def policy(d):
        a, b, c = torch.nn.functional.linear(d, weight).chunk(3, -1)
        return aajr.swiglu(a, b) + aajr.rms_norm(c, 32) + torch.softmax(c, -1) + aajr.gelu(b)

    model = torch.nn.Module()
    model.weight = weight
    loss = lambda x, v: aajr.aligned_penalty(lambda d: policy(d).chunk(2, -1)[0], x, v, metric="fisher")
    step, counter = compiled(loss, "inductor")
    for length in (23, 27, 31, 48):
        with torch._dynamo.config.patch(error_on_recompile=length > 27):
            x, v = torch.randn(2, 2, length, 32).unbind()
            agrees(model, step, loss, (x.requires_grad_(), v.requires_grad_()), 1e-5)
    assert counter.frame_count == 2


@slow
def test_bfloat16_under_autocast():
    model = tiny("llama", num_hidden_layers=1)

    def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return call

    with fuse(model):
        step, counter = compiled(step_of(model), "inductor")
        # fused element-wise chains round less often than separate ones
        agrees(model, under_autocast(step), under_autocast(step_of(model)), batch(13), 2e-2)
    assert counter.frame_count == 1


@slow
def test_checkpointed_layers():
    model = tiny("llama", num_hidden_layers=2).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with fuse(model, recompute=True):
        step, counter = compiled(step_of(model), "inductor")
        agrees(model, step, step_of(model), batch(13), 1e-5)
    assert counter.frame_count == 1


@slow
def test_a_checkpoint_by_hand():
    weight = torch.randn(6, 6, requires_grad=True)
    block = lambda d, factor: aajr.gelu(torch.nn.functional.linear(d, weight)) * factor

    def loss(x, v):
        return checkpoint(block, aajr.dual(x, v), 2.0, use_reentrant=False).stacked.square().sum()

    x, v = torch.randn(2, 4, 6).unbind()
    step, _ = compiled(loss, "aot_eager")
    actual, expected = step(x, v), loss(x, v)
    assert_exact(actual, expected, tolerance=1e-6)
    assert_exact(*(torch.autograd.grad(y, weight)[0] for y in (actual, expected)), tolerance=1e-6)


# -- tuples -----------------------------------------------------------------------------------------------------------

TUPLES: dict[str, Callable[[Any], Any]] = {
    "cat": lambda d: torch.cat((d, -d), -1),
    "cat by name": lambda d: torch.cat(tensors=[d, d], dim=0),
    "stack": lambda d: torch.stack([d, d * 2]),
    "hstack": lambda d: torch.hstack((d, d.sin())),
    "dstack": lambda d: torch.dstack((d, d)),
    "einsum": lambda d: torch.einsum("ij,kj->ik", [d, d]),
    "nothing": lambda d: d.sin(),
}


@pytest.mark.parametrize("name", [n if n == "cat" else pytest.param(n, marks=slow) for n in TUPLES])
def test_tuple_arguments(name):
    function, (x, v) = TUPLES[name], torch.randn(2, 4, 6).unbind()

    def tangents(x, v):
        with aajr.tuple_arguments():
            return function(aajr.dual(x, v)).tangents

    expected = tangents(x, v)
    assert torch.equal(expected, function(aajr.dual(x, v)).tangents)  # nothing changes in eager code
    assert_exact(compiled(tangents, "eager")[0](x, v), expected, tolerance=1e-6)
    through_jvp = lambda x, v: aajr.jvp(function, (x,), (v,))[1]
    assert_exact(compiled(through_jvp, "eager")[0](x, v), expected[0], tolerance=1e-6)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_unsupported_operation_says_so():
    x, v = torch.randn(2, 4, 6).unbind()
    function = lambda x, v: torch.special.bessel_j0(aajr.dual(x, v))
    words = r"special_bessel_j0 has no derivative rule for a Dual: replace it, .*or register one"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(function, "eager")[0](x, v)
    torch.compiler.reset()
    with pytest.raises(aajr.UnsupportedOperation, match=words):
        torch.compile(function, backend="eager")(x, v)


@slow
def test_the_generic_fallback_breaks_the_graph_or_says_why_it_cannot():
    x, v = torch.randn(2, 4, 6).unbind()
    function = lambda x, v: torch.cumulative_trapezoid(aajr.dual(x, v)).tangents
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="differentiated by torch.func.jvp, which torch.compile"
    ):
        compiled(function, "eager")[0](x, v)
    torch.compiler.reset()
    assert_exact(torch.compile(function, backend="eager")(x, v), function(x, v), tolerance=1e-6)


def test_coverage_sees_what_is_compiled_once():
    weight = torch.randn(6, 6)
    function = lambda x, v: aajr.gelu(torch.nn.functional.linear(aajr.dual(x, v), weight)).tangents
    step, _ = compiled(function, "eager")
    x, v = torch.randn(2, 4, 6).unbind()
    with aajr.coverage() as first:
        step(x, v)
    with aajr.coverage() as second, torch._dynamo.config.patch(error_on_recompile=True):
        step(x, v)
    backend = "native" if aajr.backends()["native"] is None else "reference"
    assert {(op, where) for op, where in first.entries if where in ("native", "reference")} == {
        ("linear", backend),
        ("gelu", backend),
    }
    assert second.entries == {}
