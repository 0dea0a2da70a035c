"""Every example runs as a program, offline, in less than two minutes; examples/README.md has the seconds."""

from __future__ import annotations

import difflib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: example -> the optional packages it needs
NEEDS = {
    "accelerate_loop": ["transformers", "accelerate"],
    "hf_trainer": ["transformers", "accelerate"],
    "latent_attack": ["transformers", "accelerate"],
    "latent_plain": ["transformers", "accelerate"],
    "targeted_attack": ["transformers"],
    "trl_grpo": ["trl", "datasets", "peft"],
    "trl_sft": ["trl", "datasets", "peft"],
    "two_agents_adapters": ["transformers", "peft"],
}
SHARED = {"latent_pgd", "text"}


def test_every_example_is_listed():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS) | SHARED
    page = (ROOT / "examples" / "README.md").read_text()
    assert [name for name in (*NEEDS, *SHARED) if f"[{name}.py]({name}.py)" not in page] == []


def test_a_script_with_latent_attacks_becomes_ours_in_ten_lines(tmp_path, monkeypatch):
    """The page shows how the two differ, and without the penalty they compute the same loss."""
    for package in NEEDS["latent_attack"]:
        pytest.importorskip(package)
    code = [
        (ROOT / "examples" / f"{name}.py").read_text().partition('"""\n')[2].splitlines()
        for name in ("latent_plain", "latent_attack")
    ]
    changed = [line[0] + line[2:] for line in difflib.ndiff(*code) if line[0] in "+-"]
    assert max(sum(line[0] == mark for line in changed) for mark in "+-") <= 10
    page = (ROOT / "docs" / "migration.md").read_text()
    shown = (
        page.partition("## From latent adversarial training")[2].partition("```diff\n")[2].partition("```")[0]
    )
    assert [line for line in shown.splitlines() if line != "..."] == changed

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    before = set(sys.modules)
    try:
        plain, ours = (importlib.import_module(name) for name in ("latent_plain", "latent_attack"))
        monkeypatch.setattr(ours, "Penalty", lambda penalty=ours.Penalty: penalty("none"))
        losses = []
        for script in (plain, ours):
            trainer = script.trainer(str(tmp_path))
            trainer.model.train()
            losses.append(float(trainer.compute_loss(trainer.model, ours.collate(ours.rows(4))).detach()))
        clean = float(trainer.model(**ours.collate(ours.rows(4))).loss.detach())
    finally:
        for name in {"text", "latent_pgd", "latent_plain", "latent_attack"} - before:
            sys.modules.pop(name, None)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[0] > clean + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, tmp_path):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"  # the models are small, and other tests run beside
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,  # for a machine that does other things too
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())  # nothing is left behind
