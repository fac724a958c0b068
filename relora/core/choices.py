"""The allowed values of the algorithm's options, and their defaults. Needs no torch."""

REINITS = ("kaiming", "orthogonal")
"""How a restart draws A."""

RESET_MODES = ("none", "zero", "random", "magnitude")
"""How a restart prunes the optimizer's state of the factors."""

RESET_MOMENTS = ("joint", "independent")
"""Whether both moments of a factor are pruned at the same entries."""

PRUNING_RATIO = 0.99
"""The share of a factor's optimizer state that a restart prunes."""

SCALING = 0.25
"""The default of alpha / rank, used when no alpha is given: the paper's 32 / 128."""
