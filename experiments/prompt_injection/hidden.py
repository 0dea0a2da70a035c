"""The attack on a hidden layer: its output at the injected text is moved, the layers below are as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aajr_kernels import ascend
from aajr_kernels.dual import is_dual
from aajr_kernels.method.evaluation import Found, Scene


@dataclass(frozen=True)
class LayerAttack:
    """Normalised steps on what is added to the output of a decoder layer, a ball for every open token.

    Attributes:
        at: number of the layer.
        radius: in root mean square norms of the layer's output at the attended tokens of the batch.
        steps: of the ascent.
        step_size: in radii.
    """

    at: int
    radius: float
    steps: int
    step_size: float
    name = "hidden"

    def run(self, scene: Scene, generator: torch.Generator | None = None) -> Found:
        """The largest losses on the way; nothing is drawn."""
        (model,) = scene.modules
        whole: Any = model
        layer = whole.get_base_model().model.layers[self.at]
        outputs: list[Any] = []
        handle = layer.register_forward_hook(lambda module, args, output: outputs.append(_first(output)))
        try:
            scene.losses(scene.x)
        finally:
            handle.remove()
        output = _plain(outputs[-1])  # of the tokens that are not in a shared context
        _, attended, attackable = (mask[:, -output.shape[1] :] for mask in scene.batch.masks)
        unit = float(output.double()[attended].square().sum(-1).mean().sqrt())

        def loss(delta: Tensor) -> Tensor:
            handle = layer.register_forward_hook(
                lambda module, args, output: _changed(output, _first(output) + delta)
            )
            try:
                losses: Tensor = scene.loss(scene.x)
                return losses
            finally:
                handle.remove()

        radius = self.radius * unit
        traj = ascend(
            *(loss, torch.zeros_like(output)),
            radius=radius,
            steps=self.steps,
            step_size=self.step_size * radius,
            scope="token",
            mask=attackable,
            module=scene.modules,
            eval_mode=True,
        )
        curve = traj.losses.cummax(0).values
        return Found(curve[-1], curve, traj.evaluations)


def _first(output: Any) -> Any:
    """The tensor, or the Dual, that a layer returned."""
    return output[0] if isinstance(output, tuple) else output


def _plain(output: Any) -> Tensor:
    """Without its tangents, which are none here."""
    values: Tensor = output.primal if is_dual(output) else output
    return values


def _changed(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first
