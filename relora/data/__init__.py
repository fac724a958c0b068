"""Texts to tokens on disk, and batches that are a pure function of seed and step.

Imports `config` and `common`. `corpus` alone imports datasets and tokenizers.
"""
