"""Evaluations: every attack finds what a loop of the same attack finds that is written out here, row by row."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from method.small_lm import VOCABULARY, WIDTH, batch_of, policy_for, row_loss, small_lm, token_norm

from aajr_kernels.method.batch import prepared
from aajr_kernels.method.evaluation import EmbeddingAttack, Evaluation, Scene, TokenSubstitution, evaluate
from aajr_kernels.method.evaluation.run import generator_of
from aajr_kernels.method.policy import Policy

STREAMED = pytest.mark.parametrize("streamed", [True, False])
CLOSE = dict(rel=1e-9, abs=1e-12)


def run(model, batches, *attacks, streamed=True, **options):
    return evaluate(policy_for(model, streamed), batches, attacks, module=model, **options)


def clean_of(model, batch):
    x = model.embedding(batch["input_ids"]).detach()
    return [float(row_loss(model, x[row], batch, row).detach()) for row in range(len(x))]


# -- embeddings ---------------------------------------------------------------------------------------------


def starts_of(batch, size, restarts, generator):
    """δ = 0, then uniform draws from the ball of every token: the length is r · u^(1/C)."""
    rows, length = batch["input_ids"].shape
    starts = [torch.zeros(rows, length, WIDTH, dtype=torch.float64)]
    for _ in range(restarts - 1):
        noise = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
        share = torch.rand(rows, length, generator=generator, dtype=torch.float64)
        unit = noise / noise.norm(dim=-1, keepdim=True)
        starts.append(unit * (size * share ** (1 / WIDTH)).unsqueeze(-1))
    return starts


def ascents_by_hand(model, batch, radius, steps, step_sizes, restarts, generator):
    """Largest loss of every row after 0, 1, ... steps."""
    open_to_attack = (batch["attack_mask"] * batch["attention_mask"]).bool()
    clean = model.embedding(batch["input_ids"]).detach()
    size = radius * token_norm(clean, batch["attention_mask"])
    best = [[float("-inf")] * (steps + 1) for _ in range(len(clean))]
    for share in step_sizes:
        winners = [None] * len(clean)
        for start in starts_of(batch, size, restarts, generator):
            for row in range(len(clean)):
                delta = torch.where(open_to_attack[row].unsqueeze(-1), start[row], 0.0)
                losses = []
                for t in range(steps + 1):
                    x = (clean[row] + delta).requires_grad_()
                    loss = row_loss(model, x, batch, row)
                    losses.append(float(loss.detach()))
                    if t == steps:
                        break
                    (slope,) = torch.autograd.grad(loss, x)
                    for place in open_to_attack[row].nonzero().flatten().tolist():
                        moved = delta[place] + share * size * slope[place] / slope[place].norm()
                        delta[place] = moved * min(1.0, size / float(moved.norm()))
                if winners[row] is None or max(losses) > max(winners[row]):
                    winners[row] = losses
        for row, losses in enumerate(winners):
            best[row] = [max(a, b) for a, b in zip(best[row], losses)]
    return [list(itertools.accumulate(row, max)) for row in best]


@STREAMED
def test_ascents_find_what_a_loop_finds(streamed):
    model, batches = small_lm(), [batch_of(seed=1), batch_of(rows=2, seed=2)]
    options = dict(radius=0.4, steps=4, step_sizes=(0.5, 0.2), restarts=3)
    evaluation = run(model, batches, EmbeddingAttack(**options), streamed=streamed, seed=5)
    expected, clean = [], []
    for index, batch in enumerate(batches):
        generator = generator_of(5, index)
        expected += ascents_by_hand(model, batch, **options, generator=generator)
        clean += clean_of(model, batch)
    assert evaluation.clean.tolist() == pytest.approx(clean, **CLOSE)
    assert evaluation.curves["embedding"].T.flatten().tolist() == pytest.approx(
        list(itertools.chain(*expected)), **CLOSE
    )
    assert evaluation.attacked["embedding"].tolist() == evaluation.curves["embedding"][-1].tolist()
    assert (evaluation.attacked["embedding"] > evaluation.clean + 0.05).all()
    # 2 sizes · 3 starts, a gradient at every point but the last one, for two batches
    assert evaluation.calls["embedding"] == (2 * 3 * 4 * 2, 2 * 3 * 2)


def test_radius_counts_in_norms_of_attended_tokens_or_in_its_own_unit():
    model, batch = small_lm(), batch_of()
    unit = token_norm(model.embedding(batch["input_ids"]).detach(), batch["attention_mask"])
    relative = run(model, batch, EmbeddingAttack(0.3, steps=3))
    own = run(model, batch, EmbeddingAttack(0.3 * unit, relative=False, steps=3))
    torch.testing.assert_close(relative.attacked, own.attacked, rtol=1e-12, atol=1e-12)
    entries = run(model, batch, EmbeddingAttack(0.3, steps=3, norm="linf", step="sign"))
    size = 0.3 * unit / WIDTH**0.5
    own = run(model, batch, EmbeddingAttack(size, relative=False, steps=3, norm="linf", step="sign"))
    torch.testing.assert_close(entries.attacked, own.attacked, rtol=1e-12, atol=1e-12)


def test_auto_steps_and_agents_are_those_of_ascend():
    model, batch = small_lm(), batch_of()
    batch["agents"] = torch.tensor([0, 0, 0, 7, 7, -1, -1, -1]).expand(3, 8)
    attack = EmbeddingAttack(0.5, steps=3, step_sizes=["auto"], scope="agent")
    scene = Scene(policy_for(model, True), prepared(batch, torch.device("cpu"), True), (model,))
    (trajectory,) = attack.ascents(scene, torch.Generator())
    assert trajectory.scope == "agent" and (trajectory.step_sizes > 0).any()
    for agent in (0, 7):
        moved = (trajectory.points - trajectory.x)[..., batch["agents"][0] == agent, :]
        assert (moved.flatten(2).norm(dim=-1) <= 0.5 * scene.unit * (1 + 1e-12)).all()
    assert (trajectory.losses.diff(dim=0) >= 0).all()


def test_embeddings_of_a_batch_that_require_gradients_are_attacked_without_a_graph():
    model, batch = small_lm(), batch_of()
    embeds = model.embedding(batch.pop("input_ids"))
    scene = Scene(
        policy_for(model, True),
        prepared(batch | {"inputs_embeds": embeds}, torch.device("cpu"), True),
        (model,),
    )
    assert embeds.requires_grad and not scene.x.requires_grad


# -- tokens -------------------------------------------------------------------------------------------------


def substitution_by_hand(model, batch, row, budget, tries, candidates):
    """Ids and losses after 0, 1, ... replacements of one row."""
    ids, table = batch["input_ids"][row].clone(), model.embedding.weight.detach()
    open_places = (batch["attack_mask"] * batch["attention_mask"])[row].nonzero().flatten().tolist()
    losses = [float(row_loss(model, table[ids], batch, row).detach())]
    for _ in range(budget):
        x = table[ids].requires_grad_()
        (slope,) = torch.autograd.grad(row_loss(model, x, batch, row), x)
        gains = []
        for place, token in itertools.product(open_places, candidates):
            if token != ids[place]:
                gains.append((float(slope[place] @ (table[token] - table[ids[place]])), place, token))
        best, chosen = losses[-1], None
        for _, place, token in sorted(gains, reverse=True)[:tries]:
            trial = ids.clone()
            trial[place] = token
            loss = float(row_loss(model, table[trial], batch, row).detach())
            if loss > best:
                best, chosen = loss, (place, token)
        if chosen is not None:
            ids[chosen[0]] = chosen[1]
            open_places.remove(chosen[0])
        losses.append(best)
    return ids.tolist(), losses


@STREAMED
@pytest.mark.parametrize("candidates", [None, [0, 3, 4, 9]])
def test_substitutions_find_what_a_loop_finds(streamed, candidates, monkeypatch):
    monkeypatch.setattr("aajr_kernels.method.evaluation.tokens.CHUNK", 3)  # candidates come in parts
    model, batches = small_lm(), [batch_of(seed=1), batch_of(rows=2, seed=2)]
    given = candidates if streamed or candidates else torch.arange(VOCABULARY)
    several = dict(first=TokenSubstitution(3, 5, given), second=TokenSubstitution(3, 5, given, at_once=2))
    evaluation = evaluate(policy_for(model, streamed), batches, several, module=model)
    row = 0
    for index, batch in enumerate(batches):
        for own in range(len(batch["input_ids"])):
            expected = substitution_by_hand(model, batch, own, 3, 5, candidates or range(VOCABULARY))
            for name in several:
                assert evaluation.tokens[name][index][own].tolist() == expected[0]
                assert evaluation.curves[name][:, row].tolist() == pytest.approx(expected[1], **CLOSE)
            row += 1
    assert (evaluation.attacked["first"] > evaluation.clean).all()
    assert evaluation.calls["first"] == (2 * 3, 2 * (1 + 3 * 5))


def test_one_substitution_with_all_tries_is_the_best_there_is():
    model, batch = small_lm(), batch_of()
    evaluation = run(model, batch, TokenSubstitution(budget=1, tries=1000))
    table = model.embedding.weight.detach()
    for row in range(3):
        best = float("-inf")
        for place, token in itertools.product(range(1, 5), range(VOCABULARY)):
            if batch["attack_mask"][row, place] and batch["attention_mask"][row, place]:
                trial = batch["input_ids"][row].clone()
                trial[place] = token
                best = max(best, float(row_loss(model, table[trial], batch, row).detach()))
        assert evaluation.attacked["substitution"][row].item() == pytest.approx(best, **CLOSE)


def test_no_label_is_replaced_and_no_token_by_itself():
    model, batch = small_lm(), batch_of()
    batch["attack_mask"] = batch["attention_mask"]  # all, the labels too
    evaluation = run(model, batch, TokenSubstitution(budget=8, tries=30))
    changed = evaluation.tokens["substitution"][0] != batch["input_ids"]
    assert (
        changed[:, :5].any() and not changed[:, 5:].any() and not changed[batch["attention_mask"] == 0].any()
    )
    same = batch_of() | {"input_ids": torch.full((3, 8), 7)}
    evaluation = run(model, same, TokenSubstitution(budget=2, candidates=[7]))
    assert torch.equal(evaluation.tokens["substitution"][0], same["input_ids"])
    assert evaluation.curves["substitution"][0].tolist() == evaluation.curves["substitution"][2].tolist()


# -- the whole ----------------------------------------------------------------------------------------------


def test_attacks_and_batches_do_not_depend_on_each_other():
    model = small_lm()
    attack = EmbeddingAttack(0.5, steps=2, step_sizes=(0.01,), restarts=4)  # a drawn start wins
    both = run(model, [batch_of(seed=1), batch_of(seed=2)], TokenSubstitution(2, 3), attack)
    only = run(model, iter([batch_of(seed=1)]), attack)
    assert torch.equal(both.attacked["embedding"][:3], only.attacked["embedding"])
    other = run(model, batch_of(seed=1), attack, seed=1)
    assert not torch.equal(other.attacked["embedding"], only.attacked["embedding"])
    expected = torch.stack([both.clean, both.attacked["substitution"], both.attacked["embedding"]]).amax(0)
    assert torch.equal(both.worst, expected) and torch.equal(both.losses("worst"), expected)


def test_the_model_is_left_as_it_was():
    model = small_lm()
    model.mix.eval()
    model.up.weight.requires_grad_(False)
    state, draws = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    run(model, batch_of(), EmbeddingAttack(0.2, steps=2, restarts=2), TokenSubstitution(1, 2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.up.training and not model.mix.training
    assert not model.up.weight.requires_grad and model.mix.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_an_objective_of_ones_own_is_what_is_maximised_and_reported():
    """Toward token 3 at the last place: the negative cross-entropy of it."""

    def of(policy, batch, clean):
        assert clean.shape == (*batch.labels.shape, 6)

        def losses(x):
            return policy.logits(x, **batch.inputs)[:, -1].log_softmax(-1)[:, 3]

        return losses

    model, batch = small_lm(), batch_of()
    attacks = EmbeddingAttack(0.3), TokenSubstitution(at_once=2)
    evaluation = run(model, batch, *attacks, loss=SimpleNamespace(of=of))
    model.eval()
    x = model.embedding(batch["input_ids"])
    expected = model(x, batch["attention_mask"])[:, -1].log_softmax(-1)[:, 3]
    assert evaluation.clean.tolist() == pytest.approx(expected.tolist(), **CLOSE)
    replaced = model(model.embedding(evaluation.tokens["substitution"][0]), batch["attention_mask"])
    expected = replaced[:, -1].log_softmax(-1)[:, 3]
    assert evaluation.attacked["substitution"].tolist() == pytest.approx(expected.tolist(), **CLOSE)
    assert (evaluation.attacked["embedding"] > evaluation.clean).all()


def test_progress_names_every_attack_on_every_batch():
    told = []
    batches = [batch_of(seed=1), batch_of(seed=2)]
    run(
        small_lm(),
        batches,
        EmbeddingAttack(steps=1),
        TokenSubstitution(1, 1),
        progress=lambda *a: told.append(a),
    )
    assert told == [
        (0, 4, "embedding"), (1, 4, "substitution"), (2, 4, "embedding"), (3, 4, "substitution"), (4, 4, "")
    ]  # fmt: skip
    told.clear()
    run(small_lm(), iter(batches), TokenSubstitution(1, 1), progress=lambda *a: told.append(a))
    assert told == [(0, None, "substitution"), (1, None, "substitution"), (2, None, "")]


# -- the result ---------------------------------------------------------------------------------------------


def result(rows=40):
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(rows, generator=generator, dtype=torch.float64)
    more = clean + torch.rand(rows, generator=generator, dtype=torch.float64)
    curve = torch.stack([clean, more])
    return Evaluation(
        clean, {"a": more, "b": clean - 1}, {"a": curve, "b": curve}, {"a": (5, 7), "b": (0, 1)}
    )


def test_intervals_are_those_of_a_percentile_bootstrap():
    evaluation = result()
    for values, interval in [
        (evaluation.clean, evaluation.interval("clean", 0.9)),
        (evaluation.attacked["a"] - evaluation.clean, evaluation.rise("a", 0.9)),
    ]:
        options = dict(n_resamples=10_000, method="percentile", confidence_level=0.9)
        expected = scipy.stats.bootstrap((values.numpy(),), lambda x, axis: x.mean(axis), **options, rng=1)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert interval[0] == pytest.approx(values.mean().item(), rel=1e-12)
        # the error of a quantile of 10,000 draws is some 2 % of the width
        assert interval[1:] == pytest.approx(tuple(expected.confidence_interval), abs=0.06 * width)
    assert evaluation.interval("worst") == evaluation.interval("a") == evaluation.interval("a")
    with pytest.raises(ValueError, match="name must be one of clean, a, b, worst, got 'c'"):
        evaluation.interval("c")
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        evaluation.interval("a", 95)
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        result(1).interval()


def test_a_result_is_json_and_comes_back():
    evaluation = run(small_lm(), batch_of(), TokenSubstitution(2, 3), EmbeddingAttack(steps=2))
    again = Evaluation.from_dict(json.loads(json.dumps(evaluation.as_dict())))
    for field in dataclasses.fields(Evaluation):
        torch.testing.assert_close(
            getattr(again, field.name), getattr(evaluation, field.name), rtol=0, atol=0
        )


def test_the_table_and_the_picture_hold_every_entry(tmp_path):
    pytest.importorskip("matplotlib")
    from rich.console import Console

    for evaluation in (result(), result(1)):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(evaluation.table())
        lines = console.export_text().splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["clean", "a", "b", "worst"]
        several = len(evaluation.clean) > 1
        for line, name in zip(lines[2:], ("clean", "a", "b", "worst")):
            mean = evaluation.losses(name).mean()
            low, high = evaluation.interval(name)[1:] if several else (0.0, 0.0)
            assert (f"{mean:.3f} [{low:.3f}, {high:.3f}]" if several else f"{mean:.4f}") in line
        assert lines[3].split()[-2:] == ["5", "7"] and lines[4].split()[-2:] == ["0", "1"]
        evaluation.save_picture(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
    evaluation.save_picture(tmp_path / "again.png")
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert result().summary()[0]["rise"] is None and result(1).summary()[1]["loss"][1:] == (None, None)


# -- errors -------------------------------------------------------------------------------------------------


def without(name):
    return {key: value for key, value in batch_of().items() if key != name}


BAD_BATCHES = {
    "no token open": (
        batch_of() | {"attack_mask": torch.zeros(3, 8, dtype=int)},
        "leave a token of the batch open",
    ),
    "no label": (
        batch_of() | {"labels": batch_of()["labels"].index_fill(0, torch.tensor(1), -100)},
        "none in row 1",
    ),
    "all are labels": (
        {name: batch_of()[name] for name in ("input_ids", "attack_mask")},
        "all that are open to attack are labels",
    ),
    "no ids": (
        without("input_ids") | {"inputs_embeds": torch.ones(3, 8, WIDTH).double()},
        "hold input_ids where",
    ),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_a_batch_that_cannot_be_attacked_is_refused(kind):
    batch, message = BAD_BATCHES[kind]
    with pytest.raises(ValueError, match=message):
        run(small_lm(), batch, TokenSubstitution(1, 1))


BAD_CALLS = {
    "policy": (lambda m, p: evaluate(m, batch_of(), [EmbeddingAttack()], module=m), "policy must be a Policy"),
    "class": (lambda m, p: evaluate(p, batch_of(), [EmbeddingAttack], module=m), "attacks must hold attacks"),
    "one": (lambda m, p: evaluate(p, batch_of(), EmbeddingAttack(), module=m), r"pass \[attack\]"),
    "twice": (lambda m, p: evaluate(p, batch_of(), [EmbeddingAttack()] * 2, module=m), "names of their own"),
    "name": (lambda m, p: evaluate(p, batch_of(), {"worst": EmbeddingAttack()}, module=m), "not be called worst"),
    "none": (lambda m, p: evaluate(p, [], [EmbeddingAttack()], module=m), "at least one batch"),
    "number": (lambda m, p: evaluate(p, 3, [EmbeddingAttack()], module=m), "batch or an iterable of batches, got int"),
    "embed": (
        lambda m, p: evaluate(Policy(m.forward), batch_of(), [TokenSubstitution()], module=m), "policy an embed"
    ),
    "head": (
        lambda m, p: evaluate(policy_for(m, False), batch_of(), [TokenSubstitution()], module=m), "candidates must be"
    ),
    "radius": (lambda m, p: EmbeddingAttack(0.0), "radius must be positive"),
    "sizes": (lambda m, p: EmbeddingAttack(step_sizes=()), "step_sizes must be a sequence"),
    "word": (lambda m, p: EmbeddingAttack(step_sizes=("fast",)), "must be one of auto, got 'fast'"),
    "size": (lambda m, p: EmbeddingAttack(step_sizes=(-1.0,)), "positive or 'auto', got -1.0"),
    "scope": (lambda m, p: EmbeddingAttack(scope="layer"), "scope must be one of"),
    "budget": (lambda m, p: TokenSubstitution(0), "budget must be an integer >= 1, got 0"),
    "floats": (lambda m, p: TokenSubstitution(candidates=torch.ones(3)), r"token ids \[K\], got torch.float32"),
    "nothing": (lambda m, p: TokenSubstitution(candidates=[]), "without an entry"),
    "text": (lambda m, p: TokenSubstitution(candidates="abc"), "sequence of token ids, got str"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_a_wrong_argument_is_named(kind):
    call, message = BAD_CALLS[kind]
    model = small_lm()
    with pytest.raises((TypeError, ValueError), match=message):
        call(model, policy_for(model, True))


def test_a_loss_that_is_not_finite_is_an_error():
    model = small_lm()
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    batch = batch_of() | {"input_ids": torch.full((3, 8), 2)}
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(model, batch | {"input_ids": torch.full((3, 8), 5)}, EmbeddingAttack())
    with pytest.raises(ValueError, match="NaN or infinite"):  # among the candidates
        run(model, batch, TokenSubstitution(1, 1000))
