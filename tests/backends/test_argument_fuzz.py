"""The entries of the native module, and of the CUDA one compiled for the CPU, with arguments changed at random.

`python scripts/sanitize.py --minutes 30` goes on for that long under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from backends import argument_fuzz
from backends.test_entries import calls as calls  # a fixture
from backends.test_entries import tensor_of

from common.trust import count

#: examples for each module, in the quick suite
SLICE = 400
MINUTES = float(os.environ.get("AAJR_FUZZ_MINUTES", "0"))


@pytest.mark.timeout(300 + int(MINUTES * 120))
def test_changed_arguments_are_refused_or_right(calls):
    module = calls[0].module
    capabilities = (
        [name for name, runs in module.capabilities() if runs] if hasattr(module, "capabilities") else []
    )
    before = module.capability() if capabilities else None
    seen: Counter = Counter()
    begin = time.monotonic()
    try:
        for first in itertools.count(0, SLICE):
            seen += argument_fuzz.fuzz(calls, range(first, first + SLICE), capabilities)
            if time.monotonic() - begin >= 30 * MINUTES:  # each of two modules takes half
                break
    finally:
        if capabilities:
            module.set_capability(before)
    assert seen["accepted"] > SLICE / 20 and seen["refused"] > SLICE / 20, seen
    count(
        "arguments",
        sanitizer_minutes=math.floor((time.monotonic() - begin) / 60),
        calls=seen.total(),
        accepted_and_right=seen["accepted"],
        failures=0,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is fenced by mprotect of libc")
@pytest.mark.parametrize("behind", [True, False])
def test_memory_beside_tensors_is_not_touched(calls, behind):
    """Also not read: the process would end."""
    module = calls[0].module
    capabilities = (
        [name for name, runs in module.capabilities() if runs] if hasattr(module, "capability") else []
    )
    before = module.capability() if capabilities else None
    tensors = [
        [t if t is None else argument_fuzz.fenced(tensor_of(t), behind) for t in c.tensors] for c in calls
    ]
    try:
        for capability in capabilities or [None]:
            if capability is not None:
                module.set_capability(capability)
            for call, placed in zip(calls, tensors):
                call.run(tensors=tuple(None if t is None else t.view() for t in placed))
    finally:
        if capabilities:
            module.set_capability(before)


def spoiled(calls, run) -> argument_fuzz.Example:
    """A valid call of an entry that `run(call, **arguments)` takes the place of."""
    call = next(call for call in calls if call.name == "norm_fwd")
    other = replace(call)
    other.run = lambda **arguments: run(call, **arguments)
    return argument_fuzz.valid(other, argument_fuzz.outputs_of(calls.index(call), calls), 1)


def test_an_entry_that_takes_no_notice_of_strides_is_seen(calls):
    def as_if_dense(call, tensors, **arguments):
        (address, code, shape, _), *others = tensors
        dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        call.run(tensors=((address, code, shape, dense), *others), **arguments)

    made = spoiled(calls, as_if_dense)
    values = made.tensors[0].of(made.tensors[0].base)
    wide = torch.cat([values, values], -1)
    made.tensors[0] = argument_fuzz.Laid(wide.view(-1), 0, tuple(values.shape), wide.stride())
    with pytest.raises(argument_fuzz.Wrong, match="for dense copies"):
        made.check()


def test_an_entry_that_accepts_what_is_no_tensor_is_seen(calls):
    made = spoiled(calls, lambda call, **arguments: None)
    made.changes.append(argument_fuzz.raw(made, 0, argument_fuzz.random.Random(0)))
    assert made.impossible
    with pytest.raises(argument_fuzz.Wrong, match="accepted"):
        made.check()


def test_an_entry_that_writes_beside_its_results_is_seen(calls):
    def careless(call, tensors, **arguments):
        call.run(tensors=tensors, **arguments)
        made.tensors[0].base[0] += 1

    made = spoiled(calls, careless)
    with pytest.raises(argument_fuzz.Wrong, match="tensor 0 outside of the results changed"):
        made.check()
