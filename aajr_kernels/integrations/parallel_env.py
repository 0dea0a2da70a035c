"""Environments with PettingZoo's parallel API, played by agents whose observations an adversary may move.

    play = Episodes(make_environment, episodes=16, discount=0.99)
    fit_agents(agents, play, AgentsConfig(steps=100, ...))

Any object with ``reset(seed=)``, ``step(actions)``, ``agents``, ``possible_agents`` and ``action_space(agent)`` will
do; PettingZoo itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..method.agents import Agent, Agents
from ..method.attack_state import frozen_parameters
from ..method.checks import check_integers, check_number, kind_of
from ..method.dialogue import sampled
from ..method.losses import IGNORED
from ..training.agents import Experience

__all__ = ["Episodes"]


@dataclass(frozen=True)
class Episodes:
    """What :func:`~aajr_kernels.training.fit_agents` plays at every step: episodes of an environment, side by side.

    A row of an agent's :class:`~aajr_kernels.training.Experience` is one decision, and its payoff the discounted sum
    of the rewards from then on, without a value of the state that a cut episode ends in. Agents take
    ``payoff="experience"``. What they observe decides how they are called:

    - numbers ``[C]``: the policy gets the last `history` observations of the episode ``[B, history, C]`` in the place
      of embeddings and returns one logit per action at each of them. Windows that are not full yet end in padding,
      with an ``attention_mask``. The adversary moves the observations.
    - token ids ``[n]``: the agent says a turn of at most `length` tokens after them, which `decode` makes an action.
      The adversary moves the embeddings of the observation.

    Attributes:
        make: a new environment, one per episode; its ``reset`` gets a seed that depends on that of the training.
        episodes: per step of the training.
        history: observations that a policy of numbers sees, at least 1.
        discount: of a reward per step of the environment, in [0, 1].
        steps: of an episode, at most; None: until the environment ends it.
        players: name of the agent that plays for each of ``possible_agents``, several of which may share one; by
            default the one with the same name.
        encode: from a name in the environment and an observation to a tensor: floating point ``[C]``, or token ids
            ``[n]``. By default the numbers of an array, flattened.
        decode: from a name in the environment and the token ids ``[n]`` of a turn to an action.
        length: tokens of a turn, at most.

    A policy gets ``action_mask`` ``[B, history, actions]`` where an ``info`` (or an observation that is a mapping, with
    ``observation`` beside it) has one, and must give illegal actions a probability of 0.
    """

    make: Callable[[], Any]
    episodes: int = 8
    history: int = 1
    discount: float = 1.0
    steps: int | None = None
    players: Mapping[str, str] | None = None
    encode: Callable[[str, Any], Tensor] | None = None
    decode: Callable[[str, Tensor], Any] | None = None
    length: int = 16

    def __post_init__(self) -> None:
        check_integers(1, episodes=self.episodes, history=self.history, length=self.length)
        check_number("discount", self.discount, 0)
        if self.discount > 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount}.")
        if self.steps is not None:
            check_integers(1, steps=self.steps)

    def __call__(self, agents: Agents, generator: torch.Generator) -> dict[str, Experience]:
        """Play.

        Args:
            agents: who play.
            generator: of actions and seeds.

        Returns:
            The experience of every agent that has acted.

        Raises:
            TypeError, ValueError: the environment has not the parallel API, other agents or actions that are not
                discrete; a policy, `encode` or `decode` returns another shape or type.
        """
        environments = [self.make() for _ in range(self.episodes)]
        try:
            seats = [_Seat(self, environment, agents, generator) for environment in environments]
            step = 0
            while any(seat.live for seat in seats) and (self.steps is None or step < self.steps):
                self._act(agents, [seat for seat in seats if seat.live], generator)
                for seat in seats:
                    if seat.live:
                        seat.step()
                step += 1
        finally:
            for environment in environments:
                if hasattr(environment, "close"):
                    environment.close()
        decisions: dict[str, list[_Decision]] = {}
        for seat in seats:
            seat.pay()
            for name, own in seat.decisions.items():
                decisions.setdefault(seat.players[name], []).extend(own)
        return {name: _experience(agents[name], own) for name, own in decisions.items() if own}

    def _act(self, agents: Agents, seats: list[_Seat], generator: torch.Generator) -> None:
        """One action of everyone who lives, by one forward per agent."""
        for agent in agents:
            waiting = [
                (seat, name) for seat in seats for name in seat.live if seat.players[name] == agent.name
            ]
            if not waiting:
                continue
            decisions = [seat.decision(name) for seat, name in waiting]
            of_tokens = [not decision.seen[-1].is_floating_point() for decision in decisions]
            if any(of_tokens) != all(of_tokens):
                raise TypeError(
                    f"observations of agent {agent.name!r} must be all token ids or all numbers, got both."
                )
            with torch.no_grad(), agent.acting(), frozen_parameters((agent.module,), True):
                act = self._say if all(of_tokens) else _choose
                act(agent, decisions, generator)

    def _say(self, agent: Agent, decisions: list[_Decision], generator: torch.Generator) -> None:
        if self.decode is None:
            raise ValueError(
                f"decode must be given where encode returns token ids, got None for agent {agent.name!r}."
            )
        if self.history != 1:
            raise ValueError(
                f"history must be 1 where encode returns token ids, got {self.history}: let encode put what was "
                "observed before in front."
            )
        device = _like(agent).device
        seen = [decision.seen[-1] for decision in decisions]
        ids, mask = (part.to(device) for part in _padded(seen))
        said, kept = (agent.speak or sampled)(agent, ids, mask, self.length, generator)
        for decision, turn, own in zip(decisions, said.cpu(), kept.cpu()):
            decision.said = turn[own]
            decision.action = self.decode(decision.player, decision.said)


@dataclass(eq=False)
class _Decision:
    """Of one agent at one step: what it saw, and what it did."""

    player: str
    seen: list[Tensor]
    space: Any
    legal: list[Tensor | None]
    time: int
    said: Tensor | None = None
    choice: int = -1
    action: Any = None
    payoff: float = 0.0


@dataclass(eq=False)
class _Seat:
    """An episode."""

    settings: Episodes
    environment: Any
    agents: Agents
    generator: torch.Generator
    players: dict[str, str] = field(default_factory=dict)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    legal: dict[str, list[Tensor | None]] = field(default_factory=dict)
    decisions: dict[str, list[_Decision]] = field(default_factory=dict)
    rewards: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    time: int = 0

    def __post_init__(self) -> None:
        environment, players = self.environment, self.settings.players
        lacking = [
            n for n in ("reset", "step", "possible_agents", "action_space") if not hasattr(environment, n)
        ]
        if lacking:
            raise TypeError(
                f"make must return an environment with PettingZoo's parallel API, got {type(environment).__name__} "
                f"without {', '.join(lacking)}: take parallel_env(), or pettingzoo.utils.aec_to_parallel."
            )
        names = list(environment.possible_agents)
        self.players = {name: name for name in names} if players is None else dict(players)
        unplayed = sorted({name for name in names if self.players.get(name) not in self.agents.names})
        if unplayed:
            raise ValueError(
                f"players must name one of the agents {', '.join(self.agents.names)} for every possible agent of the "
                f"environment, got none for {', '.join(unplayed)}."
            )
        options: dict[str, Any] = dict(generator=self.generator, device=self.generator.device)
        observations, infos = environment.reset(seed=int(torch.randint(2**31 - 1, (), **options)))
        self._observe(observations, infos)

    @property
    def live(self) -> list[str]:
        return list(self.environment.agents)

    def decision(self, name: str) -> _Decision:
        """The next one, not decided yet."""
        history = self.settings.history
        space = self.environment.action_space(name)
        made = _Decision(name, self.seen[name][-history:], space, self.legal[name][-history:], self.time)
        self.decisions.setdefault(name, []).append(made)
        return made

    def step(self) -> None:
        actions = {name: self.decisions[name][-1].action for name in self.live}
        result = self.environment.step(actions)
        if not isinstance(result, tuple) or len(result) != 5:
            count = f"{len(result)} entries" if isinstance(result, tuple) else type(result).__name__
            raise TypeError(
                "step of the environment must return observations, rewards, terminations, truncations and infos, got "
                f"{count}: take one with PettingZoo's parallel API."
            )
        observations, rewards, _, _, infos = result
        for name, reward in rewards.items():
            if name in self.decisions:
                self.rewards.setdefault(name, []).append((self.time, float(reward)))
            elif float(reward):
                raise ValueError(f"rewards must be of agents that have acted, got {reward} for {name!r}.")
        self.time += 1
        self._observe(observations, infos)

    def pay(self) -> None:
        """Every decision its discounted rewards from then on."""
        for name, own in self.decisions.items():
            for decision in own:
                later = [(at - decision.time, reward) for at, reward in self.rewards.get(name, [])]
                decision.payoff = sum(
                    self.settings.discount**wait * reward for wait, reward in later if wait >= 0
                )

    def _observe(self, observations: Mapping[str, Any], infos: Mapping[str, Any]) -> None:
        for name in self.live:
            if name not in observations:
                raise ValueError(
                    f"the environment must return an observation of its live agent {name!r}, got those of "
                    f"{', '.join(observations) or 'none'}."
                )
            observation, legal = observations[name], (infos.get(name) or {}).get("action_mask")
            if isinstance(observation, Mapping) and "action_mask" in observation:
                legal = observation["action_mask"]
                observation = observation.get("observation") if self.settings.encode is None else observation
            encode = self.settings.encode or _numbers
            encoded = encode(name, observation)
            if not isinstance(encoded, Tensor) or encoded.dim() != 1 or not encoded.numel():
                raise TypeError(
                    f"encode must return a tensor [C] of numbers or [n] of token ids, got {kind_of(encoded)} "
                    f"for {name!r}."
                )
            self.seen.setdefault(name, []).append(encoded)
            self.legal.setdefault(name, []).append(None if legal is None else torch.as_tensor(legal) != 0)


def _numbers(name: str, observation: Any) -> Tensor:
    """The default of ``encode``."""
    try:
        return torch.as_tensor(observation).flatten().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"observations must be arrays of numbers, got {type(observation).__name__} for {name!r}: give encode."
        ) from error


def _like(agent: Agent) -> Tensor:
    """A tensor with the dtype and device of a policy."""
    like = next((p for p in agent.module.parameters() if p.is_floating_point()), None)
    return torch.empty(0) if like is None else like.detach()


def _windows(agent: Agent, decisions: list[_Decision]) -> dict[str, Tensor]:
    """Entries of a batch: observations ``[B, N, C]``, and masks where they are needed; the last token decides."""
    sizes = {len(seen) for decision in decisions for seen in decision.seen}
    if len(sizes) > 1:
        raise ValueError(
            f"observations of agent {agent.name!r} must have one size, got {sorted(sizes)}: give encode, or an agent "
            "per size."
        )
    lengths, like = [len(decision.seen) for decision in decisions], _like(agent)
    longest = max(lengths)
    x = torch.zeros(len(decisions), longest, sizes.pop(), dtype=torch.float64)
    for row, decision in enumerate(decisions):
        x[row, : lengths[row]] = torch.stack([seen.double() for seen in decision.seen])
    entries = {"inputs_embeds": x.to(like)}
    if min(lengths) < longest:
        attended = torch.arange(longest) < torch.tensor(lengths)[:, None]
        entries["attention_mask"] = attended.long().to(like.device)
    if any(legal is not None for decision in decisions for legal in decision.legal):
        masks = torch.ones(len(decisions), longest, int(decisions[0].space.n), dtype=torch.bool)
        for row, decision in enumerate(decisions):
            for place, legal in enumerate(decision.legal):
                if legal is None:
                    continue
                if tuple(legal.shape) != tuple(masks.shape[2:]):
                    raise ValueError(
                        f"action_mask must have an entry for each of {masks.shape[2]} actions, got shape "
                        f"{tuple(legal.shape)} for {decision.player!r}."
                    )
                masks[row, place] = legal
        entries["action_mask"] = masks.to(like.device)
    return entries


def _choose(agent: Agent, decisions: list[_Decision], generator: torch.Generator) -> None:
    """Sample an action of each."""
    spaces = {(getattr(d.space, "n", None), int(getattr(d.space, "start", 0))) for d in decisions}
    if len(spaces) > 1 or None in {n for n, _ in spaces}:
        raise ValueError(
            f"action spaces of agent {agent.name!r} must be one Discrete space, got "
            f"{', '.join(sorted({str(d.space) for d in decisions}))}: make them discrete, or let encode return token "
            "ids and decode an action."
        )
    ((actions, start),) = spaces
    entries = _windows(agent, decisions)
    x = entries.pop("inputs_embeds")
    logits = agent.policy.logits(x, **entries)
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (*x.shape[:2], actions):
        raise ValueError(
            f"policy of agent {agent.name!r} must return a logit for each of {actions} actions, shape "
            f"{(*x.shape[:2], actions)}, got {kind_of(logits)}."
        )
    last = torch.tensor([len(decision.seen) - 1 for decision in decisions], device=x.device)
    rows = torch.arange(len(decisions), device=x.device)
    chances = logits[rows, last].double().softmax(-1)
    if "action_mask" in entries and bool((chances * ~entries["action_mask"][rows, last]).any()):
        raise ValueError(
            f"policy of agent {agent.name!r} must give illegal actions a probability of 0: mask its logits with the "
            "argument action_mask."
        )
    choices = torch.multinomial(chances.to(generator.device), 1, generator=generator).squeeze(-1)
    for decision, choice in zip(decisions, choices.tolist()):
        decision.choice, decision.action = choice, choice + start


def _padded(rows: list[Tensor], left: bool = True) -> tuple[Tensor, Tensor]:
    """Ids ``[B, N]`` and mask of rows of unequal lengths."""
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence([row.long().cpu() for row in rows], True, 0, side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, True, False, side)


def _experience(agent: Agent, decisions: list[_Decision]) -> Experience:
    payoff = torch.tensor([decision.payoff for decision in decisions], dtype=torch.float64)
    if decisions[0].said is None:
        entries = _windows(agent, decisions)
        labels = torch.full(entries["inputs_embeds"].shape[:2], IGNORED)
        for row, decision in enumerate(decisions):
            labels[row, len(decision.seen) - 1] = decision.choice
        return Experience(entries | {"labels": labels.to(_like(agent).device)}, payoff, shift_labels=False)
    seen = [decision.seen[-1] for decision in decisions]
    said = [decision.said for decision in decisions if decision.said is not None]
    ids, mask = _padded([torch.cat([before.cpu(), turn]) for before, turn in zip(seen, said)], left=False)
    place = torch.arange(ids.shape[1])
    observed = place < torch.tensor([len(before) for before in seen])[:, None]
    batch = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(observed | ~mask, IGNORED),
        "attack_mask": observed.long(),
    }
    device = _like(agent).device
    return Experience({name: entry.to(device) for name, entry in batch.items()}, payoff, shift_labels=True)
