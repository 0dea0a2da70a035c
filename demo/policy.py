"""Part (a): a pretrained language-model policy on prompt-injection text.

The policy answers a user whose text is an attack. The adversary moves the embeddings of that text, and only of that
text, along the gradient of the reply's loss; the penalty is the Fisher size of what this does to the distribution of
the reply, summed over its tokens. Replies are the policy's own greedy ones: what is protected is its behaviour.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import aajr_kernels as aajr
from aajr_kernels.integrations.transformers import fuse
from common.meter import Cost, measure, spread
from common.texts import require

from . import peers

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
    rows = [
        (ids + reply, user + [False] * len(reply))
        for (ids, user), reply in zip(prompts, replies, strict=True)
    ]
    shape = (len(rows), max(len(ids) for ids, _ in rows) - 1)  # the last token predicts nothing
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    user = torch.zeros(shape, dtype=torch.bool)
    for i, (row, mask) in enumerate(rows):
        n, first = len(row) - 1, len(prompts[i][0]) - 1
        ids[i, :n] = torch.tensor(row[:-1])
        user[i, :n] = torch.tensor(mask[:-1])
        labels[i, first:n] = torch.tensor(row[first + 1 :])
    return Dialogues(ids, labels, user)


@torch.no_grad()
def greedy_replies(model: Any, prompts: list[list[int]], count: int, stop: int | None) -> list[list[int]]:
    """The policy's own replies: up to `count` greedy tokens, cut after `stop`."""
    longest = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[i, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=stop or 0
    )
    replies = [row[longest:].tolist() for row in out]
    return [row[: row.index(stop) + 1] if stop in row else row for row in replies]


def reply_loss(model: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the reply's tokens, given input embeddings."""
    return F.cross_entropy(model(inputs_embeds=x, use_cache=False).logits.flatten(0, 1), labels.flatten())


def embed(model: Any, batch: Dialogues) -> torch.Tensor:
    return model.get_input_embeddings()(batch.ids).detach()


def ascent_direction(model: Any, x: torch.Tensor, batch: Dialogues) -> torch.Tensor:
    """Unit gradient (per sequence) of the reply's loss for the embeddings of the user's text, zero elsewhere."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(reply_loss(model, x, batch.labels), x)
    return aajr.normalize(gradient, scope="sequence", mask=batch.user)


def backbone(model: Any) -> Any:
    """The module below the head that returns hidden states, in a plain model and under peft."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.model


def streamed_penalty(
    model: Any, x: torch.Tensor, v: torch.Tensor, batch: Dialogues
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our penalty with streamed logits, and the reply's loss from the same forward."""
    return aajr.aligned_penalty(
        lambda embeds: backbone(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state,
        x,
        v,
        metric="fisher",
        head=aajr.LMHead(model.get_output_embeddings().weight),
        labels=batch.labels,
        mask=batch.reply,
        unit="sequence",
        return_primal=True,
    )


# ---------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------


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
    problem = peers.Problem(x, ascent_direction(model, x, batch), batch.reply)
    parameters = list(model.parameters())
    gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
    truth = _oracle(model, problem, on_run)

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
        PLAIN: lambda: reply_loss(model, x, batch.labels),
        OURS: ours,
        FUSED: lambda: streamed_penalty(model, problem.x, problem.v, batch)[0],
        FORWARD_MODE: lambda: peers.forward_mode(model, problem),
    }
    for h in config.difference_steps:
        methods[f"differences, h={h:g}"] = _differences(model, problem, h)
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    found: dict[str, tuple[float, float | None]] = {}
    names = list(methods)
    for turn in range(1 + config.repeats):
        # interleaved, in an order that changes: a slow moment of the machine hits all of them alike
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            penalty = methods[name]
            on_run(name)
            fusion = fuse(model) if name == FUSED else contextlib.nullcontext()
            run = functools.partial(peers.value_and_gradients, penalty, parameters)
            with fusion, peers.math_attention(name == FORWARD_MODE):
                (value, gradients), cost = measure(run, x.device)
            if turn == 0:  # warms up, and is judged; the times of the others count
                found[name] = value, None if name == PLAIN else peers.relative_error(gradients, truth)
            else:
                costs[name].append(cost)
            del gradients
    rows = []
    for name, (value, error) in found.items():
        seconds = [cost.seconds for cost in costs[name]]
        peaks = [max(0, c.peak_bytes - gradient_bytes) for c in costs[name] if c.peak_bytes is not None]
        peak = min(peaks) if peaks else None
        rows.append(MethodRow(name, value, error, min(seconds), peak, spread(seconds)))
    return rows


def _differences(model: Any, problem: peers.Problem, h: float) -> Callable[[], torch.Tensor]:
    return lambda: peers.finite_difference(model, problem, h)


def _oracle(model: Any, problem: peers.Problem, on_run: Callable[[str], None]) -> list[torch.Tensor]:
    on_run("float64 oracle")
    exact = peers.double_precision(model)
    with peers.math_attention():
        _, truth = peers.value_and_gradients(
            lambda: peers.forward_mode(exact, problem.to(torch.float64)), list(exact.parameters())
        )
    return truth


# ---------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------


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
    penalty: list[float]
    loss: list[float]
    after: HeldOut


def evaluate(model: Any, batch: Dialogues, radius: float) -> HeldOut:
    """Held-out figures of a model."""
    x = embed(model, batch)
    v = ascent_direction(model, x, batch)
    with torch.no_grad():
        penalty, loss = streamed_penalty(model, x, v, batch)
        attacked = reply_loss(model, x + radius * v, batch.labels)
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
    require("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    options = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it renamed
        lora = get_peft_model(model, options)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=config.learning_rate)
    x = embed(lora, train)
    penalties: list[float] = []
    losses: list[float] = []
    for _ in range(config.lora_steps):
        if weight:
            penalty, task = streamed_penalty(lora, x, ascent_direction(lora, x, train), train)
            loss = task + weight * penalty
            penalties.append(penalty.item())
        else:
            loss = task = reply_loss(lora, x, train.labels)
        losses.append(task.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        on_step()
    with torch.no_grad():
        losses.append(reply_loss(lora, x, train.labels).item())
    if weight:
        v = ascent_direction(lora, x, train)
        with torch.no_grad():
            penalties.append(streamed_penalty(lora, x, v, train)[0].item())
    after = evaluate(lora, held_out, config.radius)
    lora.unload()
    for p in model.parameters():
        p.requires_grad_(True)
    return LoraRun(weight, penalties, losses, after)
