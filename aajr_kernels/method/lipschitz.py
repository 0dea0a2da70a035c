"""A bound of the Jacobian at every input: the product of the layers' spectral norms.

    ‖J(x)‖₂ ≤ Πₗ cₗ,    cₗ = ‖Wₗ‖₂ of a linear layer, the Lipschitz constant of anything else

for a network that applies its layers one after the other. It needs no points and no directions: the global bound that
penalties along an ascent are compared with. It is loose, as layers need not line up, and it holds everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.errors import UnsupportedOperation
from .head import LMHead
from .scopes import widened

__all__ = ["CONSTANTS", "layer_product"]

#: largest slope of SiLU, at x = 2.399, where its second derivative is 0; rounded up
SILU = 1.0998394
#: that of GELU is at √2; its tanh form has a slightly larger one
GELU = {"none": 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.pi**0.5, "tanh": 1.1291}

#: class of a layer -> its Lipschitz constant in the Euclidean norm, a number or a function of the layer; add your own
CONSTANTS: dict[type[nn.Module], float | Callable[[Any], float]] = {
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten), 1.0),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid), 1.0),
    nn.Sigmoid: 0.25,
    nn.SiLU: SILU,
    nn.GELU: lambda layer: GELU[layer.approximate],
    nn.LeakyReLU: lambda layer: max(1.0, abs(layer.negative_slope)),
    nn.ELU: lambda layer: max(1.0, abs(layer.alpha)),
    nn.Dropout: lambda layer: 1 / (1 - layer.p) if layer.training and layer.p < 1 else 1.0,
}


def layer_product(network: nn.Module, head: LMHead | None = None) -> Tensor:
    """Πₗ cₗ of a network, differentiable in its weights.

    Costs the singular values of every weight, which are exact, and no forward.

    Args:
        network: an ``nn.Linear``, a layer in :data:`CONSTANTS`, or an ``nn.Sequential`` of such, nested or not. A class
            of your own is known once ``CONSTANTS[Class]`` holds its Lipschitz constant.
        head: a further linear layer at the end, with its scale; a softcap has slope 1 at most.

    Returns:
        A scalar, in float32 for lower dtypes.

    Raises:
        UnsupportedOperation: a layer's constant is not known.
    """
    product = _constant(network)
    if head is not None:
        product = product * abs(head.scale) * _norm(head.weight)
    return product if isinstance(product, Tensor) else torch.tensor(product)


def _constant(layer: nn.Module) -> Any:
    if _runs_as(layer, nn.Sequential):
        return math.prod((_constant(child) for child in layer.children()), start=1.0)
    if _runs_as(layer, nn.Linear):
        return _norm(layer.weight)
    for kind in type(layer).__mro__:
        if kind in CONSTANTS and _runs_as(layer, kind):
            constant = CONSTANTS[kind]
            return constant(layer) if callable(constant) else constant
    raise UnsupportedOperation(
        f"the Lipschitz constant of {type(layer).__name__} is not known: put it into "
        "aajr_kernels.method.lipschitz.CONSTANTS, or bound ‖J‖₂ at points with method 'spectral'."
    )


def _runs_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is one, and of the same forward: a subclass may do something else."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _norm(weight: Any) -> Tensor:
    return torch.linalg.matrix_norm(widened(weight), 2)
