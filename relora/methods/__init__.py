"""What a method is: one file each, which answers all questions about its settings, its cost and its training.

Imports `core`, `budget`, `common` and `optimizers`. torch and what needs it are imported inside hooks.
"""
