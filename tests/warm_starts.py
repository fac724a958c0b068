"""Runs that share a warm start."""

from relora.config.compose import compose
from relora.runs.rundir import RunDir
from relora.training.job import launch

RELORA = ["method=relora", "method.rank=4"]


OTHERS = [
    ["method=relora", "method.rank=8", "optimizer.learning_rate=3e-3"],
    ["method=lora", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=full", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=galore", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=fira", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=apollo", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=lowrank", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=sltrain", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
    ["method=cola", "method.rank=4", "method.warm_start_steps=3", "method.warm_start_learning_rate=2e-3"],
]


def setting(tiny: list[str], *arm: str) -> list[str]:
    """The small setting and `arm`. Values of another method are left out."""
    own = [item for item in tiny if not item.startswith("method.") or arm[0] == "method=relora"]
    rates = ["optimizer.learning_rate=4e-3", "optimizer.embedding_learning_rate=5e-3"]
    return [*own, *rates, *arm]


def trained(overrides: list[str]) -> RunDir:
    config = compose(overrides)
    assert launch(config, overrides).state == "finished"
    return RunDir(config.run_dir)
