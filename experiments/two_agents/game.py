"""A barter of two rounds: each asks for a lot, hears what the other asks for, and hands over a lot; payoffs are exact.

Both agents hold one lot of every type, of so many items. An agent knows the sizes of the lots and what an item of
each is worth to itself, not to the other. A request is not binding. An agent's profit is what it gets less what it
gives, as a share of all that it holds; its payoff also regards the other's profit. So interests are opposed in part:
the lot that an agent would rather part with is not the one that the other wants most, and both do better when
requests are heard.

No convention pays here that looks at nothing: handing over the same lot is no trade. Where it does (claims to lots that
must not overlap, which a pilot tried first), training of both ends at one, and nothing is left for an adversary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Games:
    """Some games.

    Attributes:
        counts: sizes of the lots, ``[n, lots]``, integers.
        values: of an item to agents A and B, ``[n, 2, lots]``, integers.
        regard: weight of the other's profit in an agent's payoff.
    """

    counts: Tensor
    values: Tensor
    regard: float

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: slice | Tensor) -> Games:
        return Games(self.counts[index], self.values[index], self.regard)

    def shares(self) -> Tensor:
        """Worth of every lot to A and B as a share of all, ``[n, 2, lots]``."""
        worth = (self.counts.unsqueeze(1) * self.values).float()
        return worth / worth.sum(-1, keepdim=True)

    def payoffs(self) -> Tensor:
        """``[n, 2, lots, lots]``: payoff of A and B for every gift of A (third axis) and of B (last axis).

        (own profit + regard · the other's profit) / (1 + regard): both sum to the sum of profits.
        """
        a, b = self.shares().unbind(1)
        profit_a = a.unsqueeze(-2) - a.unsqueeze(-1)
        profit_b = b.unsqueeze(-1) - b.unsqueeze(-2)
        profits = torch.stack([profit_a, profit_b], 1)
        return (profits + self.regard * profits.flip(1)) / (1 + self.regard)

    def optimum(self) -> Tensor:
        """The largest sum of both payoffs, ``[n]``."""
        return self.payoffs().sum(1).flatten(1).amax(1)

    def unheard(self) -> Tensor:
        """The sum of payoffs, ``[n]``, of agents that hand over their least valued lot and ignore requests."""
        table = self.payoffs().sum(1)
        a, b = (F.one_hot(s.argmin(-1), s.shape[-1]).float() for s in self.shares().unbind(1))
        return torch.einsum("na,nab,nb->n", a, table, b)


class Heads(NamedTuple):
    """Output of a policy at an observation: logits.

    Attributes:
        requests: ``[n, lots]``, of the lot that it asks for.
        gifts: ``[n, lots, lots]``, of the lot that it hands over (last axis) after every request of the other.
    """

    requests: Any
    gifts: Any

    def detach(self) -> Heads:
        return Heads(self.requests.detach(), self.gifts.detach())


def deal(game: dict[str, Any], number: int, generator: torch.Generator) -> Games:
    """Random games: lots of 1 to `counts` items, each worth 0 to `values`; an agent that values nothing values all."""
    shape = (number, game["lots"])
    counts = torch.randint(1, game["counts"] + 1, shape, generator=generator)
    values = torch.randint(game["values"] + 1, (number, 2, game["lots"]), generator=generator)
    return Games(counts, torch.where(values.sum(-1, keepdim=True) == 0, 1, values), game["regard"])


def observations(games: Games) -> Tensor:
    """Observations of A and B before the requests: size and own value of lot after lot, ``[n, 2, 2 * lots]``."""
    counts = games.counts.unsqueeze(1).expand_as(games.values)
    return torch.stack([counts, games.values], -1).flatten(2)


def marginal(own: Heads, other: Heads) -> Any:
    """Log-probabilities of an agent's gift over what the other may ask for, ``[n, lots]``."""
    heard = other.requests.log_softmax(-1).unsqueeze(-1)
    return torch.logsumexp(heard + own.gifts.log_softmax(-1), 1)


def expected(a: Heads, b: Heads, table: Tensor) -> Any:
    """Expected payoff ``[n]`` for a table ``[n, lots, lots]``, exact.

    An agent's gift depends on the other's request and not on its own, so that, given both observations, the two gifts
    are independent, and the payoff is bilinear in their distributions, each a mixture over the other's requests.
    """
    chances = marginal(a, b).exp().unsqueeze(-1) * marginal(b, a).exp().unsqueeze(-2)
    return (chances * table).sum((-2, -1))


def entropy(own: Heads, other: Heads) -> Any:
    """Of an agent's gift and of its request, ``[n]``."""
    logs = marginal(own, other), own.requests.log_softmax(-1)
    return -sum((log.exp() * log).sum(-1) for log in logs)
