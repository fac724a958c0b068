"""Turn text into tokens on disk, and serve batches as a pure function of seed and step.

Imports `config` and `common`. Only `documents` imports datasets, and only `encoding` tokenizers.
"""
