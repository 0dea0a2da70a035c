"""Names that stand for no place, and modules that cannot be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.transformers.subjects import tiny
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels.training import policy_of

pytest.importorskip("transformers")


class Named(nn.Module):
    """Calls a linear layer as often as it is told, and a part that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.pair, self.flat = nn.Identity(), nn.Flatten(0, 1)
        self.repeats, self.checkpoints = 1, None

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for _ in range(self.repeats):
            if self.checkpoints is None:
                x = self.layer(x)
            else:
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.checkpoints)
        self.pair({"x": x})
        self.flat(x)
        return x


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        (
            "layers.7",
            ValueError,
            "must name a module of LlamaForCausalLM, got 'layers.7'; the nearest names are",
        ),
        ("slef_attn.q_proj", ValueError, r"the nearest names are .*self_attn\.q_proj"),
        ("q_proj", ValueError, "must name one module, got 'q_proj', with which 2 names end"),
        (2, ValueError, "must be a layer from -2 to 1, those of model.layers, got 2"),
        ([], ValueError, "must name at least one place, got an empty list"),
        ([0, "layers.0"], ValueError, "must name every place once, got model.layers.0 twice"),
        (True, TypeError, "got bool"),
        (1.5, TypeError, "got float"),
        ([None], TypeError, "got NoneType"),
    ],
)
def test_names_that_stand_for_no_place(at, error, message):
    with pytest.raises(error, match=message):
        policy_of(tiny("llama"), at=at)


def test_modules_that_are_no_places():
    x = torch.randn(2, 3, 8)
    model = Named()

    def opened(at: str) -> Any:
        policy = policy_of(model, at=at)
        return policy.places(x, policy.forward)

    with pytest.raises(
        ValueError, match="numbers go with models that have one list of layers, this one has none"
    ):
        policy_of(model, at=0)
    with pytest.raises(ValueError, match="unused, which its forward did not call"):
        opened("unused")
    with pytest.raises(TypeError, match="pair must return a floating point tensor.* got dict"):
        opened("pair")
    with pytest.raises(
        ValueError, match=r"flat must return hidden states \[B, N, C\] = \[2, 3, C\], got \(6, 8\)"
    ):
        opened("flat")
    for model.checkpoints, message in (
        (False, "layer must not be inside a checkpoint"),
        (True, "use_reentrant=False"),
    ):
        with pytest.raises(aajr.UnsupportedOperation, match=message):
            opened("layer")
    model.checkpoints, model.repeats = None, 2
    with pytest.raises(aajr.UnsupportedOperation, match="layer must be called once in a forward"):
        opened("layer")
    model.repeats = 1
    places = opened("layer")
    assert torch.equal(places(torch.zeros_like(places.x)), model(x))
    model.repeats = 0
    with pytest.raises(aajr.UnsupportedOperation, match="layer must be called in every forward"):
        places(places.x)
    with pytest.raises(ValueError, match="delta must be"):
        places(places.x[:, :1])
    with pytest.raises(TypeError, match="delta must be a tensor"):
        places(None)
    assert not model.layer._forward_hooks and "forward" not in model.layer.__dict__


@pytest.mark.slow
def test_what_compiled_layers_would_not_see():
    """``module.compile()`` makes calls that pass by hooks that come later."""
    model, x = Named(), torch.randn(2, 3, 8)
    model.layer.compile(backend="eager")
    policy = policy_of(model, at="layer")
    model(x)
    opened = policy.places(x, policy.forward, relative=False)
    delta = torch.randn(opened.x.shape)
    torch.testing.assert_close(opened(delta), model(x) + delta)
    assert model.layer._compiled_call_impl is not None
