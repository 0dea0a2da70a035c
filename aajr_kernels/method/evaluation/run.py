"""Evaluation: all attacks on all batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import sharding
from ...backends.errors import UnsupportedOperation
from ..attack_state import modules_of
from ..batch import Prepared, prepared
from ..checks import check_integers
from ..policy import Policy
from .result import Evaluation
from .scene import Found, Scene

__all__ = ["EvaluationAttack", "evaluate", "generator_of", "scenes_of"]

Progress = Callable[[int, int | None, str], None]


class EvaluationAttack(Protocol):
    """An attack: :class:`EmbeddingAttack`, :class:`TokenSubstitution` and the others, or one of your own."""

    @property
    def name(self) -> str:
        """Name of its results in an evaluation."""

    def run(self, scene: Scene, generator: torch.Generator) -> Found:
        """Attack one batch; all that is drawn comes from `generator`."""


def evaluate(
    policy: Policy,
    batches: Any,
    attacks: Iterable[EvaluationAttack] | Mapping[str, EvaluationAttack],
    *,
    module: nn.Module | Iterable[nn.Module] | None,
    loss: Any = None,
    shift_labels: bool = True,
    share_context: bool | str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Losses of a model on batches as they are, and under attacks.

    Args:
        policy: how the model is called (:func:`~aajr_kernels.training.policy_of`).
        batches: one batch or an iterable of them, with the entries that :func:`~aajr_kernels.training.fit` takes:
            ``input_ids`` or ``inputs_embeds``, ``labels``, ``attention_mask``, ``attack_mask``, ``agents`` and more for
            the model.
        attacks: in a sequence, called by their names, or in a mapping with names of your own, for several of a kind.
        module: the model(s) inside `policy`: in eval mode during the evaluation, and their parameters need no
            gradient; all is put back afterwards. None for a function without state.
        loss: what the adversary maximises and the evaluation reports, of :mod:`aajr_kernels.method.objectives` or an
            object of your own whose ``of(policy, batch, x)`` returns a function from inputs like the clean `x` to
            ``[B]``; by default the mean cross-entropy of every row's labels.
        shift_labels: labels are the tokens themselves; position t learns that at t + 1.
        share_context: the tokens before the first that is open to attack in any row run once per batch
            (:func:`~aajr_kernels.integrations.transformers.shared_context`): ``"auto"`` where they are an eighth of the
            sequence and it is possible; True raises where it is not. Not with `loss`.
        seed: of what the attacks draw. Results of an attack do not depend on which others run, nor a batch's on the
            batches before it.
        progress: called as ``progress(done, total, text)`` before every attack on every batch, and at the end; `total`
            is None where the number of batches is not known.

    Returns:
        Evaluation: the losses of all rows, in the order of the batches.

    Raises:
        TypeError, ValueError: an argument or an entry of a batch has a wrong type, shape or value; a row has no label;
            a batch has no token open to attack.
        UnsupportedOperation: parameters of `module` are spread over processes.
        NonFiniteLoss: a loss is NaN or infinite.
    """
    check_integers(0, seed=seed)
    named = _named(attacks)
    groups = _several(batches)
    total = len(groups) * len(named) if isinstance(groups, Sized) else None
    tell = progress or (lambda done, total, text: None)
    found: dict[str, list[Found]] = {name: [] for name in named}
    clean: list[Tensor] = []
    for index, scene in enumerate(scenes_of(policy, groups, module, loss, shift_labels, share_context)):
        with torch.inference_mode(False):
            clean.append(scene.losses(scene.x))
            for place, (name, attack) in enumerate(named.items()):
                tell(index * len(named) + place, total, name)
                found[name].append(attack.run(scene, generator_of(seed, index)))
    if not clean:
        raise ValueError("batches must hold at least one batch, got none.")
    tell(len(clean) * len(named), total, "")
    return Evaluation.of(clean, found)


def scenes_of(
    policy: Policy,
    batches: Any,
    module: Any,
    loss: Any = None,
    shift_labels: bool = True,
    share_context: bool | str = "auto",
) -> Iterator[Scene]:
    """The scenes of the batches, one after the other; arguments of :func:`evaluate`.

    Raises:
        TypeError, ValueError, UnsupportedOperation: see there.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a Policy, got {type(policy).__name__}: make one with policy_of(model)."
        )
    modules = modules_of(module, _check_whole)
    device = next((p.device for one in modules for p in one.parameters()), None)
    try:
        several = iter(_several(batches))
    except TypeError as error:
        raise TypeError(
            f"batches must be a batch or an iterable of batches, got {type(batches).__name__}."
        ) from error
    for batch in several:
        with torch.inference_mode(False):
            scene = Scene(
                policy, _prepared(batch, device, shift_labels), modules, loss, shift_labels, share_context
            )
        yield scene


def _several(batches: Any) -> Any:
    """A batch as a list of one."""
    return [batches] if isinstance(batches, (Mapping, Tensor, Prepared)) else batches


def generator_of(seed: int, batch: int) -> torch.Generator:
    """Of what an attack draws for the batch of this index, whatever was drawn before."""
    mixed = random.Random(f"{seed}/{batch}").getrandbits(32)  # a CPU's generator has no more bits of a seed
    return torch.Generator().manual_seed(mixed)


def _named(attacks: Any) -> dict[str, Any]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Iterable):
        several = list(attacks)
        names = [getattr(attack, "name", type(attack).__name__) for attack in several]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"attacks of one kind must have names of their own, got {', '.join(twice)} more than once: pass a "
                "mapping from names to attacks."
            )
        named = dict(zip(names, several))
    else:
        raise TypeError(
            f"attacks must be a sequence or a mapping of attacks, got {type(attacks).__name__}: pass [attack]."
        )
    for name, attack in named.items():
        if isinstance(attack, type) or not callable(getattr(attack, "run", None)):
            raise TypeError(
                f"attacks must hold attacks such as EmbeddingAttack(), got {attack!r} for {name!r}: pass objects with "
                "run(scene, generator)."
            )
    if reserved := sorted(named.keys() & {"clean", "worst"}):
        raise ValueError(
            f"attacks must not be called {' or '.join(reserved)}, which are entries of the result."
        )
    return named


def _check_whole(module: object) -> None:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "module must be the plain model, got one in DistributedDataParallel: give its .module."
        )
    if isinstance(module, nn.Module) and any(map(sharding.is_fully_sharded, module.modules())):
        raise UnsupportedOperation(
            "module must have its parameters on this process, got one after fully_shard: evaluate a copy that is "
            "loaded from a checkpoint."
        )


def _prepared(batch: Any, device: torch.device | None, shift: bool) -> Prepared:
    if isinstance(batch, Prepared):
        return batch if device is None else batch.to(device)
    if device is None:
        values = batch.values() if isinstance(batch, Mapping) else [batch]
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    return prepared(batch, device, shift)
