"""The algorithm of ReLoRA as a library: schedule, low-rank layer, merge, reset of the optimizer's state, loss.

Imports `budget` and torch. The schedule does without torch.
"""
