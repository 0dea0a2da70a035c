"""The benchmarks behind `aajr bench`: suites of cases that are gated, interleaved, and written as rows.

==============  ===============================================================================
module          what it holds
==============  ===============================================================================
``case``        what a suite is made of: Suite, Case, Variant, Run, Selection
``gate``        gradients against float64; no speed without it
``run``, ``peak``  timing, memory in fresh processes, rows
``allocator``   freed memory stays with the process while it measures
``row``         the schema of a results file
``attention``, ``pointwise``, ``head``, ``step``, ``method``, ``models``  the suites
``gpu``, ``gpu_attention``  the suite for devices
``roofline``, ``ceilings``  the model of a device, and what one really reaches
``show``, ``plot``  tables on the terminal, pictures from rows
==============  ===============================================================================

To add a suite, write a module with a function from a Selection to Cases and enter its Suite below.
"""

from . import attention, gpu, head, method, pointwise, step
from .allocator import keep_memory
from .case import Case, Run, Selection, Suite, Variant
from .row import Row, append_rows, environment, read_rows
from .run import Outcome, run_case

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
    "read_rows",
    "run_case",
]

#: the registry, in the order in which suites run
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (attention.SUITE, *pointwise.SUITES, head.SUITE, step.SUITE, method.SUITE, gpu.SUITE)
}
