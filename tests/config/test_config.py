import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small import REPOSITORY, TINY

from relora.cli import main as cli
from relora.common.checks import parse_count
from relora.common.errors import ConfigError
from relora.config.cluster import SlurmConfig
from relora.config.compose import Composer, compose
from relora.config.frozen import freeze, thaw
from relora.studies.sweeps import expand

WRONG = [
    (["method.rank=600"], "rank=600 ...=128 of model.layers.0.self_attn.q_proj ... lower method.rank"),
    (["method.rnak=3"], "unknown key method.rnak ... method.rank?"),
    (["+method.rnak=3"], "unknown key method.rnak ... method.rank?"),
    (["method=full", "method.rank=8"], "unknown key method.rank ... choice of method"),
    (["nonsense=1"], "unknown key nonsense"),
    (
        ["model=llama_13b"],
        "model=llama_13b does not exist ... model= one of llama_130m, llama_1b",
    ),
    (["method"], "'method' is not ... key=value"),
    (["method.rank=abc"], "method.rank: ... 'abc' ... Integer"),
    (["method.rank=0"], "method.rank=0 ... at least 1"),
    (["method.alpha=0"], "method.alpha=0.0 must be positive"),
    (["method.reset_interval_steps=0"], "method.reset_interval_steps=0 ... at least 1 (null: no restarts)"),
    (["method.reset_interval_steps=-5"], "method.reset_interval_steps=-5 ... at least 1 (null: no restarts)"),
    (
        ["method=lowrank", "method.restart_interval_steps=0"],
        "method.restart_interval_steps=0 ... at least 1 (null: no restarts)",
    ),
    (
        ["method=lowrank", "method.restart_interval_steps=601"],
        "method.restart_interval_steps=601 ... the 600 steps ... lower it",
    ),
    (
        ["method=lowrank", "method.restart_interval_steps=99"],
        "the last restart ... 594 ... leaves 6 steps ... method.restart_interval_steps=99",
    ),
    (["method=sltrain", "method.density=0"], "method.density=0.0 must be positive"),
    (["method=sltrain", "method.density=1.5"], "method.density=1.5 must be at most 1: ... share"),
    (["method.reset_interval_steps=501"], "method.reset_interval_steps=501 ... the 500 steps ... lower it"),
    (
        ["trainer.total_steps=100"],
        "method.warm_start_steps=100 leaves no step ... lower it or raise trainer.total_steps",
    ),
    (
        ["schedule.warmup_steps=600"],
        "schedule.warmup_steps=600 ... the 500 steps ... lower it or raise trainer.total_steps",
    ),
    (
        ["schedule.warmup_steps=150"],
        "schedule.warmup_steps=150 ... method.reset_interval_steps=100 ... lower schedule.warmup_steps",
    ),
    (
        ["schedule.restart_warmup_steps=101"],
        "schedule.restart_warmup_steps=101 ... lower schedule.restart_warmup_steps",
    ),
    (
        ["method.reset_interval_steps=99"],
        "the last restart ... 595 ... leaves 5 steps ... method.reset_interval_steps=99",
    ),
    (["method.optimizer_reset.mode=some"], "method.optimizer_reset.mode=some ... one of none, zero, random, magn"),
    (["method.optimizer_reset.pruning_ratio=1.5"], "method.optimizer_reset.pruning_ratio=1.5 ... between 0 and 1"),
    (
        ["method.target_modules=[proj]"],
        "method.target_modules: 'proj' matches no ... the model has down_proj",
    ),
    (["method.target_modules=[]"], "method.target_modules is empty"),
    (["trainer.sequences_per_micro_step=5"], "trainer.sequences_per_micro_step=5 does not divide"),
    (
        ["trainer.update_in_backward=true"],
        "trainer.update_in_backward=true cannot clip ... set optimizer.max_grad_norm=null",
    ),
    (
        ["trainer.update_in_backward=true", "optimizer.max_grad_norm=null", "trainer.sequences_per_micro_step=4"],
        "all 16 sequences ... not trainer.sequences_per_micro_step=4 ... set it to null",
    ),
    (
        ["trainer.update_in_backward=true", "optimizer.max_grad_norm=null", "cluster=slurm", "cluster.nodes=2"],
        "trainer.update_in_backward=true ... only with one process ... cluster.nodes=1",
    ),
    (["trainer.total_steps=null"], "no budget; set trainer.total_steps or trainer.total_tokens"),
    (["trainer.total_steps=1e3"], "trainer.total_steps: ... '1000.0' ... Integer"),
    (["trainer.total_tokens=1.5X"], "trainer.total_tokens=1.5X is not a count"),
    (["trainer.device=tpu"], "trainer.device=tpu ... one of auto, cpu, cuda, cuda:N"),
    (["trainer.precision=fp8"], "trainer.precision=fp8 ... one of fp32, bf16_autocast, bf16"),
    (["optimizer.learning_rate=-1"], "optimizer.learning_rate=-1.0 must be positive"),
    (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan must be positive"),
    (["model.heads=3"], "model.hidden_size=128 ... even multiple of model.heads=3"),
    (["model.kv_heads=3"], "model.heads=4 ... multiple of model.kv_heads=3"),
    (["model.kv_heads=0"], "model.kv_heads=0 ... at least 1"),
    (["model.kv_heads=8"], "model.heads=4 ... multiple of model.kv_heads=8"),
    (["model.vocab_size=100"], "model.vocab_size=100 ... below data.vocab_size=2048"),
    (["data.sequence_length_tokens=2048"], "data.sequence_length_tokens=2048 exceeds model.max_position_embeddings"),
    (["data.packing=padded"], "data.packing=padded ... one of packed, pad"),
    (
        ["data.packing=pad", "data.attend_across_documents=false"],
        "data.attend_across_documents=false has no meaning with data.packing=pad ... set it to true",
    ),
    (
        ["data.packing=pad", "trainer.total_tokens=1.5M"],
        "trainer.total_tokens=1.5M is no budget with data.packing=pad ... set trainer.total_steps",
    ),
    (["data=text"], "data=text needs data.path=FILE_OR_FOLDER"),
    (["data=text", "data.path=/no/such"], "data.path=/no/such does not exist"),
    (["data=text", "data.path=.git"], "data.path= ... .git contains no text; ... .txt"),
    (["data.path=x"], "data.path=x has no meaning ... use data=text"),
    (["data.tokenizer=/no/such"], "data.tokenizer=/no/such has no tokenizer.json"),
    (["tracker.uri=mlruns"], "tracker.uri=mlruns is not a store ... sqlite:///FILE, http://HOST:PORT"),
    (["data=text", "data.path=${foo}"], "data.path: Interpolation key 'foo' not found"),
    (["method=null"], "method=null is not a choice ... leave method out ... method= one of apollo, apollo_mini"),
    (["model=null"], "model=null is not a choice ... leave model out ... model= one of llama_130m"),
    (
        ["experiments=null"],
        "experiments=null is not a choice ... leave experiments out ... experiments= one of laptop/",
    ),
    (["experiments="], "experiments= is not a choice"),
    (["+tune=3"], "unknown key tune; ... sweeps/ file"),
    (["+grids=3"], "unknown key grids; ... sweeps/ file"),
    (["model.name=a/b"], "model.name=a/b may contain only letters, digits"),
    (["runs_dir="], "runs_dir= is empty; name a folder"),
    (["study='a b'"], "study=a b ... only letters, digits"),
    (["study=../x"], "study=../x may contain only letters, digits"),
    ([f"study={'x' * 300}"], "study=xxx ... has 300 characters ... at most 100"),
    ([f"runs_dir=/tmp/{'x' * 300}"], "is too long ... 255 bytes ... use a shorter path"),
    (["model.name=gpt2"], "model.name=gpt2 names another architecture ... use another name"),
    (["model=5"], "model=5 is not a choice"),
    (["trainer=true"], "trainer=true does not exist ... trainer= one of default"),
    (["sweeps=1e30"], "sweeps=1e30 is not a choice"),
    (["~data"], "~data: ... cannot be deleted ... set data= another value"),
    (["method.name=[full]"], "method.name=['full'] ... one of full, lora"),
    (["cluster.name={a: 1}"], "cluster.name={'a': 1} ... one of local, debug, slurm"),
    (["optimizer.lr=1"], "unknown key optimizer.lr ... optimizer.learning_rate?"),
    (["data.seq_len=64"], "unknown key data.seq_len ... data.sequence_length_tokens?"),
    (["cluster.options.constraint=a100"], "unknown key cluster.options ... choice of cluster"),
    (["trainer.seed=???"], "trainer.seed=??? is not a value"),
    (["trainer.seed=99999999999999999999"], "trainer.seed=99999999999999999999 ... at most 9,223,372,036,854,775,807"),
    (["trainer.seed=1,2"], "trainer.seed=1,2 has several values ... python run.py -m"),
    (["data=text", "data.path="], "data=text needs data.path=FILE_OR_FOLDER"),
    (["data.path="], "data.path= is empty"),
    (["data.tokenizer=''"], "data.tokenizer= is empty"),
    (
        ["optimizer.weight_decay=inf"],
        "optimizer.weight_decay=inf ... optimizer.learning_rate=0.01 ... at most 1 ... lower one",
    ),
    (["optimizer.epsilon=1e30"], "optimizer.epsilon=1e+30 must be at most 1"),
    (["model.rms_norm_eps=1e30"], "model.rms_norm_eps=1e+30 must be at most 1"),
    (["method.alpha=1e30"], "method.alpha=1e+30 must be at most"),
    (["model.vocab_size=1000000000000"], "model.vocab_size=1000000000000 must be at most 16,777,216"),
    (["model.layers=1000000000000"], "model.layers=1000000000000 must be at most 1,000"),
    (
        ["trainer.sequences_per_step=1000000000000000000000"],
        "trainer.sequences_per_step=1000000000000000000000 ... at most 1,048,576",
    ),
    (["trainer.total_tokens=1e30"], "trainer.total_tokens=1e+30 must be at most"),
    (["cluster=slurm", "runs_dir=100%j"], "100%j contains % ... use a folder without %"),
    (["cluster=slurm", "cluster.mem_gb=0.00001"], "cluster.mem_gb=1e-05 ... --mem=0 ... set the gigabytes"),
    (
        ["cluster=slurm", 'cluster.partition="a\n#SBATCH --uid=0"'],
        "cluster.partition=a\\n#SBATCH --uid=0 contains the control",
    ),
    (["cluster=slurm", 'cluster.setup=["module load x\rrm"]'], "cluster.setup=module load x\\rrm contains the control"),
    (["cluster=slurm", "cluster.options={a b: 1}"], "cluster.options: a b ... not an option of sbatch"),
    (
        ["cluster=slurm", "cluster.options={constraint: [1]}"],
        "cluster.options.constraint=[1] ... must be text, a number",
    ),
    (["tracker.experiment='a\x1b[31m'"], "tracker.experiment=a\\x1b[31m contains the control character"),
]
"""Wrong overrides, and parts of their message in order: "..." is any text between two parts."""


def pattern(message: str) -> str:
    """Return a regular expression for the parts of a message."""
    return ".*".join(re.escape(part.strip()) for part in message.split("..."))


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_a_wrong_option_is_one_clear_message(overrides: list[str], message: str, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert re.search(pattern(message), str(caught.value))
    assert "\n" not in str(caught.value)


ODD_PATHS = [
    "tex ts",
    "lr=1",
    "\u65e5\u672c\u8a9e",
    "a[1]",
    "b(2)",
    "c{d}",
    'it\'s "x"',
    "123",
    "a:b",
    "100%",
    "#1",
    "null2",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_PATHS)
def test_an_ordinary_path_needs_no_quotes(name: str, tmp_path: Path, monkeypatch) -> None:
    for folder in (tmp_path / name, tmp_path / "home" / name):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for written, meant in ((f"{tmp_path}/{name}", tmp_path), (name, tmp_path), (f"~/{name}", tmp_path / "home")):
        override = f"data.path={written}"
        assert compose(["data=text", override]).data.path == str(meant / name)
        found = expand(["data=text", override, "method.rank=8,16"])
        assert [run.data.path for run in found.runs] == [str(meant / name)] * 2
        assert compose([f"runs_dir={written}"]).runs_dir == str(meant / name)


@pytest.mark.slow
def test_paths_with_commas_between_them_are_a_sweep(tmp_path: Path) -> None:
    paths = [tmp_path / "lr=1", tmp_path / "a[1]"]
    for path in paths:
        path.mkdir()
        (path / "a.txt").write_text("text")
    found = expand(["data=text", f"data.path={paths[0]},{paths[1]}", "study=x"])
    assert [run.data.path for run in found.runs] == list(map(str, paths))


@pytest.mark.slow
def test_run_py_accepts_ordinary_paths_and_reports_an_error_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1 \u65e5\u672c"
    folder.mkdir()
    (folder / "a.txt").write_text("text")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "run.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    shown = run("--cfg", "job", "data=text", f"data.path={folder}")
    assert shown.returncode == 0
    assert yaml.safe_load(shown.stdout)["data"]["path"] == str(folder)
    for words, message in (
        (
            ["-m", "data=text", f"data.path={folder}", "method.rank=600,700"],
            "rank=600 exceeds ...=128 ... lower method.rank",
        ),
        (["-m", "--cfg", "job", "method.rank=8,16"], "-m starts a sweep ... --cfg ... leave out one"),
        (["-m", "method.rank=interval(1,2)"], "method.rank=interval(1,2) ... infinite number of values ... key=a,b,c"),
        (["-m", "hydra.sweeper.params.x=8,16"], "hydra.sweeper.params.x=8,16 ... setting of Hydra ... key=a,b,c"),
        (["--cfg", "job", "method.rnak=3"], "unknown key method.rnak ... method.rank?"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ):
        done = run(*words)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert re.search(pattern(message), done.stderr)
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_glob_sweeps_the_choices_of_a_group() -> None:
    found = expand(["model=glob(llama_1*)", "method=full"])
    assert [run.model.name for run in found.runs] == ["llama_130m", "llama_1b"]


def test_a_free_option_of_sbatch_needs_no_plus() -> None:
    cluster = compose(["cluster=slurm", "cluster.options.constraint=a100"]).cluster
    assert isinstance(cluster, SlurmConfig)
    assert cluster.options == {"constraint": "a100"}


@pytest.mark.parametrize("study", ["1e5", "2020-01-01", "null", "true", "0x10"])
def test_text_that_yaml_may_read_as_another_type_is_frozen_as_text(study: str, tmp_path: Path) -> None:
    config = compose([f"study='{study}'"])
    freeze(config, tmp_path / "run" / "config.yaml")
    assert thaw(tmp_path / "run" / "config.yaml").study == study


@pytest.mark.slow
def test_a_wrong_option_gives_code_2_without_importing_torch_or_making_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from relora.cli.main import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'mlflow', 'datasets', 'submitit'} & set(sys.modules);"
        "print(heavy, file=sys.stderr) if heavy else None; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "method.rank=600", f"runs_dir={tmp_path / 'runs'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("relora: rank=600 exceeds")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", ["9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "7b", "tiny"])
@pytest.mark.parametrize("method", ["full", "lora", "relora"])
def test_every_choice_of_a_group_composes(model: str, method: str) -> None:
    config = compose([f"model=llama_{model}", f"method={method}"])
    assert config.model.name == f"llama_{model}"
    assert config.method.name == method


@pytest.mark.parametrize("overrides", [[], ["method=full"], ["method=lora", "tracker=jsonl"], list(TINY)])
def test_a_frozen_config_thaws_to_itself(tmp_path: Path, overrides: list[str]) -> None:
    config = compose(overrides)
    freeze(config, tmp_path / "run" / "config.yaml")
    assert thaw(tmp_path / "run" / "config.yaml") == config


def test_full_rank_has_no_rank() -> None:
    assert not hasattr(compose(["method=full"]).method, "rank")


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "override",
    [
        "trainer.device=cpu",
        "trainer.sequences_per_micro_step=4",
        "trainer.checkpoint_interval_steps=7",
        "trainer.validation_interval_steps=7",
        "trainer.log_interval_steps=3",
        "runs_dir=/elsewhere",
        "study=mine",
        "tracker=jsonl",
        "tracker.uri=http://headnode:5000",
        "trainer.total_tokens=1228800",
        "method.alpha=8",
    ],
)
def test_a_value_that_does_not_change_the_mathematics_does_not_change_the_hash(override: str) -> None:
    assert compose([override]).config_hash == compose([]).config_hash


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "trainer.seed=1",
        "trainer.precision=bf16",
        "trainer.total_steps=700",
        "trainer.sequences_per_step=32",
        "method.rank=16",
        "method.alpha=16",
        "method.reset_interval_steps=50",
        "method.optimizer_reset.mode=zero",
        "method.optimizer_reset.moments=independent",
        "method.optimizer_reset.reset_step=false",
        "method.warm_start_steps=0",
        "method.target_modules=[q_proj]",
        "schedule.restart_warmup_steps=5",
        "schedule.min_lr_ratio=0",
        "optimizer.learning_rate=1e-4",
        "optimizer.embedding_learning_rate=1e-4",
        "data.sequence_length_tokens=64",
        "data.vocab_size=1000",
        "model.layers=2",
    ],
)
def test_a_value_that_changes_the_mathematics_changes_the_hash(override: str) -> None:
    assert compose([override]).config_hash != compose([]).config_hash


@pytest.mark.slow
def test_a_text_source_is_identified_by_its_absolute_path(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    relative = ["data=text", "data.path=a.txt"]
    monkeypatch.chdir(tmp_path)
    assert compose(relative).config_hash == compose(["data=text", f"data.path={tmp_path / 'a.txt'}"]).config_hash
    assert compose(relative).config_hash != compose([]).config_hash


@pytest.mark.slow
def test_comparable_runs_share_a_key_and_seeds_share_a_variant() -> None:
    relora, full, other = compose([]), compose(["method=full"]), compose(["trainer.total_steps=700"])
    assert relora.comparison_key == full.comparison_key != other.comparison_key
    assert compose(["trainer.seed=1"]).comparison_key == relora.comparison_key
    assert compose(["trainer.seed=1"]).variant == relora.variant != full.variant
    assert compose(["trainer.seed=1"]).name != relora.name


def test_the_name_of_the_run_folder_has_model_method_rank_and_hash() -> None:
    config = compose(["runs_dir=/somewhere"])
    assert str(config.run_dir) == f"/somewhere/llama_tiny-relora-r32-{config.config_hash}"


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5B", 1_500_000_000), ("200k", 200_000), ("3M", 3_000_000), ("1e6", 10**6), (4096, 4096), ("2_048", 2048)],
)
def test_counts_are_parsed(text: str | int, count: int) -> None:
    assert parse_count("x", text) == count


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "1.5", "0.0001k", "1.5X", None, True])
def test_a_value_that_is_no_count_is_refused(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_count("x", text)  # type: ignore[arg-type]


FULL = compose(["method=full", "trainer.total_tokens=1.5B"])


@pytest.mark.slow
@given(steps=st.integers(1, 10**6), sequences=st.integers(1, 2048), spare=st.integers(0, 10**6))
def test_a_token_budget_is_rounded_up_to_whole_steps(steps: int, sequences: int, spare: int) -> None:
    config = FULL
    config.trainer.sequences_per_step = sequences
    per_step = config.tokens_per_step
    config.trainer.total_tokens = str(steps * per_step - spare % per_step)
    assert config.total_steps == steps


def test_steps_on_the_command_line_replace_the_budget_of_an_experiment(
    text: Path, capsys, monkeypatch, tmp_path
) -> None:
    own = ["experiments=paper/relora_1b", "method=full"]
    assert compose(own).total_steps == 23_499
    assert compose([*own, "trainer.total_steps=6000"]).total_steps == 6000
    assert compose([*own, "trainer.total_steps=6000", "trainer.total_tokens=9.8304B"]).total_steps == 10_000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert cli.run([*own, "trainer.total_steps=6000", "--cfg", "job"]) == 0
    assert "total_tokens: null" in capsys.readouterr().out


def test_a_token_budget_has_priority_over_a_step_budget() -> None:
    assert compose(["trainer.total_tokens=2.048M"]).total_steps == 1000


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.rank=8", "trainer.seed=3", "study=x"],
        ["method=full", "experiments=laptop/small", "optimizer.learning_rate=1e-3", "runs_dir=/tmp/elsewhere"],
        ["experiments=laptop/small", "method=lora", "method.target_modules=[q_proj,v_proj]", "method.alpha=null"],
        ["sweeps=methods", "method=galore", "model=llama_9m", "trainer.total_tokens=1.5M"],
        ["cluster=slurm", "+cluster.options.constraint=a100", "cluster.setup=[module load x]"],
        ["trainer.total_steps=500", "trainer.precision=bf16", "method.optimizer_reset.reset_step=false"],
        ["tracker.uri=sqlite:///${runs_dir}/x.db"],
    ],
)
def test_runs_of_a_reused_composer_are_equal_to_what_hydra_composes(overrides: list[str]) -> None:
    composer = Composer()
    composer.compose([text for text in overrides if text.startswith(("experiments=", "method=", "model=", "cluster="))])
    made = composer.compose(overrides)
    assert made == compose(overrides)
    assert made.name == compose(overrides).name


@pytest.mark.parametrize("wrong", ["method.rnk=8", "method.rank=abc", "method.rank=600", "trainer.seed=-1"])
def test_a_wrong_value_has_the_same_message_from_compose_and_from_a_composer(wrong: str) -> None:
    with pytest.raises(ConfigError) as alone:
        compose([wrong])
    with pytest.raises(ConfigError, match=re.escape(str(alone.value))):
        Composer().compose([wrong])


# ------------------------------------------------------------------------------------------------------- validations


@pytest.mark.parametrize(
    ("total_steps", "given", "interval"), [(600, 100, 100), (100, 100, 100), (99, 100, 9), (80, 100, 8), (7, 100, 1)]
)
def test_a_validation_interval_longer_than_the_run_is_adapted_and_reported(
    total_steps: int, given: int, interval: int
) -> None:
    overrides = ["method=full", "schedule.warmup_steps=1", f"trainer.total_steps={total_steps}"]
    config = compose([*overrides, f"trainer.validation_interval_steps={given}"])
    assert config.validation_interval_steps == interval
    parts = [
        f"trainer.validation_interval_steps={given}",
        f"the run's {total_steps} steps",
        f"every {interval} steps",
    ]
    assert len(config.remarks) == (interval != given)
    assert all(part in remark for remark in config.remarks for part in parts)
