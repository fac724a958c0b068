"""Turn text into tokens on disk, and serve batches as a pure function of seed and step.

Imports `config` and `common`. Only `readers` imports pyarrow, and only `encoding` tokenizers.
"""
