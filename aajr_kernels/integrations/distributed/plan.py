"""Tensor parallelism of a Hugging Face model by the styles of torch, from the plan that its configuration carries."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["axis_of", "tensor_parallel"]


def tensor_parallel(model: nn.Module, mesh: Any, axis: str = "tensor") -> nn.Module:
    """Split the layers of a Hugging Face causal language model, and its vocabulary, over an axis of a mesh.

    ``torch.distributed.tensor.parallel.parallelize_module`` with ``ColwiseParallel`` and ``RowwiseParallel`` as the
    model's configuration says (``base_model_tp_plan``), and ``ColwiseParallel`` for a linear head with weights of its
    own. Norms and residuals stay whole; for SequenceParallel write the plan yourself (docs/distributed.md). Call it
    before ``fully_shard``, which takes another axis.

    Args:
        model: with the same parameters in all processes; changed in place.
        mesh: of one axis, or with an axis of that name.
        axis: its name.

    Returns:
        The model.

    Raises:
        ValueError: the mesh lacks the axis, or the heads of the attention cannot be shared evenly.
        TypeError: the configuration has no plan, or one with styles that torch does not have.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    over = axis_of(mesh, axis)
    config: Any = getattr(model, "config", None)
    layer_styles = getattr(config, "base_model_tp_plan", None)
    body = getattr(model, "base_model", None)
    if not layer_styles or body is None:
        raise TypeError(
            f"model must carry a plan (config.base_model_tp_plan), got {type(model).__name__} without: call "
            "parallelize_module with a plan of yours."
        )
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    unknown = sorted(set(layer_styles.values()) - styles.keys())
    if unknown:
        raise TypeError(
            f"model must be split by columns and rows, got the styles {', '.join(unknown)} in the plan of "
            f"{type(model).__name__}: call parallelize_module with a plan of yours."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % over.size():
            raise ValueError(
                f"mesh must share {name}={heads} evenly, got {over.size()} processes on its axis: take a divisor."
            )
    start = "" if body is model else f"{model.base_model_prefix}."
    plan: dict[str, ParallelStyle] = {start + name: styles[style]() for name, style in layer_styles.items()}
    head, table = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input"))
    if isinstance(head, nn.Linear) and head.weight is not getattr(table, "weight", None):
        plan[next(name for name, module in model.named_modules() if module is head)] = ColwiseParallel()
    return parallelize_module(model, over, plan)


def axis_of(mesh: Any, axis: str) -> Any:
    """The axis of that name, or the mesh itself if it has only one.

    Raises:
        ValueError: there is none.
    """
    names = tuple(mesh.mesh_dim_names or ())
    if axis in names:
        return mesh[axis]
    if mesh.ndim == 1 and not names:
        return mesh
    raise ValueError(
        f"mesh must have an axis {axis!r}, got the axes {names or mesh.ndim}: name it in init_device_mesh(..., "
        "mesh_dim_names=...), or give axis=."
    )
