"""The displays of metrics: the console and MLflow.

This package imports `runs`, `config` and `common`. Only `store` imports MLflow, and only `console` imports rich.
"""
