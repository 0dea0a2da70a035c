"""The page on language models: written before the runs, and drawn from their rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..store import Row
from ..summaries import bootstrap_interval, environment_line, interval_text, table
from .comparisons import AFTERWARDS, NAMES, PAIRS, cell, chosen, perplexity, quantities, verdict
from .picture import draw

__all__ = ["report"]


def _means(config: dict[str, Any], rows: list[Row], part: str) -> str:
    """Perplexities, curvature and time of every method; of a part."""
    evaluation, lines = config["evaluation"], []
    tested = chosen(rows, part)
    counts = range(len(next(iter(tested.values()))[0]["test"]["substitution"]))
    for method, by_seed in tested.items():
        tests = [row["test"] for row in by_seed.values()]
        largest = [test["eta_max"] for test in tests]
        finite = [value for value in largest if value is not None]
        cells = [
            NAMES[method],
            perplexity([test["clean"] for test in tests]),
            *(
                perplexity([test["embedding"][place] for test in tests])
                for place in range(len(evaluation["radii"]))
            ),
            *(perplexity([test["substitution"][count] for test in tests]) for count in counts),
            f"{np.mean([test['kappa'] for test in tests]):.3f}",
            f"{np.mean(finite):.2f}" if len(finite) == len(largest) else "∞ at times",
            f"{100 * np.mean([test['falls'] for test in tests]):.1f}",
        ]
        lines.append(cells)
    radii = [f"embeddings {factor * config['radius']:g}" for factor in evaluation["radii"]]
    replaced = [f"{count} token{'' if count == 1 else 's'}" for count in counts]
    return table(["method", "clean", *radii, *replaced, "κ", "η_max", "non-monotone, %"], lines)


def _seconds(rows: list[Row], part: str) -> dict[str, dict[int, float]]:
    """method -> seed -> median processor time of a step; of all runs of a method their median."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["part"] == part and "seconds_per_step" in row:
            found.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row["seconds_per_step"])
    return {m: {seed: float(np.median(v)) for seed, v in by_seed.items()} for m, by_seed in found.items()}


def _runs(rows: list[Row]) -> str:
    """Knobs, how well the runs are matched, and what a step costs."""
    tested, seconds, lines = chosen(rows, "scratch"), _seconds(rows, "scratch"), []
    for method, by_seed in tested.items():
        away = [abs(np.exp(row["validation"]) / row["target"] - 1) for row in by_seed.values()]
        matched = method not in ("plain", "adversarial")
        ratios = [seconds[method][seed] / seconds["adversarial"][seed] for seed in by_seed]
        knobs = [row["knob"] for row in by_seed.values()]
        cost = bootstrap_interval(ratios)
        cells = [
            NAMES[method],
            f"{np.exp(np.mean(np.log(knobs))):.3g}" if matched else "-",
            f"{np.mean(away):.1%}" if matched else "-",
            f"{max(away):.1%}" if matched else "-",
            interval_text(cost, 2, sign=False) if method != "adversarial" else "1",
            str(sum(row["skipped"] for row in rows if row["part"] == "scratch" and row["method"] == method)),
        ]
        lines.append(cells)
    heads = ["method", "w or λ", "off the target", "furthest off", "time per step", "steps skipped"]
    return table(heads, lines)


def _adapted(rows: list[Row]) -> str:
    """Weights, losses of training, and what a step costs, of the adapted part."""
    seconds, lines = _seconds(rows, "adapted"), []
    for row in rows:
        if row["part"] != "adapted" or row["stage"] != "training":
            continue
        base = seconds["adversarial"][row["seed"]]
        ends = [
            f"{row['first'][name]:.3g} to {row['last'][name]:.3g}" if row["first"][name] is not None else "-"
            for name in ("clean_loss", "adversarial_loss", "penalty")
        ]
        cost = f"{row['seconds_per_step']:.2f} ({row['seconds_per_step'] / base:.2f})"
        lines.append([NAMES[row["method"]], row["seed"], f"{row['weight']:.2g}", *ends, cost])
    heads = ["clean loss", "adversarial loss", "penalty", "seconds per step (ratio)"]
    return table(["method", "seed", "λ", *heads], lines)


def _differences(config: dict[str, Any], rows: list[Row], pairs: list[tuple[str, str]]) -> str:
    known = quantities(config)
    lines = [
        [
            f"{NAMES[ours]} − {NAMES[other]}",
            *(cell(rows, ours, other, digits, value) for _, digits, value in known.values()),
        ]
        for ours, other in pairs
    ]
    return table(["paired difference", *(heading for heading, _, _ in known.values())], lines)


def report(header: dict[str, Any], rows: list[Row], folder: Path) -> str:
    """The page; draws ``language-model.png`` into the folder."""
    a, b = header["config"]["scratch"], header["config"]["adapted"]
    draw(header["config"], rows, folder / "language-model.png")
    seconds = sum({row["task"]: row["seconds"] for row in rows}.values())
    strong, pretraining = a["evaluation"], a["pretraining"]
    attack, small = strong["attack"], b["evaluation"]
    open_places = (a["length"] // a["turn"] + 1) // 2 * a["turn"]
    verdicts = "\n".join(verdict(a, rows, ours, other) for ours, other in PAIRS)
    return f"""# Language models: robust perplexity, in embeddings and in tokens

`python -m experiments language-model` ({a["seeds"]} seeds from scratch, {b["seeds"]} of SmolLM2-135M-Instruct).
{environment_line(header, seconds)}

## Question

A language model reads a text in which every other turn is the adversary's. Trained against an adversary who
moves the embeddings of its turns: **at the same clean perplexity**, how much does the perplexity of the other
turns suffer under a strong attack of that kind, without a penalty and with each way of regularising? And does
what is gained hold against an adversary who cannot touch embeddings, but puts other tokens in their place?

## Protocol

- Shakespeare's works. Hamlet and The Tempest are held out: their first half is for validation, the second one for
  the test. Windows of {a["length"]} bytes are divided into turns of {a["turn"]}: the first, third, ... are open to
  attack, the tokens of the others are scored. So no token is both, in training and in evaluation, under both attacks.
- **From scratch**: a Llama of {a["layers"]} layers of width {a["width"]} over bytes. Every seed trains one on
  the plain text ({pretraining["steps"]} steps of {pretraining["batch"]} windows). From there every run takes
  {a["steps"]} steps of {a["batch"]} windows with `training.fit`, AdamW at {a["learning_rate"]:g}, on
  (clean + w · adversarial) / (1 + w) + λ · penalty: adversarial is the loss at the worst point of
  {a["inner"]["steps"]} normalised steps of {a["inner"]["step"]:g} radii, a ball of {a["radius"]:g} norms of a token
  for every open token. A seed fixes start, batches and windows for all methods alike.
- All penalties are in the Fisher metric, over the scored tokens, at every row's worst point, in `fit`'s relative
  units: they differ in the direction alone. AAJR takes the ascent's. `spectral` takes {a["power_iterations"]} power
  iterations from a random start, `frobenius` one random sign vector, `random` one random vector of norm 1 per token;
  all three over the open tokens alone.
- **Common target**: {a["price"]:g} times the clean validation perplexity of adversarial training with w = 1 and
  λ = 0, for every seed. Every method gets {a["budget"]} runs to meet it: a stride on a logarithmic scale until the
  target is bracketed, then interpolation. The penalties search λ at w = 1, in units of 1 over the penalty of the
  model that training starts from; *w matched* searches w at λ = 0, so that it may spend the same perplexity on the
  adversary's weight. The run whose clean validation perplexity is nearest to the target is tested, whatever its
  robustness. Perplexity is matched on {strong["clean_rows"]} windows.
- **Embedding attack**: {attack["steps"]} normalised steps of {" and ".join(map(str, attack["step_sizes"]))} radii,
  {attack["restarts"]} restarts each (from the tokens, from a uniform draw); the largest loss at any point of any of
  them, mean over {strong["rows"]} test windows; at {", ".join(f"{f:g}" for f in strong["radii"])} times the radius of
  training.
- **Substitution attack**: at most {strong["substitution"]["budget"]} of the {open_places} open tokens are replaced, one
  after the other, by bytes that occur in the training text: the {strong["substitution"]["tries"]} replacements with the
  largest first-order gain are tried, the one with the largest true loss is made if it raises the loss.
- Curvature: along the ascent of training on the test windows, at 3 points of every step: κ, mean negative curvature,
  and η_max, the median of the largest step that cannot lower the loss, both with lengths in norms of a token.
  Non-monotone: of the strong attack's steps at the training radius, those that lower the loss.
- Time per step: processor time of a training step on one thread over that of the adversarial step without a penalty,
  medians over the steps of all runs, the same seed. On an idle machine that is wall-clock; this one was shared.
- **SmolLM2-135M-Instruct**, {b["seeds"]} seed: LoRA of rank {b["rank"]} on query and value projections,
  {b["steps"]} steps of {b["batch"]} windows of {b["length"]} tokens on the same objective with w = 1, radius
  {b["radius"]:g}, {b["inner"]["steps"]} ascent steps. λ is not searched: λ · penalty is
  {b["share"]:g} of the loss at the start. {small["rows"]} test windows; {small["attack"]["steps"]} steps of
  {" and ".join(map(str, small["attack"]["step_sizes"]))} radii, {small["attack"]["restarts"]} start;
  {small["substitution"]["budget"]} substitutions of {small["substitution"]["tries"]} tries, by tokens of the training
  text; curvature from differences of gradients. **One seed and {small["rows"]} windows carry no statistical claim**:
  this part shows that the same code trains and attacks a pretrained model, and what it costs.
- Primary: paired differences of the loss under the embedding attack at the training radius, and under the
  substitution attack with {strong["substitution"]["budget"]} tokens; mean over seeds, 95 % percentile bootstrap
  interval over seeds (10,000 resamples). Everything else is secondary; intervals are not corrected for their number.
  This analysis was committed before the runs; radius, target and ranges of the search come from a pilot on another
  seed (100).
- What the pilot saw: at a third of a unit the penalties raised the clean perplexity by 5 % over w = 1 (spectral by
  11 %), as w = 10 did. Robust losses at the training radius were then 2.69 for AAJR, 2.71 for Frobenius, 2.74 for
  random, 2.80 for spectral, and 2.66 for w = 10: **plain adversarial training with more weight on the adversary was
  ahead of every penalty**. With 4 tokens replaced AAJR was ahead: 2.79, against 2.83 or more.

## Result

![Perplexity against radius and against replaced tokens, paired differences, SmolLM2](language-model.png)

From scratch, means over seeds (perplexities: geometric means). Columns in tokens are perplexities after so many
replacements; they and those of the embedding attack are over {strong["rows"]} windows, *clean* is over
{strong["clean_rows"]}.

{_means(a, rows, "scratch")}

Paired differences in nats per token on the test part; bold where the interval leaves out zero. Less is better.
*Rise*: the loss under the attack at the training radius, or with {strong["substitution"]["budget"]} tokens replaced,
minus that of the same windows without.

{_differences(a, rows, PAIRS)}

{verdicts}

Added after the runs, for the second half of the question: against clean training, whose clean perplexity is lower.

{_differences(a, rows, AFTERWARDS)}

How well the runs are matched, and what a training step costs:

{_runs(rows)}

SmolLM2-135M-Instruct with LoRA, one seed:

{_means(b, rows, "adapted")}

{_adapted(rows)}

## Limits

Small models: {a["layers"]} layers over bytes, {a["steps"]} steps of regularised training, one corpus, one radius in
training, one price. {a["seeds"]} seeds make a percentile bootstrap interval narrower than it should be: read an
interval that just leaves out zero as a hint. Robustness is matched on nothing; perplexity is matched on validation
windows with {a["budget"]} runs, so that on the test part it agrees up to sampling and to what the search left (the
last table of that part): a difference of clean loss belongs to the price of a method as well. Perplexities under
attack are over {strong["rows"]} windows a seed and lower bounds of the worst case: a stronger attack may find more.
Greedy substitution guided by gradients is one attack on tokens of many; bytes that it puts in need not read well.
Losses are over every other turn of {a["turn"]} tokens, the first of which follow the adversary's directly: they are not
the perplexity of running text. All penalties are in the Fisher metric;
[the digits experiment](digits.md) has the others. The adversarial and the clean loss are both trained on, so that
penalties have to improve on a model that is robust already. The penalties' directions are per token of norm 1 (AAJR,
random) or over the sequence (the global ones); the search for λ takes up that scale. For SmolLM2: one seed, one λ, few
steps, few windows, no claim.
"""
