"""The stages of scripts/gpu_first.py, each a process of its own. ``NAMES`` are in order of value."""

#: name -> seconds of a run of 560; the tests and the benchmarks share what the others leave
NAMES = {
    "machine": 20,
    "warm": 60,
    "correctness": 100,
    "kernels": 100,
    "step": 110,
    "graphs": 30,
    "context": 30,
    "choices": 50,
    "tests": 80,
    "bench": 100,
}
#: those of the second run, on what failed in the first
AGAIN = {"correctness": 120, "tests": 200, "sanitizer": 240}
