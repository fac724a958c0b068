"""Where metrics are shown: the console and MLflow.

Imports `runs`, `config` and `common`. `store` alone imports MLflow, `console` alone rich.
"""
