"""The comparison in every test of an operation: ours against float64 forward mode of a formula written out by hand.

Inputs that carry tangents are stacked tensors ``[1 + K, *shape]``, those without are ``[1, *shape]`` and enter the
operation as plain tensors. The cotangent is random on primal and tangents alike, so that both paths are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from assertions import assert_exact, assert_within_budget
from torch import Tensor

from aajr_kernels.testing.cases.case import entered, forward_mode, stacks  # noqa: F401  stacks: for the tests


def record_calls(monkeypatch: Any, module: Any, names: Sequence[str]) -> list[str]:
    """A list that every call of these functions of a module adds its name to."""
    ran: list[str] = []

    def recorded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_run(*args: Any) -> Any:
            ran.append(name)
            return run(*args)

        return record_and_run

    for name in names:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return ran


def outcome(
    run: Callable[[list[Tensor], list[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    cotangent: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Result of `run` and the gradient of every input and parameter."""
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *params)]
    y = run(leaves[: len(inputs)], leaves[len(inputs) :])
    gradients = torch.autograd.grad(y, leaves, cotangent.to(y.dtype), allow_unused=True)
    return y.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)]


def check(
    op: Callable[..., Any],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    *,
    tolerance: float = 1e-12,
) -> None:
    """Value, tangents and all gradients of `op` in float64, linearity in the tangent, ⟨ū, Jv⟩ = ⟨Jᵀū, v⟩."""

    def ours(s: list[Tensor], p: list[Tensor]) -> Tensor:
        return op(*(entered(t) for t in s), *p).stacked

    shape = forward_mode(formula, inputs, params).shape
    cotangent = torch.randn(shape, dtype=torch.float64)
    y, gradients = outcome(ours, inputs, params, cotangent)
    expected, exact = outcome(lambda s, p: forward_mode(formula, s, p), inputs, params, cotangent)
    assert not y.numel() or y[1:].any()
    assert_exact(y, expected, "stacked output", tolerance=tolerance)
    for i, (got, want) in enumerate(zip(gradients, exact)):
        assert_exact(got, want, f"gradient {i}", tolerance=tolerance, floor=1e-3)

    doubled = [torch.cat([s[:1], 2.0 * s[1:]]) for s in inputs]
    twice = ours(doubled, list(params))
    assert_exact(twice[1:], 2.0 * y[1:], "tangent of twice the direction")
    only_tangents = torch.cat([torch.zeros_like(cotangent[:1]), cotangent[1:]])
    _, pulled = outcome(ours, inputs, params, only_tangents)
    through = sum((g[1:] * s[1:]).sum() for g, s in zip(pulled, inputs))
    assert_exact(torch.as_tensor(through), (cotangent[1:] * y[1:]).sum(), "adjoint identity")


def check_low(
    op: Callable[..., Any],
    eager: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    dtype: torch.dtype,
    formula: Callable[..., Tensor] | None = None,
    ulps: float = 4.0,
) -> None:
    """Error of `op` in a low dtype against float64, at most twice that of eager forward mode in that dtype."""
    inputs, params = [t.to(dtype) for t in inputs], [t.to(dtype) for t in params]
    wide_inputs, wide_params = [t.double() for t in inputs], [t.double() for t in params]
    formula = formula or eager
    cotangent = torch.randn(forward_mode(formula, wide_inputs, wide_params).shape).to(dtype)
    exact = outcome(lambda s, p: forward_mode(formula, s, p), wide_inputs, wide_params, cotangent.double())
    in_dtype = outcome(lambda s, p: forward_mode(eager, s, p), inputs, params, cotangent)
    got = outcome(lambda s, p: op(*(entered(t) for t in s), *p).stacked, inputs, params, cotangent)
    assert got[0].dtype == dtype
    assert_within_budget(got[0], in_dtype[0], exact[0], "stacked output", ulps=ulps)
    for i, (mine, theirs, want) in enumerate(zip(got[1], in_dtype[1], exact[1])):
        assert mine.dtype == dtype
        assert_within_budget(mine, theirs, want, f"gradient {i}", ulps=ulps)
