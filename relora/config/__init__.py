"""A run's config: dataclasses and checks, composition by Hydra, presets, and what the run will cost.

Imports `common`, `budget` and `core.schedule`; never torch. `compose` alone imports Hydra and OmegaConf.
"""
