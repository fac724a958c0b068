"""The ReLoRA algorithm as a library: schedule, low-rank layer, merge, reset of the optimizer state, loss.

Imports `budget` and torch. The schedule does not need torch.
"""
