"""The commands: run.py and `relora VERB`.

Imports all other packages, most of them when a verb needs them.
"""
