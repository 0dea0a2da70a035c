"""Shared by the workers: the process group, small models, the step of the method, and how gradients are compared."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.integrations.distributed import inside

VOCABULARY, HIDDEN, LENGTH = 97, 32, 12  # 97 words: no number of processes divides them


def begin() -> tuple[int, int, list[str]]:
    """Join the group of all workers; rank, number of workers, the other arguments."""
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    warnings.filterwarnings("error", module="aajr_kernels")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.manual_seed(0)
    return rank, world, sys.argv[4:]


def end() -> None:
    dist.barrier()
    dist.destroy_process_group()
    print("agrees", flush=True)


# -- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and MLP, as one writes them by hand, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        # a bias of the keys moves all scores of a query alike: its gradient would be rounding alone
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=i != 1) for i in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

    def attend(self, x: Any) -> Any:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, HIDDEN // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))

    def feed(self, x: Any) -> Any:
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Any) -> Any:
        x = x + self.attend(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Hand(nn.Module):
    """A small GPT with the interface of a Hugging Face body: ``body(inputs_embeds=x)`` are hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def hidden(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x: Any) -> Any:
        return self.head(self.hidden(x))


SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    """``hand``, ``llama`` or ``gpt2``, the same parameters in every process."""
    torch.manual_seed(1)
    if kind == "hand":
        model: nn.Module = Hand()
    else:
        import transformers

        if kind == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        else:
            options = {**SIZES, "n_inner": 48, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0}
            for name in ("intermediate_size", "num_key_value_heads", "max_position_embeddings"):
                options.pop(name)
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, attn_pdrop=0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # nothing at 0 or 1, where a mistake would not show
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def layers_of(model: nn.Module) -> nn.ModuleList:
    layers = getattr(model, "layers", None)
    if layers is None:
        layers = model.model.layers if hasattr(model, "model") else model.transformer.h  # type: ignore[union-attr]
    return layers  # type: ignore[return-value]


def hidden_of(model: nn.Module, mask: Tensor | None = None) -> Callable[[Any], Any]:
    """From embeddings to hidden states, past whatever wraps the model."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "hidden"):
        return model.hidden  # type: ignore[return-value]
    body: Any = model.base_model
    return lambda x: body(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


def head_of(model: nn.Module) -> Any:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.head if hasattr(model, "hidden") else model.lm_head


# -- data, comparison -------------------------------------------------------------------------------------------------


def batch(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings ``[rows, LENGTH, HIDDEN]`` and labels, some of them ignored, the same number in every row."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    labels[:, ::5] = -100
    return x, labels


def whole(value: Tensor) -> Tensor:
    """All of a tensor, be it spread or not."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the names of the unwrapped model."""
    by_name = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            by_name[name] = whole(p.grad.detach())
    return by_name


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1e-3) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the parameters; a norm below `floor` of the largest counts as that."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    largest = max(float(b.double().norm()) for b in expected.values())
    errors = {
        name: float((actual[name].double() - b.double()).norm())
        / max(float(b.double().norm()), floor * largest)
        for name, b in expected.items()
    }
    assert all(float(b.abs().max()) > 0 for b in expected.values()), "a gradient is zero"
    return max(errors.values())


#: relative error of gradients that is allowed against one process
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}


def say(what: str, error: float, dtype: torch.dtype) -> None:
    if dist.get_rank() == 0:
        print(f"{what} {str(dtype).removeprefix('torch.')} {error:.1e}", flush=True)
    assert error <= BOUND[dtype], (what, dtype, error)


# -- the method -------------------------------------------------------------------------------------------------------


def step(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    metric: str = "fisher",
    steps: int = 2,
    which: str = "last",
    modules: Any = None,
    denominator: Any = None,
    mask: Tensor | None = None,
) -> tuple[aajr.Trajectory, Tensor]:
    """An attack, and the gradient of adversarial loss plus penalty at its end; the head streams inside `modules`."""
    hidden, head = hidden_of(model), head_of(model)
    modules = model if modules is None else modules
    adversary = inside(modules, aajr.lm_loss(hidden, head=head, labels=labels))
    traj = aajr.ascend(adversary, x, radius=0.5, steps=steps, scope="token", module=model, step_size=0.3)
    penalty, aux = inside(modules, aajr.trajectory_penalty)(
        hidden, x, traj, steps=which, metric=metric, head=head, labels=labels, return_primal=True,
        penalty_weight=0.1, denominator=denominator, mask=mask,
    )  # fmt: skip
    total = aux.primal + 0.1 * penalty
    total.backward()
    return traj, total.detach()
