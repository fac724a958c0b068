"""The displays of metrics: the console and MLflow.

Imports `runs`, `config` and `common`. Only `store` imports MLflow, and only `console` imports rich.
"""
