"""The suffix search and the universal perturbation find what loops find that are written out here."""

from __future__ import annotations

import pytest
import torch
from method.small_lm import VOCABULARY, WIDTH, batch_of, policy_for, row_loss, small_lm, token_norm

from aajr_kernels.method.batch import prepared
from aajr_kernels.method.evaluation import (
    EmbeddingAttack,
    Scene,
    SuffixSearch,
    UniversalPerturbation,
    evaluate,
)
from aajr_kernels.method.evaluation.run import generator_of
from aajr_kernels.method.evaluation.suffix import lengthened

CLOSE = dict(rel=1e-9, abs=1e-12)
STREAMED = pytest.mark.parametrize("streamed", [True, False])


def run(model, batches, *attacks, streamed=True, **options):
    return evaluate(policy_for(model, streamed), batches, attacks, module=model, **options)


# -- suffix -------------------------------------------------------------------------------------------------


def with_suffix(batch, row, suffix):
    """The batch of one row with ids put in behind its last open token, and where they begin."""
    open_places = (batch["attack_mask"] * batch["attention_mask"])[row].nonzero().flatten().tolist()
    start = max(open_places) + 1
    longer = {}
    for name, filler in (
        ("input_ids", suffix),
        ("labels", [-100] * len(suffix)),
        ("attention_mask", [1] * len(suffix)),
    ):
        values = batch[name][row].tolist()
        longer[name] = torch.tensor([values[:start] + filler + values[start:]])
    return longer, start


def search_by_hand(model, batch, *, length, steps, tries, top, initial, candidates, generator):
    """Ids and losses of every row after 0, 1, ... steps."""
    table = model.embedding.weight.detach()
    rows = range(len(batch["input_ids"]))

    def loss_of(row, suffix, x=None):
        longer, _ = with_suffix(batch, row, suffix)
        return row_loss(model, table[longer["input_ids"][0]] if x is None else x, longer, 0)

    current = [list(initial) for _ in rows]
    best, losses = list(current), [[float(loss_of(row, current[row]).detach())] for row in rows]
    for _ in range(steps):
        places = torch.randint(length, (len(rows), tries), generator=generator)
        ranks = torch.randint(min(top, len(candidates)), (len(rows), tries), generator=generator)
        for row in rows:
            longer, start = with_suffix(batch, row, current[row])
            x = table[longer["input_ids"][0]].requires_grad_()
            (slope,) = torch.autograd.grad(loss_of(row, current[row], x), x)
            found = []
            for place, rank in zip(places[row].tolist(), ranks[row].tolist()):
                own = current[row][place]
                gains = [
                    (
                        float("-inf")
                        if token == own
                        else float(slope[start + place] @ (table[token] - table[own])),
                        -k,
                    )
                    for k, token in enumerate(candidates)
                ]
                order = sorted(range(len(candidates)), key=lambda k: gains[k], reverse=True)
                trial = list(current[row])
                trial[place] = candidates[order[rank]]
                found.append((float(loss_of(row, trial).detach()), trial))
            loss, current[row] = max(found, key=lambda one: one[0])
            if loss > losses[row][-1]:
                best[row] = current[row]
            losses[row].append(max(loss, losses[row][-1]))
    return best, losses


@STREAMED
@pytest.mark.parametrize("at_once", [1, 3])
def test_the_search_finds_what_a_loop_finds(streamed, at_once):
    model, batches = small_lm(), [batch_of(seed=1), batch_of(rows=2, seed=2)]
    given = [0, 2, 3, 5, 7, 9]
    attack = SuffixSearch(3, steps=5, tries=4, top=3, initial=[1, 2, 1], candidates=given, at_once=at_once)
    evaluation = run(model, batches, attack, streamed=streamed, seed=2)
    options = dict(length=3, steps=5, tries=4, top=3, initial=[1, 2, 1], candidates=given)
    row = 0
    for index, batch in enumerate(batches):
        best, losses = search_by_hand(model, batch, **options, generator=generator_of(2, index))
        for own in range(len(best)):
            expected, start = with_suffix(batch, own, best[own])
            assert evaluation.tokens["suffix"][index][own].tolist() == expected["input_ids"][0].tolist()
            assert evaluation.curves["suffix"][:, row].tolist() == pytest.approx(losses[own], **CLOSE)
            assert start in (4, 5)
            row += 1
    assert (evaluation.curves["suffix"][-1] > evaluation.curves["suffix"][0]).all()
    assert evaluation.calls["suffix"] == (2 * 5, 2 * (1 + 5 * 4))


def test_one_token_with_every_candidate_tried_often_is_the_best_there_is():
    model, batch = small_lm(), batch_of()
    evaluation = run(model, batch, SuffixSearch(1, steps=1, tries=200, top=VOCABULARY))
    for row in range(3):
        longer = [with_suffix(batch, row, [token])[0] for token in range(VOCABULARY)]
        losses = [
            float(row_loss(model, model.embedding(one["input_ids"][0]), one, 0).detach()) for one in longer
        ]
        assert evaluation.attacked["suffix"][row].item() == pytest.approx(max(losses), **CLOSE)


def test_a_lengthened_batch_predicts_the_same_tokens():
    batch = batch_of() | {"agents": torch.arange(24).reshape(3, 8)}
    for shift in (True, False):
        ready = prepared(batch, torch.device("cpu"), shift)
        scene = Scene(policy_for(small_lm(), True), ready, is_shifted=shift)
        longer, places = lengthened(scene, torch.full((3, 2), 10))
        assert places.tolist() == [[4, 5], [5, 6], [5, 6]]
        assert longer.batch.attackable.nonzero()[:, 1].reshape(3, 2).tolist() == places.tolist()
        assert longer.batch.inputs["attention_mask"].tolist() == [[1] * 10, [1] * 10, [0] + [1] * 9]
        assert longer.batch.agents[0].tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7]
        for row in range(3):
            expected = with_suffix(batch, row, [10, 10])[0]
            again = prepared(expected, torch.device("cpu"), shift)
            assert longer.batch.labels[row].tolist() == again.labels[0].tolist()
            assert longer.ids[row].tolist() == again.input_ids[0].tolist()


# -- universal ----------------------------------------------------------------------------------------------


def universal_by_hand(model, batches, radius, steps, step_size, size):
    """Points ``[size, C]`` of the ascent on the mean loss, in norms of a token, and losses of all rows at each."""
    delta, points, losses = torch.zeros(size, WIDTH, dtype=torch.float64), [], []
    for step in range(steps + 1):
        leaf, values = delta.clone().requires_grad_(), []
        for batch in batches:
            values += losses_at(model, batch, leaf)
        points.append(delta.clone())
        losses.append([float(value.detach()) for value in values])
        if step == steps:
            break
        (slope,) = torch.autograd.grad(sum(values) / len(values), leaf)
        for k in range(size):
            if slope[k].norm() > 0:
                delta[k] += step_size * radius * slope[k] / slope[k].norm()
            delta[k] *= min(1.0, radius / max(float(delta[k].norm()), 1e-30))
    return points, losses


def losses_at(model, batch, delta):
    x, losses = model.embedding(batch["input_ids"]).detach(), []
    unit = token_norm(x, batch["attention_mask"])
    for row in range(len(x)):
        places = (batch["attack_mask"] * batch["attention_mask"])[row].nonzero().flatten().tolist()
        moved = list(x[row])
        for k, place in enumerate(places):
            moved[place] = moved[place] + unit * delta[k % len(delta)]
        losses.append(row_loss(model, torch.stack(moved), batch, row))
    return losses


@STREAMED
@pytest.mark.parametrize("size", [None, 1, 2])
def test_one_perturbation_for_a_batch_is_that_of_a_loop(streamed, size):
    model, batches = small_lm(), [batch_of(seed=1), batch_of(rows=2, seed=2)]
    attack = UniversalPerturbation(0.5, steps=4, step_size=0.4, size=size)
    evaluation = run(model, batches, attack, streamed=streamed)
    row = 0
    for batch in batches:
        _, losses = universal_by_hand(model, [batch], 0.5, 4, 0.4, size or 4)
        for step in range(5):
            best = max(range(step + 1), key=lambda t: sum(losses[t]))
            curve = evaluation.curves["universal"][step, row : row + len(losses[0])]
            assert curve.tolist() == pytest.approx(losses[best], **CLOSE)
        row += len(losses[0])
    assert evaluation.attacked["universal"].mean() > evaluation.clean.mean() + 0.05


def test_a_perturbation_fitted_on_one_split_is_applied_to_another():
    model = small_lm()
    train, test = [batch_of(seed=1), batch_of(rows=2, seed=2)], [batch_of(seed=3), batch_of(seed=4)]
    attack = UniversalPerturbation(0.5, steps=6, step_size=0.3, size=3)
    fitted = attack.fit(policy_for(model, True), train, module=model)
    assert attack.delta is None and model.training
    points, losses = universal_by_hand(model, train, 0.5, 6, 0.3, 3)
    worst = max(range(7), key=lambda t: sum(losses[t]))
    torch.testing.assert_close(fitted.delta, points[worst], rtol=1e-9, atol=1e-12)
    evaluation = run(model, test, fitted)
    expected = [float(loss.detach()) for batch in test for loss in losses_at(model, batch, points[worst])]
    assert evaluation.attacked["universal"].tolist() == pytest.approx(expected, **CLOSE)
    assert torch.equal(evaluation.curves["universal"][0], evaluation.clean)
    assert evaluation.calls["universal"] == (0, 4)
    again = run(model, train, fitted).attacked["universal"].tolist()  # the split it was fitted on
    assert again == pytest.approx(losses[worst], **CLOSE)


def test_auto_steps_of_a_universal_perturbation_never_lower_the_mean():
    attacks = (
        UniversalPerturbation(0.5, steps=5, step_size="auto"),
        EmbeddingAttack(0.5, step_sizes=(0.4, 0.05)),
    )
    evaluation = run(small_lm(), batch_of(), *attacks)
    means = evaluation.curves["universal"].mean(-1)
    assert (means.diff() >= 0).all() and means[-1] > means[0]
    # one perturbation for all rows cannot do more than one for each
    assert evaluation.attacked["embedding"].mean() > evaluation.attacked["universal"].mean()


# -- errors -------------------------------------------------------------------------------------------------

NO_PLACE = batch_of() | {"attack_mask": batch_of()["attack_mask"].index_fill(0, torch.tensor(1), 0)}
BAD = {
    "row": (lambda: SuffixSearch(2), NO_PLACE, "token open in every row .* got none in row 1"),
    "positions": (lambda: SuffixSearch(2), batch_of() | {"position_ids": torch.arange(8).unsqueeze(0)}, "position_ids"),
    "initial": (lambda: SuffixSearch(2, initial=[1, 2, 3]), batch_of(), "one id or length=2 of them, got 3"),
    "text": (lambda: SuffixSearch(2, initial="!"), batch_of(), "initial must be an integer"),
    "tries": (lambda: SuffixSearch(2, tries=0), batch_of(), "tries must be an integer >= 1"),
    "delta": (lambda: UniversalPerturbation(delta=torch.ones(3)), batch_of(), r"delta must be floating point \[K, C\]"),
    "far": (lambda: UniversalPerturbation(0.1, delta=torch.ones(3, 6)), batch_of(), "within radius=0.1, got a vector"),
    "width": (lambda: UniversalPerturbation(9.0, delta=torch.ones(3, 5)), batch_of(), "the width 6 of the embeddings"),
    "size": (lambda: UniversalPerturbation(size=0), batch_of(), "size must be an integer >= 1"),
    "step": (lambda: UniversalPerturbation(step_size=0.0), batch_of(), "step_size must be positive or 'auto'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(kind):
    attack, batch, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        run(small_lm(), batch, attack())


def test_nothing_to_fit_on_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        UniversalPerturbation().fit(policy_for(small_lm(), True), [], module=None)
