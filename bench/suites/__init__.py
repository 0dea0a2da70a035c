"""The suites of `python -m bench`, one module each, and the registry of them.

To add a suite, write a module with a function from a Selection to Cases and enter its Suite below.
"""

from __future__ import annotations

from dataclasses import replace

from ..case import Case, Suite
from . import attention, gpu, head, launch, memory, method, pointwise, step

#: in the order in which they run
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        attention.SUITE,
        *pointwise.SUITES,
        head.SUITE,
        step.SUITE,
        method.SUITE,
        memory.SUITE,
        gpu.SUITE,
        launch.SUITE,
    )
}


def quick(cases: list[Case]) -> list[Case]:
    """The smallest timed case of every family, without large ones and without variants that have to be compiled.

    Slow variants that run a few rounds at most run one.
    """
    smallest: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = case.suite, case.family
        if case.timed and not case.large and (key not in smallest or case.length < smallest[key].length):
            variants = tuple(
                replace(variant, rounds=None if variant.rounds is None or variant.name in case.base else 1)
                for variant in case.variants
                if not variant.compiled
            )
            names = {variant.name for variant in variants}
            base = tuple(name for name in case.base if name in names)
            smallest[key] = replace(case, variants=variants, base=base)
    return list(smallest.values())
