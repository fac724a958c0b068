"""The commands: run.py and `relora VERB`.

Imports all other packages, most of them only when a verb needs them.
"""
