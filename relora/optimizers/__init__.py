"""What an optimizer is: one file each, with its settings, its state's bytes and how it is built.

Imports `budget` and `common`. torch is imported when one is built.
"""
