"""Turn text or token ids into a corpus on disk, and serve batches as a pure function of seed and step.

Imports `config` and `common`. Only `readers`, `decoding` and `tokens` import pyarrow, only `hub` datasets, and only
`tokenizer` tokenizers and transformers.
"""
