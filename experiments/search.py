"""The search of every method: the same number of runs, one of which is chosen on validation results and tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .store import Row


def search(
    budget: int,
    propose: Callable[[list[Row]], float],
    run: Callable[[float], tuple[Row, Any]],
    choose: Callable[[Row], Any],
    test: Callable[[Any], dict[str, Any]],
) -> list[Row]:
    """Rows of all runs of one method; the chosen one also has what the test part says.

    Args:
        budget: number of runs.
        propose: from the rows so far to the next value of what is searched.
        run: from that value to a row and the trained model.
        choose: rank of a row, from validation results only; the row of the largest is tested, the first of equals.
        test: of its model.
    """
    rows: list[Row] = []
    models = []
    for _ in range(budget):
        row, model = run(propose(rows))
        rows.append(row | {"chosen": False})
        models.append(model)
    tested = best(rows, choose)
    rows[tested] |= {"chosen": True, "test": test(models[tested])}
    return rows


def best(rows: list[Row], rank: Callable[[Row], Any]) -> int:
    """Index of the row with the largest rank, the first of equals."""
    return max(range(len(rows)), key=lambda index: rank(rows[index]))


def bisected(reached: list[bool], middle: float, half_range: float) -> float:
    """The next exponent: down after a run that reached the target, else up, by half the distance each time."""
    steps = (half_range / 2 ** (number + 1) for number in range(len(reached)))
    return middle + sum(-step if enough else step for step, enough in zip(steps, reached))


def interpolated(tried: list[tuple[float, float]], target: float, middle: float, stride: float) -> float:
    """The next exponent: a stride up or down until the target is bracketed, then linear interpolation between.

    Args:
        tried: exponents and the losses that they gave.
        target: a loss.
        middle: the first exponent.
        stride: of the way to a bracket.
    """
    below = [pair for pair in tried if pair[1] <= target]
    above = [pair for pair in tried if pair[1] > target]
    if not tried:
        return middle
    if not above:
        return max(below)[0] + stride
    if not below:
        return min(above)[0] - stride
    (low, low_loss), (high, high_loss) = max(below), min(above)
    share = (target - low_loss) / (high_loss - low_loss)
    return low + min(max(share, 0.1), 0.9) * (high - low)
