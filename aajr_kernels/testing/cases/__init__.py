"""The table of cases: every op, and a whole policy."""

from __future__ import annotations

from . import policy, products, rows
from .case import Case

#: of the ops; every backend runs them
CASES = [*rows.CASES, *products.CASES]
#: public name -> its cases; the last is a policy through the penalty and the rules of unmodified PyTorch functions
OPS: dict[str, list[Case]] = {}
for _case in (*CASES, *policy.CASES):
    OPS.setdefault(_case.public, []).append(_case)
