"""DDP and FSDP2 in two and four processes with gloo: every parameter's gradient is that of one process.

The step is the method's: an attack on the streamed cross-entropy, then adversarial loss and penalty with a streamed
head, whose weight is gathered by the hooks of the wrapped model.
"""

from __future__ import annotations

import pytest
import torch
from integration_rows import said
from integrations.distributed.processes import launch, needs_gloo
from torch import nn

import aajr_kernels as aajr
from aajr_kernels.integrations.distributed import inside

pytestmark = needs_gloo
slow = pytest.mark.slow


@pytest.mark.integration(
    "{kind}, two processes", "Llama, GPT-2, written by hand; float32 and float64", "one process"
)
@slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["hand", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_agree_with_one(kind, name, precision, tmp_path, record_property):
    record_property("error", said(launch("sharded", 2, tmp_path, kind, name, precision)))


@pytest.mark.integration("{kind}, four processes", "Llama, float32", "one process")
@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_four_processes_agree_with_one(kind, tmp_path, record_property):
    record_property("error", said(launch("sharded", 4, tmp_path, kind, "llama", "float32")))


@pytest.mark.integration("{kind}, activation checkpointing", "non-reentrant, float32", "one process")
@slow
@pytest.mark.parametrize("name", ["hand", "llama"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_with_activation_checkpointing(kind, name, tmp_path, record_property):
    record_property("error", said(launch("sharded", 2, tmp_path, kind, name, "float32", "checkpoint")))


@slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["hand", "llama"])
def test_fsdp2_with_mixed_precision(name, precision, tmp_path):
    """Against one process in the dtype of the computation; bfloat16 against float32, with the error of one process."""
    launch("sharded", 2, tmp_path, "fsdp2", name, precision, "mixed")


@slow
def test_several_forwards_before_a_backward(tmp_path):
    launch("sharded", 2, tmp_path, "fsdp2", "llama", "float32", "all")


@slow
def test_a_head_with_hooks_of_its_own(tmp_path):
    launch("sharded", 2, tmp_path, "fsdp2", "hand", "float32", "head")


@slow
@pytest.mark.parametrize("more", ["fused", "fused checkpointing", "window", "window fused"])
def test_a_shared_context_under_fsdp2(more, tmp_path):
    """The whole sequence in one process, with ranks whose contexts end at different tokens."""
    pytest.importorskip("transformers")
    launch("context", 2, tmp_path, *more.split())


@slow
@pytest.mark.parametrize(
    "cases",
    [
        "base,shared,scored",
        "rows,points,hinge,diagnostics",
        "finite_difference,spectral,cure",
        "base head",
        "base hsdp",
    ],
)
def test_the_objective_under_fsdp2(cases, tmp_path):
    """Loss, penalty and all gradients are those of one process with the whole model and all micro-batches."""
    pytest.importorskip("transformers")
    launch("fsdp", 2, tmp_path, *cases.split())


@slow
def test_fit_under_fsdp2(tmp_path):
    """Parameters after three steps, rows, a training in two calls, and its checkpoint in a whole model."""
    pytest.importorskip("transformers")
    launch("fsdp", 2, tmp_path, "fit", str(tmp_path / "out"))


def test_inside_leaves_a_plain_module_as_it_was():
    module = nn.Linear(3, 2)
    seen = []
    module.register_forward_pre_hook(lambda m, inputs: seen.append("before"))
    module.register_forward_hook(lambda m, inputs, output: seen.append(output))

    def func(x: torch.Tensor, *, more: int) -> tuple[torch.Tensor, int]:
        """Doubled."""
        return module(x), more

    called = inside(module, func)
    output, more = called(torch.ones(3), more=4)
    assert more == 4 and called.__doc__ == "Doubled."
    # around the call, and of the module's own forward within it
    assert seen[0] == seen[1] == "before" and torch.equal(seen[2], output) and seen[3][1] == 4
    assert "forward" not in vars(module)
    with pytest.raises(TypeError):
        inside(module, lambda: module(None))()
    assert "forward" not in vars(module)


def test_inside_keeps_a_forward_of_the_instance():
    module = nn.Linear(3, 2)
    module.forward = own = lambda x: x + 1
    assert inside(module, lambda: module(torch.ones(3)))().tolist() == [2, 2, 2]
    assert module.forward is own


def test_what_is_no_module_has_no_such_hooks():
    with pytest.raises(TypeError, match="must be an nn.Module or several of them, got int"):
        inside(3, lambda: None)


def test_the_private_names_that_rules_hang_on_exist():
    """A rule for a name that does not exist would leave the guard's refusal in its place."""
    from torch.distributed.nn import functional
    from torch.distributed.tensor import _api

    assert _api._FromTorchTensor.__qualname__ == "_FromTorchTensor" and functional._AllReduce
    utils = pytest.importorskip("transformers.distributed.parallel_utils")
    assert utils._AllReduceForward and utils._AllReduceBackward


def test_a_linear_function_passes_a_dual():
    @aajr.integrations.distributed.linear_function
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, g):
            return g * ctx.factor, None

    x, v = torch.randn(3, requires_grad=True), torch.randn(3)
    d = aajr.dual(x, v)
    y = Twice.apply(d, 2.0)
    assert torch.equal(y.primal, 2 * x) and torch.equal(y.tangent, 2 * v)
    y.primal.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_frozen_attack_computes_no_gradients_of_leaves():
    from aajr_kernels import sharding

    leaf, x = torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    made = leaf * 2
    # what is made of something may depend on the input
    for weight, has_gradient in ((leaf, False), (made, True)):
        for call in (
            lambda w: aajr.linear(aajr.Dual(x), w).stacked.sum(),
            lambda w: aajr.lm_head_sensitivity(aajr.Dual(x), w).sum(),
            lambda w: aajr.rms_norm(
                aajr.Dual(x), 3, w[0] if has_gradient else leaf[0].detach().requires_grad_()
            ).stacked.sum(),
        ):
            with sharding.frozen_parameters():
                y = call(weight)
            grads = torch.autograd.grad(y, (x, leaf), allow_unused=True, retain_graph=True)
            assert grads[0] is not None and (grads[1] is not None) == has_gradient
    assert sharding.detach_frozen(leaf) == (leaf,)
