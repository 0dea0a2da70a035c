"""The oracle of whole models: float64 forward mode of PyTorch on hand-written layers, and finite differences.

Nothing here imports anything of this package: the tests and ``aajr validate --model`` measure it against this. The
oracle runs the unmodified model under ``torch.func.jvp`` and takes an ordinary gradient of a loss on its tangents.
PyTorch's own reverse-over-forward is silently wrong through ``layer_norm`` and through ``batch_norm`` in training mode,
and gives NaN through a masked attention with an empty row. `HandWritten` therefore replaces every norm,
``scaled_dot_product_attention`` and the grouped product by formulas made of elementary operations; what it cannot
reach (inside ``F.multi_head_attention_forward``) runs under MATH attention. `KeepFloat64` neutralises the casts to
float32 that model code makes, so that a float64 model stays float64 and errors of 1e-10 can be seen.
`finite_difference` checks the oracle itself, from values of the penalty only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

METRICS = ("l2", "logits", "fisher", "probs")


# ---------------------------------------------------------------------------------------- hand-written layers
def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - m(x)) / sqrt(m((x - m(x))^2) + eps) over ``dims``."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * ((centred * centred).mean(dims, keepdim=True) + eps).pow(-0.5)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``F.layer_norm`` from elementary operations."""
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardise(x, dims, eps), weight, bias, tuple(normalized_shape))


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` from elementary operations."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * ((x * x).mean(dims, keepdim=True) + eps).pow(-0.5)
    return y if weight is None else y * weight


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``F.group_norm`` from elementary operations."""
    rows = x.reshape(x.shape[0], num_groups, -1)
    y = _standardise(rows, (-1,), eps).reshape(x.shape)
    return _affine(y, weight, bias, (1, -1) + (1,) * (x.dim() - 2))


def _channel_norm(
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    own_statistics: bool,
    dims: tuple[int, ...],
    eps: float,
) -> Tensor:
    """Norm of the channels on axis 1, by their statistics over ``dims`` or by the running ones (never updated)."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if own_statistics:
        return _affine(_standardise(x, dims, eps), weight, bias, shape)
    x = (x - mean.reshape(shape)) * (var.reshape(shape) + eps).pow(-0.5)
    return _affine(x, weight, bias, shape)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm`` from elementary operations."""
    dims = tuple(range(2, x.dim()))
    return _channel_norm(x, running_mean, running_var, weight, bias, use_input_stats, dims, eps)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` from elementary operations."""
    dims = (0, *range(2, x.dim()))
    return _channel_norm(x, running_mean, running_var, weight, bias, training, dims, eps)


def _affine_first(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For ``torch.batch_norm`` and ``torch.instance_norm``: weight and bias stand before the statistics."""

    def reordered(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Tensor:
        return norm(x, mean, var, weight, bias, *rest[:3])  # without cudnn_enabled

    return reordered


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` from elementary operations; a row with nothing to attend to gives zeros."""
    if dropout_p:
        raise NotImplementedError("The oracle's attention has no dropout: call the model in eval mode.")
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    return masked_softmax(scores, allowed.tril() if is_causal else allowed, attn_mask) @ v


def masked_softmax(scores: Tensor, allowed: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis of what `allowed` and a boolean or additive mask leave; an empty row gives zeros."""
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask != -math.inf)
        scores = scores + torch.where(mask == -math.inf, torch.zeros_like(mask), mask)
    # disallowed scores are replaced before exp and their weights zeroed after it, so that nothing is ever inf - inf
    top = scores.detach().masked_fill(~allowed, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)
    weights = torch.exp(torch.where(allowed, scores - top, 0.0)) * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """``F.grouped_mm`` of a 2-D with a 3-D operand as a loop of products (the kernel has no float64)."""
    if offs is None or a.dim() != 2 or b.dim() != 3:
        raise NotImplementedError("The oracle's grouped_mm takes a 2-D and a 3-D operand with offsets.")
    ends = [0, *offs.tolist()]
    parts = [a[start:end] @ b[i] for i, (start, end) in enumerate(pairwise(ends))]
    return torch.cat(parts) if bias is None else torch.cat(parts) + bias


_LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: _affine_first(instance_norm),
    F.batch_norm: batch_norm,
    torch.batch_norm: _affine_first(batch_norm),
    F.scaled_dot_product_attention: attention,
}
#: the builtin behind F.grouped_mm, which has no gate for torch functions
if hasattr(torch, "_grouped_mm"):
    _LAYERS[torch._grouped_mm] = grouped_mm


class HandWritten(TorchFunctionMode):
    """Replaces norms, attention and the grouped product by the formulas above while it is active."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _LAYERS.get(func, func)(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------- float64 throughout
_LOW = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64}
_LOW_NAMES = {f"torch.{kind}Tensor": "torch.DoubleTensor" for kind in ("Float", "Half", "BFloat16")}
_LOW_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


def _widened(value: Any) -> Any:
    """``value`` with every low float dtype in it replaced by float64."""
    if isinstance(value, torch.dtype):
        return _LOW.get(value, value)
    if isinstance(value, str):
        return _LOW_NAMES.get(value, value)
    if type(value) in (tuple, list):
        return type(value)(_widened(item) for item in value)
    return value


_DTYPE_METHODS = (
    "to", "type", "sum", "mean", "prod", "cumsum", "cumprod", "nansum", "nanmean", "norm", "softmax", "log_softmax",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
)  # fmt: skip


class KeepFloat64(TorchFunctionMode):
    """Turns every cast to a lower float dtype, explicit or as a ``dtype=`` option, into one to float64.

    Arguments that are not tensors but implement ``__torch_function__`` pass through to their own implementation.
    The default dtype is float64 while the mode is active, so that new tensors follow.

    Args:
        classes: tensor-like classes whose own methods (``x.to(torch.float32)``) torch never sees; their casts are
            neutralised too while the mode is active.
    """

    def __init__(self, *classes: type) -> None:
        super().__init__()
        self._classes = classes

    def __enter__(self) -> KeepFloat64:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        self._patches = ExitStack()
        for cls in self._classes:
            for name in _DTYPE_METHODS:
                self._replace(cls, name, self._widening(getattr(cls, name)))
            for name in ("float", "half", "bfloat16"):
                self._replace(cls, name, getattr(cls, "double"))  # noqa: B009
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        torch.set_default_dtype(self._default)

    def _replace(self, cls: type, name: str, method: Callable[..., Any]) -> None:
        self._patches.callback(setattr, cls, name, getattr(cls, name))
        setattr(cls, name, method)

    @staticmethod
    def _widening(method: Callable[..., Any]) -> Callable[..., Any]:
        def widened(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(
                self, *map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()}
            )

        return widened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOW_CASTS:
            return Tensor.double(args[0])
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(_widened(arg) for arg in args), **kwargs)


@contextmanager
def oracle_mode(float64: bool = True) -> Iterator[None]:
    """Hand-written layers, MATH attention elsewhere and (``float64``) no casts to lower float dtypes."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if float64:
            stack.enter_context(KeepFloat64())
        stack.enter_context(HandWritten())
        yield


# ----------------------------------------------------------------------------------------------------- penalty
def metric_values(z: Tensor, z_tan: Tensor, metric: str) -> Tensor:
    """Squared size of the tangents: q [K, ...] from z [..., V] and z_tan [K, ..., V].

    l2 and logits: sum z_tan^2. With p = softmax(z), mu = sum p z_tan: fisher: sum p (z_tan - mu)^2;
    probs: sum p^2 (z_tan - mu)^2.
    """
    if metric in ("l2", "logits"):
        return (z_tan * z_tan).sum(-1)
    p = torch.exp(z - z.logsumexp(-1, keepdim=True))
    centred = z_tan - (p * z_tan).sum(-1, keepdim=True)
    if metric == "fisher":
        return (p * centred * centred).sum(-1)
    if metric == "probs":
        return (p * p * centred * centred).sum(-1)
    raise ValueError(f"metric is one of {METRICS}, got {metric!r}.")


def mean_over_units(q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of q [K, ...] over its tangents and over the units with True in ``mask``."""
    if mask is None:
        return q.mean()
    return (q * mask).sum() / (q.shape[0] * mask.sum())


def jvp(func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangents [K, ...] of ``func`` at ``x`` along v [K, *x.shape], one ``torch.func.jvp`` a tangent."""
    pairs = [torch.func.jvp(func, (x,), (direction,))[:2] for direction in v.unbind(0)]
    return pairs[0][0], torch.stack([tangent for _, tangent in pairs])


# ----------------------------------------------------------------------------------------- finite differences
@torch.no_grad()
def finite_difference(
    value: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    step: float = 1e-3,
) -> float:
    """Derivative of ``value()`` along ``directions`` of ``leaves``, by fourth-order central differences.

    Leaves are moved in place and put back. Error about step^4 plus 1e-16 / step of the value.
    """
    saved = {name: leaves[name].detach().clone() for name in directions}

    def at(shift: float) -> float:
        for name, direction in directions.items():
            leaves[name].copy_(saved[name] + shift * direction)
        return value().item()

    try:
        return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    finally:
        for name, original in saved.items():
            leaves[name].copy_(original)
