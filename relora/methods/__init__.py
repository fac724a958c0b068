"""What the trainer asks a method: its parameters, its optimizer, its restarts, its end.

Imports `config`, `core`, `budget`, `optimizers` and torch.
"""
