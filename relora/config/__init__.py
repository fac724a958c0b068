"""A run's config: dataclasses and checks, composition by Hydra, presets, and what the run will cost.

Imports `methods`, `budget`, `common` and `core.schedule`; never torch. `compose` alone imports Hydra and OmegaConf.
"""
