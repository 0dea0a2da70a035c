"""The benchmarks behind `python -m bench`: suites of cases that are gated, interleaved, and written as rows.

==================  ==============================================================================
module              content
==================  ==============================================================================
``case``            Suite, Case, Variant, Run, Selection
``suites``          the registry SUITES and one module per suite
``gate``            gradients against float64; no speed without it
``run``, ``peak``   timing, memory in fresh processes, rows
``row``             the schema of a results file
``compare``         rows against rows or a baseline
``roofline``        the ceilings of a device, measured; the times of kernels, predicted
``tables``          on the terminal
``plot``, ``report``  pictures and tables of the documentation, from rows
``tune``            tiles of the attention kernels, measured on a device
``scaling``         a step in many processes: communication and memory, counted
==================  ==============================================================================
"""

import aajr_kernels  # noqa: F401  before torch, whose waiting threads it tells to sleep
