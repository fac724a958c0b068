"""Start runs: as processes on this machine, as SLURM jobs, or as trials of a search for learning rates.

Imports `studies`, `training` and the packages below them. Only `submit` imports submitit, and only `tune` Optuna.
"""
