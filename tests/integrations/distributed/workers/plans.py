"""How the small models are spread by the parallel styles of torch."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from aajr_kernels.integrations.distributed import PrepareModuleInput, SequenceParallel


def plan_of(name: str, sequence: bool) -> dict[str, Any]:
    """Columns, rows and vocabulary; with `sequence` norms and residuals split along the sequence too."""
    where = "layers.*." if name == "hand" else "model.layers.*."
    attention, mlp = ("", "") if name == "hand" else ("self_attn.", "mlp.")
    q, o = (("q", "k", "v"), "o") if name == "hand" else (("q_proj", "k_proj", "v_proj"), "o_proj")
    up, down = (("up",), "down") if name == "hand" else (("gate_proj", "up_proj"), "down_proj")
    norms = ("norm1", "norm2") if name == "hand" else ("input_layernorm", "post_attention_layernorm")
    # by hand nothing but the layers themselves is there to gather the sequence
    columns = dict(input_layouts=Shard(1)) if sequence and name == "hand" else {}
    rows = dict(output_layouts=Shard(1)) if sequence else {}
    plan: dict[str, Any] = {}
    for n in q:
        plan[where + attention + n] = ColwiseParallel(**columns)
    for n in up:
        plan[where + mlp + n] = ColwiseParallel(**columns)
    plan[where + attention + o] = RowwiseParallel(**rows)
    plan[where + mlp + down] = RowwiseParallel(**rows)
    plan["head" if name == "hand" else "lm_head"] = ColwiseParallel()
    if not sequence:
        return plan
    for n in norms:
        plan[where + n] = SequenceParallel()
    plan["norm" if name == "hand" else "model.norm"] = SequenceParallel()
    plan[where.replace("*", "0").rstrip(".")] = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    if name != "hand":
        plan[where + "self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        plan[where + "mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        )
    return plan
