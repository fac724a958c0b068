"""FLOPs, parameters and bytes of a run, by arithmetic.

Imports Python's own library alone.
"""
