"""Two small language models that negotiate.

A policy reads the embeddings of its observation, the last of which is a prompt; the distribution of what it asks for is
on the logits of the lots' tokens there. The requests that it may hear follow as branches of a tree: each is visible
only to itself, at the same position, so that one forward gives the logits of its gift after every request, as one
sequence per request would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.texts import small_llama

from .game import Games, Heads, marginal, observations


class Policy(nn.Module):
    """Observation embeddings ``[n, length, hidden]`` to :class:`Heads`.

    Args:
        model: a causal language model with ``model.model`` and ``model.lm_head``, as in Hugging Face's Llama.
        words: token of every lot, ``[lots]``: heard as the other's request, and what the policy answers with.
        length: of the observation, the prompt included.
    """

    def __init__(self, model: Any, words: Tensor, length: int) -> None:
        super().__init__()
        self.model, self.words, self.length = model, words, length
        branches, total = len(words), length + len(words)
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        seen[length:, length:] = torch.eye(branches, dtype=torch.bool)
        self.mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).reshape(1, 1, total, total)
        self.positions = torch.arange(total).clamp(max=length).unsqueeze(0)

    def embed(self, tokens: Tensor) -> Tensor:
        """The frozen embeddings of tokens: the ball around an observation keeps its meaning during training."""
        embeddings: Tensor = self.model.get_input_embeddings()(tokens).detach()
        return embeddings

    def forward(self, x: Any) -> Heads:
        rows, total = x.shape[0], self.length + len(self.words)
        heard = self.embed(self.words).expand(rows, -1, -1)
        hidden = self.model.model(
            inputs_embeds=torch.cat([x, heard], 1),
            attention_mask=self.mask.expand(rows, 1, total, total),
            position_ids=self.positions.expand(rows, -1),
            use_cache=False,
        ).last_hidden_state
        logits = F.linear(hidden, self.model.lm_head.weight[self.words])
        return Heads(logits[:, self.length - 1], logits[:, self.length :])


@dataclass(frozen=True)
class Pair:
    """Policies of A and B, and how they read a game.

    Attributes:
        policies: both.
        tokens: from games to the observations' tokens, ``[n, 2, length]``.
        attackable: ``[length]``, bool: which tokens an adversary may move; never the prompt.
    """

    policies: nn.ModuleList
    tokens: Callable[[Games], Tensor]
    attackable: Tensor

    def embed(self, games: Games) -> Tensor:
        """Both observations one after the other, ``[n, 2 * length, hidden]``."""
        tokens = self.tokens(games)
        return torch.cat([policy.embed(tokens[:, i]) for i, policy in enumerate(self._both())], 1)

    def heads(self, x: Any) -> tuple[Heads, Heads]:
        """Heads of A and B at their halves of `x`."""
        a, b = self._both()
        length = len(self.attackable)
        return a(x[:, :length]), b(x[:, length:])

    def composite(self, x: Any) -> Any:
        """(o_A, o_B) to the log-probabilities of both gifts, ``[n, 2, lots]``; each depends on both observations.

        Taken over the requests: what counts is what is handed over. With requests and gifts as one outcome the Fisher
        matrix would have no entries between the agents, and joint and per-agent directions would measure the same.
        """
        a, b = self.heads(x)
        return torch.stack([marginal(a, b), marginal(b, a)], 1)

    def agents(self, rows: int) -> Tensor:
        """Whose observation a token belongs to, ``[rows, 2 * length]``: 0, 1, or −1 where it may not be attacked."""
        ids = torch.cat([torch.where(self.attackable, agent, -1) for agent in (0, 1)])
        return ids.expand(rows, -1)

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policies.parameters() if parameter.requires_grad]

    def _both(self) -> tuple[Policy, Policy]:
        a, b = self.policies
        assert isinstance(a, Policy) and isinstance(b, Policy)
        return a, b


def from_scratch(game: dict[str, Any], model: dict[str, int], seed: int) -> Pair:
    """Two Llamas with random weights; the embeddings, of variance 1, stay as they are.

    Args:
        game: lots, counts, values.
        model: width and layers.
        seed: of the start.
    """
    lots = game["lots"]
    # words of its own for every lot's sizes and values, then the prompt, then the lots
    words, prompt = game["counts"] + game["values"] + 1, lots * (game["counts"] + game["values"] + 1)
    shift = torch.tensor([-1, game["counts"]]).repeat(lots) + words * torch.arange(lots).repeat_interleave(2)
    length = 2 * lots + 1

    def tokens(games: Games) -> Tensor:
        seen = observations(games) + shift
        return torch.cat([seen, torch.full_like(seen[..., :1], prompt)], -1)

    policies = nn.ModuleList()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(2):
            made = small_llama(
                None,
                vocab_size=prompt + 1 + lots,
                hidden_size=model["width"],
                intermediate_size=2 * model["width"],
                num_hidden_layers=model["layers"],
                num_attention_heads=2,
                max_position_embeddings=length + lots,
                initializer_range=model["width"] ** -0.5,
                tie_word_embeddings=False,
            )
            with torch.no_grad():
                made.get_input_embeddings().weight.normal_()
                made.lm_head.weight.mul_(0.3)  # begins near the uniform distribution
            made.get_input_embeddings().requires_grad_(False)
            policies.append(Policy(made, prompt + 1 + torch.arange(lots), length))
    return Pair(policies, tokens, torch.arange(length) < length - 1)
