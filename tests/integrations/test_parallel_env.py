"""Environments with PettingZoo's parallel API: what agents see, what they are paid, and that they learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aajr_kernels.integrations.parallel_env import Episodes
from aajr_kernels.method.agents import Agent, Agents
from aajr_kernels.method.policy import Policy
from aajr_kernels.training import AgentsConfig, Attack, ObjectiveConfig, Penalty, fit_agents

NAMES = ("left", "right")


class Echo:
    """The parallel API by hand: a number in [0, 3) is to be said again; `left` leaves after two steps, `right` after 3.

    With `masked`, action 0 is illegal. Every call is kept.
    """

    possible_agents = list(NAMES)

    def __init__(self, masked: bool = False, start: int = 0) -> None:
        self.masked, self.start, self.log, self.closed = masked, start, [], False

    def action_space(self, name: str) -> Any:
        return SimpleNamespace(n=3, start=self.start)

    def _see(self) -> dict[str, Any]:
        self.wanted = {name: int(torch.randint(3, (), generator=self.random)) for name in self.agents}
        return {name: [float(i == self.wanted[name]) for i in range(3)] for name in self.agents}

    def _infos(self) -> dict[str, Any]:
        return {name: {"action_mask": [0, 1, 1]} if self.masked else {} for name in self.agents}

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        self.random, self.agents, self.time = torch.Generator().manual_seed(seed), list(NAMES), 0
        return self._see(), self._infos()

    def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
        assert set(actions) == set(self.agents)
        rewards = {name: float(actions[name] == self.wanted[name] + self.start) for name in actions}
        self.log.append((dict(actions), rewards))
        self.time += 1
        over = {name: self.time >= (2 if name == "left" else 3) for name in self.agents}
        self.agents = [name for name in self.agents if not over[name]]
        return self._see(), rewards, over, dict.fromkeys(over, False), self._infos()

    def close(self) -> None:
        self.closed = True


class Reads(nn.Module):
    """The mean of what was seen so far, two layers, one logit per action."""

    def __init__(self, size: int = 3, actions: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, actions)).double()

    def forward(self, x: Any, attention_mask: Any = None, action_mask: Any = None) -> Any:
        z = self.body(x)
        return z if action_mask is None else z + (~action_mask).to(torch.float64) * -1e9


def agent(name: str, module: nn.Module | None = None, **options: Any) -> Agent:
    module = module or Reads(seed=len(name))
    return Agent(name, Policy(forward=module), module, **(dict(payoff="experience") | options))


def pair() -> Agents:
    return Agents([agent(name) for name in NAMES])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rows_are_decisions_with_their_rewards_from_then_on():
    made: list[Echo] = []

    def make() -> Echo:
        made.append(Echo(start=5))
        return made[-1]

    experiences = Episodes(make, episodes=4, discount=0.5)(pair(), generator())
    assert len(made) == 4 and all(environment.closed for environment in made)
    for name, steps in zip(NAMES, (2, 3)):
        batch, payoff = experiences[name].batch, experiences[name].payoff
        assert batch["inputs_embeds"].shape == (4 * steps, 1, 3) and "attention_mask" not in batch
        assert experiences[name].shift_labels is False
        row = 0
        for environment in made:
            rewards = [paid[name] for _, paid in environment.log if name in paid]
            actions = [done[name] for done, _ in environment.log if name in done]
            for t in range(steps):
                expected = sum(0.5 ** (s - t) * rewards[s] for s in range(t, steps))
                assert float(payoff[row]) == expected
                assert int(batch["labels"][row, 0]) == actions[t] - 5
                row += 1
        assert row == len(payoff)


def test_windows_hold_what_was_seen_before():
    experience = Episodes(Echo, episodes=2, history=2)(pair(), generator())["right"]
    x, mask = experience.batch["inputs_embeds"], experience.batch["attention_mask"]
    assert mask.tolist() == [[1, 0], [1, 1], [1, 1]] * 2
    for first in (0, 3):
        assert torch.equal(x[first, 0], x[first + 1, 0]) and torch.equal(x[first + 1, 1], x[first + 2, 0])
        assert not x[first, 1].any()
    assert (experience.batch["labels"] >= 0).tolist() == [[True, False], [False, True], [False, True]] * 2


def test_the_gradient_is_that_of_the_decisions():
    """−A log π of every decision over their number, against the module called by hand."""
    agents = pair()
    experience = Episodes(Echo, episodes=3, history=2, discount=0.9)(agents, generator())["right"]
    config = settings(
        1, objective=ObjectiveConfig(Attack(radius=0.0), Penalty("none")), clip_norm=None, learners=["right"]
    )
    before = [p.detach().clone() for p in agents["right"].parameters()]
    row = fit_agents(agents, lambda *_: {"right": experience}, config, progress=False).rows[0]
    x, labels, payoff = experience.batch["inputs_embeds"], experience.batch["labels"], experience.payoff
    last, rows = (labels >= 0).long().argmax(-1), torch.arange(len(x))
    by_hand = Reads(seed=len("right"))
    log_p = by_hand(x).log_softmax(-1)[rows, last, labels[rows, last]]
    expected = -((payoff - payoff.mean()) * log_p).mean()
    assert row["clean_loss"] == pytest.approx(float(expected.detach()), rel=1e-12)
    gradients = torch.autograd.grad(expected, list(by_hand.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-10)
    for p, old, g in zip(agents["right"].parameters(), before, gradients):  # AdamW's first step
        torch.testing.assert_close(p.detach(), old - 0.03 * g / (g.abs() + 1e-8), rtol=1e-10, atol=1e-14)


def test_a_mask_of_actions_is_kept_to():
    experiences = Episodes(lambda: Echo(masked=True), episodes=8)(pair(), generator())
    for experience in experiences.values():
        assert experience.batch["action_mask"][0, 0].tolist() == [False, True, True]
        assert 0 not in experience.batch["labels"]

    class Ignores(Reads):
        def forward(self, x: Any, **unused: Any) -> Any:
            return self.body(x)

    careless = Agents([agent(name, Ignores(seed=len(name))) for name in NAMES])
    with pytest.raises(ValueError, match="illegal actions a probability of 0"):
        Episodes(lambda: Echo(masked=True))(careless, generator())


def settings(steps: int, **options: Any) -> AgentsConfig:
    objective = ObjectiveConfig(
        attack=Attack(radius=0.1, steps=2, step_size=0.05, relative=False),
        penalty=Penalty(weight=1e-3, steps="last"),
    )
    return AgentsConfig(
        steps,
        **(dict(objective=objective, learning_rate=0.03, order="together", checkpoint_every=1) | options),
    )


def test_agents_learn_under_attack_and_resume_with_the_same_bits(tmp_path):
    play = Episodes(Echo, episodes=32, discount=0.0)
    whole = pair()
    result = fit_agents(whole, play, settings(20), out=tmp_path / "whole", progress=False)
    first, last = (
        sum(row["payoff"] for row in rows) / len(rows) for rows in (result.rows[:4], result.rows[-4:])
    )
    assert first < 0.5 and last > 0.8
    unequal = [row for row in result.rows if row["payoff"] < 1]  # else no row has an advantage
    assert len(unequal) > 30
    assert all(row["penalty"] > 0 and row["attack_worst"] > row["attack_start"] for row in unequal)
    broken = pair()

    class Stop(Exception):
        pass

    def stop(row: Any) -> None:
        if row["step"] == 18:
            raise Stop

    with pytest.raises(Stop):
        fit_agents(broken, play, settings(20), out=tmp_path / "broken", progress=False, on_step=stop)
    again = pair()
    assert fit_agents(again, play, settings(20), out=tmp_path / "broken", progress=False).resumed_from == 17
    for one, other in zip(whole, again):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_one_policy_plays_for_several():
    one = Agents([agent("both")])
    players = dict.fromkeys(NAMES, "both")
    experience = Episodes(Echo, episodes=2, players=players)(one, generator())["both"]
    assert len(experience.payoff) == 2 * (2 + 3)


def test_what_is_observed_may_be_tokens():
    """A language model reads an observation, says a turn, and is paid for what it decodes to."""
    transformers = pytest.importorskip("transformers")
    from aajr_kernels.training import policy_of

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=12, **sizes)).double()
    speaks = Agents([Agent("both", policy_of(model), model, payoff="experience")])
    encode = lambda name, seen: torch.tensor([7] * (1 + (name == "right")) + [3 + seen.index(1.0)])
    options = dict(players=dict.fromkeys(NAMES, "both"), encode=encode, length=2)
    play = Episodes(Echo, episodes=2, decode=lambda name, said: int(said[0]) % 3, **options)
    batch = play(speaks, generator())["both"].batch
    assert batch["input_ids"].shape == (10, 5)
    assert batch["attack_mask"].sum(-1).tolist() == [2, 2, 3, 3, 3] * 2
    assert ((batch["labels"] >= 0).sum(-1) == 2).all()
    assert torch.equal(batch["attention_mask"].sum(-1), batch["attack_mask"].sum(-1) + 2)
    rows = fit_agents(speaks, play, settings(1, learning_rate=1e-3), progress=False).rows
    assert rows[0]["gradient_norm"] > 0
    with pytest.raises(ValueError, match="decode must be given"):
        Episodes(Echo, **options)(speaks, generator())
    with pytest.raises(ValueError, match="history must be 1"):
        Episodes(Echo, history=2, decode=lambda name, said: 0, **options)(speaks, generator())


def test_bad_input_has_one_sentence():
    with pytest.raises(
        ValueError, match=r"players must name one of the agents left for .* got none for right"
    ):
        Episodes(Echo)(Agents([agent("left")]), generator())
    with pytest.raises(TypeError, match="parallel API, got object without reset, step"):
        Episodes(object)(pair(), generator())
    with pytest.raises(ValueError, match="discount must be in"):
        Episodes(Echo, discount=1.5)
    with pytest.raises(ValueError, match="logit for each of 3 actions"):
        Episodes(Echo)(Agents([agent(n, Reads(actions=2, seed=len(n))) for n in NAMES]), generator())
    with pytest.raises(TypeError, match="encode must return a tensor"):
        Episodes(Echo, encode=lambda name, seen: seen)(pair(), generator())
    with pytest.raises(ValueError, match="payoff of agent 'left' must be a function where a dialogue"):
        agent("left").paid(None, 2)
    with pytest.raises(ValueError, match="payoff must be 'experience' or a function"):
        agent("left", payoff="reward")

    class Silent(Echo):
        def _see(self) -> dict[str, Any]:
            return {"left": super()._see()["left"]}

    with pytest.raises(ValueError, match="observation of its live agent 'right', got those of left"):
        Episodes(Silent)(pair(), generator())

    class Old(Echo):
        def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
            return super().step(actions)[:4]

    with pytest.raises(TypeError, match="terminations, truncations and infos, got 4 entries"):
        Episodes(Old)(pair(), generator())

    class Short(Echo):
        def _infos(self) -> dict[str, Any]:
            return {name: {"action_mask": [1, 1]} for name in self.agents}

    with pytest.raises(ValueError, match="action_mask must have an entry for each of 3 actions"):
        Episodes(Short)(pair(), generator())

    class Continuous(Echo):
        def action_space(self, name: str) -> Any:
            return SimpleNamespace(shape=(2,))

    with pytest.raises(ValueError, match="must be one Discrete space"):
        Episodes(Continuous)(pair(), generator())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_environment_of_pettingzoo():
    """Its own API test passes for what is played here, and Discrete spaces and arrays are understood."""
    pytest.importorskip("pettingzoo", reason="pettingzoo is not installed: pip install pettingzoo")
    import numpy as np
    from gymnasium.spaces import Box, Discrete
    from pettingzoo import ParallelEnv
    from pettingzoo.test import parallel_api_test

    class Same(ParallelEnv):
        metadata = {"name": "same_v0"}

        def __init__(self) -> None:
            self.possible_agents, self.agents = list(NAMES), []
            self.seen_in, self.done_by = Box(-1.0, 1.0, (3,), np.float32), Discrete(3)

        def observation_space(self, agent: str) -> Any:
            return self.seen_in

        def action_space(self, agent: str) -> Any:
            return self.done_by

        def reset(self, seed: Any = None, options: Any = None) -> Any:
            self.agents, self.random = list(NAMES), np.random.default_rng(seed)
            return self.seen(), {name: {} for name in NAMES}

        def seen(self) -> Any:
            return {name: self.random.uniform(-1, 1, 3).astype(np.float32) for name in self.agents}

        def step(self, actions: Any) -> Any:
            paid = float(len(set(actions.values())) == 1)
            names, over = self.agents, bool(self.random.integers(3) == 0)
            observations = self.seen()
            self.agents = [] if over else names
            every: Tensor | Any = lambda value: dict.fromkeys(names, value)
            return observations, every(paid), every(over), every(False), {name: {} for name in names}

    parallel_api_test(Same(), num_cycles=20)
    result = fit_agents(pair(), Episodes(Same, episodes=4, steps=5), settings(2), progress=False)
    assert len(result.rows) == 4 and all(row["gradient_norm"] > 0 for row in result.rows)
