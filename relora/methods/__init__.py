"""The training methods, one file each. The file holds the settings, the cost and the training of its method.

Imports `core`, `budget`, `common` and `optimizers`. torch, and modules that need torch, are imported inside hooks.
"""
