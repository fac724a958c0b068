"""The record of seconds for each machine and switch, and the comparisons that the record permits."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from lab import FULL, RELORA, Lab
from trainers import config_of, stop_after, trainer_of
from warm_starts import OTHERS, setting, trained
from warm_starts import RELORA as ARM

from relora.common.errors import Interrupted
from relora.config.compose import compose
from relora.runs import checkpoint
from relora.runs.rundir import RunDir
from relora.runs.spent import CHOSEN, MICRO_STEP, conditions, differences, spend
from relora.studies.gaps import Compared
from relora.studies.report import answer, write_report
from relora.training.job import launch

ONE = {"host": "one", "device": "cpu", "cpu": "x", "torch": "2.12", "threads": 2, "ranks": 1, "trainer.compile": False}


def entry(seconds: float = 100.0, **changes: Any) -> dict[str, Any]:
    names = {"compile": "trainer.compile", "merged": "method.merged_weight"}
    return {**ONE, **{names.get(name, name): value for name, value in changes.items()}, "seconds": seconds}


# ------------------------------------------------------------------------------------------------------- the record


def test_seconds_are_added_up_under_equal_conditions() -> None:
    record: list[dict[str, Any]] = []
    for host, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        spend(record, {"host": host}, seconds)
    assert record == [{"host": "a", "seconds": 5.0}, {"host": "b", "seconds": 2.0}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch",
    [
        "trainer.compile=true",
        "trainer.activation_checkpointing=true",
        "trainer.sequences_per_micro_step=2",
        "method.merged_weight=rebuilt",
    ],
)
def test_every_switch_of_speed_is_a_condition(switch: str) -> None:
    """None of them changes the run's identity: a finished run with another value is used."""
    found = []
    for config in (config_of(), config_of(switch)):
        size = config.trainer.sequences_per_micro_step or config.trainer.sequences_per_step
        found.append(conditions(config, {"host": "a"}, sequences_per_micro_step=size, warm_start=False))
    assert config_of().config_hash == config_of(switch).config_hash
    assert differences([{**found[0], "seconds": 1.0}], [{**found[1], "seconds": 1.0}]).startswith("other switches")


@pytest.mark.slow
def test_a_checkpoint_keeps_the_seconds_of_each_attempt_with_its_machine_and_switches(tmp_path: Path) -> None:
    every = ("trainer.checkpoint_interval_steps=2",)
    with pytest.raises(Interrupted):
        trainer_of(config_of(*every), tmp_path, stop=stop_after(6), machine={"host": "a"}).train()
    kept = checkpoint.load_latest(tmp_path / "checkpoints", print)["counters"]  # type: ignore[index]
    changed = config_of(*every, "trainer.activation_checkpointing=true", "trainer.sequences_per_micro_step=2")
    trainer = trainer_of(changed, tmp_path, machine={"host": "b"})
    trainer.train()
    record = trainer.counters.spent
    assert sum(spent["seconds"] for spent in record) == pytest.approx(trainer.counters.training_seconds)
    on = {host: [spent for spent in record if spent["host"] == host] for host in "ab"}
    assert sum(spent["seconds"] for spent in on["a"]) == kept["training_seconds"]
    assert {spent["trainer.activation_checkpointing"] for spent in on["a"]} == {False}
    assert [spent["trainer.sequences_per_micro_step"] for spent in on["b"]] == [2]
    # In the three steps of the warm start the method's switch does nothing.
    assert ["method.merged_weight" in spent for spent in on["a"]] == [False, True]


@pytest.mark.slow
def test_an_old_checkpoint_without_the_record_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer_of(config_of(), tmp_path, stop=stop_after(6)).train()
    state = checkpoint.load_latest(tmp_path / "checkpoints", print)
    assert state is not None
    del state["counters"]["spent"]
    checkpoint.save(tmp_path / "checkpoints", state["step"], state)
    trainer = trainer_of(config_of(), tmp_path)
    trainer.train()
    assert 0 < sum(spent["seconds"] for spent in trainer.counters.spent) < trainer.counters.training_seconds


@pytest.mark.slow
def test_a_forked_warm_start_has_the_record_of_the_run_that_trained_it(tiny: list[str]) -> None:
    slow = [*setting(tiny, *ARM), "trainer.activation_checkpointing=true"]
    assert launch(compose(slow), slow).state == "finished"
    forked = trained(setting(tiny, *OTHERS[0]))
    status = RunDir(forked.path).status
    assert status is not None
    switches = [(spent["trainer.activation_checkpointing"], "method.merged_weight" in spent) for spent in status.spent]
    assert switches == [(True, False), (False, True)]
    assert all(spent["host"] == status.host and spent["device"] == "cpu" and spent["cpu"] for spent in status.spent)
    assert sum(spent["seconds"] for spent in status.spent) == pytest.approx(status.summary["training_seconds"])


# -------------------------------------------------------------------------------------------------------- comparisons


def test_micro_steps_that_were_chosen_to_fit_do_not_prevent_a_comparison_of_seconds() -> None:
    """They follow from the memory that a method needs, so they are a part of its speed. Peak memory follows them."""
    small, large, given = ({**entry(), MICRO_STEP: size} for size in (8, 16, 16))
    small, large = ({**each, CHOSEN: True} for each in (small, large))
    assert differences([small], [large]) == ""
    assert differences([small], [large], memory=True) == f"other switches ({MICRO_STEP} 8 against 16)"
    assert differences([small], [given]) == f"other switches ({MICRO_STEP} 8 against 16)"
    assert differences([large], [given]) == ""


@pytest.mark.parametrize(
    ("one", "other", "speed", "memory"),
    [
        ([entry()], [entry()], "", ""),
        ([entry()], [entry(host="two")], "machine or device .*host one against two", ""),
        ([entry()], [entry(threads=1)], "machine or device .*threads 2 against 1", ""),
        ([entry()], [entry(device="H100")], "device cpu against H100", "device cpu against H100"),
        ([entry()], [entry(compile=True)], r"other switches .*trainer\.compile False against True", "other switches"),
        (
            [entry(merged="never")],
            [entry(merged="resident")],
            r"other switches .*method\.merged_weight",
            "other switches",
        ),
        ([entry(merged="never")], [entry()], "", ""),
        ([entry(), entry(host="two")], [entry()], "host two against one", ""),
        ([entry(), entry(0.5, host="two")], [entry()], "", ""),
        ([{"host": "one", "device": "cpu", "seconds": 1.0}], [entry()], "", ""),
    ],
)
def test_other_machines_or_switches_prevent_a_comparison(
    one: list[dict[str, Any]], other: list[dict[str, Any]], speed: str, memory: str
) -> None:
    for expected, found in ((speed, differences(one, other)), (memory, differences(one, other, memory=True))):
        assert re.search(expected, found)
        assert bool(expected) == bool(found)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def against_full(lab: Lab, **full: Any) -> Compared:
    study = lab.study(lab.run(*FULL, loss=3.0, **full), lab.run(*RELORA, loss=3.2, spent=[entry(merged="resident")]))
    return next(member for member in study.members if member.label == "relora")


@pytest.mark.slow
def test_other_switches_keep_the_gap_in_loss_and_mark_speed_and_memory(lab: Lab) -> None:
    full = lab.run(*FULL, loss=3.0, spent=[entry(compile=True)])
    relora = lab.run(*RELORA, loss=3.2, spent=[entry(merged="resident")])
    study = lab.study(full, relora)
    member = next(member for member in study.members if member.label == "relora")
    assert member.tokens.loss == pytest.approx(0.2)
    assert member.seconds.loss is None
    assert re.fullmatch(r"wall-clock: other switches .*trainer\.compile False against True\)", member.seconds.note)
    folder = write_report(study, lab.runs_dir)
    page = (folder / "report.md").read_text()
    (row,) = (line for line in page.partition("## Arms")[2].splitlines() if line.startswith("| relora"))
    for remark in (member.speed_note, member.memory_note, member.seconds.note):
        (mark,) = (line[3 : line.index(")")] for line in page.splitlines() if line.endswith(f") {remark}"))
        assert f"({mark})" in row
    assert any(re.search(r"no fair comparison: .*peak memory: other switches", line) for line in answer(study))
    with (folder / "results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert "trainer.compile" in rows[relora.name]["tokens_per_second_note"]
    assert "trainer.compile" in rows[relora.name]["peak_memory_bytes_note"]
    assert rows[full.name]["tokens_per_second_note"] == ""


def test_a_last_attempt_on_the_same_machine_does_not_hide_an_earlier_one_elsewhere(lab: Lab) -> None:
    member = against_full(lab, host="one", device="cpu", spent=[entry(60.0, host="two"), entry(40.0)])
    assert member.seconds.loss is None
    assert "host one against two" in member.seconds.note
    assert member.memory_note == ""


def test_equal_machines_and_switches_are_compared_without_a_mark(lab: Lab) -> None:
    member = against_full(lab, spent=[entry()])
    assert member.seconds.loss == pytest.approx(0.2)
    assert (member.speed_note, member.memory_note) == ("", "")


def test_an_old_status_without_the_record_is_compared_by_its_last_machine(lab: Lab) -> None:
    assert against_full(lab, host="one", device="cpu").seconds.loss == pytest.approx(0.2)
