"""A causal language model of two layers in float64, its batch, and its losses written out, for tests of evaluations."""

from __future__ import annotations

import torch
from torch import nn

from aajr_kernels.method.policy import Policy

VOCABULARY, WIDTH = 11, 6


class SmallLM(nn.Module):
    """Called with embeddings ``[B, N, C]`` and ``attention_mask``; a causal mean, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, VOCABULARY)

    def hidden(self, x, attention_mask=None, position_ids=None):
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        lengths = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        before = torch.cumsum(x, 1) / lengths
        return self.dropout(torch.tanh(self.up(x + torch.tanh(self.mix(before)))))

    def forward(self, x, attention_mask=None):
        return self.head(self.hidden(x, attention_mask))


def small_lm(seed: int = 0) -> SmallLM:
    """In training mode: an evaluation has to turn its dropout off."""
    torch.manual_seed(seed)
    model = SmallLM().double()
    with torch.no_grad():  # sharper than at its start, so that losses differ
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model.train()


def policy_for(model: SmallLM, streamed: bool) -> Policy:
    if streamed:
        return Policy(model.hidden, model.embedding, model.head)
    return Policy(model.forward, model.embedding)


def batch_of(rows: int = 3, length: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens 1 to 4 are the adversary's, the last three are scored; the last row is padded on the left by one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    attacked = torch.zeros_like(ids)
    attacked[:, 1:5] = 1
    attacked[0, 4] = 0
    labels = torch.full_like(ids, -100)
    labels[:, 5:] = ids[:, 5:]
    mask = torch.ones_like(ids)
    mask[-1, 0] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "attack_mask": attacked}


def row_loss(model: SmallLM, x: torch.Tensor, batch, row: int) -> torch.Tensor:
    """Mean cross-entropy of the scored tokens of one row, with embeddings ``[N, C]``; labels are those of `batch`."""
    model.eval()
    logits = model(x.unsqueeze(0), batch["attention_mask"][row : row + 1])[0]
    labels, terms = batch["labels"][row], []
    for t in range(len(labels) - 1):
        if labels[t + 1] != -100:
            terms.append(torch.logsumexp(logits[t], -1) - logits[t, labels[t + 1]])
    return torch.stack(terms).mean()


def token_norm(x: torch.Tensor, mask: torch.Tensor) -> float:
    """Root mean square over the tokens that are attended to."""
    squares = [float(x[b, t].square().sum()) for b, t in mask.nonzero().tolist()]
    return (sum(squares) / len(squares)) ** 0.5
