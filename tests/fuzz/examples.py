"""How many examples a property is tried with: a slice by `make test`, thousands by `make test-all`, and a count.

Examples are the same in every run. `AAJR_FUZZ_SEED=7 pytest tests/fuzz` tries others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from common.trust import count

pytest.importorskip("hypothesis", reason="hypothesis is not installed: make setup-test")
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

#: another number gives other examples
SEED = int(os.environ.get("AAJR_FUZZ_SEED", "20261203"))


def fuzzed(promise: str, quick: int, full: int) -> Callable[[Callable[[Any], None]], Any]:
    """A property of hypothesis' ``data``, as one test with `quick` examples and a slow one with `full` examples.

    Those that passed count for the `promise`; an example that a property rejects does not.

    No time limit: the machine may be busy. No database of earlier failures: each becomes a test with a name.
    """

    def decorate(check: Callable[[Any], None]) -> Any:
        def tested(size: int) -> None:
            tried = 0

            def attempt(data: Any) -> None:
                nonlocal tried
                check(data)
                tried += 1

            options = settings(
                max_examples=size,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.explicit, Phase.generate, Phase.shrink),
            )
            seed(f"{SEED} {check.__name__} {size}")(options(given(st.data())(attempt)))()
            count(promise, examples=tried)

        sizes = [
            pytest.param(quick, id="slice"),
            pytest.param(full, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
        ]
        tested.__name__, tested.__doc__, tested.__module__ = check.__name__, check.__doc__, check.__module__
        return pytest.mark.parametrize("size", sizes)(tested)

    return decorate
