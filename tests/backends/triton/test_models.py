"""Whole models on the Triton kernels: gradients of every parameter, one graph for the compiler, no look at a value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_gradients_within_budget, assert_within_budget
from integrations.transformers.subjects import tiny
from ops.suite import DEVICES, Target
from test_zoo import MODEL_ULPS, SCALAR_ULPS, eagerly, problem, through_the_dual

import aajr_kernels as aajr
from aajr_kernels import BackendUnavailable
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.integrations.transformers import fuse

ON_CPU = DEVICES["triton"] == "cpu"
pytestmark = pytest.mark.skipif(
    Target("triton").why_not("attention") is not None or not ON_CPU,
    reason="these run in Triton's interpreter, beside an oracle on the CPU; tests/backends/test_gpu.py runs on one",
)


@contextlib.contextmanager
def triton_alone() -> Iterator[None]:
    """Everything that has kernels runs on Triton's."""
    with aajr.use_backend("triton"), aajr.coverage() as seen:
        yield
    backends = {backend for _, backend in seen.entries}
    assert "triton" in backends and backends <= {"triton", "torch", "view", "fallback"}, str(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama-sdpa", "llama-sdpa-pad_left", "gpt2-sdpa", "gemma2-eager", "bert-sdpa", "qwen3-sdpa"]
)
def test_float32_gradients_of_unmodified_models(name):
    subject, v, exact, probe = problem(name, 1)
    eager = eagerly(subject, v, probe)
    with triton_alone():
        actual = through_the_dual(subject, v, probe)
    assert_within_budget(actual.penalty, eager.penalty, exact.penalty, "penalty", ulps=SCALAR_ULPS)
    assert_within_budget(actual.primal, eager.primal, exact.primal, "primal")
    assert_within_budget(actual.tangents, eager.tangents, exact.tangents, "tangents")
    assert_gradients_within_budget(actual.gradients, eager.gradients, exact.gradients, ulps=MODEL_ULPS)


@pytest.mark.slow
def test_bfloat16_gradients_of_a_llama():
    subject, v, _, probe = problem("llama-sdpa", 1)
    low = subject.to(torch.bfloat16)
    exact, v, probe = low.double(), v.bfloat16(), probe.bfloat16()
    options = dict(metric=low.metric, mask=low.mask)
    expected = oracle_losses.loss_and_gradients(
        exact.tensor, exact.x, v.double(), exact.parameters, probe=probe.double(), **options
    )
    eager = oracle_losses.loss_and_gradients(low.tensor, low.x, v, low.parameters, probe=probe, **options)
    with triton_alone():
        actual = through_the_dual(low, v, probe)
    assert_within_budget(actual.primal, eager.primal, expected.primal, "primal", ulps=1)
    assert_gradients_within_budget(actual.gradients, eager.gradients, expected.gradients, ulps=1)


def llama_loss(model: torch.nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Loss and penalty of a fused model with a streamed head: everything a training step launches."""
    # a whole mask: from a missing one transformers looks for packed sequences, at values
    mask = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    penalty, loss = aajr.aligned_penalty(
        lambda d: model.model(inputs_embeds=d, attention_mask=mask, use_cache=False).last_hidden_state,
        x,
        v,
        head=aajr.LMHead(model.lm_head.weight),
        labels=torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device),
        return_primal=True,
    )
    return loss + 0.1 * penalty


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by Dynamo
def test_a_fused_model_compiles_in_one_graph():
    model = tiny("llama", num_hidden_layers=1)
    x, v = torch.randn(2, 2, 7, 32).unbind()
    x.requires_grad_()
    leaves = {"x": x} | {name: p for name, p in model.named_parameters() if "embed" not in name}

    def loss(x, v):
        y = model(inputs_embeds=aajr.dual(x, v), use_cache=False).logits
        return y.tangent.square().mean() + y.primal.mean()

    with fuse(model), aajr.use_backend("triton"):
        expected = loss(x, v)
        gradients = oracle_losses.gradients_of(expected, leaves)
        torch._dynamo.reset()
        actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, v)
        assert_exact(actual, expected, tolerance=1e-5)
        for name, gradient in oracle_losses.gradients_of(actual, leaves).items():
            if gradients[name] is not None:
                assert_exact(gradient, gradients[name], name, tolerance=1e-5)
    torch._dynamo.reset()


def test_a_step_never_looks_at_a_value():
    """On meta tensors every look raises: the step can be captured in a CUDA graph, and the host runs ahead."""
    model = tiny("llama", num_hidden_layers=2).to("meta", torch.bfloat16)
    x, v = torch.empty(2, 2, 40, 32, dtype=torch.bfloat16, device="meta").unbind()
    x.requires_grad_()
    with fuse(model), gpu.dry_run("sm_90") as launched, aajr.use_backend("triton"):
        llama_loss(model, x, v).backward()
    names = {kernel.__name__ for kernel in launched}
    assert {"_attention_fwd_kernel", "_attention_bwd_q_kernel"} <= names, names
    assert x.grad is not None and model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_float64_has_no_kernels():
    x = aajr.dual(*torch.randn(2, 1, 2, 5, 16, dtype=torch.float64))
    with (
        aajr.use_backend("triton"),
        pytest.raises(BackendUnavailable, match=r"float64: cast it to float32"),
    ):
        aajr.attention(x, x, x)
