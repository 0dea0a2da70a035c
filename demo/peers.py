"""Other ways to compute the Fisher penalty of a causal language model, and the float64 oracle.

None of it uses this package: the penalty is sum over the masked tokens of sum_j p_j (z_tan_j - mu)^2 with
p = softmax(z) and mu = sum_j p_j z_tan_j, averaged over the rows of the batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aajr_kernels.testing import formulas, oracle


@dataclass(frozen=True)
class Problem:
    """One penalty to compute.

    Attributes:
        x: input embeddings ``[B, S, D]``.
        v: directions, like `x`.
        mask: ``[B, S]`` bool, True where the position counts.
    """

    x: Tensor
    v: Tensor
    mask: Tensor


def penalty_of(z: Tensor, z_tan: Tensor, mask: Tensor) -> Tensor:
    """The penalty of logits ``[B, S, V]`` and their directional derivative."""
    return (formulas.fisher(z, z_tan) * mask).sum(-1).mean()


def forward_mode(model: torch.nn.Module, problem: Problem) -> Tensor:
    """PyTorch's forward mode; no fused attention has a JVP: run it under ``sdpa_kernel(SDPBackend.MATH)``."""

    def logits(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits

    outputs = torch.func.jvp(logits, (problem.x,), (problem.v,))
    return penalty_of(outputs[0], outputs[1], problem.mask)


def finite_difference(model: torch.nn.Module, problem: Problem, step: float) -> Tensor:
    """Forward difference of the logits, two plain forwards."""
    z = model(inputs_embeds=problem.x, use_cache=False).logits
    z_tan = (model(inputs_embeds=problem.x + step * problem.v, use_cache=False).logits - z) / step
    return penalty_of(z, z_tan, problem.mask)


def value_and_gradients(
    penalty: Callable[[], Tensor], parameters: list[torch.nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """The penalty and its gradient for every parameter (zeros where it does not depend on one)."""
    value = penalty()
    return value.item(), list(torch.autograd.grad(value, parameters, materialize_grads=True))


def exact_gradients(model: torch.nn.Module, problem: Problem) -> tuple[float, list[Tensor]]:
    """Those of a float64 copy on hand-written layers."""
    model = copy.deepcopy(model).double()
    problem = Problem(problem.x.double(), problem.v.double(), problem.mask)
    with oracle.oracle_mode():
        return value_and_gradients(lambda: forward_mode(model, problem), list(model.parameters()))


def relative_error(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """||g - g*|| / ||g*|| over all parameters together, in float64."""
    errors = (float((g.double() - exact).norm()) for g, exact in zip(gradients, truth, strict=True))
    return math.hypot(*errors) / math.hypot(*(float(exact.norm()) for exact in truth))
