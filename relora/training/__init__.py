"""One run from its folder to its end: model, trainer, processes, evaluation, export.

Imports all packages but `studies`, `launching` and `cli`. `model` and `pretrained` import transformers.
"""
