"""Who starts runs, and where: processes on this machine, jobs on SLURM, a search for rates.

Imports `studies`, `training` and what is below them. `submit` alone imports submitit, `tune` alone Optuna.
"""
