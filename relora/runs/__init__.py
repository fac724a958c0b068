"""A run's folder: state, metrics, checkpoints, warm start, results, and what SLURM says of the run's job.

Imports `config` and `common`. `checkpoint` alone imports torch.
"""
