"""Parallel styles of torch that refuse every non-Tensor, in forms that accept a Dual.

``ColwiseParallel``, ``RowwiseParallel`` and ``PrepareModuleOutput`` accept a Dual unchanged. ``SequenceParallel`` and
``PrepareModuleInput`` first ask ``isinstance(x, torch.Tensor)``, which a Dual is not, before they call anything that a
rule could be registered for. The subclasses here change only that test; for plain tensors they are the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import PrepareModuleInput as _PrepareModuleInput
from torch.distributed.tensor.parallel import PrepareModuleInputOutput as _PrepareModuleInputOutput
from torch.distributed.tensor.parallel import SequenceParallel as _SequenceParallel

from ...dual import is_dual

__all__ = ["PrepareModuleInput", "PrepareModuleInputOutput", "SequenceParallel"]


class SequenceParallel(_SequenceParallel):
    """``torch.distributed.tensor.parallel.SequenceParallel`` for tensors and Duals; the same arguments."""

    @staticmethod
    def _prepare_input_fn(
        sequence_sharding: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        x = inputs[0]
        if not is_dual(x):
            return _SequenceParallel._prepare_input_fn(sequence_sharding, mod, inputs, device_mesh)
        if not hasattr(x, "placements"):
            return DTensor.from_local(x, device_mesh, sequence_sharding, run_check=False)
        return x if x.placements == sequence_sharding else x.redistribute(placements=sequence_sharding)


class PrepareModuleInput(_PrepareModuleInput):
    """``torch.distributed.tensor.parallel.PrepareModuleInput`` for tensors and Duals; the same arguments."""

    def _prepare_input_arg(self, input: Any, mesh: DeviceMesh, input_layout: Any, desired_layout: Any) -> Any:
        if not is_dual(input) or input_layout is None:
            return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
        x: Any = input
        if not hasattr(x, "placements"):
            x = DTensor.from_local(x, mesh, (input_layout,), run_check=False)
        if desired_layout is not None and input_layout != desired_layout:
            x = x.redistribute(placements=(desired_layout,))
        return x.to_local() if self.use_local_output else x


class PrepareModuleInputOutput(_PrepareModuleInputOutput):
    """``torch.distributed.tensor.parallel.PrepareModuleInputOutput`` for tensors and Duals; the same arguments."""

    def __init__(
        self,
        *,
        input_layouts: Any = None,
        desired_input_layouts: Any = None,
        input_kwarg_layouts: Any = None,
        desired_input_kwarg_layouts: Any = None,
        use_local_input: bool = False,
        **outputs: Any,
    ) -> None:
        inputs = dict(
            input_layouts=input_layouts,
            desired_input_layouts=desired_input_layouts,
            input_kwarg_layouts=input_kwarg_layouts,
            desired_input_kwarg_layouts=desired_input_kwarg_layouts,
        )
        super().__init__(**inputs, use_local_input=use_local_input, **outputs)
        self.prepare_module_input = PrepareModuleInput(**inputs, use_local_output=use_local_input)
