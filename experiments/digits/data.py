"""The digits of scikit-learn (8×8 pixels in [0, 1], ten classes) with four quantities of each image to be told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits

CLASSES = 10
#: outputs of the utility head for an image: how much ink there is, where its centre lies, and how it slants
UTILITIES = ("ink", "centre across", "centre down", "slant")


@dataclass(frozen=True)
class Split:
    """Images ``[n, 64]``, classes ``[n]`` and utilities ``[n, 4]``."""

    x: torch.Tensor
    y: torch.Tensor
    u: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor | slice) -> Split:
        return Split(self.x[index], self.y[index], self.u[index])


@dataclass(frozen=True)
class Digits:
    """Three disjoint parts."""

    train: Split
    validation: Split
    test: Split


def moments(x: torch.Tensor) -> torch.Tensor:
    """Ink, centre of mass and slant of images ``[n, 64]``: ``[n, 4]``."""
    image = x.reshape(-1, 8, 8)
    at = torch.linspace(-1, 1, 8)
    ink = image.sum((1, 2))
    across, down = (image * at).sum((1, 2)) / ink, (image * at[:, None]).sum((1, 2)) / ink
    from_centre = (at[None, None, :] - across[:, None, None]) * (at[None, :, None] - down[:, None, None])
    return torch.stack([ink, across, down, (image * from_centre).sum((1, 2)) / ink], 1)


def load(seed: int, sizes: tuple[int, int, int]) -> Digits:
    """A random split; utilities have mean 0 and variance 1 over its training part.

    Args:
        seed: of the split.
        sizes: of training, validation and test part; 1,797 images in all.
    """
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order[: sum(sizes)].split(sizes)
    u = moments(x)
    u = (u - u[train].mean(0)) / u[train].std(0)
    whole = Split(x, y, u)
    return Digits(whole[train], whole[validation], whole[test])
