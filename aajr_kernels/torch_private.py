"""Every private part of torch that the package reaches, and what each relies on per version of torch.

The bottom of the package: it imports torch only, and no other module names anything of torch that starts with an
underscore (``tests/test_torch_private.py`` reads the sources). To add something:

1. Give it one function or name here, said in the package's terms: ``break_graph``, not ``torch._dynamo``. What differs
   between versions differs here, never at the caller. Look for the part itself (``hasattr``, ``isinstance``) where that
   tells the versions apart, else compare :data:`VERSION`.
2. Write into its docstring what it relies on, in which versions, and what happens where that is missing. A part without
   which a gradient would be lost raises; one that only improves a message is left out.
3. Test it where its caller is tested. The suite runs on every version of :data:`TESTED`.

One other module overrides private methods, where its classes stand: ``integrations/distributed/styles.py`` has
``_prepare_input_fn`` and ``_prepare_input_arg`` of torch's parallel styles, the same in torch 2.11-2.15.

Nothing here imports ``torch._dynamo``, which takes a second: functions that need it find it loaded.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch._lowrank
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.hooks import BackwardHook

_F = TypeVar("_F", bound=Callable[..., Any])

#: first and last minor version of torch on which the suite found all values and gradients right
TESTED = ((2, 11), (2, 15))
#: minor version of torch, from ``torch.__version__`` without its local part
VERSION: tuple[int, int] = tuple(int(part) for part in torch.__version__.split(".")[:2])  # type: ignore[assignment]


def is_tested() -> bool:
    """Whether this torch lies in the range on which the suite has passed."""
    return TESTED[0] <= VERSION <= TESTED[1]


def tested_range() -> str:
    """The range, for messages: ``"2.11 to 2.15"``."""
    return " to ".join(".".join(map(str, version)) for version in TESTED)


# -- functions and types: names that torch 2.11-2.15 have -------------------------------------------------------------

#: nested containers of tensors
pytree = _pytree

#: builtins behind ``torch.nn.functional``, and those behind ``torch``
NN: Any = torch._C._nn
VARIABLE_FUNCTIONS: Any = torch._C._VariableFunctions

#: the product over groups of transformers' mixtures of experts
GROUPED_MM: Callable[..., torch.Tensor] = torch._grouped_mm

#: resampling with anti-aliasing: the operator, and the builtin behind ``F.interpolate``
UPSAMPLE_BILINEAR_AA: tuple[Any, Any] = (torch.ops.aten._upsample_bilinear2d_aa, NN._upsample_bilinear2d_aa)

#: reads and adds by index where a mask allows it; what Inductor's decompositions of pooling and resampling are made of
MASKED_INDEX: Any = torch._unsafe_masked_index
MASKED_INDEX_PUT: Any = torch._unsafe_masked_index_put_accumulate

#: softmax whose rows of −inf are zeros; ``torch.compile`` makes it of attention's weights
SAFE_SOFTMAX: Any = torch.ops.aten._safe_softmax

#: training's batch norm as one operator
BATCH_NORM_WITH_UPDATE: Any = torch.ops.aten._batch_norm_with_update

#: the module of ``svd_lowrank`` and ``pca_lowrank``, which torch writes in Python
LOW_RANK: Any = torch._lowrank

#: asked by ``nn.TransformerEncoder``: whether its padding suits the nested fast path
NESTED_MASK_FITS: Callable[..., bool] = torch._nested_tensor_from_mask_left_aligned

#: the class of dropout modules
DROPOUT: type[torch.nn.Module] = torch.nn.modules.dropout._DropoutNd

#: norms of modules with running statistics
RUNNING_NORMS: type[torch.nn.Module] = torch.nn.modules.batchnorm._NormBase

#: Functions in which ``DTensor.from_local`` and ``torch.distributed.nn.functional.all_reduce`` end, by qualified name
FROM_LOCAL = "torch.distributed.tensor._api._FromTorchTensor"
ALL_REDUCE = "torch.distributed.nn.functional._AllReduce"

#: ``(condition, message)``: an assertion on a device, without waiting for it
assert_async: Callable[[torch.Tensor, str], None] = torch._assert_async

#: how cuBLAS forms products of float32: ``torch.backends.cuda.matmul.fp32_precision`` of torch 2.11-2.15 without the
#: Python around it, five times as fast
matmul_precision: Callable[[], str] = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def has_memory(t: torch.Tensor) -> bool:
    """Whether the tensor is what it seems: no subclass that intercepts operations."""
    return type(t).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def version_of(t: torch.Tensor) -> int:
    """How often the tensor's memory was written in place, views of it included; inference tensors do not count it.

    Relies on, in torch 2.11-2.15: ``Tensor._version``.
    """
    return t._version


#: how many ``TorchDispatchMode`` see the operators of torch that run now; in torch 2.11-2.15
has_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

#: innermost hooks on saved tensors or None, of a checkpoint for one; where a module has its compiled call; 2.11-2.15
saved_tensor_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
COMPILED_CALL = "_compiled_call_impl"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its forward: hooks of it or of all modules, or compiled code.

    Torch 2.11-2.15: dictionaries of hooks by these names, ``torch.nn.modules.module._has_any_global_hook``.
    """
    return bool(torch.nn.modules.module._has_any_global_hook()) or _is_hooked(module)


def unhooked(module: torch.nn.Module) -> list[torch.nn.Module] | None:
    """The modules inside, at any depth, or None where one :func:`has_hooks`; for code that asks at every call.

    Torch 2.11-2.15: the same dictionaries, and ``_modules``.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return None
    inside = [part for part in module._modules.values() if part is not None]
    for part in inside:  # which grows
        if _is_hooked(part):
            return None
        inside += [child for child in part._modules.values() if child is not None]
    return inside


def _is_hooked(module: torch.nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(forward or backward or module._compiled_call_impl is not None)


# -- autograd ---------------------------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Whether this thread runs a backward: one that another thread starts on its device would wait for it.

    Relies on, in torch 2.11-2.15: ``torch._C._current_graph_task_id()``, -1 outside.
    """
    return torch._C._current_graph_task_id() != -1


_SEEN = "_aajr_sees_arguments"  # an attribute of the functions that replace torch's, and of classes without a guard

#: whether torch.func transforms what runs now; in torch 2.11-2.15
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: of a tensor that a transform of torch.func left behind, what is in it; other tensors as they are; in torch 2.11-2.15
alive: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.unwrap_if_dead


def bare_apply(cls: type) -> Callable[..., Any]:
    """``apply`` of an ``autograd.Function`` that is given no Dual, without the Python of torch and of guards around it.

    Only where :func:`transforms_active` is false, and for arguments that are :func:`alive`: before torch 2.14 it sees
    to neither.

    Relies on, in torch 2.11-2.15: ``torch._C._FunctionBase.apply``, a classmethod in C.
    """
    setattr(cls, _SEEN, True)
    apply: Callable[..., Any] = torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)
    return apply


def in_transform(*tensors: torch.Tensor) -> bool:
    """Whether torch.func transforms what runs now, or a tensor has a tangent of ``torch.autograd.forward_ad``.

    Relies on, in torch 2.11-2.15: ``torch._C._are_functorch_transforms_active()``.
    """
    return transforms_active() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def watch_functions(call: Callable[..., Any], check: Callable[[type, tuple[Any, ...]], None]) -> None:
    """Have every ``autograd.Function`` see its arguments first, also through an ``apply`` bound before. Idempotent.

    Relies on, in torch 2.11-2.15: ``Function.apply`` may be assigned (a classmethod in Python to 2.13, a descriptor in
    C from 2.14 on); every call of it makes a ``BackwardCFunction``, which knows its class as ``_forward_cls``, before
    it looks up the class's ``forward``. An ``apply`` bound earlier is the original one and cannot be replaced: its
    class's ``forward`` is, when the first such call has made its context.

    Args:
        call: takes the original ``apply`` of a class, the class and all arguments, and returns the result.
        check: takes a class and the positional arguments of its ``forward``; raises where they may not be.
    """
    original = inspect.getattr_static(torch.autograd.Function, "apply")
    if getattr(getattr(original, "__func__", None), _SEEN, False):
        return
    # .cls: the class whose `apply` has seen its arguments and made no context yet
    current = threading.local()

    def seen(cls: type, *args: Any, **kwargs: Any) -> Any:
        current.cls = cls
        try:
            return original.__get__(None, cls)(*args, **kwargs)
        finally:
            current.cls = None

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return call(functools.partial(seen, cls), cls, *args, **kwargs)

    setattr(apply, _SEEN, True)
    apply.__doc__ = original.__get__(None, torch.autograd.Function).__doc__
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]

    def made(ctx: BackwardCFunction, *args: Any, **kwargs: Any) -> None:
        cls = getattr(ctx, "_forward_cls", None)
        if hasattr(cls, _SEEN):
            return
        if cls is getattr(current, "cls", None):
            current.cls = None  # `forward` may call other Functions
        elif cls is not None and issubclass(cls, torch.autograd.Function):
            _watch_forward(cls, check)

    BackwardCFunction.__init__ = made  # type: ignore[method-assign,assignment]


def _watch_forward(cls: type, check: Callable[[type, tuple[Any, ...]], None]) -> None:
    forward = cls.forward  # type: ignore[attr-defined]
    if getattr(forward, _SEEN, False):
        return

    @functools.wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(cls, (*args, *kwargs.values()))
        return forward(*args, **kwargs)

    setattr(checked, _SEEN, True)
    cls.forward = staticmethod(checked)  # type: ignore[attr-defined]


def watch_backward_hooks(wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
    """Replace what attaches a module's full backward hooks to its inputs and outputs. Idempotent.

    Relies on, in torch 2.11-2.15: ``torch.utils.hooks.BackwardHook`` with ``setup_input_hook(values)``,
    ``setup_output_hook(values)`` and ``module``.

    Args:
        wrap: makes the replacement of a method, from the method and ``"input"`` or ``"output"``.
    """
    for name, place in (("setup_input_hook", "input"), ("setup_output_hook", "output")):
        original = getattr(BackwardHook, name)
        if not hasattr(original, _SEEN):
            replacement = wrap(original, place)
            setattr(replacement, _SEEN, True)
            setattr(BackwardHook, name, replacement)


def lazy_clone(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` that is made when one of the two is written.

    Relies on, in torch 2.11-2.15: ``torch._lazy_clone``, which raises a RuntimeError for memory that torch did not
    allocate itself, and for classes of tensors without it. There the copy is made at once; so it is of a part of a
    larger memory, all of which a write would copy.
    """
    try:
        return torch._lazy_clone(x) if x.untyped_storage().nbytes() == x.nbytes else x.clone()
    except (AttributeError, RuntimeError):
        return x.clone()


#: qualified name of the Function that keeps the arguments of a non-reentrant checkpoint in torch 2.11; gone in 2.12
CHECKPOINT_SAVER = "torch.utils.checkpoint._NoopSaveInputs"


def on_recomputation(saver: torch.Tensor, restore: Callable[[list[Any]], list[Any]]) -> None:
    """Have a checkpoint call its function again with ``restore(arguments)``.

    Relies on, in torch 2.11: the result of :data:`CHECKPOINT_SAVER` has a node, unless gradients are off, whose
    ``get_args(saved_tensors)`` gives its own arguments but the first, a dummy.
    """
    node: Any = saver.grad_fn
    if node is not None:
        get_args = node.get_args
        node.get_args = lambda saved: restore(get_args(saved))


def pass_weight_of_l1_loss() -> None:
    """Have ``F.l1_loss`` hand its ``weight`` to ``__torch_function__``, which torch leaves out of the call. Idempotent.

    Relies on, in torch 2.11-2.15: ``l1_loss`` calls ``handle_torch_function(l1_loss, (input, target, weight), ...)`` of
    its module. A torch that passes the weight is left as it is by the wrapper.
    """
    original = F.handle_torch_function  # type: ignore[attr-defined]
    if hasattr(original, _SEEN):
        return

    @functools.wraps(original)
    def handle(function: Any, operands: Any, *args: Any, **kwargs: Any) -> Any:
        if function is F.l1_loss and len(operands) == 3 and len(args) < 6:
            kwargs.setdefault("weight", operands[2])
        return original(function, operands, *args, **kwargs)

    setattr(handle, _SEEN, True)
    F.handle_torch_function = handle  # type: ignore[attr-defined]


# -- control flow -----------------------------------------------------------------------------------------------------


def watch_control_flow(watched: dict[str, Callable[..., Any]]) -> None:
    """Have functions of torch's control flow, ``torch.cond`` and its like, see their arguments first. Idempotent.

    Relies on, in torch 2.11-2.15: each lies in the module of its name in ``torch._higher_order_ops``, which
    ``import torch`` loads, and is found by that name there, in the package and in ``torch``. One that this torch lacks
    is left out; one bound by its user before raises errors of torch's own.

    Args:
        watched: name of a function -> called in its place, with the function and its arguments.
    """
    for name, call in watched.items():
        module = sys.modules.get(f"torch._higher_order_ops.{name}")
        original = getattr(module, name, None)
        if original is None or hasattr(original, _SEEN):
            continue
        replacement = _calling(call, original)
        setattr(replacement, _SEEN, True)
        for owner in (module, torch._higher_order_ops, torch):
            if getattr(owner, name, None) is original:
                setattr(owner, name, replacement)


def _calling(call: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return call(original, *args, **kwargs)

    return replacement


# -- multi-head attention ---------------------------------------------------------------------------------------------


def watch_multi_head_attention(
    call: Callable[..., Any], dtype_of: Callable[[Any], torch.dtype | None]
) -> list[Callable[..., Any]]:
    """Have ``F.multi_head_attention_forward`` see all its arguments first. Idempotent.

    Relies on, in torch 2.11-2.15: nn.MultiheadAttention and nn.Transformer* find that function and ``_none_or_dtype``,
    which refuses masks that are no Tensor, in ``torch.nn.functional``; torch.jit.script compiles what
    ``__prepare_scriptable__`` of a function returns.

    Args:
        call: called with the function and its arguments.
        dtype_of: takes the place of ``_none_or_dtype``.

    Returns:
        The functions that now go by that name, none where they did before.
    """
    original = F.multi_head_attention_forward
    if hasattr(original, _SEEN):
        return []

    forward = _calling(call, original)
    replaced: dict[str, Callable[..., Any]] = {original.__name__: forward, "_none_or_dtype": dtype_of}
    for name, function in replaced.items():
        before = getattr(F, name)
        function.__prepare_scriptable__ = lambda before=before: before  # type: ignore[attr-defined]
        setattr(function, _SEEN, True)
        setattr(F, name, function)
    return [forward]


# -- torch.compile ----------------------------------------------------------------------------------------------------

#: in ``TRACED`` of rules/registry.py: what Dynamo calls in place of non-reentrant checkpointing, in torch 2.11-2.15
TRACED_CHECKPOINT = "torch.tag_activation_checkpoint"


def break_graph(message: str) -> None:
    """While torch.compile traces: what follows cannot be traced. With ``fullgraph=True`` that is an error.

    Relies on, in torch 2.11-2.15: ``torch._dynamo.graph_break(msg)``, whose text reaches the user.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=message)


def mark_constant(function: _F) -> _F:
    """Mark a function that torch.compile runs while it traces, and whose result it takes as a constant.

    Relies on, in torch 2.11-2.15: the attribute that ``torch.compiler.assume_constant_result`` sets, and that is all it
    does, beside importing the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def separate_outputs() -> None:
    """Have no compiled ``autograd.Function`` return a tensor twice, which costs it its gradient. Idempotent.

    Relies on, in torch 2.11: Dynamo makes each intermediate of a traced ``forward`` an output of the higher
    order operator that stands for the Function. An operation that returns what it was given (``mul_``, ``out=``,
    ``contiguous``, ``to``) makes one tensor two outputs; autograd sends its whole gradient to the last of them, where
    the traced ``backward`` does not look: silently zeros, on every backend of torch.compile. The operator
    is not cached, so that no compiled code from before remains. From 2.12 on Dynamo returns what is used only.
    """
    if VERSION >= (2, 12):
        return
    operator = type(torch.ops.higher_order.autograd_function_apply)
    original = operator.__call__
    if hasattr(original, _SEEN):
        return

    @functools.wraps(original)
    def call(self: Any, fwd: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        return original(self, _separating(fwd), *args, **kwargs)

    setattr(call, _SEEN, True)
    operator.__call__ = call  # type: ignore[method-assign]


def _separating(fwd: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`fwd`, which returns outputs and what is saved, with an alias in place of an output that came before."""
    graph = torch.fx.Graph()
    results = graph.graph_copy(fwd.graph, {})
    graph.output(graph.call_function(_separate, (results,)))
    return torch.fx.GraphModule(fwd, graph)


def _separate(results: tuple[Any, Any]) -> tuple[Any, Any]:
    outputs, saved = results
    seen: set[int] = set()
    separated = []
    for output in outputs:
        if isinstance(output, torch.Tensor):
            output = output.detach() if id(output) in seen else output
            seen.add(id(output))
        separated.append(output)
    return tuple(separated), saved
