"""Evaluations of models of transformers, with a context that is shared and without."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from integrations.trainer.trainers import gpt2, llama
from method.small_lm import batch_of, policy_for, small_lm

from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.method.evaluation import (
    EmbeddingAttack,
    SuffixSearch,
    TokenSubstitution,
    UniversalPerturbation,
    evaluate,
)
from aajr_kernels.training import policy_of

#: tokens before the first that is open, up to the last one, and in all
START, END, LENGTH = 5, 11, 17
ATTACKS = {
    "embedding": EmbeddingAttack(0.5, steps=3, step_sizes=(0.5, "auto"), restarts=2),
    "substitution": TokenSubstitution(2, 4, candidates=range(1, 30), at_once=2),
    "suffix": SuffixSearch(2, steps=2, tries=4, initial=3, candidates=range(1, 30), at_once=3),
    "universal": UniversalPerturbation(0.5, steps=3),
}


@functools.cache
def model(kind):
    made = {"gpt2": gpt2, "llama": llama, "llama, fused": llama}[kind]().double()
    if "fused" in kind:
        fuse(made)
    return made


def batch(scored_from=END):
    """Rows that open at different places, one of them padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (3, LENGTH), generator=generator)
    places = torch.arange(LENGTH)
    attended = torch.ones_like(ids)
    attended[1, -2:] = 0
    attacked = (places >= torch.tensor([START, START + 2, START])[:, None]) & (places < END)
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "labels": ids.masked_fill((places < scored_from) | attacked | (attended == 0), -100),
        "attack_mask": attacked,
    }


@pytest.mark.parametrize(
    ("kind", "scored_from"),
    [
        ("gpt2", END),
        ("llama, fused", 2),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        pytest.param("llama, fused", END, marks=pytest.mark.slow),
    ],
)
def test_a_shared_context_changes_nothing_and_runs_once(kind, scored_from):
    net, lengths = model(kind).train(), []
    layer = next(module for name, module in net.named_modules() if name.endswith((".h.0", ".layers.0")))
    results = {}
    hook = layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[-2]))
    try:
        for share in (True, False, "auto"):
            lengths.clear()
            options = dict(module=net, share_context=share)
            results[share] = evaluate(policy_of(net), batch(scored_from), ATTACKS, **options)
            counts = {length: lengths.count(length) for length in set(lengths)}
            # that of the batch and that of the one with a suffix, which begins at END
            assert [counts.get(length, 0) for length in (START, END)] == (
                [0, 0] if share is False else [1, 1]
            )
            assert (LENGTH in counts and LENGTH + 2 in counts) == (share is False)
    finally:
        hook.remove()
    for name in ATTACKS:
        curve = results[False].curves[name]
        torch.testing.assert_close(results[True].curves[name], curve, rtol=1e-9, atol=1e-11)
        assert curve[-1].mean() > curve[0].mean()
    for name in ("substitution", "suffix"):
        assert torch.equal(results[True].tokens[name][0], results[False].tokens[name][0])
    torch.testing.assert_close(results[True].clean, results[False].clean, rtol=1e-10, atol=1e-12)
    assert torch.equal(results["auto"].worst, results[True].worst)
    assert net.training


def test_the_losses_are_those_of_the_model_itself():
    net, data = model("llama, fused"), batch()
    evaluation = evaluate(policy_of(net), data, ATTACKS, module=net)
    for name, ids in (
        ("clean", data["input_ids"]),
        ("substitution", evaluation.tokens["substitution"][0]),
    ):
        with torch.no_grad():
            logits = net.eval()(input_ids=ids, attention_mask=data["attention_mask"]).logits
        nll = -logits[:, :-1].log_softmax(-1).gather(2, data["labels"][:, 1:].clamp(min=0).unsqueeze(-1))
        learnt = (data["labels"][:, 1:] != -100) & (data["attention_mask"][:, :-1] != 0)
        expected = (nll.squeeze(-1) * learnt).sum(-1) / learnt.sum(-1)
        torch.testing.assert_close(evaluation.losses(name), expected, rtol=1e-9, atol=1e-11)


BAD = {
    "objective": (dict(share_context=True, loss=SimpleNamespace(of=None)), "'auto' or False with loss="),
    "word": (dict(share_context="yes"), "share_context must be one of auto"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_context_that_cannot_be_shared_is_refused(kind):
    options, message = BAD[kind]
    net = model("gpt2")
    with pytest.raises(ValueError, match=message):
        evaluate(policy_of(net), batch(), ATTACKS, module=net, **options)


def test_a_policy_without_a_context_shares_none():
    net = small_lm()
    attacks = [EmbeddingAttack(steps=1)]
    with pytest.raises(ValueError, match="policy must say how a context is shared"):
        evaluate(policy_for(net, True), batch_of(), attacks, module=net, share_context=True)
    shared, not_shared = (
        evaluate(policy_for(net, True), batch_of(), attacks, module=net, share_context=share)
        for share in ("auto", False)
    )
    assert torch.equal(shared.worst, not_shared.worst)
