"""The evidence for the method: experiments with fixed seeds, their rows, figures and pages.

``python -m experiments NAME`` runs one. To add one, write a module with the parts of :class:`Experiment`, with its
configuration in ``config.json`` and the text of its page in ``page.md`` beside it, and enter it below.

==================  ====================================================================================
module              what it holds
==================  ====================================================================================
``base``            parts of an experiment, and the running of its tasks
``store``           rows as JSON lines: resumable, each written once
``search``          the same number of runs for every method, one of which is chosen and tested
``ascents``         report of the recorded values of an ascent
``bounded``         training at a bound whose weight is controlled, for every method
``equal``           differences at an equal bound, and at an equal realised sensitivity
``statistics``      t intervals, exact sign-flip tests, Holm's correction, equivalence
``summaries``       comparisons of methods paired by seed, the page
``evaluate``        attacks on a model and texts of the user's
``results/``        committed rows; the pages in docs/experiments/ are drawn from them
==================  ====================================================================================
"""

from __future__ import annotations

import importlib
from pathlib import Path

import aajr_kernels  # noqa: F401  before torch, whose waiting threads it tells to sleep

# isort: split
from .base import Experiment

__all__ = ["EXPERIMENTS", "RESULTS", "Experiment", "load"]

#: name -> (module, what it shows)
EXPERIMENTS = {
    "inclusion": (".inclusion", "Strict inclusion in closed form, and controls that must show no gap."),
    "step-condition": (".step_condition", "When a step of the inner ascent is monotone."),
    "minimax": (".minimax", "Stability of minimax training at matched nominal loss."),
    "digits": (".digits", "Price of robustness on digits, against global regularisation."),
    "language-model": (
        ".language_model",
        "Robust perplexity of language models, in embeddings and in tokens.",
    ),
    "constraint": (
        ".constraint",
        "The constraint is met on held-out digits, for bounds that bind and one that does not.",
    ),
    "constraint-lm": (
        ".constraint_lm",
        "The constraint is met on held-out text by a language model whose λ follows validation text.",
    ),
    "equal-bound": (
        ".equal_bound",
        "Nominal loss of methods at the same bound, and at the same realised sensitivity, on digits.",
    ),
    "equal-bound-lm": (
        ".equal_bound_lm",
        "Clean and robust loss of a language model at the same bound, and in the same time without one.",
    ),
    "lazy": (".lazy", "The penalty on every k-th step with k times its weight."),
    "shared-context": (".shared_context", "Seconds of a LoRA step with a context that is computed once."),
    "curvature": (
        ".curvature",
        "Positive and negative curvature along the ascent, and what they are made of.",
    ),
    "ablation": (
        ".ablation",
        "Where the penalty is measured, with the adversary's weight, at matched clean perplexity.",
    ),
    "decoupling": (
        ".decoupling",
        "Smoothness along the ascent held at 1/η: its price, and whether it steadies a training that oscillates.",
    ),
    "two-agents": (
        ".two_agents",
        "Two language models perturb each other's observations, at matched clean payoff.",
    ),
    "prompt-injection": (
        ".prompt_injection",
        "LoRA of SmolLM2 against prompt injections, under attacks that it was not trained on.",
    ),
}
RESULTS = Path(__file__).parent / "results"


def load(name: str) -> Experiment:
    """The experiment of that name, imported.

    Raises:
        ValueError: there is none.
        ModuleNotFoundError: a package that it needs is not installed.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is unknown: choose from {', '.join(EXPERIMENTS)}.")
    experiment: Experiment = importlib.import_module(EXPERIMENTS[name][0], __name__).EXPERIMENT
    return experiment
