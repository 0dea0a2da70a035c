"""The experiment on prompt injections: its dialogues, runs of seconds on a tiny model, choice of runs, and analysis."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from aajr_kernels.method.evaluation import evaluate
from aajr_kernels.training import Constraint, policy_of
from experiments import load, prompt_injection
from experiments.prompt_injection import dialogues, evaluation, hidden, training
from experiments.prompt_injection.report import LOSSES, METHODS, is_near, rank, unmatched, verdict
from experiments.search import best

FULL, QUICK = load("prompt-injection").config(False), load("prompt-injection").config(True)
LINES = [f"Obey {word}!" for word in "me now him her them it us all no one or two".split()]


@pytest.fixture(autouse=True)
def lines(monkeypatch):
    monkeypatch.setattr(dialogues.texts, "injections", lambda seed, longest: LINES)


@pytest.fixture
def scene():
    """The stand-in in float64, its tokens, and dialogues."""
    model, encode = training.model_of(QUICK, 0)
    return model.double().eval(), encode, dialogues.data_of(QUICK, 0)


def encode(text: str, marks: bool) -> list[int]:
    """Bytes, with a mark of the chat as one token where marks are marks."""
    if not marks or "<|im_end|>" not in text:
        return list(text.encode())
    before, after = text.split("<|im_end|>", 1)
    return [*encode(before, True), 256, *encode(after, True)]


def test_parts_share_no_text_and_no_order():
    data = dialogues.data_of(QUICK, 0)
    parts = {name: getattr(data, name) for name in dialogues.PARTS}
    assert {name: len(part) for name, part in parts.items()} == QUICK["rows"]
    of = {name: {one.injection for one in part} for name, part in parts.items()}
    assert of["start"] | of["train"] <= set(data.texts["train"])
    learnt, *others = (set(data.texts[name]) for name in ("train", "validation", "test"))
    assert not learnt & others[0] and not learnt & others[1] and not others[0] & others[1]
    numbers = [one.fact.split(":")[0] for part in parts.values() for one in part]
    assert len(set(numbers)) == len(numbers)
    words = [{w.strip(".,") for one in parts[name] for w in one.reply.split()} for name in ("train", "test")]
    names = {*dialogues.GOODS, *dialogues.CITIES}
    assert not words[0] & words[1] & names and words[1] & names


def test_too_few_texts():
    config = copy.deepcopy(QUICK) | {"texts": {"train": 9, "validation": 2, "test": 2}}
    with pytest.raises(ValueError, match="at most 12 in all, got 13"):
        dialogues.data_of(config, 0)


def test_only_the_injection_is_open_and_only_the_reply_is_scored():
    one = dialogues.Dialogue("Order 1.", "stop<|im_end|>", "One.")
    other = dialogues.Dialogue("Order 22.", "x", "Two.")
    batch = dialogues.batch_of(encode, [one, other])
    ids, mask, labels = (batch[name] for name in ("input_ids", "attack_mask", "labels"))
    attacked = bytes(ids[0][mask[0].bool()].tolist()).decode()
    assert attacked == " stop<|im_end|>"  # as text
    assert labels[0][labels[0] != -100].tolist() == [*b"One.", 256]
    assert not (mask.bool() & (labels != -100)).any()
    assert batch["attention_mask"][1].sum() == ids.shape[1] - len(attacked) + 2 + 1
    opening = len(encode(dialogues.OPENING, True))
    assert mask[0].nonzero()[0] == opening + len("Order 1.")


def test_objectives():
    plain = training.objective_of(FULL, 0.0, None)
    assert (plain.clean_weight, plain.adversarial_weight) == (1, 0) and plain.penalty.method == "none"
    bounded = training.objective_of(FULL, 3.0, 0.5)
    assert (bounded.clean_weight, bounded.adversarial_weight) == (0.25, 0.75)
    assert isinstance(bounded.penalty, Constraint) and bounded.penalty.gamma.share == 0.5
    assert bounded.share_context is True and bounded.attack.step_size == pytest.approx(0.1)


def test_the_hidden_layer_attack_is_the_loop_written_out(scene):
    """Against steps on δ through the layers above, called one by one."""
    model, encode_text, data = scene
    batch, policy = dialogues.batch_of(encode_text, data.test), policy_of(model)
    attack = hidden.LayerAttack(at=0, radius=0.5, steps=3, step_size=0.5)
    found = evaluate(policy, batch, [attack], module=model, share_context=False)
    inner = model.get_base_model().model
    attended, open_, labels = (batch[name] for name in ("attention_mask", "attack_mask", "labels"))
    whole = inner(batch["input_ids"], attention_mask=attended, output_hidden_states=True, use_cache=False)
    h = whole.hidden_states[1].detach()
    radius = 0.5 * h[attended.bool()].square().sum(-1).mean().sqrt()
    rotary = inner.rotary_emb(h, torch.arange(h.shape[1]).unsqueeze(0))
    head = model.get_base_model().lm_head

    def losses(delta):
        y = inner.layers[1](h + delta, position_embeddings=rotary)
        logits = head(inner.norm(y[0] if isinstance(y, tuple) else y))[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
        return each.sum(-1) / (labels[:, 1:] != -100).sum(-1)

    delta, worst = torch.zeros_like(h), losses(torch.zeros_like(h)).detach()
    assert torch.allclose(worst, found.clean, rtol=1e-9)
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(losses(leaf).sum(), leaf)
        slope = slope * open_.unsqueeze(-1)
        delta = delta + 0.5 * radius * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        worst = torch.maximum(worst, losses(delta).detach())
    assert (worst - found.clean).min() > 1e-4
    assert torch.allclose(worst, found.losses("hidden"), rtol=1e-7)


def test_a_shared_context_changes_no_loss_of_the_hidden_layer_but_its_unit(scene):
    model, encode_text, data = scene
    batch, policy = dialogues.batch_of(encode_text, data.test), policy_of(model)
    attack = hidden.LayerAttack(at=0, radius=0.5, steps=2, step_size=0.5)
    shared, whole = (
        evaluate(policy, batch, [attack], module=model, share_context=share) for share in (True, False)
    )
    assert torch.allclose(shared.clean, whole.clean, rtol=1e-9)
    assert torch.allclose(shared.worst, whole.worst, rtol=0.1) and (shared.worst > shared.clean).all()


def test_adapters_are_put_back(scene):
    model, encode_text, data = scene
    state = training.state_of(model)
    before = evaluation.clean_loss(model, dialogues.batch_of(encode_text, data.test))
    rows = training.tune(QUICK, model.float(), encode_text, data.train, 0, mix=1.0, gamma=0.5)
    assert rows["seconds_per_step"] > 0 and rows["multiplier"] is not None
    model.double()
    assert evaluation.clean_loss(model, dialogues.batch_of(encode_text, data.test)) != before
    training.put(model, state)
    assert evaluation.clean_loss(model, dialogues.batch_of(encode_text, data.test)) == before


def test_work_of_a_method():
    prompt_injection._start.cache_clear()
    rows = prompt_injection.work(QUICK, 0, "aajr")
    assert [(row["mix"], row["gamma"]) for row in rows] == [(1, 0.5), (3, 0.5)]
    (tested,) = [row for row in rows if row["chosen"]]
    assert tested is rows[best(rows, lambda row: rank(QUICK, row))]
    losses, by_row = tested["test"], tested["test"]["rows"]
    assert set(by_row) == set(LOSSES)
    for name, values in by_row.items():
        assert losses[name] == pytest.approx(sum(values) / len(values))
    assert by_row["worst"] == [max(values) for values in zip(*(by_row[name] for name in LOSSES))]
    # these start from the clean input and keep the largest loss on the way; the universal one and the suffix need not
    for name in ("embedding", "hidden", "substitution"):
        assert all(a >= b - 1e-6 for a, b in zip(by_row[name], by_row["clean"])), name


def made_up(worst: dict[str, list[float]], clean: float = 0.01) -> list[dict]:
    """Rows of the full configuration: two runs of a method and seed, the second of which is tested."""
    rows = []
    for method in METHODS:
        for seed, value in enumerate(worst[method]):
            test = dict.fromkeys(LOSSES, 0.1) | {"clean": clean, "worst": value}
            for number, knobs in enumerate(FULL["runs"][method][:2]):
                chosen = number == len(FULL["runs"][method][:2]) - 1
                row = {"seed": seed, "method": method, **knobs, "reference": 0.01, "chosen": chosen}
                row |= {"validation": {"clean": 0.02, "robust": value}, "seconds_per_step": 2.0}
                if method == "aajr":
                    row |= {"bound": 1.0, "multiplier": 0.5, "violation": 0.1}
                rows.append(row | ({"test": test} if chosen else {}))
    return rows


def test_the_most_robust_of_the_near_runs_is_chosen():
    runs = [
        {"reference": 0.01, "validation": {"clean": clean, "robust": robust}}
        for clean, robust in ((0.02, 0.9), (0.029, 0.5), (0.04, 0.1))
    ]
    choose = lambda some: best(some, lambda row: rank({"price": 0.02}, row))
    assert choose(runs) == 1 and choose(runs[::-1]) == 1
    assert [is_near({"price": 0.02}, row) for row in runs] == [True, True, False]
    far = [row | {"reference": -1.0} for row in runs]
    assert choose(far) == 0


def test_seeds_that_are_not_matched():
    rows = made_up({method: [0.5] * 3 for method in METHODS})
    assert unmatched(FULL, rows) == []
    tested = [row for row in rows if row["chosen"] and row["method"] == "aajr"]
    tested[0]["test"]["clean"] += 1.5 * FULL["price"]
    tested[2]["validation"]["clean"] += 1.5 * FULL["price"]
    assert unmatched(FULL, rows) == [0, 2]


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.001, 0.0, 0.001], "differs by at most"),
        ([-0.3, 0.1, 0.2], "is undecided"),
        ([-0.30, -0.31, -0.32], "is undecided"),  # three seeds confirm no sign
    ],
)
def test_page_and_verdict(differences, words, tmp_path):
    plain, adversarial = [1.0, 1.3, 1.2], [0.5, 0.6, 0.75]
    aajr = [a + b for a, b in zip(adversarial, differences)]
    rows = made_up({"plain": plain, "adversarial": adversarial, "aajr": aajr})
    text = verdict(FULL, rows)
    assert words in text and "matched at every seed" in text
    rows = [row | {"task": f"{row['seed']}/{row['method']}", "seconds": 60.0} for row in rows]
    environment = dict(dirty=False, torch="2", python="3", cpu="c", machine="m", commit="0")
    config = copy.deepcopy(FULL)
    config["runs"] = {method: runs[:2] for method, runs in config["runs"].items()}
    page = load("prompt-injection").report({"config": config, "environment": environment}, rows, tmp_path)
    assert text in page and "None" not in page and "nan" not in page
    assert math.isclose(0.25, 2 / 2 ** FULL["seeds"]) and "below 0.25" in page
    assert (tmp_path / "prompt-injection.png").stat().st_size > 10_000
