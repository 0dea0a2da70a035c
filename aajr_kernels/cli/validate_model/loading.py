"""A user's model from a folder or a class, and a small batch to call it with."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

#: sizes of a model built only from its configuration class, by the names that transformers uses
SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "sliding_window": 5,
}


#: per parameter at the peak: float64 copy, two gradients, and what finite differences move (measured on 135 M)
BYTES = 80


class CannotValidate(ValueError):
    """The model cannot be loaded or called; the message is for the user."""


@dataclass(frozen=True)
class Subject:
    """A model with what it is called with.

    Attributes:
        model: in eval mode.
        x: ``[B, N, C]``, the embedded tokens.
        v: like `x`: the ascent direction of the loss, per token of the size of an embedding.
        inputs: keyword arguments beside ``inputs_embeds``.
        labels: ``[B, N]`` classes, −100 where a token is padding.
        mask: ``[B, N]``, True where the output counts.
    """

    model: nn.Module
    x: Tensor
    v: Tensor
    inputs: Mapping[str, Tensor]
    labels: Tensor
    mask: Tensor

    def call(self, x: Any) -> Any:
        """The logits, or the hidden states of a model without any."""
        y = self.model(inputs_embeds=x, **self.inputs)
        for name in ("logits", "last_hidden_state"):
            if getattr(y, name, None) is not None:
                return getattr(y, name)
        return y

    def task(self, y: Tensor) -> Tensor:
        """The mean cross-entropy of logits; of hidden states half the mean square."""
        kept = self.mask.to(y.device)
        if not self.has_logits:
            return y[kept].square().mean() / 2
        return nn.functional.cross_entropy(y[kept], self.labels.to(y.device)[kept])

    @property
    def has_logits(self) -> bool:
        """Whether the output is a distribution over the vocabulary."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return head is not None

    @property
    def metric(self) -> str:
        """Of the penalty."""
        return "fisher" if self.has_logits else "l2"

    def placed(self, device: str, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Subject:
        """A copy, rounded to `rounded` (default: `dtype`) and then held in `dtype`."""

        def place(t: Tensor) -> Tensor:
            return t.detach().to(rounded or dtype).to(device, dtype)

        model = copy.deepcopy(self.model).to(rounded or dtype).to(device, dtype)
        inputs = {name: t.to(device) for name, t in self.inputs.items()}
        x, v = place(self.x).requires_grad_(), place(self.v).requires_grad_()
        return replace(self, model=model, x=x, v=v, inputs=inputs)

    def leaves(self) -> dict[str, Tensor]:
        """All that gets gradients: the parameters by name, ``inputs_embeds``, and the ``direction``."""
        return {**dict(self.model.named_parameters()), "inputs_embeds": self.x, "direction": self.v}


def load(spec: str, layers: int | None = None) -> nn.Module:
    """The model of a folder (or of the name of a cached one), or what ``module:name`` stands for.

    Args:
        spec: a folder that ``save_pretrained`` wrote or the name of a model on its hub; or ``module:name`` of a
            function without arguments that returns a model, of a module, or of a model class of transformers, which is
            built small and with random weights.
        layers: so many layers instead of all, for models that do not fit into memory in float64.

    Raises:
        CannotValidate: there is no such thing, or it is no model.
        ModuleNotFoundError: transformers is not installed.
    """
    module, colon, name = spec.partition(":")
    is_code = colon and os.sep not in spec and not Path(spec).exists()
    try:
        return _from_code(module, name, layers) if is_code else _from_folder(spec, layers)
    except CannotValidate:
        raise
    except Exception as error:  # any error of foreign code and files becomes one sentence
        if not is_code and isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CannotValidate(
            f"{spec!r} cannot be loaded ({type(error).__name__}: {first}): give the path of a folder that "
            "save_pretrained wrote, the name of a model in the cache of transformers, or MODULE:NAME of a model, of a "
            "function without arguments that returns one, or of a model class of transformers."
        ) from error


def _from_folder(spec: str, layers: int | None) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(spec, local_files_only=True)
    # the class that was saved; another one would lack weights, or leave some out
    saved = (getattr(config, "architectures", None) or [""])[0]
    maker = getattr(transformers, saved, None) or transformers.AutoModel
    options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    model, info = maker.from_pretrained(spec, config=_with_layers(config, layers), **options)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise CannotValidate(
            f"{spec!r} lacks weights of {type(model).__name__}, which would be random: {some}."
        )
    return cast(nn.Module, model)


def _from_code(module: str, name: str, layers: int | None) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the current folder, as with python -m
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    config_class = getattr(target, "config_class", None)
    if config_class is not None and inspect.isclass(target):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            target = target(_with_layers(_small(config_class), layers))  # type: ignore[call-arg]
            for parameter in target.parameters():
                if parameter.dim() == 1:  # norm weights and biases: constant ones hide wrong gradients
                    parameter.add_(0.2 * torch.randn_like(parameter))
    elif layers is not None:
        raise CannotValidate(
            f"{module}:{name} decides its own layers: --layers goes with a folder or with a class of transformers."
        )
    elif callable(target) and not isinstance(target, nn.Module):
        target = target()
    if not isinstance(target, nn.Module):
        raise TypeError(f"{type(target).__name__} is no nn.Module")
    return target


def _small(config_class: Any) -> Any:
    """A small configuration of a class: sizes under the names that it uses."""
    config: Any = config_class()
    for name, value in {**SMALL, "head_dim": SMALL["hidden_size"] // SMALL["num_attention_heads"]}.items():
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError):  # computed from the others
                setattr(config, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None and not (isinstance(token, int) and token < SMALL["vocab_size"]):
            setattr(config, name, 0)
    # per-layer lists belong to the default depth; a configuration made anew writes its own
    kept = {
        k: v for k, v in config.to_diff_dict().items() if k not in ("layer_types", "transformers_version")
    }
    return config_class(**kept)


def _with_layers(config: Any, layers: int | None) -> Any:
    if layers is None:
        return config
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise CannotValidate(f"{type(config).__name__} names no number of layers: leave --layers out.")
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def prepare(model: nn.Module, batch: int, length: int, seed: int) -> Subject:
    """A batch of random tokens, the last row padded, and the ascent direction of the loss.

    Raises:
        CannotValidate: the model takes no ``inputs_embeds``, has no embedding, returns nothing to measure, or is too
            large for the memory of this machine.
    """
    _check_memory(model)
    model = model.float().eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    taken = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if "inputs_embeds" not in taken and not anything:
        raise CannotValidate(
            f"{type(model).__name__}.forward does not take inputs_embeds=: wrap the model in a module that does, and "
            "give MODULE:NAME of a function that returns it."
        )
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        vocab_size = int(embedding.num_embeddings)
    except (AttributeError, NotImplementedError) as error:
        raise CannotValidate(
            f"{type(model).__name__} must have get_input_embeddings() with an nn.Embedding: {error}."
        ) from error
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 4 :] = False
    inputs: dict[str, Tensor] = {}
    if "attention_mask" in taken or anything:
        inputs["attention_mask"] = mask.long()
    else:
        mask = torch.ones_like(mask)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(vocab_size, (batch, length), generator=generator)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # type: ignore[union-attr]
    labels = torch.randint(vocab_size, (batch, length), generator=generator)
    x = embedding(ids).detach()
    return _with_ascent(Subject(model, x, torch.zeros_like(x), inputs, labels, mask))


def _check_memory(model: nn.Module) -> None:
    """Refuse a model that does not fit into the memory that this process may use, where the system tells it."""
    if not hasattr(os, "sysconf"):
        return
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            have = min(have, int(limit.read_text()))
    count = sum(p.numel() for p in model.parameters())
    if BYTES * count > have:
        raise CannotValidate(
            f"{count / 1e9:.2g} billion parameters need about {BYTES * count / 2**30:.0f} GiB for copies and gradients "
            f"in float64, and this machine has {have / 2**30:.0f}: for a folder, --layers 2 takes its first two layers."
        )


def _with_ascent(subject: Subject) -> Subject:
    """With the gradient of the loss as direction, per token as long as an embedding is; nothing at padding."""
    x = subject.x.clone().requires_grad_()
    try:
        y = subject.call(x)
    except Exception as error:  # any error of a foreign model becomes one sentence
        raise CannotValidate(
            f"{type(subject.model).__name__} cannot be called with inputs_embeds={tuple(x.shape)} and "
            f"{', '.join(subject.inputs) or 'nothing else'}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, Tensor) or y.shape[:2] != x.shape[:2] or not y.requires_grad:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise CannotValidate(
            f"{type(subject.model).__name__} must return logits or hidden states [B, N, ...] that depend on "
            f"inputs_embeds, got {got}."
        )
    # an output may have fewer classes than the embedding
    labels = (subject.labels % y.shape[-1]).masked_fill(~subject.mask, -100)
    subject = replace(subject, labels=labels)
    (g,) = torch.autograd.grad(subject.task(y), x)
    g = g * subject.mask.unsqueeze(-1)
    norm = g.norm(dim=-1, keepdim=True)
    return replace(subject, v=torch.where(norm > 0, g / norm, 0.0) * subject.x.norm(dim=-1).mean())
