"""Results of an evaluation as a page."""

from __future__ import annotations

from typing import Any

from aajr_kernels.files import markdown
from aajr_kernels.method.evaluation import Evaluation
from common.pages import table

#: rows whose texts are shown, and characters of a text
SHOWN, MOST = 3, 300


def page(title: str, facts: dict[str, Any], evaluation: Evaluation, texts: dict[str, list[str]]) -> str:
    """Markdown with the table of losses, the picture beside it, and texts that were found.

    Args:
        title: of the page.
        facts: name -> value, of the run.
        evaluation: its result.
        texts: ``"clean"`` and the attacks on tokens -> what the adversary wrote in every row.
    """
    told = "; ".join(f"{name}: {markdown(str(value))}" for name, value in facts.items())
    lines = [f"# {markdown(title)}", "", f"{told}.", ""]
    several = len(evaluation.clean) > 1
    lines += [
        f"Mean cross-entropy in nats per scored token over {len(evaluation.clean)} rows"
        + (", with 95 % bootstrap intervals over rows." if several else "."),
        "`worst` takes the largest loss of every row, without an attack or under any of them.",
        "",
        table(
            ["attack", "loss", "rise over clean", "gradients", "forwards"],
            [
                (
                    markdown(entry["name"]),
                    _interval(entry["loss"]),
                    _interval(entry["rise"]) if entry["rise"] else "",
                    *(f"{count:,}" for count in entry["calls"] or ()),
                    *([""] * (0 if entry["calls"] else 2)),
                )
                for entry in evaluation.summary()
            ],
        ),
        "",
        "![Mean losses with intervals, and the losses over steps and replacements](evaluation.png)",
        "",
    ]
    for name in evaluation.tokens:
        rises = evaluation.attacked[name] - evaluation.clean
        order = rises.argsort(descending=True)[:SHOWN].tolist()
        lines += [f"## Texts of {markdown(name)}", "", "The rows whose loss rose most.", ""]
        for row in order:
            loss = f"{evaluation.clean[row]:.3f} to {evaluation.attacked[name][row]:.3f} nats"
            lines += [
                f"- Row {row}, {loss}:",
                "",
                _quoted(texts["clean"][row]),
                "",
                "  becomes",
                "",
                _quoted(texts[name][row]),
                "",
            ]
    return "\n".join(lines)


def _interval(values: tuple[float, float | None, float | None]) -> str:
    mean, low, high = values
    return f"{mean:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")


def _quoted(text: str) -> str:
    cut = text if len(text) <= MOST else text[:MOST] + " ..."
    return "\n".join(f"  > {markdown(line)}" for line in cut.splitlines() or [""])
