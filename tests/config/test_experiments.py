import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from small import REPOSITORY

from relora.config.compose import compose
from relora.config.data import HubConfig
from relora.config.run import RunConfig
from relora.methods import registry
from relora.methods.lora import LoRA
from relora.methods.relora import ReLoRA
from relora.optimizers.adamw import AdamW
from relora.studies.baselines import Baselines
from relora.studies.sweeps import Sweep, expand


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The values that an experiments/ file must have. They are written here and not read from the file."""

    model: str
    sizes: tuple[int, int, int, int]
    """Hidden, intermediate, heads, layers."""
    sequences: int
    length: int
    steps: int
    table_billion_tokens: float | None = None
    """The tokens of the paper's table."""
    over_the_table: float = 1.0
    """The tokens of the setting divided by those of the table. Not 1 if the documented steps give other tokens."""
    warmup: int
    precision: str = "bf16"
    weight_decay: float = 0.0


METHODS = tuple(registry.METHODS.built_in)

M60, M130, M250 = (512, 1376, 8, 8), (768, 2048, 12, 12), (768, 2560, 16, 24)
PICO_TINY, PICO_SMALL = (96, 384, 12, 12), (384, 1536, 12, 12)
M350, M1B, TINY = (1024, 2736, 16, 24), (2048, 5461, 32, 24), (128, 352, 4, 4)

# fmt: off
SETTINGS = {
    "paper/relora_60m": Setting(model="llama_60m", sizes=M60, sequences=480, length=256, steps=10_000, warmup=500,
                                table_billion_tokens=1.2, over_the_table=1.02),
    "paper/relora_130m": Setting(model="llama_130m", sizes=M130, sequences=600, length=256, steps=20_000, warmup=500,
                                 table_billion_tokens=2.6, over_the_table=1.18),
    "paper/relora_250m": Setting(model="llama_250m", sizes=M250, sequences=1152, length=512, steps=20_000, warmup=500,
                                 table_billion_tokens=6.8, over_the_table=1.73),
    "paper/relora_350m": Setting(model="llama_350m", sizes=M350, sequences=1152, length=512, steps=20_000, warmup=1000,
                                 table_billion_tokens=6.8, over_the_table=1.73),
    "paper/relora_1b": Setting(model="llama_1b", sizes=M1B, sequences=1920, length=512, steps=23_499, warmup=1000,
                               table_billion_tokens=23.1),
    "paper/galore_60m": Setting(model="llama_60m", sizes=M60, sequences=512, length=256, steps=10_000, warmup=1000,
                                table_billion_tokens=1.1, over_the_table=1.19),
    "paper/galore_130m": Setting(model="llama_130m", sizes=M130, sequences=512, length=256, steps=20_000, warmup=2000,
                                 table_billion_tokens=2.2, over_the_table=1.19),
    "paper/galore_350m": Setting(model="llama_350m", sizes=M350, sequences=512, length=256, steps=60_000, warmup=6000,
                                 table_billion_tokens=6.4, over_the_table=1.23),
    "paper/galore_1b": Setting(model="llama_1b", sizes=M1B, sequences=512, length=256, steps=100_000, warmup=10_000,
                               table_billion_tokens=13.1),
    "paper/geometry_60m": Setting(model="llama_60m", sizes=M60, sequences=512, length=256, steps=10_000, warmup=1000),
    "paper/geometry_130m": Setting(model="llama_130m", sizes=M130, sequences=512, length=256, steps=20_000,
                                   warmup=2000),
    "paper/geometry_350m": Setting(model="llama_350m", sizes=M350, sequences=512, length=256, steps=60_000,
                                   warmup=6000),
    "paper/relora_small_11m": Setting(model="pico_tiny", sizes=PICO_TINY, sequences=1024, length=2048, steps=20_000,
                                      warmup=2000, precision="bf16_autocast", weight_decay=0.01),
    "paper/relora_small_66m": Setting(model="pico_small", sizes=PICO_SMALL, sequences=1024, length=2048, steps=20_000,
                                      warmup=2000, precision="bf16_autocast", weight_decay=0.01),
    "laptop/small": Setting(model="llama_tiny", sizes=TINY, sequences=16, length=128, steps=400, warmup=40,
                            precision="fp32"),
    "laptop/crossing": Setting(model="llama_tiny", sizes=TINY, sequences=16, length=128, steps=4000, warmup=50,
                               precision="fp32"),
}
# fmt: on

GALORE_RANKS = {"paper/galore_60m": 128, "paper/galore_130m": 256, "paper/galore_350m": 256, "paper/galore_1b": 512}

RELORA_TRAINABLE_MILLION = {
    "paper/relora_60m": 42.87,
    "paper/relora_130m": 71.74,
    "paper/relora_250m": 98.89,
    "paper/relora_350m": 125.61,
    "paper/relora_1b": 251.12,
}

# fmt: off
GALORE_TABLE = {
    "paper/galore_60m": ({"full": 34.06, "lowrank": 78.18, "lora": 34.99, "relora": 37.04, "galore": 34.88}, 256, 1),
    "paper/galore_130m": ({"full": 25.08, "lowrank": 45.51, "lora": 33.92, "relora": 29.37, "galore": 25.36}, 256, 1),
    "paper/galore_350m": ({"full": 18.80, "lowrank": 37.41, "lora": 25.58, "relora": 29.08, "galore": 18.95}, 128, 4),
    "paper/galore_1b": ({"full": 15.56, "lowrank": 142.53, "lora": 19.21, "relora": 18.33, "galore": 15.64}, 16, 8),
}
"""Table 2 of arXiv 2403.03507, and the micro-batch and GPUs of the authors' scripts."""
# fmt: on

PAPER = [name for name in SETTINGS if name.startswith("paper/")]
ON_C4 = [name for name in PAPER if not name.startswith("paper/relora_small")]
GEOMETRY = [name for name in PAPER if name.startswith("paper/geometry")]
WITH_A_TABLE = [name for name in PAPER if SETTINGS[name].table_billion_tokens is not None]
SOURCES = {"relora_small": "arXiv 2509.12960", "relora": "arXiv 2307.05695", "geometry": "arXiv 2605.13652"}
PRESETS = REPOSITORY / "conf" / "presets"
PRESET_FILES = sorted(path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml"))
SAME_AS_THE_DEFAULT = {
    f"laptop/small/{method}" for method in ("lora", "control", "galore", "fira", "apollo", "lowrank", "sltrain", "cola")
}
SAME_AS_THE_DEFAULT |= {f"{name}/apollo_mini" for name in SETTINGS if not name.startswith("paper/galore")}
"""Presets that are equal to the default of the method."""


IDS = "data.path=null"
"""The override for experiments that read token ids. A config is checked for whether its files exist."""


@pytest.fixture(autouse=True, scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> None:
    global IDS
    path = tmp_path_factory.mktemp("ids") / "ids.bin"
    path.write_bytes(bytes(2**16))
    IDS = f"data.path={path}"


def in_setting(experiment: str) -> list[str]:
    return [f"experiments={experiment}", *([IDS] if experiment.startswith("paper/relora_small") else [])]


@functools.cache
def composed(experiment: str, method: str, *more: str) -> RunConfig:
    return compose([*in_setting(experiment), f"method={method}", *more])


@functools.cache
def default_of(method: str) -> RunConfig:
    """Return the config without a preset. No experiments/ file has values of a method."""
    return compose([f"method={method}"])


def baseline_of(config: RunConfig, *overrides: str) -> str:
    """Return the hash of the full-rank run that a study of `config` gets."""
    return Baselines(Sweep(study="x", question="", runs=[config], fixed=list(overrides))).of(config).config_hash


def loaded(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found.update(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


def test_every_experiment_has_its_numbers_in_this_file() -> None:
    folder = REPOSITORY / "experiments"
    files = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert files == set(SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_has_the_setting_that_is_cited(name: str, method: str) -> None:
    setting, config = SETTINGS[name], composed(name, method)
    model = config.model
    assert config.method.name == method
    assert model.name == setting.model
    assert (model.hidden_size, model.intermediate_size, model.heads, model.layers) == setting.sizes
    assert config.tokens_per_step == setting.sequences * setting.length
    assert config.data.sequence_length_tokens == setting.length
    assert config.total_steps == setting.steps
    assert config.schedule.warmup_steps == setting.warmup
    assert config.schedule.min_lr_ratio == 0.1
    assert config.trainer.precision == setting.precision
    text = ("hub", 32100) if name in ON_C4 else ("tokens", 50304) if name in PAPER else ("stdlib", 2048)
    assert (config.data.name, config.data.vocab_size) == text
    assert isinstance(config.optimizer, AdamW)
    weight_decay = 0.01 if method == "cola" and name in GEOMETRY else setting.weight_decay
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.999, weight_decay)
    assert config.comparison_key == composed(name, "full").comparison_key


@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_the_budget_is_the_papers_budget_or_the_file_states_the_papers(name: str) -> None:
    setting = SETTINGS[name]
    assert setting.table_billion_tokens is not None
    tokens = setting.steps * setting.sequences * setting.length
    assert tokens / 1e9 / setting.table_billion_tokens == pytest.approx(setting.over_the_table, abs=0.005)
    stated = f"{setting.table_billion_tokens}B" in (REPOSITORY / "experiments" / f"{name}.yaml").read_text()
    assert stated or abs(setting.over_the_table - 1) < 0.01


@pytest.mark.parametrize("name", SETTINGS)
def test_an_experiment_holds_no_method_values(name: str) -> None:
    file = loaded(REPOSITORY / "experiments" / f"{name}.yaml")
    assert set(file) <= {"defaults", "model", "data", "schedule", "trainer", "published"}
    assert set(file["schedule"]) <= {"warmup_steps", "min_lr_ratio"}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_experiment_states_the_figures_of_its_paper(name: str) -> None:
    published = composed(name, "full").published
    assert published is not None
    if name not in GALORE_TABLE:
        assert published.source == SOURCES[name.removeprefix("paper/").rpartition("_")[0]]
        assert published.divisor == ("batches_plus_one" if name in GEOMETRY else "tokens")
        assert published.perplexity == {}
        return
    figures, micro_batch_sequences, gpus = GALORE_TABLE[name]
    assert published.source == "arXiv 2403.03507, table 2"
    assert (published.divisor, published.perplexity) == ("batches_plus_one", figures)
    assert (published.micro_batch_sequences, published.gpus) == (micro_batch_sequences, gpus)
    assert published.batches_per_gpu == pytest.approx(10e6 / (micro_batch_sequences * 215 * gpus), abs=0.7)


# ------------------------------------------------------------------------------------------------------------ presets


def test_every_method_has_a_preset_in_every_experiment() -> None:
    assert set(PRESET_FILES) == {f"{experiment}/{method}" for experiment in SETTINGS for method in METHODS}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESET_FILES)
def test_every_preset_is_applied_to_its_experiment_and_method(preset: str) -> None:
    experiment, _, method = preset.rpartition("/")
    assert experiment in SETTINGS
    assert method in METHODS
    values, with_preset = leaves(loaded(PRESETS / f"{preset}.yaml")), composed(experiment, method)
    assert values
    for key, value in values.items():
        assert functools.reduce(getattr, key.split("."), with_preset) == value, key
    without = default_of(method)
    differ = {key for key, value in values.items() if functools.reduce(getattr, key.split("."), without) != value}
    assert differ or preset in SAME_AS_THE_DEFAULT


@pytest.mark.parametrize(("name", "million"), RELORA_TRAINABLE_MILLION.items())
def test_relora_trains_as_many_parameters_as_in_its_paper(name: str, million: float) -> None:
    config = composed(name, "relora")
    assert isinstance(config.method, ReLoRA)
    assert (config.rank, config.method.alpha, config.schedule.restart_warmup_steps) == (128, 32, 100)
    trained = {method: composed(name, method).cost(32100) for method in ("relora", "lora", "control")}
    assert trained["relora"].trainable_parameters / 1e6 == pytest.approx(million, abs=0.005)
    assert trained["lora"].trainable_parameters == trained["relora"].trainable_parameters
    assert trained["control"].parameters / 1e6 == pytest.approx(million, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "interval", "pruning_ratio", "learning_rate", "warm_start_learning_rate"),
    [
        ("paper/relora_60m", 1000, 0.99, 1e-3, 1e-3),
        ("paper/relora_130m", 2000, 0.9, 1e-3, 1e-3),
        ("paper/relora_250m", 5000, 0.99, 1e-3, 5e-4),
        ("paper/relora_350m", 5000, 0.99, 1e-3, 5e-4),
        ("paper/relora_1b", 5000, 0.99, 4e-4, 2e-4),
    ],
)
def test_relora_has_its_papers_recipe(
    name: str,
    interval: int,
    pruning_ratio: float,
    learning_rate: float,
    warm_start_learning_rate: float,
) -> None:
    config = composed(name, "relora")
    assert isinstance(config.method, ReLoRA)
    assert config.reset_interval_steps == interval
    assert config.method.optimizer_reset.mode == "magnitude"
    assert config.method.optimizer_reset.pruning_ratio == pruning_ratio
    assert config.optimizer.learning_rate == learning_rate
    assert config.method.warm_start_steps == 5000
    assert config.warm_start_learning_rate == warm_start_learning_rate
    full = composed(name, "full")
    assert full.optimizer.learning_rate == warm_start_learning_rate
    assert baseline_of(config, f"experiments={name}", "method=relora") == full.config_hash


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), GALORE_RANKS.items())
def test_low_rank_methods_have_the_rank_of_the_galore_table(name: str, rank: int) -> None:
    runs = {method: composed(name, method) for method in METHODS}
    assert {run.rank for method, run in runs.items() if method not in ("full", "apollo_mini")} == {rank}
    assert runs["apollo_mini"].rank == 1
    assert {run.optimizer.max_grad_norm for run in runs.values()} == {None}
    assert runs["galore"].optimizer.learning_rate == 1e-2
    assert runs["relora"].method.warm_start_steps == 0
    assert runs["full"].config_hash == baseline_of(runs["galore"], f"experiments={name}")


@pytest.mark.parametrize(
    ("name", "rank", "interval", "pruning_ratio", "learning_rate"),
    [
        ("paper/geometry_60m", 128, 1000, 0.99, 1e-3),
        ("paper/geometry_130m", 256, 5000, 0.99, 1e-3),
        ("paper/geometry_350m", 256, 6000, 0.99, 5e-4),
        ("paper/relora_small_11m", 16, 2000, 0.999, 3e-4),
        ("paper/relora_small_66m", 16, 2000, 0.999, 3e-4),
    ],
)
def test_relora_has_the_recipe_of_its_rerun(
    name: str, rank: int, interval: int, pruning_ratio: float, learning_rate: float
) -> None:
    config = composed(name, "relora")
    assert isinstance(config.method, ReLoRA)
    reset = config.method.optimizer_reset
    assert (config.rank, config.method.alpha, config.method.dropout) == (rank, 32, 0.1)
    assert (config.reset_interval_steps, config.method.warm_start_steps) == (interval, 0)
    assert (reset.mode, reset.pruning_ratio, reset.moments) == ("random", pruning_ratio, "joint")
    assert config.optimizer.learning_rate == learning_rate
    assert config.model.kv_heads == (4 if name.startswith("paper/relora_small") else None)


def test_laptop_crossing_has_the_rates_of_the_probe() -> None:
    runs = {method: composed("laptop/crossing", method) for method in ("full", "lora", "relora")}
    assert {method: run.optimizer.learning_rate for method, run in runs.items()} == {
        "full": 2.5e-3,
        "lora": 5e-3,
        "relora": 5e-3,
    }
    assert {run.rank for run in runs.values() if isinstance(run.method, LoRA)} == {8}
    assert runs["relora"].clock.restarts_before(4000) == 7
    assert runs["relora"].clock.restarts_at(900)


# ------------------------------------------------------------------------------------------------------------- in use


@pytest.mark.slow
def test_the_ablation_of_the_paper_composes_in_its_setting() -> None:
    sweep = expand(["sweeps=paper_ablation", "experiments=paper/relora_130m"])
    assert len(sweep.runs) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_sweep_of_a_papers_table_has_its_arms(name: str) -> None:
    sweep = expand(["sweeps=paper_table", *in_setting(name)])
    assert [run.method.name for run in sweep.runs] == ["full", "lowrank", "lora", "relora", "galore"]
    assert sweep.study == "paper_table"
    for run in sweep.runs:
        assert run.published is not None
        assert run.published.differs == []
        assert run.config_hash == composed(name, run.method.name).config_hash


def test_the_command_line_can_choose_another_text_model_and_budget() -> None:
    config = composed(
        "paper/relora_250m",
        "relora",
        "model=llama_9m",
        "data.packing=packed",
        "trainer.total_tokens=6.8B",
        "method.rank=8",
    )
    assert config.model.name == "llama_9m"
    assert config.total_steps == 11_529
    assert config.clock.restarts_before(11_529) == 1
    assert config.clock.restarts_at(10_000)
    assert compose(["experiments=paper/relora_60m", "data=stdlib"]).data.name == "stdlib"


@pytest.mark.parametrize("name", ON_C4)
def test_a_paper_experiment_reads_c4_with_the_tokenizer_of_t5(name: str) -> None:
    config, setting = composed(name, "full"), SETTINGS[name]
    data = config.data
    assert isinstance(data, HubConfig)
    assert (data.dataset, data.config, data.split, data.validation_split) == ("allenai/c4", "en", "train", "auto")
    assert data.tokenizer == "t5-base"
    limit, documents = data.limit("limit_tokens"), setting.steps * setting.sequences
    assert limit is not None
    if name == "paper/relora_1b":
        assert data.packing == "packed"
        assert config.total_steps * config.tokens_per_step <= limit
    else:
        assert data.packing == "pad"
        assert 1.02 < limit / (430 * documents) < 1.1, "a document for each sequence"


@pytest.mark.slow
def test_without_a_network_there_is_one_message_before_torch_is_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "experiments=paper/relora_60m", f"runs_dir={tmp_path / 'runs'}", "tracker=jsonl"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
            "PYTHONPROFILEIMPORTTIME": "1",
        },
    )
    assert done.returncode == 1
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "relora.data.hub" in imported
    assert not {"torch", "datasets"} & imported, "imports that take seconds"
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    for part in ("data.dataset=allenai/c4", "cannot be reached", "data.dataset to a folder", "relora data prepare"):
        assert part in line
