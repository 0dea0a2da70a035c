"""GRPO as the learner of one agent against others: whose tokens are learnt, what may be attacked, who changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_exact_gradients
from integrations.trainer.test_trl import llama, options_of
from integrations.trainer.trainers import quiet, recorder

from aajr_kernels.integrations.trainer import AAJRPenaltyMixin, DialogueRollout, dialogue_batch
from aajr_kernels.integrations.transformers import adapter_agent
from aajr_kernels.method.agents import Agent, Agents
from aajr_kernels.method.dialogue import Dialogue
from aajr_kernels.training import Attack, Objective, ObjectiveConfig, Penalty, policy_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_checkpointing.* is deprecated:FutureWarning"),  # asked for by TRL
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what datasets and trl import
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]
NAMES = ("seller", "buyer")  # the learner speaks second


def paid(dialogue: Dialogue) -> Any:
    return dialogue.ids[:, dialogue.speakers == 1].double().mean(-1)


def team() -> tuple[Any, Agents]:
    model = llama().double()
    config = lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config(), "buyer", autocast_adapter_dtype=False)
    adapted.add_adapter("seller", config())
    adapted.double().set_adapter("buyer")
    agents = [adapter_agent(adapted, "seller"), adapter_agent(adapted, "buyer", payoff=paid)]
    return adapted, Agents(agents)


def trainer_of(model: Any, **options: Any) -> Any:
    """What a rollout reads of a trainer."""
    own = dict(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
        args=SimpleNamespace(generation_kwargs=None),
        processing_class=transformers.ByT5Tokenizer(extra_ids=0),
        temperature=0.7,
        top_p=1.0,
        top_k=0,
    )
    return SimpleNamespace(**(own | options))


def test_a_rollout_is_the_dialogue_with_the_own_tokens_marked():
    model, agents = team()
    model.generation_config.eos_token_id = None
    seen: list[Dialogue] = []
    keeps = adapter_agent(model, "buyer", payoff=lambda d: (seen.append(d), paid(d))[1])
    rollout = DialogueRollout(Agents([agents["seller"], keeps]), "buyer", rounds=2, length=3)
    torch.manual_seed(0)
    played = rollout(["ab", "abcd"], trainer_of(model))
    (dialogue,) = seen
    assert model.active_adapter == "buyer"
    assert played["logprobs"] is None and played["payoff"] == paid(dialogue).tolist()
    assert played["prompt_ids"] == [[100, 101, 1], [100, 101, 102, 103, 1]]  # bytes plus 3, and an end
    for row in range(2):
        turns = dialogue.ids[row, dialogue.speakers >= 0]
        assert played["completion_ids"][row] == turns.tolist()
        assert played["env_mask"][row] == [0, 0, 0, 1, 1, 1] * 2
    torch.manual_seed(0)
    assert rollout(["ab", "abcd"], trainer_of(model)) == played  # draws of the global state
    messages = SimpleNamespace(
        pad_token_id=0, apply_chat_template=lambda m, **_: {"input_ids": [5] * len(m[0]["content"])}
    )
    talk = [[{"role": "user", "content": "abc"}], [{"role": "user", "content": "a"}]]
    assert rollout(talk, trainer_of(model, processing_class=messages))["prompt_ids"] == [[5, 5, 5], [5]]
    # what comes after the learner's last token is left out
    first = DialogueRollout(agents, "buyer", length=2, order=["buyer", "seller"])(["ab"], trainer_of(model))
    assert first["env_mask"] == [[1, 1]]


def test_the_turns_of_others_may_be_attacked():
    inputs = {
        "prompt_ids": torch.tensor([[7, 8], [0, 8]]),
        "prompt_mask": torch.tensor([[1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    batch, weights = dialogue_batch(inputs)
    assert batch["attack_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [3, 4], [-100] * 4 + [3, -100]]
    assert weights.tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="inputs must hold the mask of the learner's own tokens"):
        dialogue_batch({name: value for name, value in inputs.items() if name != "tool_mask"})


@pytest.mark.slow
@pytest.mark.integration(
    "TRL: GRPOTrainer", "one agent of a dialogue", "the surrogate and the penalty by hand"
)
def test_grpo_learns_one_agent(tmp_path, record_property):
    """Its loss and gradient are those of its own tokens, the penalty's under attack of what others said."""
    trl = pytest.importorskip("trl")
    import datasets

    class Learner(AAJRPenaltyMixin, trl.GRPOTrainer):
        inputs: Any = None

        def aajr_batch(self, inputs: Any) -> Any:
            self.inputs = inputs
            return super().aajr_batch(inputs)

    model, agents = team()
    model.generation_config.eos_token_id = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rollout, seen = DialogueRollout(agents, "buyer", rounds=2, length=3), recorder()
    sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=64)
    attack = Attack(radius=0.5, relative=False, steps=2, step_size=0.3)
    trainer = quiet(
        Learner,
        model,
        [rollout.reward],
        trl.GRPOConfig(**options_of(tmp_path, **sizes)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "abcdef"[i:]} for i in range(4)]),
        processing_class=transformers.ByT5Tokenizer(extra_ids=0),
        rollout_func=rollout,
        callbacks=[seen],
        objective=ObjectiveConfig(attack=attack, penalty=Penalty(weight=0.5, steps="last")),
    )
    trainer.train()
    inputs = trainer.inputs
    own = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert own.sum(-1).tolist() == [6] * 4 and inputs["advantages"].abs().min() > 0
    # the policy gradient at the start, by hand: the ratio is 1 there
    start = team()[0]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    z = start(input_ids=ids, attention_mask=mask).logits[:, -own.shape[1] - 1 : -1]
    log_p = z.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    by_row = (log_p * own).sum(-1) / own.sum(-1)
    (-(inputs["advantages"].double() * by_row).mean()).backward()
    batch, weights = dialogue_batch(inputs)
    assert torch.equal(batch["attack_mask"].sum(-1), torch.full((4,), 6))
    Objective(start, trainer.aajr_config).penalty(batch, row_weights=weights).total.backward()
    (gradients,) = seen.gradients
    reached = {name: p.grad for name, p in start.named_parameters() if p.grad is not None}
    assert reached and all(".buyer." in name for name in reached)
    actual = {name: gradients[name] for name in reached}
    record_property(
        "error", assert_exact_gradients(actual, reached, tolerance=1e-6)
    )  # advantages are in float32
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(reached)


def test_bad_input_has_one_sentence():
    model, agents = team()
    with pytest.raises(
        ValueError, match="agent 'seller' must have a payoff that is a function of a dialogue"
    ):
        DialogueRollout(agents, "seller")
    with pytest.raises(ValueError, match="order must name the learner 'buyer'"):
        DialogueRollout(agents, "buyer", order=["seller"])
    rollout = DialogueRollout(agents, "buyer", length=2)
    with pytest.raises(ValueError, match="must come from the rollout"):
        rollout.reward(["x"])
    with pytest.raises(ValueError, match="env_mask must be taken by the trainer"):
        rollout.reward(["x"], payoff=[1.0], env_mask=[[1]])
    with pytest.raises(ValueError, match="the trainer's model must be the module of agent 'buyer'"):
        rollout(["x"], trainer_of(llama()))
    with pytest.raises(ValueError, match="use_vllm must be False"):
        rollout(["x"], trainer_of(model, use_vllm=True))
    with pytest.raises(TypeError, match="prompts must be texts or lists of messages, got int"):
        rollout([1], trainer_of(model))
    few = DialogueRollout(
        agents, "buyer", opened=lambda p: Dialogue.opened(NAMES, opening=torch.ones(1, 2).long())
    )
    with pytest.raises(ValueError, match="opened must return a row for each of 2 prompts, got 1"):
        few(["x", "y"], trainer_of(model))
    model.set_adapter("seller")
    with pytest.raises(ValueError, match=r"call model.set_adapter\('buyer'\) before"):
        rollout(["x"], trainer_of(model))
    whole = llama()
    alone = Agent("buyer", policy_of(whole), whole, paid)
    unseen = DialogueRollout(
        Agents([alone]),
        "buyer",
        opened=lambda p: Dialogue.opened(("buyer",)).said(None, torch.ones(1, 1).long(), torch.zeros(1, 1)),
    )
    with pytest.raises(ValueError, match="must see a token"):
        unseen(["x"], trainer_of(whole))
