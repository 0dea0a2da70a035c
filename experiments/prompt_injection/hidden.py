"""The attack on a hidden layer: its output at the injected text is moved, the layers below are as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aajr_kernels.dual import is_dual
from aajr_kernels.method.evaluation import Found, HiddenAttack, Scene


@dataclass(frozen=True)
class LayerAttack:
    """Normalised steps on what is added to the output of a decoder layer, a ball for every open token.

    Attributes:
        at: number of the layer.
        radius: in root mean square norms of the layer's output at the attended tokens behind the shared context; a
            ``HiddenAttack(relative=True)`` counts those of the injection only.
        steps: of the ascent.
        step_size: in radii.
    """

    at: int
    radius: float
    steps: int
    step_size: float
    name = "hidden"

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """The largest losses on the way; nothing is drawn."""
        (model,) = scene.modules
        whole: Any = model
        layer = whole.get_base_model().model.layers[self.at]
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, args, output: outputs.append(_plain(output)))
        try:
            scene.losses(scene.x)
        finally:
            hook.remove()
        (output,) = outputs
        attended = scene.batch.masks[1, :, scene.start :]
        unit = float(output.double()[attended].square().sum(-1).mean().sqrt())
        sizes = (self.step_size,)
        attack = HiddenAttack(layer, self.radius * unit, relative=False, steps=self.steps, step_sizes=sizes)
        return attack.run(scene, generator)


def _plain(output: Any) -> Tensor:
    """The tensor that a layer returned, without tangents, which are none here."""
    first = output[0] if isinstance(output, tuple) else output
    values: Tensor = first.primal if is_dual(first) else first
    return values
