"""`check(fn, inputs, K)`: value, tangent and every gradient of a random functional against float64 oracles.

The functional is Φ = Σ c₀·y + Σ_k c_k·ẏ_k + ½ Σ ẏ_k², random cotangents on primal and tangents together. Its gradients
with respect to primals, tangents and plain inputs are compared with central finite differences of Φ; the tangents in
Φ are themselves compared with central differences of the plain function, so no forward or reverse mode of PyTorch is
trusted. Where upstream is right, ``torch.func.jvp`` under autograd is compared too, at rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aajr_kernels import Dual, dual, is_dual

H = 1e-3  # step of the five-point stencil: truncation h⁴, rounding ε/h
Values = list[Tensor]


def _outputs(result: Any) -> list[Any]:
    """Floating-point outputs; integer ones (indices) have no derivative and are compared as values elsewhere."""
    leaves = pytree.tree_leaves(result, is_leaf=is_dual)
    return [y for y in leaves if isinstance(y, (Tensor, Dual)) and y.is_floating_point()]


def _slope(f: Callable[[float], Any], h: float = H) -> Any:
    """Five-point central difference at 0 of a function of one number that returns a list of tensors or a number."""
    near, far = (f(h), f(-h)), (f(2 * h), f(-2 * h))
    if isinstance(near[0], list):
        return [(8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in zip(*near, *far)]
    return (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * h)


def _close(name: str, got: Tensor, want: Tensor, tolerance: float, scale: float = 0.0) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all() or torch.equal(torch.isnan(got), torch.isnan(want)), (
        f"{name} is not finite: {got}"
    )
    error = (got - want).abs().max().item() if got.numel() else 0.0
    reference = max(want.abs().max().item() if want.numel() else 0.0, scale, 1e-3)
    assert error <= tolerance * reference, f"{name}: error {error:.2e} at size {reference:.2e}\n{got}\n{want}"


def check(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    K: int = 2,
    *,
    duals: Sequence[int] | None = None,
    upstream: bool = True,
    moves: bool = True,
    seed: int = 0,
) -> None:
    """Assert that `fn` of Duals has the right value, tangents and gradients.

    Args:
        fn: function of `inputs`, deterministic.
        inputs: float64 tensors (differentiated) and anything else (passed through).
        K: number of tangents.
        duals: positions of `inputs` that become Duals; the other float tensors stay plain but get gradients. None
            means the first.
        upstream: also compare with autograd of ``torch.func.jvp``.
        moves: assert that some tangent is non-zero.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.dtype == torch.float64]
    dualled = [places[0]] if duals is None else list(duals)
    points = [inputs[i].detach().clone() for i in places]
    directions = [noise(K, *inputs[i].shape) for i in dualled]

    def plain(values: Values) -> list[Tensor]:
        filled = list(inputs)
        for place, value in zip(places, values):
            filled[place] = value
        return _outputs(fn(*filled))

    def lifted(values: Values, tangents: Values) -> list[Dual]:
        filled = list(inputs)
        for place, value in zip(places, values):
            filled[place] = value
        for place, tangent in zip(dualled, tangents):
            filled[place] = dual(filled[place], tangent)
        outputs = _outputs(fn(*filled))
        assert all(is_dual(y) for y in outputs), f"the result is not a Dual: {outputs}"
        return outputs

    # value and tangent
    expected = plain([p.clone() for p in points])
    outputs = lifted([p.clone() for p in points], [d.clone() for d in directions])
    assert len(outputs) == len(expected)
    for y, want in zip(outputs, expected):
        _close("value", y.primal, want, 1e-12)
    numeric: list[Values] = []
    for k in range(K):
        steps = {i: d[k] for i, d in zip(dualled, directions)}
        numeric.append(
            _slope(lambda t: plain([p + t * steps[i] if i in steps else p for i, p in zip(places, points)]))
        )
    for i, y in enumerate(outputs):
        want = torch.stack([numeric[k][i] for k in range(K)])
        _close(
            "tangent", y.tangents, want, 2e-8, scale=expected[i].abs().max().item() if want.numel() else 0.0
        )
    if moves:
        assert any(y.tangents.abs().max() > 0 for y in outputs if y.numel()), "every tangent is zero"

    # gradients of Φ
    weights = [(noise(*y.shape), noise(K, *y.shape)) for y in outputs]

    def functional(primals: Values, tangents: list[Tensor]) -> Tensor:
        terms = [
            (c * y).sum() + (ck * y_tan).sum() + 0.5 * y_tan.square().sum()
            for (c, ck), y, y_tan in zip(weights, primals, tangents)
        ]
        return sum(terms[1:], terms[0])

    def phi(values: Values, tangents: Values) -> Tensor:
        ys = lifted(values, tangents)
        return functional([y.primal for y in ys], [y.tangents for y in ys])

    leaves = [p.clone().requires_grad_() for p in points]
    tangent_leaves = [d.clone().requires_grad_() for d in directions]
    variables = [*leaves, *tangent_leaves]
    total = phi([x * 1 for x in leaves], [v * 1 for v in tangent_leaves])
    grads = torch.autograd.grad(total, variables, allow_unused=True)
    grads = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, variables)]
    base = [*points, *directions]
    size = max(g.abs().max().item() for g in grads if g.numel())
    for index, (grad, start) in enumerate(zip(grads, base)):
        direction = noise(*start.shape)
        direction /= max(direction.abs().max().item(), 1e-9) if direction.numel() else 1.0

        def along(t: float, index: int = index, direction: Tensor = direction) -> float:
            moved = [b + t * direction if j == index else b.clone() for j, b in enumerate(base)]
            with torch.no_grad():
                return phi(moved[: len(points)], moved[len(points) :]).item()

        name = f"gradient of {'input' if index < len(points) else 'tangent'} {index % max(len(points), 1)}"
        want, got = _slope(along), (grad * direction).sum().item()
        _close(name, torch.tensor(got), torch.tensor(want), 1e-6, scale=max(abs(total.item()), size) * 1e-2)

    # upstream
    if not upstream:
        return
    leaves2 = [p.clone().requires_grad_() for p in points]
    tangents2 = [d.clone().requires_grad_() for d in directions]

    def of_duals(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(dualled, values))
        return tuple(plain([replaced.get(i, x) for i, x in zip(places, leaves2)]))

    primal_in = tuple(x for i, x in zip(places, leaves2) if i in dualled)
    with sdpa_kernel(SDPBackend.MATH):
        runs = [torch.func.jvp(of_duals, primal_in, tuple(v[k] for v in tangents2)) for k in range(K)]
    primals = list(runs[0][0])
    tangents = [torch.stack([run[1][i] for run in runs]) for i in range(len(primals))]
    for y, want in zip(outputs, tangents):
        _close("tangent against torch.func.jvp", y.tangents, want, 1e-11)
    expected_grads = torch.autograd.grad(
        functional(primals, tangents), [*leaves2, *tangents2], allow_unused=True
    )
    for index, (grad, want) in enumerate(zip(grads, expected_grads)):
        want = torch.zeros_like(grad) if want is None else want
        _close(f"gradient {index} against upstream", grad, want, 1e-10, scale=size * 1e-2)
