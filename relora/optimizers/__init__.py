"""The optimizers, one file each. The file holds the settings, the size of the state and the build of its optimizer.

Imports `core`, `budget` and `common`. torch is imported when an optimizer is built.
"""
