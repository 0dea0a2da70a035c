"""The attack on hidden states: ascents on what is added to the outputs of modules inside the model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dual import Dual, is_dual
from ..attack_state import frozen_parameters
from ..batch import norm_at
from ..places import changed, first_of
from ..scopes import widened
from ..trajectory import Trajectory
from .embedding import ascents_of, check_ascents, found_by
from .scene import Found, Scene

__all__ = ["HiddenAttack"]

#: a module, its dotted name, or a list of modules, which stands for all of its entries
Place = nn.Module | str


@dataclass(frozen=True, eq=False)
class HiddenAttack:
    """Projected gradient ascent on what is added to outputs of modules, the largest loss at any point of any ascent.

    A module returns a tensor ``[B, N, C]``, or a tuple that starts with one, and runs once in a forward.

    Attributes:
        at: modules inside the model, their dotted names, or a ModuleList for all of its entries; one or several.
        radius: of the ball of every group of the scope.
        relative: `radius` counts in norms of a hidden state, of every place its own: the root mean square of the norms
            of its clean outputs at the tokens open to attack (those of a first token can be a hundred times
            larger). False: in the units of the outputs.
        steps: of every ascent.
        step_sizes: one ascent for each, in radii; or ``"auto"``, see :func:`~aajr_kernels.ascend`.
        restarts: of every ascent: the first from the clean outputs, the others from uniform draws.
        scope: ``"token"``: every token at every place in a ball of its own; ``"sequence"``: all places of a row
            together; ``"agent"``: every place of a row.
        step: of :func:`~aajr_kernels.ascend`.
    """

    at: Place | Sequence[Place]
    radius: float = 0.1
    relative: bool = True
    steps: int = 20
    step_sizes: tuple[float | str, ...] = (0.5, 0.125)
    restarts: int = 1
    scope: str = "token"
    step: str = "normalized"

    #: name of its results in an evaluation
    name = "hidden"

    def __post_init__(self) -> None:
        several = [self.at] if isinstance(self.at, (nn.Module, str)) else self.at
        if not isinstance(several, Sequence) or not several:
            raise ValueError(f"at must name a module or several, got {self.at!r}.")
        for place in several:
            if not isinstance(place, (nn.Module, str)):
                raise TypeError(
                    f"at must hold modules or their dotted names, got {type(place).__name__}: a layer by its number is "
                    "model.model.layers[number]."
                )
        object.__setattr__(self, "at", tuple(several))
        check_ascents(self)

    def ascents(self, scene: Scene, generator: torch.Generator) -> list[Trajectory]:
        """One for every step size, each of what is added: ``[B, P·N, C]``, the tokens of one place after the other.

        Raises:
            ValueError: a place is not in the model, runs more than once in a forward or not at all, or its output is no
                ``[B, N, C]``.
            TypeError: a place does not return a tensor.
        """
        opened = _Opened(scene, _modules(scene, self.at), self.relative)  # type: ignore[arg-type]
        return ascents_of(
            scene,
            scene.losses_through(opened.around, opened.x),
            opened.x,
            radius=self.radius,
            steps=self.steps,
            step_sizes=self.step_sizes,
            step=self.step,
            scope=self.scope,
            agents=opened.index,
            restarts=self.restarts,
            mask=opened.mask,
            generator=generator,
        )

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """The largest losses; `generator` draws the starts."""
        return found_by(self.ascents(scene, generator), more=1)


class _Opened:
    """The policy's forward as a function of what is added at P places, whose outputs were recorded once.

    Attributes:
        x: zeros ``[B, P·N, C]``, C the largest width of a place.
        index: ``[B, P·N]``, the number of the place.
        mask: bool, ``[B, P·N]``, open to attack, or ``[B, P·N, C]`` where places have several widths.
    """

    def __init__(self, scene: Scene, modules: dict[str, nn.Module], relative: bool) -> None:
        self.scene, self.modules = scene, modules
        outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

        def record(name: str, output: Any) -> Any:
            first = first_of(output, name)
            outputs[name].append((first.primal if is_dual(first) else first).detach())
            return output

        with torch.no_grad(), frozen_parameters(scene.modules, True), self._hooks(record):
            scene.loss(scene.x)
        rows, tokens = scene.labels.shape
        behind = tokens - scene.start
        for name, several in outputs.items():
            if len(several) != 1:
                raise ValueError(
                    f"{name} must run once in a forward of the model, ran {len(several)} times: name one that "
                    "does."
                )
            shape = tuple(several[0].shape)
            if len(shape) != 3 or shape[:2] != (rows, behind):
                raise ValueError(
                    f"{name} must return [B, N, C] = [{rows}, {behind}, ...], got {shape}: name a module that does."
                )
        states = [several[0] for several in outputs.values()]
        at = scene.mask[:, scene.start :]
        self.units = [float(norm_at(state, at)) if relative else 1.0 for state in states]
        self.widths = [state.shape[-1] for state in states]
        like = widened(states[0])
        self.x = like.new_zeros(rows, len(states) * tokens, max(self.widths))
        numbers = torch.arange(len(states), device=like.device).repeat_interleave(tokens)
        self.index = numbers.expand(rows, -1)
        self.mask = scene.mask.repeat(1, len(states))
        if len(set(self.widths)) > 1:
            channels = torch.arange(max(self.widths), device=like.device)
            inside = channels < torch.tensor(self.widths, device=like.device)[numbers].unsqueeze(-1)
            self.mask = self.mask.unsqueeze(-1) & inside

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of the batch as it is, as a function of what is added, ``[B, P·N, C]``."""
        tokens, start = self.scene.labels.shape[1], self.scene.start
        x = self.scene.x[:, start:]
        places = {name: i for i, name in enumerate(self.modules)}

        def opened(delta: Any, **inputs: Any) -> Any:
            def add(name: str, output: Any) -> Any:
                place = places[name]
                own = slice(place * tokens + start, (place + 1) * tokens)
                added = delta[:, own, : self.widths[place]] * self.units[place]
                return changed(output, lambda y: y + added.to(y.dtype), name)

            with self._hooks(add):
                # the operations of a number without tangents are those of the loss (:func:`~aajr_kernels.lm_loss`)
                return forward(Dual(x.unsqueeze(0)) if is_dual(delta) else x, **inputs)

        return opened

    @contextlib.contextmanager
    def _hooks(self, change: Callable[[str, Any], Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                hook = lambda _, args, output, name=name: change(name, output)
                stack.callback(module.register_forward_hook(hook).remove)
            yield


def _modules(scene: Scene, at: Sequence[Place]) -> dict[str, nn.Module]:
    """The places by name, in their order.

    Raises:
        ValueError: one is not in the model, or twice in the list.
    """
    known = {name: module for whole in scene.modules for name, module in whole.named_modules() if name}
    names = {id(module): name for name, module in known.items()}
    named: list[tuple[str, nn.Module]] = []
    for place in at:
        module = known.get(place) if isinstance(place, str) else place
        if module is None or id(module) not in names:
            near = difflib.get_close_matches(str(place), known, 3, 0.3) if isinstance(place, str) else []
            shown = repr(place) if isinstance(place, str) else type(place).__name__
            remedy = f": {', '.join(near)} are" if near else ": pass the model that holds it as module="
            raise ValueError(
                f"at must name modules inside the model, got {shown}, which is not there{remedy}."
            )
        if isinstance(module, nn.ModuleList):
            named += [(names[id(entry)], entry) for entry in module]
        else:
            named.append((names[id(module)], module))
    places = dict(named)
    if len(places) != len(named):
        raise ValueError(f"at must name every module once, got {', '.join(name for name, _ in named)}.")
    return places
