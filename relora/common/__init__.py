"""Helpers that every package may use: errors for users, stop signals, atomic file writes, checks of values, perplexity.

Imports only Python's standard library.
"""
