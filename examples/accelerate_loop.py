"""A training loop of your own with accelerate: unequal micro-batches, mixed precision, several processes.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 --mixed_precision bf16 examples/accelerate_loop.py

The objective counts the tokens of all micro-batches of a step, on all processes, before the first of them is trained
on; the gradients then add up to those of one large batch.
"""

from __future__ import annotations

import contextlib
import itertools

import torch
from accelerate import Accelerator
from text import VOCABULARY, passages
from transformers import GPT2Config, GPT2LMHeadModel

from aajr_kernels.training import Attack, Cosine, Linear, Objective, ObjectiveConfig, Penalty, Share, WarmUp

STEPS, ACCUMULATE = 40, 2


def collate(rows: list[str]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row.encode(), *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))
    loader = torch.utils.data.DataLoader(passages(640), batch_size=8, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    objective = Objective(
        model,
        ObjectiveConfig(
            attack=Attack(radius=Linear(0.0, 0.2, STEPS // 2), steps=2),
            penalty=Penalty(weight=Share(WarmUp(10, Cosine(0.1, 0.05, STEPS)))),
        ),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    losses = []
    model.train()
    for step in range(STEPS):
        micro = list(itertools.islice(batches, ACCUMULATE))
        counts = objective.counts(micro)
        total = 0.0
        for part, batch in enumerate(micro):
            last = part == len(micro) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    terms = objective(batch, counts=counts, step=step, part=part)
                accelerator.backward(terms.total)
            total += float(terms.parts["adversarial_loss" if step else "clean_loss"])  # no attack at radius 0
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if (step + 1) % 10 == 0:
            accelerator.print(f"step {step + 1}: loss under attack {total:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
