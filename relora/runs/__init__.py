"""A run's folder: state, metrics, checkpoints, warm start, results, and the state of the run's SLURM job.

Imports `config` and `common`. Only `checkpoint` imports torch.
"""
