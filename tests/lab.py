"""Studies without training: run folders like those of training, with the figures that a test gives."""

import math
from pathlib import Path
from typing import Any

from relora.config.compose import Composer
from relora.config.frozen import freeze
from relora.config.run import RunConfig
from relora.config.tuned import Presets
from relora.runs.metrics import MetricsLog
from relora.runs.rundir import RunDir, Status
from relora.studies.compare import Study, load_study
from relora.studies.study import planned_runs, write_manifest
from relora.studies.sweeps import Sweep

STEPS = 40
SETTING = (f"trainer.total_steps={STEPS}", "schedule.warmup_steps=2")
RELORA = ("method=relora", "method.warm_start_steps=0", "method.reset_interval_steps=20")
FULL = ("method=full",)
COMPOSER, PRESETS = Composer(), Presets()
"""All labs share these. So Hydra composes each choice of groups only once."""


class Lab:
    """Makes run folders like those of training, with the figures that a test gives."""

    def __init__(self, runs_dir: Path, tracker: str = "jsonl", *, noted: bool = False) -> None:
        """`noted`: the runs record the origin of their rates, as runs of this version do."""
        self.runs_dir, self.tracker, self.noted = runs_dir, tracker, noted

    def config(self, *overrides: str) -> RunConfig:
        texts = [*SETTING, *overrides, f"tracker={self.tracker}", f"runs_dir={self.runs_dir}"]
        config = COMPOSER.compose(texts)
        return PRESETS.noted(config, texts) if self.noted else config

    def run(self, *overrides: str, loss: float = 3.0, state: str = "finished", **changes: Any) -> RunConfig:
        """Make a run with a validation loss that falls linearly to `loss`. The test loss is 0.1 above."""
        config = self.config(*overrides)
        run = RunDir(config.run_dir)
        freeze(config, run.config_file)
        total, tokens = config.total_steps, config.total_steps * config.tokens_per_step
        flops, seconds = changes.pop("flops", 1e9), changes.pop("seconds", 100.0)
        interval = changes.pop("validation_interval_steps", 10)
        with MetricsLog.opened(run.metrics_file, exact=True) as log:
            for step in range(0, total + 1, 10):
                share = step / total
                progress = {"progress/tokens": step * config.tokens_per_step, "progress/flops": share * flops}
                row = {"train/loss": 5 - share, "train/lr": 1e-3, "perf/training_seconds": share * seconds}
                evaluated = {"eval/loss": loss + 2 * (1 - share)} if step % interval == 0 else {}
                log.log(step, row | progress | evaluated)
                if step in (20, 30) and config.reset_interval_steps:
                    log.log(step, {"restart/number": step // 20})
        summary = {
            "eval_loss": loss,
            "eval_perplexity": math.exp(loss),
            "test_loss": loss + 0.1,
            "test_perplexity": math.exp(loss + 0.1),
            "tokens": tokens,
            "flops": flops,
            "training_seconds": seconds,
            "peak_memory_bytes": 2**30,
            "parameters": 1_000_000,
            "trainable_parameters": 600_000 if config.rank else 1_000_000,
            "restarts": 1,
            "skipped_updates": 0,
        }
        summary |= changes.pop("summary", {})
        run.status = Status(state=state, summary=summary if state == "finished" else {}, **changes)
        return config

    def study(self, *configs: RunConfig, name: str = "mine") -> Study:
        sweep = Sweep(study=name, question="Which one?", runs=list(configs), fixed=list(SETTING), baseline_rates=[1.0])
        write_manifest(self.runs_dir, sweep, planned_runs(sweep), ["method.rank=8,16"])
        return load_study(self.runs_dir, name)
