"""Any arguments of run.py give a valid run or one clear line, in bounded time.

    FUZZ_EXAMPLES=20000 pytest tests/config/test_fuzz.py

searches longer, with other values each time.
"""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora.common.errors import ConfigError
from relora.config import choices
from relora.config.cluster import CLUSTERS, LocalConfig
from relora.config.compose import Composer, cluster_with, compose
from relora.config.frozen import freeze, thaw
from relora.config.run import RunConfig
from relora.methods.registry import METHODS
from relora.optimizers.registry import OPTIMIZERS
from relora.studies.sweeps import expand, search
from relora.tracking.mirror import parameters

pytestmark = pytest.mark.slow


T = TypeVar("T")

LONGEST_MESSAGE = 300
LONGEST_SECONDS = 120
"""The time limit of one composition, for a busy machine. A composition usually takes 0.1 s."""
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

GROUPS = sorted(choices.groups())
WITH_CHOICES = {
    "cluster": ["cluster=slurm"],
    "method.update_interval_steps": ["method=galore"],
    "method.scale": ["method=galore"],
    "method.square_side": ["method=galore"],
    "method.growth_limit": ["method=fira"],
    "method.restart_interval_steps": ["method=lowrank"],
    "method.density": ["method=sltrain"],
    "optimizer.momentum": ["optimizer=muon"],
    "optimizer.newton_schulz_steps": ["optimizer=muon"],
}
"""The choice of a group that has a key which the default choice lacks."""


def fields_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a dataclass."""
    for item in dataclasses.fields(kind):
        yield prefix + item.name


SCHEMA = [
    *(f"method.{name}" for kind in METHODS.built_in.values() for name in fields_of(kind)),
    *(f"optimizer.{name}" for kind in OPTIMIZERS.built_in.values() for name in fields_of(kind)),
    *(f"cluster.{name}" for kind in CLUSTERS.values() for name in fields_of(kind)),
]
FREE = [
    "cluster.options.constraint",
    "cluster.options.mail-type",
    "hydra.sweeper.params.x",
    "hydra.verbose",
    "optimizer.lr",
    "a.b.c",
    "=",
    "",
]
KEYS = sorted({*choices.known_keys(), *SCHEMA, *GROUPS, *FREE, "runs_dir", "study"})

PLAIN = [
    *("-1", "0", "1", "7", "1.5", "-0.0", "1e30", "1e-30", "1000000000000", "9" * 20, "9" * 400, "9" * 5000),
    *("inf", "-inf", "nan", "true", "false", "null", "0x10", "1_000", "1e", "2020-01-01", "1e5", "'1e5'", "'null'"),
    *("", "''", '""', " ", "???", "'???'", "[]", "[a,b]", "[[[]]]", "{}", "{a: 1}", "{a: {b: [1]}}", "[1", "{a"),
    *("a b", "a=b", "a:b", "a|b", "~/x", "~", "/", "/dev/null", "../../x", "a/b", "a[1]", "a(1)", "<b>x</b>", "gpt2"),
    *("\u00e4", "\u30c6\u30ad\u30b9\u30c8", "\u202e", "\udc80", "'\u2028'", '"a\nb"', "'\0'", "'\x1b[31m'", "'\x85'"),
    *("x" * 256, "x" * 5000, "[" * 500, "\\", "'", '"', "%", "#", "!", "@", "*", "-", "--help"),
    *("${foo}", "${trainer.seed}", "${oc.env:NO_SUCH_VARIABLE}", "${runs_dir}", "${", "${${a}}", "$x", "${a,b}"),
    *("int(x)", "float(1)", "str(1)", "bool(3)", "json_str(1)", "sort(3,1)", "f(x)"),
]
SWEPT = [
    *("a,b", "8,16", "8,,16", ",", "choice(1,2)", "choice()", "choice(8)", "shuffle(1,2)", "sort(8,a)", "tag(x,1)"),
    *("range(1,3)", "range(0,1e12)", "range(1,3,0)", "range(1e308,inf)", "range(3)", "range(5,1)"),
    *("interval(1,2)", "interval(2,1)", "interval(1)", "glob(*)", "glob([a,b])", "glob(llama_*)", "glob()"),
    *("[q_proj],[v_proj]", "null,1", "true,false", "???,1"),
]

values = st.one_of(
    st.sampled_from(PLAIN),
    st.sampled_from(PLAIN),
    st.sampled_from(SWEPT),
    st.integers(-(10**6), 10**20).map(str),
    st.floats().map(str),
    st.text(st.characters(), max_size=20),
)
marks = st.sampled_from(["", "", "", "", "+", "++", "~"])
overrides = st.tuples(marks, st.sampled_from(KEYS), values).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")
COMPOSER = Composer()


def examples(usual: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try the same `usual` examples in every run of the suite. FUZZ_EXAMPLES tries other examples each time."""
    return settings(
        max_examples=EXAMPLES or usual,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes longer than LONGEST_SECONDS."""

    def late(*_: object) -> None:
        pytest.fail(f"took more than {LONGEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(action: Callable[[], T]) -> T | None:
    """Return the result of `action`, or None if it raises one clear line. Any other exception is a failure."""
    try:
        with bounded():
            return action()
    except ConfigError as error:
        message = str(error)
        assert message.strip()
        assert message.isprintable(), message
        assert len(message) <= LONGEST_MESSAGE, (len(message), message)
        return None


def hold(config: RunConfig, folder: Path) -> None:
    """Check that a valid run is equal after freeze and thaw, and that its cost and parameters can be computed."""
    with bounded():
        file = folder / "run" / "config.yaml"
        freeze(config, file)
        again = thaw(file)
        assert again == config
        assert again.identity == config.identity
        assert again.name == config.name
        assert config.cost(config.model.vocab_size or config.data.vocab_size).parameters > 0
        assert parameters(config)


def group_of(override: str) -> list[str]:
    key = override.partition("=")[0].lstrip("+~")
    return WITH_CHOICES.get(key) or WITH_CHOICES.get(key.partition(".")[0] if "." in key else key, [])


@examples(170)
@given(override=overrides)
def test_an_odd_value_is_a_valid_run_or_one_clear_line(override: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = outcome(lambda: COMPOSER.compose([*group_of(override), override]))
    if config is not None:
        hold(config, tmp_path_factory.getbasetemp())


@examples(25)
@given(chosen=st.lists(overrides, min_size=2, max_size=4))
def test_several_odd_values_are_a_valid_run_or_one_clear_line(
    chosen: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = outcome(lambda: compose([*(text for one in chosen[:1] for text in group_of(one)), *chosen]))
    if config is not None:
        hold(config, tmp_path_factory.getbasetemp())


@examples(40)
@given(
    key=st.sampled_from(KEYS),
    value=st.one_of(st.sampled_from(SWEPT), st.sampled_from(SWEPT), st.sampled_from(PLAIN)),
    rest=st.sampled_from([["method.rank=8,16"], ["sweeps=methods"], ["sweeps=tune_learning_rate"], ["study=x"], []]),
)
def test_a_sweep_of_odd_values_is_runs_or_one_clear_line(key: str, value: str, rest: list[str]) -> None:
    given_here = [f"{key}={value}", *rest]
    found = outcome(lambda: search(given_here) or expand(given_here))
    assert found is None or found.study


@examples(60)
@given(key=st.sampled_from([key for key in KEYS if key.startswith("cluster")]), value=values)
def test_an_odd_setting_of_a_retry_is_a_cluster_or_one_clear_line(key: str, value: str) -> None:
    before = dataclasses.asdict(LocalConfig(name="local"))
    outcome(lambda: cluster_with(before, ["cluster=slurm", f"{key}={value}"]))


@pytest.mark.parametrize(
    "sizes",
    [
        ["model.layers=1000000000000"],
        ["model.layers=1000", "model.hidden_size=65536", "model.heads=1024", "method=control"],
        ["model.layers=1000", "model.hidden_size=65536", "model.heads=1", "method=control"],
        ["model.layers=1000", "method.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"],
        ["trainer.sequences_per_step=1000000007"],
        ["trainer.sequences_per_step=1048573", "trainer.sequences_per_micro_step=1048572"],
        ["trainer.total_steps=1000000000000"],
        ["trainer.total_tokens=1e18"],
        ["method.reset_interval_steps=1", "schedule.warmup_steps=1", "schedule.restart_warmup_steps=1"],
    ],
)
def test_large_sizes_are_checked_in_bounded_time(sizes: list[str], tmp_path: Path) -> None:
    config = outcome(lambda: compose(sizes))
    if config is not None:
        hold(config, tmp_path)
