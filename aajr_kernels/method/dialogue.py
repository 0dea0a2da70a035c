"""Dialogues in turns: one agent's output is another's observation, which an adversary may move.

A dialogue is one tensor of tokens that all agents share, with the speaker of every token. Each agent sees it after a
prompt of its own; its own turns are what it learns, the turns of others are what an adversary may perturb.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .agents import Agent, Agents
from .attack_state import frozen_parameters
from .checks import check_integers, check_number, kind_of
from .losses import IGNORED

__all__ = ["Dialogue", "play", "sampled"]

#: from an agent, tokens and mask ``[B, N]`` of its view, a length and a generator to tokens ``[B, length]`` and a mask
Speak = Callable[[Agent, Tensor, Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Tokens that have been said.

    Attributes:
        names: of the agents, in the order of their numbers.
        prompts: per agent ``[B, P]`` token ids that it only sees, before the dialogue; left out for none.
        ids: ``[B, N]``.
        attended: ``[B, N]`` bool: a token, False for padding of a turn that ended early.
        speakers: ``[N]``, the number of the agent that said each token, −1 for an opening without one.
        prompt_masks: per agent ``[B, P]``, nonzero = a token; left out where a prompt has no padding.
    """

    names: tuple[str, ...]
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    attended: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    speakers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    prompt_masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"names must be those of at least one agent, each once, got {self.names}.")
        if unknown := sorted(set(self.prompts) - set(self.names)):
            raise ValueError(
                f"prompts must be of the agents {', '.join(self.names)}, got {', '.join(unknown)}."
            )
        for name, mask in self.prompt_masks.items():
            if name not in self.prompts or self.prompts[name].shape != mask.shape:
                of = tuple(self.prompts[name].shape) if name in self.prompts else "none"
                raise ValueError(
                    f"prompt_masks must have the shapes of the prompts, got {tuple(mask.shape)} for {name!r} and {of}."
                )
        rows = {prompt.shape[0] for prompt in self.prompts.values()} | (
            {len(self.ids)} if self.ids.numel() else set()
        )
        if len(rows) > 1:
            raise ValueError(f"prompts and ids must have the same rows, got {sorted(rows)}.")

    @classmethod
    def opened(
        cls,
        names: Sequence[str],
        prompts: Mapping[str, Tensor] | None = None,
        opening: Tensor | None = None,
        prompt_masks: Mapping[str, Tensor] | None = None,
    ) -> Dialogue:
        """A dialogue before the first turn.

        Args:
            names: of the agents.
            prompts: per agent ``[B, P]``, which it only sees.
            opening: ``[B, N]``, seen by all and said by none.
            prompt_masks: per agent ``[B, P]``, nonzero = a token, for prompts of different lengths.
        """
        dialogue = cls(tuple(names), dict(prompts or {}), prompt_masks=dict(prompt_masks or {}))
        return dialogue if opening is None else dialogue.said(None, opening)

    @property
    def rows(self) -> int:
        """B."""
        return max([len(self.ids), *(len(prompt) for prompt in self.prompts.values())])

    def said(self, name: str | None, ids: Tensor, attended: Tensor | None = None) -> Dialogue:
        """The dialogue with one more turn.

        Args:
            name: of the speaker; None for a text without one.
            ids: ``[B, n]``.
            attended: ``[B, n]``, nonzero = a token; all by default.

        Raises:
            TypeError, ValueError: an argument has a wrong type or shape; there is no such agent.
        """
        speaker = -1 if name is None else self._number(name)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            raise TypeError(f"ids must be token ids [B, n], got {kind_of(ids)}.")
        if self.rows not in (0, len(ids)):
            raise ValueError(f"ids must have the {self.rows} rows of the dialogue, got {len(ids)}.")
        mask = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended != 0
        if mask.shape != ids.shape:
            raise ValueError(
                f"attended must have the shape {tuple(ids.shape)} of ids, got {tuple(mask.shape)}."
            )
        before = (self.ids, self.attended) if len(self.ids) else (ids[:, :0], mask[:, :0])
        turn = torch.full((ids.shape[1],), speaker, dtype=torch.long)
        return replace(
            self,
            ids=torch.cat([before[0], ids], 1),
            attended=torch.cat([before[1], mask], 1),
            speakers=torch.cat([self.speakers, turn]),
        )

    def view(self, name: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``[B, P + N]`` of all that an agent sees."""
        self._number(name)
        prompt = self.prompts.get(name)
        ids, mask = self.ids, self.attended
        if prompt is None:
            return ids, mask
        if not len(ids):
            ids, mask = prompt[:, :0], torch.ones_like(prompt[:, :0], dtype=torch.bool)
        of_prompt = self.prompt_masks.get(name)
        of_prompt = torch.ones_like(prompt, dtype=torch.bool) if of_prompt is None else of_prompt != 0
        return torch.cat([prompt, ids], 1), torch.cat([of_prompt, mask], 1)

    def batch(self, name: str, *, observed: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A batch of :class:`~aajr_kernels.training.Objective` for one agent, up to the last token that it said.

        Labels are the tokens of its own turns, one of others is attackable if `observed` names its speaker, and
        ``agents`` has the number of the speaker of every attackable token, −1 elsewhere: ``Attack(scope="agent")``
        gives each of them a ball of its own, ``Penalty(per_agent=True)`` a tangent, and without them all are moved
        jointly.

        Args:
            name: of the agent that learns.
            observed: names of the agents whose turns an adversary may move, all others by default.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``attack_mask``, ``agents`` ``[B, n]``, n <= P + N, and
            ``position_ids`` where turns are padded. What is said after the agent's last token is left out: it has
            decided nothing on it.

        Raises:
            ValueError: there is no such agent, it has said nothing, or `observed` names itself.
        """
        number = self._number(name)
        others = [n for n in self.names if n != name] if observed is None else list(observed)
        if name in others:
            raise ValueError(f"observed must name other agents than {name!r}, whose own turns are learnt.")
        numbers = torch.tensor([self._number(other) for other in others], dtype=torch.long)
        if not bool((self.speakers == number).any()):
            raise ValueError(
                f"agent {name!r} must have said something in the dialogue to learn from it, got no turn."
            )
        ids, attended = self.view(name)
        end = ids.shape[1] - len(self.speakers) + int((self.speakers == number).nonzero()[-1]) + 1
        unsaid = torch.full((ids.shape[1] - len(self.speakers),), -1, dtype=torch.long)
        speakers = torch.cat([unsaid, self.speakers]).expand(ids.shape).to(ids.device)[:, :end]
        ids, attended = ids[:, :end], attended[:, :end]
        attackable = torch.isin(speakers, numbers.to(ids.device)) & attended
        own = (speakers == number) & attended
        batch = {
            "input_ids": ids,
            "attention_mask": attended.long(),
            "labels": ids.masked_fill(~own, IGNORED),
            "attack_mask": attackable.long(),
            "agents": speakers.masked_fill(~attackable, -1),
        }
        if not bool(attended.all()):
            batch["position_ids"] = positions(attended)
        return batch

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}.")
        return self.names.index(name)


def positions(attended: Tensor) -> Tensor:
    """Position of every token among those that are attended to, 0 where none came yet."""
    return (attended.long().cumsum(-1) - 1).clamp(min=0)


def play(
    agents: Agents,
    dialogue: Dialogue,
    *,
    rounds: int,
    length: int,
    generator: torch.Generator,
    order: Sequence[str] | None = None,
    speak: Speak | None = None,
) -> Dialogue:
    """Let agents speak in turn.

    Args:
        agents: of the dialogue.
        dialogue: what was said before, with at least one token in every view.
        rounds: every agent speaks once in each.
        length: tokens of a turn, at most.
        generator: of the samples.
        order: names of those who speak in a round, all by default.
        speak: how an agent says its turn; its own :attr:`Agent.speak`, or :func:`sampled`, by default.

    Returns:
        The dialogue with ``rounds · len(order)`` more turns.
    """
    check_integers(1, rounds=rounds, length=length)
    for _ in range(rounds):
        for name in agents.names if order is None else order:
            agent = agents[name]
            ids, attended = dialogue.view(name)
            if not ids.shape[1]:
                raise ValueError(
                    f"agent {name!r} must see a token to speak, got an empty view: give it a prompt."
                )
            say = speak or agent.speak or sampled
            with torch.no_grad(), agent.acting(), frozen_parameters((agent.module,), True):
                dialogue = dialogue.said(name, *say(agent, ids, attended, length, generator))
    return dialogue


def sampled(
    agent: Agent,
    ids: Tensor,
    attended: Tensor,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    end: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a turn token by token, with a forward of the whole view for each: for small models and any policy.

    Args:
        agent: whose policy embeds tokens.
        ids: ``[B, N]``.
        attended: ``[B, N]`` bool, with a token in every row.
        length: tokens to be said.
        generator: of the samples.
        temperature: of the softmax; 0 takes the most likely token.
        end: id of a token that ends a turn, which is then padded with it.

    Returns:
        Token ids ``[B, length]`` and their mask.
    """
    check_number("temperature", temperature, 0)
    if agent.policy.embed is None:
        raise ValueError(
            f"agent {agent.name!r} must have a policy that embeds tokens, got one without embed."
        )
    view, mask, running = ids, attended, attended.any(-1)
    said: list[Tensor] = []
    for _ in range(length):
        inputs: dict[str, Any] = {"attention_mask": mask.long(), "position_ids": positions(mask)}
        z = agent.policy.logits(agent.policy.embed(view), **inputs)
        last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        z = z[torch.arange(len(z), device=z.device), last].float()
        if temperature == 0:
            token = z.argmax(-1)
        else:
            chances = (z / temperature).softmax(-1).to(generator.device)
            token = torch.multinomial(chances, 1, generator=generator).squeeze(-1).to(view.device)
        if end is not None:
            token = torch.where(running, token, end)
        said.append(token)
        view, mask = torch.cat([view, token[:, None]], 1), torch.cat([mask, running[:, None]], 1)
        if end is not None:
            running = running & (token != end)
    return torch.stack(said, 1), mask[:, -length:]
