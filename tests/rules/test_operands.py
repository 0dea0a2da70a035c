"""Operands in unusual places: a number first, a Dual target or weight of a loss; and operands that torch refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules.cases import P, U, X, Y, rand, real
from rules.check import check

from aajr_kernels import Dual, dual

FIRST = torch.tensor([[2.3, -3.1, 1.7], [4.2, -2.2, 2.9]], dtype=torch.float64)
NUMBER_FIRST: dict[str, Callable[[Any], Any]] = {
    "remainder": lambda x: torch.remainder(7.5, x),
    "remainder of an integer": lambda x: torch.remainder(7, x),
    "%": lambda x: 7.5 % x,
    "pow": lambda x: torch.pow(1.7, x),
    "**": lambda x: 1.7**x,
    "float_power": lambda x: torch.float_power(1.7, x),
    "rsub": lambda x: torch.rsub(x, 1.7, alpha=2),
    "-": lambda x: 1.7 - x,
    "/": lambda x: 1.7 / x,
    "xlogy": lambda x: torch.xlogy(1.7, x.abs()),
    "xlog1py": lambda x: torch.special.xlog1py(1.7, x.abs()),
    "where": lambda x: torch.where(FIRST > 0, 1.7, x),
    "add(0-d)": lambda x: torch.add(torch.tensor(1.7), x, alpha=3),
    "fmod(0-d)": lambda x: torch.fmod(torch.tensor(7.5), x),
    "remainder(0-d)": lambda x: torch.remainder(torch.tensor(7.5), x),
    "atan2(0-d)": lambda x: torch.atan2(torch.tensor(1.7), x),
    "copysign(0-d)": lambda x: torch.copysign(torch.tensor(1.7), x) + x,
    "maximum(0-d)": lambda x: torch.maximum(torch.tensor(0.3), x),
    "hypot(0-d)": lambda x: torch.hypot(torch.tensor(1.7, dtype=torch.float64), x),
    "floor_divide": lambda x: 7.5 // x + x,
}


@pytest.mark.parametrize("name", NUMBER_FIRST)
def test_a_number_may_come_first(name: str) -> None:
    for k in (1, 2):
        check(NUMBER_FIRST[name], (FIRST,), k, upstream=False)


# -- losses -----------------------------------------------------------------------------------------------------------

WEIGHT, BEYOND = rand(3, 4, low=0.4, high=2.0), rand(3, 4, low=1.4, high=3.0)
LOSSES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "binary_cross_entropy": (F.binary_cross_entropy, (U, rand(3, 4))),
    "binary_cross_entropy(weight)": (F.binary_cross_entropy, (U, rand(3, 4), WEIGHT)),
    "binary_cross_entropy(weight of a row)": (F.binary_cross_entropy, (U, rand(3, 4), WEIGHT[0])),
    "binary_cross_entropy(vector)": (F.binary_cross_entropy, (U[0], rand(4))),
    "binary_cross_entropy(0-d)": (F.binary_cross_entropy, (U[0, 0], rand())),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, (X, U, WEIGHT)),
    "binary_cross_entropy_with_logits(pos_weight)": (
        lambda x, t, w, **kw: F.binary_cross_entropy_with_logits(x, t, pos_weight=w, **kw),
        (X, U, WEIGHT[0]),
    ),
    "cross_entropy": (F.cross_entropy, (X, U)),
    "mse_loss": (F.mse_loss, (X, Y)),
    "mse_loss(weight)": (lambda x, y, w, **kw: F.mse_loss(x, y, weight=w, **kw), (X, Y, WEIGHT)),
    "l1_loss": (F.l1_loss, (X, Y)),
    "l1_loss(weight)": (lambda x, y, w, **kw: F.l1_loss(x, y, weight=w, **kw), (X, Y, WEIGHT)),
    "huber_loss(weight)": (lambda x, y, w, **kw: F.huber_loss(x, y, delta=0.7, weight=w, **kw), (X, Y, WEIGHT)),
    "smooth_l1_loss": (lambda x, y, **kw: F.smooth_l1_loss(x, y, beta=0.7, **kw), (X, Y)),
    "soft_margin_loss": (F.soft_margin_loss, (X, Y)),
    "kl_div": (F.kl_div, (X, U)),
    "kl_div(log_target)": (lambda x, t, **kw: F.kl_div(x, t, log_target=True, **kw), (X, Y)),
    "poisson_nll_loss": (lambda x, t, **kw: F.poisson_nll_loss(x, t, full=True, **kw), (X, BEYOND)),
    "gaussian_nll_loss": (lambda x, t, v, **kw: F.gaussian_nll_loss(x, t, v, full=True, **kw), (X, Y, P)),
    "margin_ranking_loss": (F.margin_ranking_loss, (X, Y, real(3, 4))),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, (X, U, WEIGHT[0])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", LOSSES)
def test_target_and_weight_of_a_loss_may_be_duals(name: str) -> None:
    loss, inputs = LOSSES[name]
    places = [(i,) for i in range(len(inputs))] + [tuple(range(len(inputs)))]
    reductions = itertools.cycle(("none", "mean", "sum"))
    for k, duals, reduction in zip((1, 2) * len(places), places, reductions):
        check(lambda *xs, r=reduction: loss(*xs, reduction=r), inputs, k, duals=duals, upstream=False)


# -- what torch refuses -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "t of four axes": (lambda x: x.t(), ((2, 3, 4, 5),)),
    "t_ of three axes": (lambda x: x.t_(), ((2, 3, 4),)),
    "huber_loss, delta 0": (lambda x, y: F.huber_loss(x, y, delta=0.0), ((3,), (3,))),
    "huber_loss, delta < 0": (lambda x, y: F.huber_loss(x, y, delta=-1.0), ((3,), (3,))),
    "smooth_l1_loss, beta < 0": (lambda x, y: F.smooth_l1_loss(x, y, beta=-1.0), ((3,), (3,))),
    "hardtanh, bounds": (lambda x: F.hardtanh(x, 0.5, -0.5), ((3,),)),
    "hardtanh, bounds, in place": (lambda x: F.hardtanh(x, 0.5, -0.5, inplace=True), ((3,),)),
    "prelu, weight of two axes": (F.prelu, ((2, 3), (1, 3))),
    "prelu, weights of a shapeless input": (F.prelu, ((), (2,))),
    "prelu, too many weights": (F.prelu, ((2, 3), (4,))),
    "prelu, weights of one channel": (F.prelu, ((2, 1), (3,))),
    "masked_fill, value of one axis": (lambda x, v: x.masked_fill(torch.ones(3).bool(), v), ((3,), (1,))),
    "masked_scatter, mask": (lambda x, y: x.masked_scatter(y, x), ((3,), (3,))),
    "index_add, index": (lambda x, y: x.index_add(0, y, x), ((3,), (3,))),
    "scatter, index": (lambda x, y: x.scatter(0, y, x), ((3,), (3,))),
    "conv1d, integer input": (lambda b: F.conv1d(torch.ones(1, 1, 4).long(), torch.ones(1, 1, 2).long(), b), ((1,),)),
    "conv2d, bias dtype": (lambda x, b: F.conv2d(x, x[:, :, :2, :2], b.double()), ((1, 1, 4, 4), (1,))),
    "dot of numbers": (torch.dot, ((), ())),
    "dot of matrices": (torch.dot, ((2, 2), (2, 2))),
    "outer of matrices": (torch.outer, ((2, 2), (2,))),
    "permute, too few": (lambda x: x.permute(0, 1), ((2, 3, 4),)),
    "expand, -1 for a new axis": (lambda x: x.expand(-1, 3), ((3,),)),
    "dropout, p": (lambda x: F.dropout(x, 1.5), ((3,),)),
    "celu, alpha 0": (lambda x: F.celu(x, 0.0), ((3,),)),
    "softshrink, lambd < 0": (lambda x: F.softshrink(x, -0.5), ((3,),)),
    "glu of a number": (F.glu, ((),)),
    "group_norm, groups": (lambda x: F.group_norm(x, 2), ((2, 3, 4),)),
    "layer_norm, shape": (lambda x: F.layer_norm(x, (3,)), ((2, 4),)),
    "cosine_similarity, axis": (lambda x: F.cosine_similarity(x, x, 2), ((2, 3),)),
    "roll, axis of a number": (lambda x: x.roll(1, 0), ((),)),
    "bmm of matrices": (torch.bmm, ((2, 2), (2, 2))),
    "mm of vectors": (torch.mm, ((2,), (2,))),
    "mv of a matrix": (torch.mv, ((2, 2), (2, 2))),
    "addmm, shapes": (torch.addmm, ((3, 3), (2, 2), (2, 2))),
    "baddbmm, two axes": (torch.baddbmm, ((2, 2), (2, 2), (2, 2))),
    "lerp, dtypes": (lambda x, y: torch.lerp(x, y.double(), 0.3), ((3,), (3,))),
    "pixel_shuffle, channels": (lambda x: F.pixel_shuffle(x, 2), ((3, 2, 2),)),
    "narrow, start": (lambda x: x.narrow(0, 2, 2), ((3,),)),
    "cat, shapes": (lambda x, y: torch.cat([x, y]), ((2, 3), (2, 4))),
    "stack, shapes": (lambda x, y: torch.stack([x, y]), ((2, 3), (2, 4))),
}  # fmt: skip


def test_a_view_does_not_leave_the_primal() -> None:
    stacked = torch.randn(3, 3)[:2]  # the storage goes on, so torch would allow it
    with pytest.raises(RuntimeError, match="leaves the 3 values of the primal"):
        Dual(stacked).as_strided((2,), (3,))


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name: str) -> None:
    function, shapes = REFUSED[name]
    plain = [torch.randn(shape) for shape in shapes]
    errors = (RuntimeError, IndexError, TypeError, ValueError)
    with pytest.raises((*errors, ZeroDivisionError)):
        function(*plain)
    for k in (1, 3):
        with pytest.raises(errors) as caught:
            function(*(dual(x, torch.randn(k, *x.shape)) for x in plain))
        assert not isinstance(caught.value, RecursionError)
