"""Which cases Triton's interpreter runs every day: it is slow, and tests/ops/test_suite.py has the same kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

#: files with many cases of one kernel, of which every third runs in `make test`, and all of them in `make test-all`
SAMPLED = {
    f"test_{name}.py"
    for name in ("activation", "attention", "head", "masks", "norm", "sensitivity", "rotary")
}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    seen: Counter[str] = Counter()
    for item in items:
        if (
            item.path.parent.parts[-2:] == ("backends", "triton")
            and item.path.name in SAMPLED
            and hasattr(item, "callspec")
        ):
            function = item.nodeid.partition("[")[0]
            if seen[function] % 3:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1
