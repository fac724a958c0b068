"""A run's config: dataclasses and checks, composition by Hydra, presets, and what the run will cost.

Imports `methods`, `optimizers`, `budget`, `common` and `core.schedule`; never torch. `compose`, `overrides` and
`typed` alone import Hydra and OmegaConf.
"""
