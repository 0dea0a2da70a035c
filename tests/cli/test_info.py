"""`aajr info` and the command's overview, as a user starts them."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import aajr_kernels
from aajr_kernels import torch_private
from aajr_kernels.cli import info, main, validate_ops


def invoke(*arguments: str):
    return CliRunner().invoke(main.app, list(arguments))


def test_json_reports_versions_devices_backends_and_build():
    result = invoke("info", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["backends"] == aajr_kernels.backends()
    assert facts["backends"]["reference"] is None
    assert isinstance(facts["build"]["native"], bool)
    if facts["backends"]["native"] is None:
        assert facts["native"]["capabilities"][facts["native"]["capability"]] is True
        assert facts["native"]["threads"] == torch.get_num_threads()
    else:
        assert facts["native"] is None
    assert bool(facts["accelerators"]) == torch.cuda.is_available()
    assert (facts["no_accelerator"] is None) == torch.cuda.is_available()


def test_tables_name_what_is_missing_and_why():
    facts = info.collect()
    facts["backends"] = {"reference": None, "native": "it was built without a compiler [sic]"}
    facts["backends"]["cuda"] = "this installation has no CUDA module: no compiler [sic] was found"
    facts["native"] = facts["cuda"] = None
    facts["versions"]["triton"] = None
    facts["accelerators"] = []
    facts["no_accelerator"] = "torch is a CPU build"
    console = Console(width=100, record=True, file=io.StringIO())
    info.show(facts, console)
    text = console.export_text()
    assert "available" in text
    assert "it was built without a compiler [sic]" in text
    assert "CUDA C++ kernels: none. this installation has no CUDA module: no compiler [sic]" in text
    assert "not installed" in text
    assert "torch is a CPU build" in text


@pytest.mark.parametrize(("version", "words"), [((2, 13), " tested"), ((9, 0), "untested: 2.11 to 2.1")])
def test_a_tested_torch_and_another_one_are_told_apart(version, words, monkeypatch):
    monkeypatch.setattr(torch_private, "VERSION", version)
    console = Console(width=100, record=True, file=io.StringIO())
    info.show(info.collect(), console)
    assert words in console.export_text()


def test_tables_describe_the_cuda_module():
    facts = info.collect()
    facts["cuda"] = {
        "file": "_cuda.so",
        "toolkit": "CUDA 13.0",
        "architectures": ["80-real", "120-virtual"],
        "host": False,
    }
    console = Console(width=120, record=True, file=io.StringIO())
    info.show(facts, console)
    text = console.export_text()
    for part in ("CUDA C++ kernels (experimental", "80-real, 120-virtual", "CUDA 13.0", "_cuda.so"):
        assert part in text, part


def test_tables_describe_the_native_module():
    facts = info.collect()
    facts["backends"]["native"] = None
    took = {"native": {"wall": 40.6, "processor": 71.2}}
    facts["build"] = {"native": True, "compiler": "/usr/bin/c++", "seconds": took}
    facts["native"] = {
        "file": "_native.so",
        "capability": "avx2",
        "capabilities": {"default": True, "avx2": True, "amx": False},
        "compiler": "GCC 12.2.0",
        "openmp": False,
        "threads": 7,
    }
    console = Console(width=120, record=True, file=io.StringIO())
    info.show(facts, console)
    text = console.export_text()
    for part in (
        "default, avx2; not on this processor: amx",
        "7, its own",
        "GCC 12.2.0, /usr/bin/c++",
        "41 s, 71 s of processor time",
        "_native.so",
    ):
        assert part in text, part


def test_overview_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("info", "validate"):
        assert name in result.output


def test_unknown_command_suggests_one():
    result = invoke("inf")
    assert result.exit_code == 2
    assert "info" in result.output


@pytest.mark.parametrize("name", ["info", "validate"])
def test_every_command_has_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"aajr {name}" in result.output or name in result.output


@pytest.mark.slow
def test_info_imports_no_other_command_and_no_optional_package():
    code = (
        "import sys; sys.argv = ['aajr', 'info', '--json']\n"
        "from aajr_kernels.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = ['transformers', 'triton', 'matplotlib', 'peft']\n"
        "heavy += ['demo.__main__', 'aajr_kernels.testing.cases']\n"
        "print('loaded:', [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stderr
    json.loads(done.stdout)


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    def missing(*arguments):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers.models")

    monkeypatch.setattr(validate_ops, "run", missing)
    monkeypatch.setattr(sys, "argv", ["aajr", "validate"])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "'transformers'" in error
    assert "pip install 'aajr_kernels[hf]'" in error


def test_an_unavailable_backend_is_one_sentence(monkeypatch, capsys):
    def unavailable(*arguments):
        raise aajr_kernels.BackendUnavailable("backend 'native' cannot run here: it was not built.")

    monkeypatch.setattr(validate_ops, "run", unavailable)
    monkeypatch.setattr(sys, "argv", ["aajr", "validate"])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == 2
    assert "cannot run here: it was not built." in capsys.readouterr().err


@pytest.mark.slow
def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "aajr_kernels", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "aajr" in done.stdout
