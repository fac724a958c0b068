"""Many runs: sweeps, full-rank baselines, comparison, report, and the disk space of runs.

Imports `tracking`, `runs`, `config`, `methods`, `optimizers` and `common`; never torch. Only `pictures`
imports matplotlib.
"""
