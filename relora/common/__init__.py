"""Helpers that every package may use: errors for users, stop signals, atomic file writes, checks of values.

Imports only Python's standard library.
"""
