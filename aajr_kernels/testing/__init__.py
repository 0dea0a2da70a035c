"""The oracle, formulas, cases and error budgets: for the tests, `aajr validate` and the gate of the benchmarks."""
