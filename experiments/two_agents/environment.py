"""The barter as a parallel environment of PettingZoo: requests in the first step, gifts in the second."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Discrete, MultiDiscrete
from pettingzoo import ParallelEnv

from .game import Games, observations


class Barter(ParallelEnv):
    """Observation: size and own value of lot after lot, then the request heard plus 1 (0 before). Action: a lot.

    Args:
        games: from which :meth:`reset` takes one: the one of its ``options["game"]``, or a random one.
    """

    metadata: ClassVar[dict[str, Any]] = {"name": "barter_v0", "render_modes": []}

    def __init__(self, games: Games) -> None:
        self.games, self.payoffs, self.seen = games, games.payoffs().numpy(), observations(games).numpy()
        self.possible_agents = ["A", "B"]
        self.agents: list[str] = []
        gifts = self.payoffs.shape[-1]
        sizes = np.append(self.seen.reshape(-1, self.seen.shape[-1]).max(0) + 1, gifts + 1)
        self._observed = {name: MultiDiscrete(sizes) for name in self.possible_agents}
        self._actions = {name: Discrete(gifts) for name in self.possible_agents}
        self._random = np.random.default_rng()
        self._game, self._heard = 0, (0, 0)

    def observation_space(self, agent: str) -> Any:
        return self._observed[agent]

    def action_space(self, agent: str) -> Any:
        return self._actions[agent]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """A new game, before the requests."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        number = (options or {}).get("game")
        self._game = int(self._random.integers(len(self.games))) if number is None else int(number)
        self.agents, self._heard = list(self.possible_agents), (0, 0)
        self._asked = False
        return self._observations(), {name: {} for name in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        """Offers, which earn nothing; then gifts, which end the game."""
        a, b = int(actions["A"]), int(actions["B"])
        over, names = self._asked, list(self.agents)
        rewards = dict.fromkeys(names, 0.0)
        if over:
            rewards = {name: float(self.payoffs[self._game, i, a, b]) for i, name in enumerate(names)}
            self.agents = []
        else:
            self._heard, self._asked = (b + 1, a + 1), True
        ended, cut = dict.fromkeys(names, over), dict.fromkeys(names, False)
        return self._observations(), rewards, ended, cut, {name: {} for name in names}

    def _observations(self) -> dict[str, Any]:
        return {
            name: np.append(self.seen[self._game, i], self._heard[i]).astype(np.int64)
            for i, name in enumerate(self.possible_agents)
        }
