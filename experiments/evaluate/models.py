"""A model to be evaluated, its tokenizer, and its own replies."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from aajr_kernels.integrations.transformers import fuse
from common import texts

#: in the place of a name or a folder: SmolLM2-135M-Instruct from a package
SMOLLM2 = "smollm2"


class CannotLoad(ValueError):
    """There is no such model; the message is for the user."""


def load(name: str, adapter: str | None, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; in eval mode, not fused.

    Args:
        name: a folder that ``save_pretrained`` wrote, the name of a model on the hub, or ``"smollm2"``.
        adapter: the folder of a PEFT adapter, or None.
        device: where it goes.
        dtype: of its weights.

    Raises:
        CannotLoad: there is none, or it is another kind of model.
        MissingPackage: transformers or peft is not installed.
    """
    texts.require("transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if name == SMOLLM2:
        model, tokenizer = texts.smollm2(dtype=dtype)
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            raise CannotLoad(
                f"--model {name!r} cannot be loaded ({first}): give the folder of a causal language model with its "
                "tokenizer, or its name on the hub."
            ) from error
    if adapter is not None:
        texts.require("peft")
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError) as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            raise CannotLoad(f"--adapter {adapter!r} cannot be loaded ({first}).") from error
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise CannotLoad(f"--device {device!r} cannot be used ({str(error).splitlines()[0]}).") from error


def fused(model: nn.Module) -> bool:
    """Run it on the fused operations, where its type is known; whether it is."""
    with contextlib.suppress(TypeError, ValueError):
        fuse(model)
        return True
    return False


@torch.no_grad()
def reply(model: nn.Module, ids: list[int], most: int) -> list[int]:
    """Greedy tokens of its own, at most so many; the end of the text is one of them."""
    given = torch.tensor([ids], device=next(model.parameters()).device)
    call: Any = model
    whole = call.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
    )
    return list(whole[0, len(ids) :].tolist())
