"""TRL's GRPO as the learner of one agent in dialogues with others, which stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...method.agents import Agents
from ...method.checks import check_integers
from ...method.dialogue import Dialogue, play
from ...sharding import is_fully_sharded
from ..transformers.adapters import generated
from .grpo import grpo_batch

__all__ = ["DialogueRollout", "dialogue_batch"]

#: settings of sampling that GRPOTrainer has under these names, as arguments of generate
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class DialogueRollout:
    """Plays dialogues for ``GRPOTrainer(rollout_func=rollout, reward_funcs=[rollout.reward])``.

    The prompt of the trainer is what the learner sees before the first turn; its completion is the dialogue from there
    to the learner's last token, in which the turns of others are masked (``env_mask``): GRPO learns the learner's own
    tokens. With :class:`~.mixins.AAJRPenaltyMixin` before the trainer, the adversary moves the turns of others. The
    learner speaks with the trainer's settings of sampling, the others with their own.

    Attributes:
        agents: who speak. The learner's module is the trainer's model, which others may share by adapters.
        learner: name of the agent that is trained, with a payoff that is a function of a
            :class:`~aajr_kernels.method.dialogue.Dialogue`.
        rounds: every agent speaks once in each.
        length: tokens of a turn, at most.
        order: names of those who speak in a round, all by default.
        opened: from the trainer's prompts of this process, one per completion, to a dialogue before the first turn; by
            default the prompts are its opening, which all see: texts, or messages in the tokenizer's chat template.
    """

    agents: Agents
    learner: str
    rounds: int = 1
    length: int = 16
    order: Sequence[str] | None = None
    opened: Callable[[list[Any]], Dialogue] | None = None

    def __post_init__(self) -> None:
        check_integers(1, rounds=self.rounds, length=self.length)
        if not callable(self.agents[self.learner].payoff):
            raise ValueError(
                f"agent {self.learner!r} must have a payoff that is a function of a dialogue to be learnt by GRPO, got "
                f"{self.agents[self.learner].payoff!r}."
            )
        order = self.agents.names if self.order is None else self.order
        if self.learner not in order:
            raise ValueError(
                f"order must name the learner {self.learner!r}, got {', '.join(order) or 'no name'}."
            )

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What GRPOTrainer calls for the completions of its prompts.

        Returns:
            ``prompt_ids``, ``completion_ids``, ``env_mask`` (1 = the learner's own), lists per row; ``logprobs`` None;
            ``payoff`` per row.

        Raises:
            TypeError, ValueError: the model, the trainer or a dialogue does not go with it.
        """
        self._check(trainer)
        settings = {
            name: getattr(trainer, name) for name in SAMPLING if getattr(trainer, name, None) is not None
        }
        settings |= getattr(trainer.args, "generation_kwargs", None) or {}
        speak = functools.partial(generated, options=settings)
        agents = Agents([replace(a, speak=speak) if a.name == self.learner else a for a in self.agents])
        start = self._opened(prompts, trainer)
        if start.rows != len(prompts):
            raise ValueError(
                f"opened must return a row for each of {len(prompts)} prompts, got {start.rows}."
            )
        before = start.view(self.learner)[0].shape[1]
        # of the global state, which the trainer seeds for every process and keeps in its checkpoints
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        options: dict[str, Any] = dict(rounds=self.rounds, length=self.length, order=self.order)
        dialogue = play(agents, start, generator=generator, **options)
        ids, attended = (part.cpu() for part in dialogue.view(self.learner))
        if not bool(attended[:, :before].any(-1).all()):
            raise ValueError(
                f"agent {self.learner!r} must see a token before the first turn in every row, which is GRPO's prompt: "
                "give it a prompt or the dialogue an opening."
            )
        own = torch.zeros_like(attended)
        speakers = dialogue.speakers == dialogue.names.index(self.learner)
        own[:, ids.shape[1] - len(speakers) :] = speakers
        result: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "env_mask": []}
        for row, mask, is_own in zip(ids, attended, own & attended):
            end = int(is_own.nonzero()[-1]) + 1
            said = mask[before:end]
            result["prompt_ids"].append(row[:before][mask[:before]].tolist())
            result["completion_ids"].append(row[before:end][said].tolist())
            result["env_mask"].append(is_own[before:end][said].long().tolist())
        payoff = self.agents[self.learner].paid(dialogue, dialogue.rows)
        return {**result, "logprobs": None, "payoff": payoff.tolist()}

    def reward(self, completions: list[Any], payoff: Any = None, **columns: Any) -> list[float]:
        """The learner's payoff, for ``reward_funcs``.

        Raises:
            ValueError: the trainer has not called the rollout, or does not know the mask of others' turns.
        """
        if payoff is None:
            raise ValueError(
                "payoff must come from the rollout, got none: pass the DialogueRollout as rollout_func, too."
            )
        if "env_mask" in columns:
            raise ValueError(
                "env_mask must be taken by the trainer, which this version of TRL does not do: it would learn the "
                "turns of others. Update TRL."
            )
        return list(payoff)

    def _check(self, trainer: Any) -> None:
        module = self.agents[self.learner].module
        if trainer.accelerator.unwrap_model(trainer.model) is not module:
            raise ValueError(
                f"the trainer's model must be the module of agent {self.learner!r}, got another: give the agent the "
                "model that the trainer gets (with adapters of its own already on it, in the place of peft_config)."
            )
        if getattr(trainer, "use_vllm", False):
            raise ValueError("use_vllm must be False with DialogueRollout, whose agents speak by themselves.")
        if is_fully_sharded(trainer.model):
            raise ValueError(
                "the trainer's model must not be fully sharded with DialogueRollout, whose agents speak by the module: "
                "use one process or DistributedDataParallel."
            )
        own = {id(p) for p in self.agents[self.learner].parameters()}
        others = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in own]
        if others:
            raise ValueError(
                f"only parameters of agent {self.learner!r} may require a gradient in the trainer, got {others[0]} "
                f"({len(others)} in all): call model.set_adapter({self.learner!r}) before."
            )

    def _opened(self, prompts: list[Any], trainer: Any) -> Dialogue:
        if self.opened is not None:
            return self.opened(prompts)
        tokenizer = trainer.processing_class
        if isinstance(prompts[0], Mapping) or not isinstance(prompts[0], (str, list)):
            raise TypeError(
                f"prompts must be texts or lists of messages, got {type(prompts[0]).__name__}: give opened=, from "
                "prompts to a Dialogue."
            )
        if isinstance(prompts[0], list):
            rows = [
                tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
                for p in prompts
            ]
        else:
            rows = tokenizer(text=prompts)["input_ids"]
        ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids = pad([torch.tensor(row) for row in rows], padding_value=tokenizer.pad_token_id or 0)
        device = next(self.agents[self.learner].module.parameters()).device
        return Dialogue.opened(self.agents.names).said(None, ids.to(device), pad(ones).to(device))


def dialogue_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """As :func:`~.grpo.grpo_batch` for rows of a :class:`DialogueRollout`: the turns of others may be attacked.

    Raises:
        ValueError: `inputs` have no mask of the learner's own tokens.
    """
    own = inputs.get("tool_mask")
    if not isinstance(own, Tensor):
        raise ValueError(
            f"inputs must hold the mask of the learner's own tokens (tool_mask), got {', '.join(inputs)}: use a "
            "version of TRL that takes env_mask of a rollout_func."
        )
    batch, advantages = grpo_batch(inputs)
    heard = inputs["completion_mask"] * (own == 0)
    batch["attack_mask"] = torch.cat([torch.zeros_like(inputs["prompt_mask"]), heard.long()], 1)
    return batch, advantages
