"""Other ways to compute the Fisher penalty of a causal language model, and the float64 oracle.

None of it uses this package: the penalty is sum over the masked tokens of sum_j p_j (z_tan_j - mu)^2 with
p = softmax(z) and mu = sum_j p_j z_tan_j, averaged over the rows of the batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels.testing import formulas, oracle


@dataclass(frozen=True)
class Problem:
    """One penalty to compute.

    Attributes:
        x: input embeddings ``[B, S, D]``.
        v: directions, like `x`.
        mask: ``[B, S]`` bool, True where the position counts.
    """

    x: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.x.to(dtype), self.v.to(dtype), self.mask)


def penalty_of(z: torch.Tensor, z_tan: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The penalty of logits ``[B, S, V]`` and their directional derivative."""
    return (formulas.fisher(z, z_tan) * mask).sum(-1).mean()


def forward_mode(model: torch.nn.Module, problem: Problem) -> torch.Tensor:
    """PyTorch's forward mode. Backward must run inside :func:`math_attention`: no fused attention has a JVP."""

    def logits(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False).logits

    outputs = torch.func.jvp(logits, (problem.x,), (problem.v,))
    return penalty_of(outputs[0], outputs[1], problem.mask)


def math_attention(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Attention written out with its [S, S] matrices, if `wanted`."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else contextlib.nullcontext()


def finite_difference(model: torch.nn.Module, problem: Problem, step: float) -> torch.Tensor:
    """Forward difference of the logits, two plain forwards."""
    z = model(inputs_embeds=problem.x, use_cache=False).logits
    z_tan = (model(inputs_embeds=problem.x + step * problem.v, use_cache=False).logits - z) / step
    return penalty_of(z, z_tan, problem.mask)


def value_and_gradients(
    penalty: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter]
) -> tuple[float, list[torch.Tensor]]:
    """The penalty and its gradient for every parameter (zeros where it does not depend on one)."""
    value = penalty()
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return value.item(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]


def _rms_norm_in_own_dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
    return oracle.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def double_precision(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy of a Llama-type model whose norms no longer round to float32 on the way."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm_in_own_dtype, module)
    return model


def relative_error(gradients: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """||g - g*|| / ||g*|| over all parameters together, in float64."""
    error = sum((g.double() - t).square().sum() for g, t in zip(gradients, truth, strict=True))
    size = sum(t.double().square().sum() for t in truth)
    return float(torch.as_tensor(error / size).sqrt())
