"""The command."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from aajr_kernels.files import write_text
from aajr_kernels.method.evaluation import (
    EmbeddingAttack,
    Evaluation,
    HiddenAttack,
    SuffixSearch,
    TokenSubstitution,
    UniversalPerturbation,
    evaluate,
)
from aajr_kernels.training import policy_of
from aajr_kernels.training.progress import Progress
from common.command import fail
from common.texts import MissingPackage

from . import data, encoding, models
from .page import page


class Attack(str, Enum):
    """Attacks by name."""

    EMBEDDING = "embedding"
    SUBSTITUTION = "substitution"
    SUFFIX = "suffix"
    UNIVERSAL = "universal"
    HIDDEN = "hidden"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the attacks."""

    radius: float
    steps: int
    restarts: int
    budget: int
    tries: int
    suffix: int
    at_once: int
    at: tuple[str, ...]


def attacks_of(names: list[str], settings: Settings, tokenizer: Any, words: int) -> dict[str, Any]:
    """The attacks by name; those on tokens put in no special token, and none that the model has no row for."""
    special = set(tokenizer.all_special_ids)
    candidates = [i for i in range(min(len(tokenizer), words)) if i not in special]
    tokens: dict[str, Any] = {"candidates": candidates, "tries": settings.tries, "at_once": settings.at_once}
    filler = encoding.response_of(tokenizer, " !")
    made = {
        "embedding": lambda: EmbeddingAttack(
            settings.radius, steps=settings.steps, restarts=settings.restarts
        ),
        "substitution": lambda: TokenSubstitution(settings.budget, **tokens),
        "suffix": lambda: SuffixSearch(
            settings.suffix, steps=settings.steps, initial=filler[-1] if filler else candidates[0], **tokens
        ),
        "universal": lambda: UniversalPerturbation(settings.radius, steps=settings.steps),
        "hidden": lambda: HiddenAttack(
            settings.at, settings.radius, steps=settings.steps, restarts=settings.restarts
        ),
    }
    return {name: made[name]() for name in names}


def command(
    model: Annotated[
        str, typer.Option(help="Folder or name of a causal language model, or smollm2 from its package.")
    ],
    source: Annotated[
        str,
        typer.Option(
            "--data",
            help="JSON lines with prompt, response and attack (the adversary's part of the prompt); a text, cut into "
            "pieces; or injections, for the prompt injections of a package.",
        ),
    ],
    adapter: Annotated[str | None, typer.Option(help="Folder of a PEFT adapter.")] = None,
    attack: Annotated[
        list[Attack] | None,
        typer.Option(help="Repeat it for several. Default: all but hidden, which needs --at."),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="Module whose output the attack hidden moves; repeat it for several."),
    ] = None,
    fit_on: Annotated[
        str | None, typer.Option("--fit", help="Texts that the universal perturbation is found on.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most rows that are evaluated.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 4,
    length: Annotated[
        int, typer.Option(min=4, help="Most tokens of a row, longer ones are left out; of a piece of text.")
    ] = 256,
    radius: Annotated[float, typer.Option(help="In norms of a token.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Of ascents and of the suffix search.")] = 20,
    restarts: Annotated[int, typer.Option(min=1, help="Of the attack on embeddings.")] = 1,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that are replaced.")] = 4,
    tries: Annotated[int, typer.Option(min=1, help="Losses that are evaluated for one of them.")] = 16,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of the suffix.")] = 8,
    at_once: Annotated[int, typer.Option(min=1, help="Tries in one forward.")] = 4,
    reply: Annotated[
        int, typer.Option(min=1, help="Tokens of the model's own reply, where a row has no response.")
    ] = 16,
    system: Annotated[str | None, typer.Option(help="System prompt of the chat.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Texts as they are, without a chat template.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], typer.Option()] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder of evaluation.json, evaluation.png and page.md.")] = Path(
        "runs/evaluate"
    ),
) -> None:
    """Losses of a model as it is, under every attack and under the worst of them, on texts of yours.

    The adversary moves the prompt, or the part of it that `attack` names; the response is scored. Exit code 2: bad
    arguments, or something that is not installed.
    """
    try:
        settings = Settings(radius, steps, restarts, budget, tries, suffix, at_once, tuple(at or ()))
        with Progress() as progress:
            progress.stage("model and texts", 1)
            net, tokenizer = models.load(model, adapter, device, getattr(torch, dtype))
            chat = not plain and getattr(tokenizer, "chat_template", None) is not None

            def encoded(place: str) -> list[encoding.Row]:
                read = data.read(place, seed)
                if isinstance(read, str):
                    return encoding.windows(tokenizer, read, length)[:rows]
                found: list[encoding.Row] = []
                for example in read:
                    row = encoding.prompt_of(tokenizer, example, system, chat)
                    if example.response is not None:
                        row = row.answered(encoding.response_of(tokenizer, example.response))
                    elif len(row) < length:
                        row = row.answered(models.reply(net, row.ids, min(reply, length - len(row))))
                    if len(row) <= length and any(row.is_open) and any(row.is_scored):
                        found.append(row)
                    if len(found) == rows:
                        break
                if not found:
                    raise ValueError(f"{place} has no row of at most --length={length} tokens: raise it.")
                return found

            evaluated = encoded(source)
            batches, order = encoding.batches(evaluated, batch)
            is_fused = models.fused(net)
            policy = _policy_of(net)
            words = net.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            kinds = attack or [one for one in Attack if one is not Attack.HIDDEN]
            names = dict.fromkeys([*(one.value for one in kinds), *(["hidden"] if at else [])])
            attacks = attacks_of(list(names), settings, tokenizer, words)
            if fit_on is not None:
                if "universal" not in attacks:
                    raise ValueError("--fit goes with the universal perturbation: add --attack universal.")
                progress.stage("universal perturbation", 1)
                train, _ = encoding.batches(encoded(fit_on), batch)
                attacks["universal"] = attacks["universal"].fit(policy, train, module=net)
            progress.stage("attacks", len(batches) * len(attacks))
            result = evaluate(
                policy,
                batches,
                attacks,
                module=net,
                seed=seed,
                progress=lambda done, total, text: progress.reach(done, text),
            )
    except (OSError, ValueError, MissingPackage) as error:
        fail(str(error))
    facts = {
        "model": model,
        "data": source,
        "rows": len(evaluated),
        "batch": batch,
        "seed": seed,
        "fused": is_fused,
    }
    facts |= {"adapter": adapter} if adapter else {}
    facts |= dataclasses.asdict(settings)
    _write(out, model, facts, result, _texts(tokenizer, evaluated, batches, order, result), order)


def _policy_of(model: Any) -> Any:
    try:
        return policy_of(model)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _texts(
    tokenizer: Any,
    rows: list[encoding.Row],
    batches: list[dict[str, Any]],
    order: list[int],
    result: Evaluation,
) -> dict[str, list[str]]:
    """What the adversary wrote, of every row in the order of the result: from its first open token to its last, or to
    the end of a suffix."""
    written: dict[str, list[str]] = {"clean": [], **{name: [] for name in result.tokens}}
    for index in order:
        row = rows[index]
        written["clean"].append(tokenizer.decode(_span(row, row.ids)))
    for name, several in result.tokens.items():
        ids = [tokens for group in several for tokens in group.tolist()]
        more = several[0].shape[1] - batches[0]["input_ids"].shape[1]
        for index, tokens in zip(order, ids):
            written[name].append(tokenizer.decode(_span(rows[index], tokens, more)))
    return written


def _span(row: encoding.Row, ids: list[int], more: int = 0) -> list[int]:
    last = len(row) - 1 - row.is_open[::-1].index(True)
    return ids[row.is_open.index(True) : last + 1 + more]


def _write(
    out: Path,
    model: str,
    facts: dict[str, Any],
    result: Evaluation,
    texts: dict[str, list[str]],
    order: list[int],
) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = {"run": facts, "rows": order, "texts": texts, **result.as_dict()}
        write_text(out / "evaluation.json", json.dumps(kept, ensure_ascii=False) + "\n")
        write_text(out / "page.md", page(f"Attacks on {model}", facts, result, texts))
        result.save_picture(out / "evaluation.png")
    except OSError as error:
        fail(str(error))
    console = Console()
    console.print(result.table())
    saved = f"Saved in {out}: evaluation.json, evaluation.png, page.md."
    console.print(saved, markup=False, highlight=False, soft_wrap=True)
