"""Part (a): a pretrained language-model policy on prompt-injection text.

The policy answers a user whose text is an attack. The adversary moves the embeddings of that text, and only of that
text, along the gradient of the reply's loss; the penalty is the Fisher size of what this does to the distribution of
the reply, summed over its tokens. Replies are the policy's own greedy ones: what is protected is its behaviour.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from common.meter import Cost, measure, spread
from common.texts import with_lora

from . import peers
from .embeddings import ascent_direction, loss_of, streamed_penalty

SYSTEM = "You are a helpful assistant."
PLAIN, OURS, FUSED, FORWARD_MODE = "plain step", "ours", "ours, fused, streamed", "PyTorch forward mode"


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of part (a).

    Attributes:
        reply_tokens: greedy tokens per reply.
        train, held_out: number of prompts for the LoRA steps, and for the figures before and after.
        repeats: timed rounds of the comparison, after one that is not; the fastest counts.
        lora_steps, rank, learning_rate: of the adaptation (AdamW; LoRA on the query and value projections and the MLP).
        weight: factor of the penalty.
        radius: of the ascent step that the held-out figures are taken after, in embedding units per sequence.
        difference_steps: h of the finite differences.
    """

    reply_tokens: int = 12
    train: int = 3
    held_out: int = 4
    repeats: int = 3
    lora_steps: int = 5
    rank: int = 8
    learning_rate: float = 6e-4
    weight: float = 0.03
    radius: float = 0.2
    difference_steps: tuple[float, ...] = (1e-2, 1e-3)


@dataclass(frozen=True)
class Dialogues:
    """A batch of prompt and reply, padded on the right (which a causal model needs no mask for).

    Attributes:
        ids: ``[B, S]`` int64.
        labels: ``[B, S]``, the reply's token at the position that predicts it, -100 elsewhere.
        user: ``[B, S]`` bool, the positions of the attacker's text.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    user: torch.Tensor

    def to(self, device: torch.device) -> Dialogues:
        return Dialogues(self.ids.to(device), self.labels.to(device), self.user.to(device))

    @property
    def reply(self) -> torch.Tensor:
        return self.labels != -100


@dataclass(frozen=True)
class MethodRow:
    """One line of the comparison.

    Attributes:
        seconds: with the gradient for every parameter, the minimum over the rounds.
        spread: how far the median of the rounds lies above it, relative to it; None of a single round.
    """

    method: str
    value: float
    gradient_error: float | None
    seconds: float
    peak_bytes: int | None
    spread: float | None


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Token ids of the chat up to the reply, and which of them the user wrote."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = chat.rindex(text)
    encoded = tokenizer(chat, return_offsets_mapping=True)
    user = [a < start + len(text) and b > start for a, b in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), user


def collate(prompts: list[tuple[list[int], list[bool]]], replies: list[list[int]]) -> Dialogues:
    """One right-padded batch."""
    columns: tuple[list[torch.Tensor], ...] = ([], [], [])
    for (ids, user), reply in zip(prompts, replies, strict=True):
        labels = [-100] * (len(ids) - 1) + reply
        # the last token predicts nothing
        for column, values in zip(columns, ((ids + reply)[:-1], labels, (user + [False] * len(reply))[:-1])):
            column.append(torch.tensor(values))
    padded = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill)
        for column, fill in zip(columns, (0, -100, False))
    )
    return Dialogues(*padded)


@torch.no_grad()
def greedy_replies(model: Any, prompts: list[list[int]], count: int, stop: int | None) -> list[list[int]]:
    """The policy's own replies: up to `count` greedy tokens, cut after `stop`."""
    device, replies = model.get_input_embeddings().weight.device, []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": stop or 0}
        reply = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
            0, len(prompt) :
        ]
        replies.append(reply.tolist())
    return [row[: row.index(stop) + 1] if stop in row else row for row in replies]


def embed(model: Any, batch: Dialogues) -> torch.Tensor:
    return model.get_input_embeddings()(batch.ids).detach()


def direction_of(model: Any, x: torch.Tensor, batch: Dialogues) -> torch.Tensor:
    """Unit gradient (per sequence) of the reply's loss for the embeddings of the user's text, zero elsewhere."""
    return ascent_direction(model, x, batch.labels, "sequence", batch.user)


def penalty_of(
    model: Any, x: torch.Tensor, v: torch.Tensor, batch: Dialogues
) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty summed over the reply's tokens, and the reply's loss."""
    return streamed_penalty(model, x, v, batch.labels, mask=batch.reply, unit="sequence")


def compare(
    model: Any, batch: Dialogues, config: PolicyConfig, on_run: Callable[[str], None] = lambda name: None
) -> list[MethodRow]:
    """Value, gradient error, time and memory of every way to compute the penalty and its parameter gradients.

    The error is relative to forward mode in float64, over all parameters together. Memory is the peak beyond weights
    and gradients.

    Args:
        on_run: told the name of a method before each of its runs.
    """
    x = embed(model, batch)
    problem = peers.Problem(x, direction_of(model, x, batch), batch.reply)
    parameters = list(model.parameters())
    gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
    on_run("float64 oracle")
    _, truth = peers.exact_gradients(model, problem)

    def ours() -> torch.Tensor:
        return aajr.aligned_penalty(
            lambda embeds: model(inputs_embeds=embeds, use_cache=False),
            problem.x,
            problem.v,
            metric="fisher",
            mask=problem.mask,
            unit="sequence",
        )

    methods: dict[str, Callable[[], torch.Tensor]] = {
        PLAIN: lambda: loss_of(model, x, batch.labels),
        OURS: ours,
        FUSED: lambda: penalty_of(model, problem.x, problem.v, batch)[0],
        FORWARD_MODE: lambda: peers.forward_mode(model, problem),
    }
    for h in config.difference_steps:
        methods[f"differences, h={h:g}"] = functools.partial(peers.finite_difference, model, problem, h)
    modes: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        FUSED: lambda: fuse(model),
        FORWARD_MODE: lambda: sdpa_kernel(SDPBackend.MATH),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    results: dict[str, tuple[float, float | None]] = {}
    names = list(methods)
    for turn in range(1 + config.repeats):
        # interleaved, in an order that changes: a slow moment of the machine hits all of them alike
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            on_run(name)
            run = functools.partial(peers.value_and_gradients, methods[name], parameters)
            with modes.get(name, contextlib.nullcontext)():
                (value, gradients), cost = measure(run, x.device)
            if turn == 0:  # warms up, and is judged; the times of the others count
                results[name] = value, None if name == PLAIN else peers.relative_error(gradients, truth)
            else:
                costs[name].append(cost)
            del gradients
    rows = []
    for name, (value, error) in results.items():
        seconds = [cost.seconds for cost in costs[name]]
        peaks = [max(0, c.peak_bytes - gradient_bytes) for c in costs[name] if c.peak_bytes is not None]
        rows.append(MethodRow(name, value, error, min(seconds), min(peaks, default=None), spread(seconds)))
    return rows


@dataclass(frozen=True)
class HeldOut:
    """Figures on prompts that were not trained on.

    Attributes:
        penalty: Fisher size along the ascent direction, per sequence.
        loss: of the reply, nats per token.
        attacked_loss: the same after one ascent step of the configured radius.
    """

    penalty: float
    loss: float
    attacked_loss: float


@dataclass
class LoraRun:
    """One adaptation.

    Attributes:
        weight: factor of the penalty; 0 for the control that trains only on the replies.
        penalty: on the training prompts before each step and after the last; empty for the control.
        loss: of the training replies, likewise.
        after: held-out figures after the last step.
    """

    weight: float
    penalty: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    after: HeldOut = HeldOut(0.0, 0.0, 0.0)

    @property
    def name(self) -> str:
        return "replies and penalty" if self.weight else "replies only"


def evaluate(model: Any, batch: Dialogues, radius: float) -> HeldOut:
    """Held-out figures of a model."""
    x = embed(model, batch)
    v = direction_of(model, x, batch)
    with torch.no_grad():
        penalty, loss = penalty_of(model, x, v, batch)
        attacked = loss_of(model, x + radius * v, batch.labels)
    return HeldOut(penalty.item(), loss.item(), attacked.item())


def adapt(
    model: Any,
    train: Dialogues,
    held_out: Dialogues,
    config: PolicyConfig,
    *,
    weight: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> LoraRun:
    """A few LoRA steps on ``reply loss + weight * penalty``; the model is left as it was.

    Args:
        weight: 0 trains only on the reply loss.
        seed: of the LoRA initialisation.
    """
    torch.manual_seed(seed)
    lora = with_lora(model, config.rank, ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=config.learning_rate)
    x, run = embed(lora, train), LoraRun(weight)

    def terms() -> tuple[torch.Tensor, torch.Tensor]:
        """Penalty (0 where it is not trained on) and task loss, both attached and recorded."""
        if not weight:
            penalty, task = x.new_zeros(()), loss_of(lora, x, train.labels)
        else:
            penalty, task = penalty_of(lora, x, direction_of(lora, x, train), train)
            run.penalty.append(penalty.item())
        run.loss.append(task.item())
        return penalty, task

    for _ in range(config.lora_steps):
        penalty, task = terms()
        optimizer.zero_grad(set_to_none=True)
        (task + weight * penalty).backward()
        optimizer.step()
        on_step()
    terms()
    run.after = evaluate(lora, held_out, config.radius)
    lora.unload()
    model.requires_grad_(True)
    return run
