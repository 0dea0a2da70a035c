"""Places inside a model where an adversary adds its perturbation, by hooks, and layers that run once below them.

What comes before the first place does not depend on δ. The layers there run once for a micro-batch, with their graph,
and return what they returned in every later call: constants in an attack, attached in losses and penalty.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...autocast import autocasting
from ...backends.errors import UnsupportedOperation
from ...coverage import paused
from ...dual import Dual, dual, is_dual
from ...method.attack_state import RandomState, frozen_parameters, parameters_are_frozen
from ...method.checks import as_mask
from ...method.places import EMBEDDING, At, Opened
from ...method.scopes import widened
from ...rules.registry import install_guards
from ...torch_private import pytree, version_of
from ...transforms import uncompiled
from .context_checks import check_embeddings
from .context_hooks import is_sharded
from .place_hooks import Perturbed, PlacesRecorded, Recorder
from .place_names import layer_lists, resolved

__all__ = ["Places", "opened_at"]

#: relative differences between layers that run once and in every call, which rounding makes
_WIDE, _LOW = 1e-3, 0.1


class Places:
    """Opens places of a model; the ``places`` of a :class:`~aajr_kernels.training.Policy`.

    Args:
        model: any module; its hooks, adapters and checkpoints stay as they are.
        at: see :func:`~aajr_kernels.training.policy_of`.

    Attributes:
        names: of the places, in their order.

    Raises:
        TypeError, ValueError: `at` names no places.
    """

    def __init__(self, model: nn.Module, at: At) -> None:
        self.model = model
        self.modules = resolved(model, at)
        self.names = tuple(self.modules)
        self.layers = [layer for part in layer_lists(model).values() for layer in part]
        inside = [*(m for m in self.modules.values() if m is not None), *self.layers]
        self.around = [part for part in model.modules() if any(m in inside for m in part.modules())]
        #: whether layers below the first place may be left out, once that is known
        self.skips: bool | None = None

    def __repr__(self) -> str:
        return f"Places({', '.join(self.names)})"

    @uncompiled  # other hooks in every step
    def __call__(
        self,
        x: Tensor,
        forward: Callable[..., Any],
        *,
        tokens: Tensor | None = None,
        relative: bool = True,
        **inputs: Any,
    ) -> Opened:
        """Open the places for one micro-batch, in a forward that ends after the last of them.

        With dropout, what is below the first place has one mask for the whole micro-batch, in attacks in eval mode too.
        The first call for a model compares calls without the layers below with calls of the whole; where they differ,
        all layers run in all calls.

        Args:
            x: embeddings ``[B, N, C]``, attached where they have a gradient.
            forward: of a policy, or a context that it shares; called as ``forward(x, **inputs)``.
            tokens: ``[B, N]``, nonzero = counts for the units; None for all.
            relative: perturbations count in norms of a token: the root mean square of the norms of these tokens'
                clean activations at the place. False: in units of the activations.
            inputs: further arguments of the model.

        Raises:
            TypeError: a place does not return hidden states.
            ValueError: a place returns them for other tokens than those of `x`; no forward reaches it.
            UnsupportedOperation: the parameters are sharded; a place runs twice, or inside a checkpoint that is none of
                transformers.
        """
        check_embeddings(x)
        if is_sharded(self.model):
            raise UnsupportedOperation(
                f"places {', '.join(self.names)} must be in a model whose parameters are whole: train it under "
                f"DistributedDataParallel, or attack at {EMBEDDING!r}."
            )
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            x = x.clone() if x.is_inference() else x
            opened = _Opened(self, x, forward, tokens, relative, inputs)
            if self.skips is None:
                self.skips = not opened.skipped or self._agrees(opened, inputs)
            if not self.skips:
                opened.skipped = {}
        return opened

    def _agrees(self, opened: _Opened, inputs: dict[str, Any]) -> bool:
        """Whether values and a directional derivative are the same without the layers below."""
        whole = copy.copy(opened)
        whole.skipped = {}
        random = RandomState(opened.x.device)
        generator = torch.Generator("cpu").manual_seed(0)
        point, v = (torch.randn(opened.x.shape, generator=generator).to(opened.x) / 8 for _ in range(2))
        limit = _WIDE
        try:
            with torch.no_grad(), paused(), frozen_parameters((self.model,), True):
                # the layers ran in training mode: with the dropout of that they would differ
                again = _Opened(self, *opened.arguments)
                expected = _first(whole(dual(point, v), **inputs))
                got = _first(again(dual(point, v), **inputs))
                is_low = expected.dtype not in (torch.float32, torch.float64)
                limit = _LOW if is_low or autocasting(point.device.type) else _WIDE
        except Exception:  # whatever a layer leaves behind that a later one looks for
            return False
        finally:
            random.restore()
        return all(
            float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) <= limit
            for a, b in ((got.primal, expected.primal), (got.tangent, expected.tangent))
        )


class _Opened:
    """See :class:`~aajr_kernels.method.places.Opened`."""

    def __init__(
        self,
        places: Places,
        x: Tensor,
        forward: Callable[..., Any],
        tokens: Tensor | None,
        relative: bool,
        inputs: dict[str, Any],
    ) -> None:
        self.arguments = (x, forward, tokens, relative, inputs)
        self._places, self._forward, self._clean = places, forward, x
        self._rows, self._length = x.shape[:2]
        self._has_graph = torch.is_grad_enabled() and not parameters_are_frozen()
        self._needs_graph = x.requires_grad
        self._versions = self._parameter_versions()
        recorder = Recorder(places.model, places.modules, places.layers, places.around)
        install_guards()
        with contextlib.suppress(PlacesRecorded):
            # a number without tangents: the operations of later calls, not PyTorch's
            recorder.run(lambda: forward(Dual(x.unsqueeze(0)), **inputs))
        outputs = {name: x if m is None else recorder.outputs.get(name) for name, m in places.modules.items()}
        for name, output in outputs.items():
            self._check(name, output)
        self.skipped = {} if EMBEDDING in outputs else recorder.below
        self.widths: tuple[int, ...] = tuple(output.shape[-1] for output in outputs.values())  # type: ignore[union-attr]
        keep = None if tokens is None else self._checked_tokens(tokens)
        self.units = torch.stack([_unit(output, keep) for output in outputs.values()])
        if not relative:
            self.units = torch.ones_like(self.units)
        count, width = len(outputs), max(self.widths)
        # the dtype of the embeddings, by whose rounding an ascent judges its steps
        self.x = x.new_zeros(self._rows, count * self._length, width)
        index = torch.arange(count, device=x.device).repeat_interleave(self._length)
        self.index = index.expand(self._rows, -1)

    def spread(self, values: Tensor) -> Tensor:
        """The same values at every place."""
        if tuple(values.shape[:2]) != (self._rows, self._length):
            raise ValueError(
                f"values must be [B, N, ...] = [{self._rows}, {self._length}, ...] like the tokens, got "
                f"{tuple(values.shape)}."
            )
        return values.repeat(1, len(self.widths), *(1,) * (values.dim() - 2))

    def attackable(self, mask: Tensor | None) -> Tensor | None:
        """The mask at every place, with channels where widths differ."""
        every = None if mask is None else self.spread(mask)
        if len(set(self.widths)) == 1:
            return every
        widths = torch.tensor(self.widths, device=self.x.device)[self.index].unsqueeze(-1)
        channels = torch.arange(self.x.shape[-1], device=self.x.device) < widths
        return channels if every is None else channels & (every != 0).unsqueeze(-1)

    def of_rows(self, rows: Tensor) -> _Opened:
        """The same for some rows."""
        part = copy.copy(self)
        count = self._rows

        def selected(leaf: Any) -> Any:
            is_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
            return leaf[rows.to(leaf.device)] if is_row else leaf

        for name in ("_clean", "x", "index"):
            setattr(part, name, selected(getattr(self, name)))
        part.skipped = pytree.tree_map(selected, self.skipped)
        part._rows = len(rows)
        return part

    @uncompiled
    def __call__(self, delta: Any, **inputs: Any) -> Any:
        """The model with δ added.

        Raises:
            TypeError, ValueError: `delta` is no tensor or Dual ``[n·B, P·N, C]``.
            RuntimeError: the places were opened without a graph, or with other parameters than those of now.
        """
        if not is_dual(delta) and not isinstance(delta, Tensor):
            raise TypeError(f"delta must be a tensor or a Dual, got {type(delta).__name__}.")
        shape = tuple(self.x.shape)
        if delta.dim() != 3 or tuple(delta.shape[1:]) != shape[1:] or delta.shape[0] % max(self._rows, 1):
            raise ValueError(
                f"delta must be {shape}, or several times its rows, got {tuple(delta.shape)}: take the .x of these "
                "places."
            )
        is_attack = parameters_are_frozen() or not torch.is_grad_enabled()
        self._check_graph(is_attack)
        repeats = delta.shape[0] // max(self._rows, 1)
        constant = functools.partial(_constant, rows=self._rows, repeats=repeats, detached=is_attack)
        # the operations of a loss are those of a number without tangents, not PyTorch's
        is_number = isinstance(delta, Dual) and not delta.num_tangents
        recorded = (lambda leaf: _number(constant(leaf))) if is_number else constant
        units = self.units.detach() if is_attack else self.units
        added: dict[str, Any] = {}
        for place, (name, width) in enumerate(zip(self._places.names, self.widths)):
            start = place * self._length
            added[name] = delta[:, start : start + self._length, :width] * units[place].to(delta.dtype)
        x: Any = recorded(self._clean)
        if EMBEDDING in added:
            x = x + added[EMBEDDING].to(x.dtype)
        install_guards()
        places = self._places
        skipped = {layer: pytree.tree_map(recorded, output) for layer, output in self.skipped.items()}
        run = Perturbed(places.model, places.modules, places.around, added, skipped)
        return run.run(lambda: self._forward(x, **inputs))

    def _check(self, name: str, output: Any) -> None:
        if output is None:
            raise ValueError(
                f"at must name modules that the policy calls, got {name}, which its forward did not call: it may be "
                "the head, which is streamed, or a part of a fused module."
            )
        if output.dim() != 3 or tuple(output.shape[:2]) != (self._rows, self._length):
            raise ValueError(
                f"{name} must return hidden states [B, N, C] = [{self._rows}, {self._length}, C], got "
                f"{tuple(output.shape)}: name a module that returns one vector per token."
            )

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
        keep = as_mask(tokens, "tokens", "counts for the units")
        if tuple(keep.shape) != (self._rows, self._length):
            raise ValueError(
                f"tokens must be [B, N] = [{self._rows}, {self._length}], got {tuple(keep.shape)}."
            )
        return keep.to(self._clean.device)

    def _check_graph(self, is_attack: bool) -> None:
        if self._versions != self._parameter_versions():
            raise RuntimeError(
                "the parameters of the model changed after its places were opened: open them for every training step."
            )
        if is_attack or self._has_graph:
            return
        if self._needs_graph or any(p.requires_grad for p in self._places.model.parameters()):
            raise RuntimeError(
                "the places were opened without a graph, under torch.no_grad() or inside an attack, and x or the "
                "parameters need its gradients: open them where gradients are on."
            )

    def _parameter_versions(self) -> int:
        return sum(version_of(p) for p in self._places.model.parameters() if not p.is_inference())


def opened_at(model: nn.Module, at: At) -> Places | None:
    """The places of a policy; None for the embedding, where nothing has to be opened.

    Raises:
        TypeError, ValueError: `at` names no places.
    """
    places = Places(model, at)
    return None if places.names == (EMBEDDING,) else places


def _constant(leaf: Any, rows: int, repeats: int, detached: bool) -> Any:
    """A tensor of the batch for several points of it, detached in an attack."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach() if detached else leaf
    is_row = leaf.dim() > 0 and leaf.shape[0] == rows and repeats > 1
    return leaf.repeat(repeats, *(1,) * (leaf.dim() - 1)) if is_row else leaf


def _number(leaf: Any) -> Any:
    """A floating-point tensor as a number without tangents."""
    return Dual(leaf.unsqueeze(0)) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _unit(output: Any, keep: Tensor | None) -> Tensor:
    """Root mean square of the norms of the kept tokens ``[B, N, C]``."""
    squares = widened(output).square().sum(-1)
    if keep is None:
        return squares.mean().sqrt()
    return (torch.where(keep, squares, 0.0).sum() / keep.sum().clamp(min=1)).sqrt()


def _first(output: Any) -> Any:
    """Hidden states or logits of what a policy's forward returned."""
    for name in ("last_hidden_state", "logits"):
        output = getattr(output, name, output)
    return output
