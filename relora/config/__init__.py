"""The config of a run: dataclasses and checks, composition by Hydra, presets, and the estimated cost of the run.

Imports `methods`, `optimizers`, `budget`, `common` and `core.schedule`; never torch. Only `compose`, `overrides` and
`typed` import Hydra and OmegaConf.
"""
