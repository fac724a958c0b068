"""One run from its folder to its end: model, trainer, processes, evaluation and export.

Imports all packages except `studies`, `launching` and `cli`. `model` and `pretrained` import
transformers.
"""
