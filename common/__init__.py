"""Shared by the benchmarks, the demonstration and the experiments: texts, the machine, costs, commands."""
