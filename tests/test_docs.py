"""The Python blocks of documentation pages run as they stand, one after the other."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

import aajr_kernels
from aajr_kernels.rules import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REGISTRIES = (registry.RULES, registry.KINDS, registry.METHODS)
#: page -> the optional packages it needs
PAGES = {
    "adversaries.md": ["transformers", "peft"],
    "agents.md": ["transformers", "peft", "accelerate", "trl", "datasets"],
    "compile.md": ["transformers"],
    "context.md": ["transformers"],
    "diagnostics.md": [],
    "distributed.md": ["transformers"],
    "evaluation.md": ["transformers"],
    "extending.md": [],
    "guide.md": ["transformers", "peft", "safetensors", "matplotlib"],
    "memory.md": ["transformers"],
    "migration.md": [],
    "ops/activation.md": [],
    "ops/attention.md": [],
    "ops/head.md": [],
    "ops/linear.md": [],
    "ops/norm.md": [],
    "ops/sensitivity.md": [],
    "ops/rotary.md": [],
    "places.md": ["transformers"],
    "quickstart.md": ["transformers"],
    "trainer.md": ["transformers", "accelerate", "peft", "trl", "datasets"],
    "training.md": ["transformers", "safetensors", "matplotlib"],
    "triton.md": ["transformers"],
}
SLOW = ("agents.md", "compile.md", "distributed.md", "guide.md", "trainer.md", "training.md")


#: Trainer's default, where there is no device
PINNED = "ignore:'pin_memory' argument is set as true:UserWarning"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by Dynamo
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # renamed in the newest
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked for by PEFT
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|trl|dill|multiprocess|pyarrow).*")
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")  # TRL's own
@pytest.mark.filterwarnings(PINNED)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PAGES]
)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    for package in PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    before = [dict(registry) for registry in REGISTRIES]
    try:
        exec(compile("\n".join(blocks), page, "exec"), {})
    finally:  # a page may add rules
        for registry, entries in zip(REGISTRIES, before):
            registry.clear()
            registry.update(entries)
    capsys.readouterr()


def test_the_block_of_readme_runs():
    pytest.importorskip("transformers")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["penalty"] > 0
    assert all(p.grad is not None and p.grad.any() for p in names["model"].parameters())


@pytest.mark.filterwarnings(PINNED)
def test_a_script_becomes_ours_in_five_lines(tmp_path, monkeypatch, capsys):
    """The first block of the page on Trainer is a plain script; its diff applies, is short, and the result runs."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    page = (DOCS / "trainer.md").read_text()
    script = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].splitlines()
    diff = re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert sum(line.startswith("+") for line in diff) <= 5
    made, place = [], 0
    for line in diff:
        mark, text = line[:1], line[1:]
        if line == "...":
            continue
        if mark == "+":
            made.append(text)
            continue
        index = script.index(text, place)  # raises where the diff does not fit
        made += script[place:index] + ([text] if mark == " " else [])
        place = index + 1
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(made + script[place:]), "trainer.md, changed", "exec"), names)
    assert type(names["trainer"]).__name__ == "AAJRTrainer" and names["trainer"].state.global_step == 2
    capsys.readouterr()


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        if "://" not in target:
            assert ((DOCS / page).parent / target).exists(), target


def test_every_page_with_python_runs():
    pages = {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "```python\n" in path.read_text()
    }
    assert pages == set(PAGES)
    others = [path for path in ROOT.glob("*.md") if "```python\n" in path.read_text()]
    others += [path for path in ROOT.glob("*/README.md") if "```python\n" in path.read_text()]
    assert others == [ROOT / "README.md"]


def test_commands_of_the_pages_exist():
    """`aajr ...` and `python -m bench ...` in blocks of commands: the command, and every option that it is given."""
    from aajr_kernels.cli.main import app
    from bench.__main__ import bench
    from bench.compare import files
    from bench.report import report
    from bench.scaling import scaling
    from bench.tune import tune
    from common.command import application
    from demo.__main__ import demo
    from experiments.__main__ import experiment
    from experiments.evaluate.command import command as evaluation

    commands = {f"aajr {name}": one for name, one in typer.main.get_group(app).commands.items()}
    programs = {"bench": bench, "bench.compare": files, "bench.report": report, "bench.scaling": scaling}
    programs |= {"bench.tune": tune, "demo": demo}
    programs |= {"experiments": experiment, "experiments evaluate": evaluation}
    for name, function in programs.items():
        commands[f"python -m {name}"] = typer.main.get_command(application(function))
    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in commands.items()
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    seen = 0
    for page in pages:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                words = line.partition("#")[0].removeprefix("$ ").split()
                while words and "=" in words[0]:  # settings
                    words.pop(0)
                if words[:3] == ["python", "-m", "aajr_kernels"]:
                    words[:3] = ["aajr"]
                if words[:1] == ["make"] and words[1:]:
                    named = [word for word in words[1:] if re.fullmatch("[a-z-]+", word)]
                    assert named and set(named) <= targets, (page.name, line)
                length = 2 if words[:1] == ["aajr"] else 3 if words[:2] == ["python", "-m"] else 0
                # a program may have commands of its own
                name = next(
                    (n for n in (" ".join(words[: length + 1]),) if n in known), " ".join(words[:length])
                )
                if not length or name.startswith(("python -m pip", "python -m build", "python -m pytest")):
                    continue
                assert name in known, (page.name, line)
                options = {w.partition("=")[0] for w in words if w.startswith("--") and len(w) > 2}
                assert options <= known[name] | {"--help"}, (page.name, line)
                seen += 1
    assert seen > 10


def test_troubleshooting_is_keyed_by_messages_that_exist():
    said = set()
    for path in [*(ROOT / "aajr_kernels").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    missing = [heading for heading in headings if not any(heading in text for text in said)]
    assert not missing


# -- the site ---------------------------------------------------------------------------------------------------------


def script(name):
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return script("site_hooks")


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](guide.md#b)", "[a](guide.md#b)"),
        ("index.md", "[a](../README.md#api)", "[a](readme.md#api)"),
        ("ops/norm.md", "[a](../../bench/README.md)", "[a](../benchmarks.md)"),
        ("readme.md", "![a](docs/images/x.png) [b](docs/ops/norm.md)", "![a](images/x.png) [b](ops/norm.md)"),
        ("readme.md", "[the rows](bench/results/cpu.jsonl)", "the rows (`bench/results/cpu.jsonl`)"),
        ("readme.md", "[`a.py`](aajr_kernels/a.py)", "`a.py`"),
        ("readme.md", "[p](https://x.org/y#z) [q](#here)", "[p](https://x.org/y#z) [q](#here)"),
        (
            "index.md",
            "```text\n[a](../README.md)\n```\n[a](../LICENSE)",
            "```text\n[a](../README.md)\n```\na (`LICENSE`)",
        ),
    ],
)
def test_links_lead_to_pages_of_the_site(hooks, page, text, expected):
    source = {name: source for source, name in hooks.EXTRA.items()}.get(page, f"docs/{page}")
    assert hooks.rewritten(text, source, page) == expected


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api.html").read_text()
    for name in aajr_kernels.__all__:
        is_module = isinstance(getattr(aajr_kernels, name), ModuleType)
        assert is_module or re.search(rf'id="aajr_kernels\.([\w.]+\.)?{name}"', api), name


# -- the table of integrations ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def integrations():
    return script("integration_table")


def test_the_table_of_integrations_is_that_of_its_rows(integrations, tmp_path):
    rows, copy = integrations.read(), tmp_path / "integrations.md"
    shutil.copy(integrations.PAGE, copy)
    assert not integrations.write(copy, rows)
    assert integrations.write(copy, rows[1:]) and integrations.write(copy, rows)
    assert copy.read_text() == integrations.PAGE.read_text()
    for row in rows:
        file, _, name = row["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), row["test"]
        assert 0 <= row["error"] < 1e-2
    expected = {
        "Trainer",
        "accelerate",
        "PEFT",
        "TRL",
        "torch.compile",
        "DDP",
        "FSDP2",
        "tensor parallel",
        "checkpointing",
    }
    assert {name for name in expected if any(name in row["integration"] for row in rows)} == expected


def test_rows_of_integrations_are_checked(integrations, monkeypatch, tmp_path):
    monkeypatch.setattr(integrations, "ROWS", tmp_path / "rows.jsonl")
    integrations.ROWS.write_text('{"integration": "DDP", "works": true}\n')
    with pytest.raises(ValueError, match="a row must have the fields integration, shows"):
        integrations.read()
    page = tmp_path / "integrations.md"
    page.write_text("# Integrations\n")
    with pytest.raises(ValueError, match="must have the lines"):
        integrations.write(page, [])
