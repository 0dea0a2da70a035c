"""The number: a primal with K tangents, stored as one tensor stacked along a new leading axis.

A :class:`Dual` flows through unmodified model code. Every torch function called on it is looked up in
:mod:`aajr_kernels.rules.registry`; without a rule it raises. Reverse mode is ordinary autograd over ``stacked``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .backends.errors import UnsupportedOperation, unsupported
from .coverage import function_name, record, record_unsupported, recording
from .rules import registry
from .rules.leaving import array_ufunc, leave, refuse_array
from .torch_private import pytree

__all__ = ["Dual", "dual", "is_dual", "unpack"]


def dispatch(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rule: Callable[..., Any] | None = None,
) -> Any:
    """Apply the rule of `func` to arguments of which at least one is or contains a Dual.

    Raises:
        UnsupportedOperation: `func` has no rule, or was called with ``out=``.
    """
    if torch.compiler.is_compiling():
        registry.guard_compiled()
    rule = rule or registry.RULES.get(func)
    if rule is None:
        name = function_name(func)
        if torch.compiler.is_compiling() and name in registry.TRACED:
            return registry.TRACED[name](*args, **kwargs)
        if recording():
            record_unsupported(name)
        if isinstance(func, torch.ScriptMethod):  # of torch.jit.script and trace
            unsupported(
                "a module of TorchScript has no derivative rule for a Dual: call the module that torch.jit was given."
            )
        unsupported(
            f"{name} has no derivative rule for a Dual: replace it, call it on y.primal where no tangent is wanted, "
            "or register one with aajr_kernels.rules.rule."
        )
    if kwargs or not _is_plain(args):
        rule, args, kwargs = registry.settled(func, rule, args, kwargs)
    result = rule(*args, **kwargs)
    if recording():
        _record(func, result)
    return result


#: types of arguments that are taken as they are
_PLAIN = {int, bool, float, str, type(None), torch.Size, torch.dtype, slice, type(...)}
_TENSORS = {torch.Tensor, torch.nn.Parameter}


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether there are only real tensors and numbers, as mostly: ``registry.settled`` has nothing to do."""
    for x in args:
        kind = type(x)
        if kind is Dual or kind in _TENSORS:
            if (x.stacked if kind is Dual else x).is_complex():
                return False
        elif kind not in _PLAIN and not (kind is tuple and _is_plain(x)):
            return False
    return True


def _record(func: Callable[..., Any], result: Any) -> None:
    if (kind := registry.KINDS[func]) == "op":
        return
    flops = 0.0
    if kind != "view" and not torch.compiler.is_compiling():  # lengths may be symbols
        leaves = pytree.tree_leaves(result, is_leaf=is_dual)
        flops = float(sum(leaf.stacked.numel() for leaf in leaves if isinstance(leaf, Dual)))
    record(function_name(func), kind, flops)


@dataclass(eq=False, repr=False)
class Dual:
    """A value and its K directional derivatives.

    Attributes:
        stacked: ``[1 + K, *shape]``; ``stacked[0]`` is the primal, ``stacked[1:]`` are the tangents. Floating point,
            or complex between the real input and the real output of a computation.

    Every ``torch.Tensor`` method and operator is available and acts on primal and tangents by its rule. Properties
    such as ``shape``, ``dtype`` and ``device`` are those of the primal. Comparisons and integer results are plain
    tensors. ``detach()`` and ``.data`` return the plain primal. So do ``item()``, ``tolist()``, ``float()``, ``int()``,
    ``bool()`` and formatting, as Python numbers, which leave the tangent behind without a word: :class:`strict` makes
    them raise. NumPy's scalars count as Python numbers, on either side of an operator; its arrays do not mix.
    """

    stacked: torch.Tensor

    if TYPE_CHECKING:  # the methods and properties that are attached below

        def __getattr__(self, name: str) -> Any: ...

    # -- the parts ----------------------------------------------------------------------------------------------

    @property
    def primal(self) -> torch.Tensor:
        """The value, shape ``[*shape]``, attached to the graph."""
        return self.stacked[0]

    @property
    def tangents(self) -> torch.Tensor:
        """All K directional derivatives, shape ``[K, *shape]``, attached to the graph."""
        return self.stacked[1:]

    @property
    def tangent(self) -> torch.Tensor:
        """The directional derivative of a Dual with one tangent, shape ``[*shape]``.

        Raises:
            ValueError: the Dual carries more than one tangent.
        """
        if self.num_tangents != 1:
            raise ValueError(
                f"tangent is defined for one tangent, this Dual has {self.num_tangents}: use tangents."
            )
        return self.stacked[1]

    @property
    def num_tangents(self) -> int:
        """K, the number of directions."""
        return self.stacked.shape[0] - 1

    # -- what torch asks of a tensor ------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        return self.stacked.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stacked.ndim - 1

    def dim(self) -> int:
        return self.stacked.dim() - 1

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        strides = self.stacked.stride()[1:]
        return strides if dim is None else strides[dim]

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return self.stacked.is_contiguous() if memory_format == torch.contiguous_format else False

    @property
    def nbytes(self) -> int:
        return self.numel() * self.element_size()

    def data_ptr(self) -> int:
        return self.stacked.data_ptr()

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError(
                "len() of a 0-dimensional Dual: torch.tensor, torch.as_tensor and torch.nested take a Dual apart like "
                "a list; leave them out, a Dual is a tensor already, and has no rule for nested tensors."
            )
        return self.shape[0]

    def __iter__(self) -> Any:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-dimensional Dual.")
        return iter(self.unbind(0))

    # -- autograd -------------------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        return self.stacked.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.stacked.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Dual:
        self.stacked.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> Dual | None:
        return None if self.stacked.grad is None else Dual(self.stacked.grad)

    def retain_grad(self) -> None:
        self.stacked.retain_grad()

    def backward(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedOperation(
            "backward() of a Dual is ambiguous: call it on a loss made of y.primal and y.tangents."
        )

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        raise UnsupportedOperation(
            "register_hook on a Dual is ambiguous: register it on y.stacked, whose gradient is [1 + K, *shape]."
        )

    def detach(self) -> torch.Tensor:
        return self.stacked[0].detach()

    data = property(detach)

    # -- leaving the number ---------------------------------------------------------------------------------------

    def item(self) -> Any:
        leave("item()")
        return self.primal.item()

    def tolist(self) -> Any:
        leave("tolist()")
        return self.primal.tolist()

    def __float__(self) -> float:
        leave("float()")
        return float(self.primal)

    def __int__(self) -> int:
        leave("int()")
        return int(self.primal)

    def __bool__(self) -> bool:
        leave("bool()")
        return bool(self.primal)

    def __format__(self, spec: str) -> str:
        if self.ndim or not spec:
            return repr(self)
        leave("a format")
        return format(self.primal.item(), spec)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_array()

    numpy = __array__

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return array_ufunc(ufunc, method, *inputs, **kwargs)

    def __repr__(self) -> str:
        head = f"Dual(shape={tuple(self.shape)}, num_tangents={self.num_tangents}, dtype={self.dtype}"
        head += f", device={self.device}" if self.device.type != "cpu" else ""
        head += ", requires_grad=True" if self.requires_grad else ""
        if self.stacked.is_meta or self.stacked.numel() > 64:
            return head + ")"
        parts = self.stacked.detach()
        return f"{head},\n  primal={parts[0]},\n  tangents={parts[1:]})"

    __hash__ = object.__hash__


def _forward_property(name: str) -> property:
    return property(
        lambda self: getattr(self.stacked, name), doc=f"``{name}``, the same for primal and tangents."
    )


for _name in """
dtype device layout is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized is_mps is_xpu is_nested is_mkldnn is_xla
is_vulkan is_ipu is_maia is_mtia itemsize output_nr retains_grad is_leaf grad_fn _version
""".split():
    setattr(Dual, _name, _forward_property(_name))


def _forward_method(name: str) -> Callable[..., Any]:
    return lambda self: getattr(self.stacked, name)()


for _name in ("is_floating_point", "is_complex", "get_device", "element_size"):
    setattr(Dual, _name, _forward_method(_name))


def _method(name: str) -> Callable[..., Any]:
    func = getattr(torch.Tensor, name)

    @functools.wraps(func, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def method(self: Dual, *args: Any, **kwargs: Any) -> Any:
        return dispatch(func, (self, *args), kwargs, registry.METHODS.get(name))

    return method


def _transpose_property(name: str) -> property:
    func = getattr(torch.Tensor, name).__get__
    return property(lambda self: dispatch(func, (self,), {}), doc=f"``{name}`` of primal and tangents.")


# Attributes of the class machinery, and what must not be forwarded because object's own behaviour is wanted.
_OWN = {
    "__class__", "__dict__", "__dir__", "__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__hash__",
    "__init__", "__init_subclass__", "__new__", "__subclasshook__", "__reduce__", "__reduce_ex__", "__setstate__",
    "__getstate__", "__deepcopy__", "__sizeof__", "__str__", "__weakref__", "__torch_dispatch__", "__module__",
    "__doc__", "__class_getitem__", "__dlpack__", "__dlpack_device__", "__cuda_array_interface__",
    "__array_priority__", "__array_wrap__",
}  # fmt: skip

for _name in ("T", "mT", "H", "mH", "real", "imag"):
    setattr(Dual, _name, _transpose_property(_name))
for _name in dir(torch.Tensor):
    if _name in _OWN or _name in Dual.__dict__ or not callable(getattr(torch.Tensor, _name)):
        continue
    setattr(Dual, _name, _method(_name))


def flatten_dual(x: Dual) -> tuple[list[Any], int | None]:
    return [x.stacked], x.stacked.dim() if isinstance(x.stacked, torch.Tensor) else None


def unflatten_dual(children: Any, ndim: int | None) -> Dual:
    (stacked,) = children
    if ndim is not None and isinstance(stacked, torch.Tensor) and stacked.dim() != ndim:
        raise UnsupportedOperation(
            "torch.func.vmap cannot map over a Dual, whose first axis is the stack: pass x and v, build the Dual "
            "inside the mapped function, and return its primal and tangents."
        )
    return Dual(stacked)


pytree.register_pytree_node(
    Dual,
    flatten_dual,
    unflatten_dual,
    serialized_type_name="aajr_kernels.Dual",
    flatten_with_keys_fn=lambda x: ([(pytree.GetAttrKey("stacked"), x.stacked)], flatten_dual(x)[1]),
)


def is_dual(x: object) -> bool:
    """Whether `x` is a Dual."""
    return isinstance(x, Dual)


def num_tangents(*values: Any) -> int:
    """K of the Duals among `values`, 0 if there is none (or only Duals that are a primal without tangents).

    Raises:
        ValueError: the Duals carry different numbers of tangents.
    """
    k = None
    for value in values:
        if isinstance(value, Dual):
            its = value.stacked.shape[0] - 1
            if k is not None and its != k:
                raise ValueError(
                    f"Duals with {k} and {its} tangents meet in one operation: build them with the same number of "
                    "directions."
                )
            k = its
    return k or 0


def stack_of(x: Any) -> Any:
    """The stacked tensor of a Dual, a plain tensor with a leading axis of one (no tangents), None for None."""
    if isinstance(x, Dual):
        return x.stacked
    return None if x is None else x.unsqueeze(0)


def dual(x: torch.Tensor, v: torch.Tensor) -> Dual:
    """A Dual with primal `x` and direction(s) `v`.

    Args:
        x: primal of any shape, floating point.
        v: one direction shaped like `x`, or K directions ``[K, *x.shape]``; dtype and device of `x`.

    Returns:
        Dual: gradients of its results reach both `x` and `v`.

    Raises:
        TypeError: an argument is not a tensor, is already a Dual, or has an integer or another dtype.
        ValueError: shapes or devices do not agree, or K is 0.
    """
    v = _directions(x, v)
    registry.install_guards()
    return Dual(torch.cat([x.unsqueeze(0), v]))


def _directions(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`v` as ``[K, *x.shape]``, after the checks that :func:`dual` promises for both."""
    for name, value in (("x", x), ("v", v)):
        if isinstance(value, Dual):
            raise TypeError(f"{name} is already a Dual: nested duals are not supported, pass {name}.primal.")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
        if not value.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {value.dtype}: a Dual is real; for token ids start "
                "at the embedding with aajr_kernels.inject."
            )
    if v.dtype != x.dtype:
        raise TypeError(f"v must have the dtype of x ({x.dtype}), got {v.dtype}: cast it with v.to(x.dtype).")
    if v.device != x.device:
        raise ValueError(
            f"v must be on the device of x ({x.device}), got {v.device}: move it with v.to(x.device)."
        )
    if v.shape == x.shape:
        v = v.unsqueeze(0)
    elif v.shape[1:] != x.shape or v.dim() != x.dim() + 1:
        raise ValueError(
            f"v must have the shape of x {tuple(x.shape)} or [K, *x.shape] for K directions, got {tuple(v.shape)}."
        )
    if v.shape[0] == 0:
        raise ValueError("v must hold at least one direction, got K = 0.")
    return v


def unpack(x: Dual | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Primal and tangent of a Dual (``[K, *shape]`` when K > 1), or ``(x, None)`` for a plain tensor."""
    if not isinstance(x, Dual):
        return x, None
    return x.primal, x.tangent if x.num_tangents == 1 else x.tangents
