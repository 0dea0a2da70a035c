"""Several processes on torch.distributed: DDP, FSDP2, tensor parallelism, checkpoints (docs/distributed.md).

torch.distributed is imported at the first use of a name.
"""

from typing import Any

from ...method.wrapped import inside
from ...rules.guards import linear_function
from . import head, ops  # noqa: F401  registers the ops on shards
from .checkpoint import TrainingState
from .plan import tensor_parallel

__all__ = ["TrainingState", "inside", "linear_function", "tensor_parallel"]
__all__ += ["PrepareModuleInput", "PrepareModuleInputOutput", "SequenceParallel"]  # imported below


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import styles  # subclasses of torch's, which have to be imported

        return getattr(styles, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
