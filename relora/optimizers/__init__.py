"""Optimizers that torch does not have.

Imports torch alone.
"""
