"""The benchmarks behind `python -m bench`: suites of cases that are gated, interleaved, and written as rows.

==============  ===============================================================================
module          what it holds
==============  ===============================================================================
``case``        what a suite is made of: Suite, Case, Variant, Run, Selection
``gate``        gradients against float64; no speed without it
``run``, ``peak``  timing, memory in fresh processes, rows
``compare``, ``against``  rows against rows, and against another commit
``allocator``   freed memory stays with the process while it measures
``row``         the schema of a results file
``attention``, ``pointwise``, ``head``, ``step``, ``method``, ``memory``, ``models``, ``sweep``  the suites
``gpu``, ``gpu_attention``  the suite for devices
``peers``       packages that are measured where they are installed
``roofline``, ``ceilings``  the model of a device, and what one really reaches
``show``, ``plot``  tables on the terminal, pictures from rows
==============  ===============================================================================

To add a suite, write a module with a function from a Selection to Cases and enter its Suite below.
"""

from dataclasses import replace

import aajr_kernels  # noqa: F401  before torch, whose waiting threads it tells to sleep

# isort: split

from .allocator import keep_memory
from .case import Case, Run, Selection, Suite, Variant
from .row import Row, append_rows, environment, read_rows
from .run import Outcome, run_case
from .suites import attention, gpu, head, memory, method, pointwise, step, sweep

__all__ = [
    "SUITES",
    "Case",
    "Outcome",
    "Row",
    "Run",
    "Selection",
    "Suite",
    "Variant",
    "append_rows",
    "environment",
    "keep_memory",
    "quick",
    "read_rows",
    "run_case",
]


def quick(cases: list[Case]) -> list[Case]:
    """The smallest timed case of every family, without large ones and without variants that have to be compiled.

    What is slow and runs a few rounds at most, runs one.
    """
    smallest: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = case.suite, case.family
        if case.timed and not case.large and (key not in smallest or case.length < smallest[key].length):
            kept = tuple(
                replace(variant, rounds=None if variant.rounds is None or variant.name in case.base else 1)
                for variant in case.variants
                if not variant.compiled
            )
            names = {variant.name for variant in kept}
            base = tuple(name for name in case.base if name in names)
            smallest[key] = replace(case, variants=kept, base=base)
    return list(smallest.values())


#: the registry, in the order in which suites run
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        attention.SUITE,
        *pointwise.SUITES,
        head.SUITE,
        step.SUITE,
        method.SUITE,
        sweep.SUITE,
        memory.SUITE,
        gpu.SUITE,
    )
}
