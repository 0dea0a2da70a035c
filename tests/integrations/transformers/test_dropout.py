"""Models in training mode: one random state is one set of dropout masks, for plain calls, Duals, attacks, penalties."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.integrations import transformers as ours

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FORMS = ["eager", "sdpa", "aajr", "fused"]


@functools.cache
def model(name: str, attention: str) -> nn.Module:
    """With dropout wherever the family has it."""
    torch.manual_seed(0)
    if name == "gpt2":
        rates = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.3)
        config = transformers.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32, **rates)
        made = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        rates = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, num_hidden_layers=2)
        config = transformers.BertConfig(
            **SIZES, hidden_size=16, num_attention_heads=2, intermediate_size=24, **rates
        )
        made = transformers.BertForMaskedLM(config)
    else:
        config = transformers.LlamaConfig(
            **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=0.3,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config)
    if attention == "aajr":
        ours.register()
    if attention == "fused":
        ours.fuse(made)
    else:
        made.set_attn_implementation(attention)
    return made.train()


PADDING = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def logits(m: nn.Module, x: Any) -> Any:
    return m(inputs_embeds=x, attention_mask=PADDING).logits


def run(m: nn.Module, x: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    y = logits(m, x)
    return y, torch.get_rng_state()


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_plain_call_and_a_dual_draw_the_same_masks(name: str, attention: str) -> None:
    m, x = model(name, attention), torch.randn(2, 7, 16)
    plain, state = run(m, x)
    for tangents in (1, 3):
        y, after = run(m, aajr.dual(x, torch.randn(tangents, *x.shape)))
        torch.testing.assert_close(y.primal, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(after, state)
    with torch.no_grad():
        dropped = (plain - logits(m.eval(), x)).abs().max()
    assert dropped > 1e-3
    m.train()


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("dual_loss", [False, True])
def test_an_attack_and_the_training_forward_after_it_have_one_mask(attention: str, dual_loss: bool) -> None:
    m, ids = model("gpt2", attention), torch.randint(0, 61, (2, 7))
    x, v, seen = torch.randn(2, 7, 16), torch.randn(2, 7, 16), []

    def loss(z: Tensor) -> Tensor:
        y = logits(m, aajr.dual(z, v) if dual_loss else z)
        y = y.primal if dual_loss else y
        seen.append(y.detach())
        return nn.functional.cross_entropy(y.mT, ids, reduction="none").mean(1)

    # so close to x that only another mask makes a difference
    traj = aajr.ascend(loss, x, radius=1e-6, steps=2, step_size=1e-6, scope="token", module=m)
    state = torch.get_rng_state()
    _, trained = aajr.aligned_penalty(lambda z: logits(m, z), traj.points[-1], v, return_primal=True)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    plain = logits(m, traj.points[-1])
    assert torch.equal(torch.get_rng_state(), after)
    for other in (*seen, plain):
        torch.testing.assert_close(other, trained, rtol=1e-4, atol=5e-5)
