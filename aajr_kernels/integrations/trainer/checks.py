"""Checks of a new trainer: settings that the objective does not support raise, with the remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...training import ObjectiveConfig
from ..transformers.library import trainer_class

__all__ = ["arguments", "language_model", "loss_divisor", "one_evaluation_dataset", "replaceable_loss"]


def arguments(trainer: Any) -> None:
    """Of any trainer with a dual in its forward.

    Raises:
        ValueError: the first that does not go with it.
    """
    args, accelerator = trainer.args, trainer.accelerator
    checkpointing = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    options = (
        getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", 1)
    for wrong, sentence in (
        (
            accelerator.mixed_precision not in ("no", "bf16"),
            f"mixed precision must be 'no' or 'bf16', got {accelerator.mixed_precision!r}, for which gradients within "
            "the attack would have to be scaled: set bf16=True.",
        ),
        (
            args.n_gpu > 1,
            f"there must be one device per process, got {args.n_gpu}, which would be DataParallel: start one process "
            "per device with torchrun or accelerate launch.",
        ),
        (
            trainer.is_deepspeed_enabled,
            "deepspeed must be off: its engine takes one forward per backward. Train under DistributedDataParallel.",
        ),
        (
            (bool(args.fsdp) or trainer.is_fsdp_enabled) and version != 2,
            f"fsdp must be off or of version 2, which is fully_shard, got version {version}: set "
            "fsdp_config={'version': 2}, or train under DistributedDataParallel.",
        ),
        (
            getattr(args, "parallelism_config", None) is not None,
            "parallelism_config must be None: tensor, context and sequence parallelism are not known to the objective.",
        ),
        (
            args.torch_compile,
            "torch_compile must be False: it compiles the call of the whole model, which the objective does not make.",
        ),
        (
            args.use_liger_kernel,
            "use_liger_kernel must be False: its operators have no derivative for a dual. Call "
            "aajr_kernels.integrations.transformers.fuse(model) for fused ones that have.",
        ),
        (
            bool(checkpointing) and isinstance(options, dict) and bool(options.get("use_reentrant")),
            "use_reentrant must be False in the arguments of checkpointing: a reentrant checkpoint drops the gradient "
            "of a dual.",
        ),
    ):
        if wrong:
            raise ValueError(sentence)


def replaceable_loss(trainer: Any, mixin: type) -> None:
    """The loss that is replaced is the cross-entropy that the objective has in its place.

    Raises:
        TypeError, ValueError: it is another one, which would be lost.
    """
    args, kind = trainer.args, type(trainer)
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the objective has the plain "
            "cross-entropy."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func must be None: the objective takes the place of the loss. Use AAJRPenaltyMixin to add "
            "the penalty to a loss of your own."
        )
    behind = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    owner = next(cls for cls in behind if "compute_loss" in vars(cls))
    supervised = owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl.")
    if owner is not trainer_class() and not supervised:
        raise TypeError(
            f"{kind.__name__} must not have a loss of its own, got that of {owner.__name__}, which the objective would "
            "replace: use AAJRPenaltyMixin, which adds the penalty to it."
        )
    loss = getattr(args, "loss_type", "nll")
    if supervised and loss not in ("nll", "chunked_nll"):
        raise ValueError(
            f"loss_type must be 'nll', got {loss!r}: the objective takes its place. Use AAJRPenaltyMixin to add the "
            "penalty to it."
        )


def one_evaluation_dataset(trainer: Any) -> None:
    """There is one, of a known length, for λ to follow.

    Raises:
        ValueError: there is none, or several.
    """
    data = trainer.eval_dataset
    if isinstance(data, dict) or not hasattr(data, "__len__"):
        raise ValueError(
            "eval_dataset must be one dataset with a length for Constraint(follow='validation'), got "
            f"{type(data).__name__}: its batches are what λ follows."
        )


def language_model(model: nn.Module, config: ObjectiveConfig) -> None:
    """A model of transformers whose own loss is the cross-entropy of tokens.

    Raises:
        TypeError, ValueError: it is another one.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    inner: Any = model if unwrap is None else unwrap()
    name, kind = type(inner).__name__, getattr(inner, "loss_type", None)
    settings = getattr(inner, "config", None)
    if kind not in (None, "ForCausalLM", "ForMaskedLM") or getattr(settings, "is_encoder_decoder", False):
        raise TypeError(
            f"model must be a causal or masked language model, got {name}: give policy=Policy(forward, embed, head), "
            "which says how it is called, or add aligned_penalty in a compute_loss of your own."
        )
    if kind == "ForMaskedLM" and config.shift_labels:
        raise ValueError(
            f"shift_labels must be False for {name}, whose labels stand where they are predicted: "
            "ObjectiveConfig(shift_labels=False)."
        )
    if getattr(settings, "output_router_logits", False):
        raise ValueError(
            f"output_router_logits must be False in the configuration of {name}: the objective has no loss of the "
            "router. Use AAJRPenaltyMixin, which keeps the model's own loss."
        )


def loss_divisor(trainer: Any, num_items_in_batch: Any) -> int:
    """The divisor of the loss that Trainer gets from ``compute_loss``; a loss of a whole step is multiplied by it."""
    scaled = None
    if hasattr(trainer_class(), "loss_is_scaled_for_ga"):  # not in older versions
        scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        accepted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = accepted or trainer.compute_loss_func is not None
    return 1 if scaled else int(getattr(trainer, "current_gradient_accumulation_steps", 1))
