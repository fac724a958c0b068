"""FLOPs, parameters and bytes of a run, computed by arithmetic.

Imports only the standard library of Python.
"""
