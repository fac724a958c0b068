"""Damaged files of a run: one line names each file, no damaged value is used, and everything else continues.

The runs are real. They are trained once and copied.
"""

import io
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import transformers
from damaged import Case, flip
from lab import RELORA, Lab

from relora.cli import main as cli
from relora.cli.ui import submitted_runs
from relora.common.errors import ConfigError, RunError
from relora.common.files import check_weights
from relora.config.compose import compose
from relora.config.frozen import thaw
from relora.config.run import RunConfig
from relora.runs.metrics import read_rows, recorded
from relora.runs.state import observe
from relora.runs.warmstart import folder_of
from relora.training.pretrained import load_pretrained

pytestmark = pytest.mark.slow


def values_of(case: Case) -> dict[tuple[int, str], float]:
    """The recorded values of a run that do not depend on the machine."""
    return {
        (row["step"], name): value
        for row in read_rows(case.run.metrics_file)
        for name, value in row.items()
        if name.startswith(("train/", "eval/", "restart/", "progress/"))
    }


def line_about(capsys: pytest.CaptureFixture[str], file: Path) -> str:
    """The one line of the output that names the file. The output has no traceback."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (line,) = [line for line in (shown.out + shown.err).splitlines() if str(file) in line and line != f"run {file}"]
    return line


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(
    killed: Case, finished_run: Case, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = killed.run.checkpoints / "step-00000008.pt"
    flip(newest, share)
    assert cli.run(killed.overrides) == 0
    assert line_about(capsys, newest).endswith("trying the one before it")
    assert killed.weights == finished_run.weights
    assert values_of(killed) == values_of(finished_run)


def test_a_damaged_warm_start_is_trained_again(killed: Case, finished_run: Case, capsys) -> None:
    shutil.rmtree(killed.run.path)
    file = folder_of(compose(killed.overrides)) / "checkpoint.pt"
    flip(file, 0.5)
    assert cli.run(killed.overrides) == 0
    assert line_about(capsys, file).endswith("training it again")
    assert killed.weights == finished_run.weights


def test_a_run_with_a_damaged_corpus_prepares_it_again(killed: Case, finished_run: Case, capsys) -> None:
    (file,) = killed.runs_dir.glob("corpora/*/train.bin")
    flip(file, 0.5)
    assert cli.run(killed.overrides) == 0
    assert line_about(capsys, file).endswith("the corpus is prepared again")
    assert killed.weights == finished_run.weights


# ---------------------------------------------------------------------------------------------------------- models


def test_a_flipped_bit_in_exported_weights_is_reported_and_checkpoints_are_kept(
    finished: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = finished.run.model / "model.safetensors", sorted(finished.run.checkpoints.iterdir())
    flip(file, 0.5)
    data = [text for text in finished.overrides if text.startswith("data")]
    for verb, overrides in (("evaluate", data), ("sample", [])):
        assert cli.main([verb, str(finished.run.model), *overrides, f"runs_dir={finished.runs_dir}"]) == 1
        assert "checksum" in line_about(capsys, file)
    assert cli.main(["clean", "--delete", f"runs_dir={finished.runs_dir}"]) == 0
    assert "checksum" in line_about(capsys, file)
    assert kept
    assert sorted(finished.run.checkpoints.iterdir()) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [({"intermediate_size": 64}, r"\(32, 48\).*\(32, 64\)"), ({"num_hidden_layers": 3}, "layers.2")],
)
def test_weights_that_do_not_match_the_config_are_refused(finished: Case, change: dict[str, int], message: str) -> None:
    file = finished.run.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    transformers.logging.add_handler(handler)
    with pytest.raises(RunError, match=message):
        load_pretrained(finished.run.model)
    transformers.logging.remove_handler(handler)
    assert written.getvalue() == "", "only the error is shown"


def test_an_old_model_without_checksums_loads(finished: Case) -> None:
    file = finished.run.model / "relora.json"
    about = json.loads(file.read_text())
    assert list(about.pop("crc32")) == ["model.safetensors"]
    file.write_text(json.dumps(about))
    load_pretrained(finished.run.model)
    check_weights(finished.run.model)


# --------------------------------------------------------------------------------------------------------- metrics


def line_of(case: Case, step: int, name: str) -> int:
    """The number, from 0, of the first line with this step and this name."""
    lines = case.run.metrics_file.read_text().splitlines()
    return next(number for number, line in enumerate(lines) if f'"step": {step},' in line and name in line)


@pytest.mark.parametrize("damage", ["garbage", "lost"])
@pytest.mark.parametrize("step", [2, 10])
def test_a_damaged_row_is_named_and_computed_again_if_possible(
    killed: Case, finished_run: Case, damage: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = killed.run.metrics_file.read_bytes().splitlines(keepends=True)
    at = line_of(killed, step, "train/loss")
    killed.run.metrics_file.write_bytes(b"".join([*lines[:at], *[b"g\xff{\n"][damage == "lost" :], *lines[at + 1 :]]))
    assert cli.run(killed.overrides) == 0
    line = line_about(capsys, killed.run.metrics_file)
    assert f"line {at + 1}" in line
    assert ("computed again now" in line) == (step == 10)
    assert killed.weights == finished_run.weights
    whole = values_of(finished_run)
    missing = whole.items() - values_of(killed).items()
    assert {name for (at, name), _ in missing if at == step} == {name for (at, name), _ in missing}
    assert (missing == set()) == (step == 10)
    assert [lost.recomputed for lost in recorded(killed.run.metrics_file).lost] == [step == 10]


# ---------------------------------------------------------------------------------------------- the other small files

BROKEN = {
    "empty": lambda values: b"",
    "garbage": lambda values: b"\xff{{{",
    "no object": lambda values: b"[1]",
    "no field": lambda values: json.dumps({"attempt": 1}).encode(),
    "wrong state": lambda values: json.dumps({**values, "state": "well"}).encode(),
    "wrong kind": lambda values: json.dumps({**values, "attempt": "one", "attempts": 7}).encode(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_with_a_damaged_status_resumes(
    killed: Case, finished_run: Case, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = killed.run.status_file
    file.write_bytes(BROKEN[how](json.loads(file.read_text())))
    assert observe([killed.run])[0].name == "unreadable"
    assert cli.run(killed.overrides) == 0
    line = line_about(capsys, file)
    assert "kept as status.json.damaged" in line
    assert "continuing without it" in line
    assert killed.weights == finished_run.weights
    assert values_of(killed) == values_of(finished_run)


def test_a_finished_run_with_a_damaged_status_is_not_trained_again(
    finished: Case, finished_run: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished.run.checkpoints)
    before = finished.run.metrics_file.read_bytes()
    finished.run.status_file.write_text("{")
    assert cli.run(finished.overrides) == 0
    line = line_about(capsys, finished.run.status_file)
    assert "read from metrics.jsonl" in line
    assert "machine is unknown" in line
    recovered, whole = finished.run.status, finished_run.run.status
    assert recovered is not None
    assert whole is not None
    assert recovered.state == "finished"
    assert recovered.corpus == whole.corpus
    assert recovered.host == ""
    same = whole.summary.keys() - {"sample"}
    assert {name: recovered.summary[name] for name in same} == {name: whole.summary[name] for name in same}
    assert finished.run.metrics_file.read_bytes() == before


@pytest.mark.parametrize("file", ["config.yaml", "launch.json"])
def test_a_launch_writes_its_own_files_again(killed: Case, finished_run: Case, file: str) -> None:
    (killed.run.path / file).write_bytes(b"\xff{")
    assert cli.run(killed.overrides) == 0
    assert killed.weights == finished_run.weights


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"- 1", b"method: {name: nothing}", b"model: 7"])
def test_a_damaged_config_is_named(killed: Case, content: bytes) -> None:
    killed.run.config_file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        thaw(killed.run.config_file)
    assert str(killed.run.config_file) in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- one run of a study


def broken_study(tmp_path: Path) -> tuple[Lab, list[RunConfig]]:
    lab = Lab(tmp_path / "runs")
    configs = [lab.run("method=full", loss=2.0), lab.run(*RELORA, loss=2.5), lab.run(*RELORA, "method.rank=2")]
    lab.study(*configs)
    return lab, configs


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", b"{"),
        ("status.json", b'{"state": "finished", "summary": {}}'),
        ("config.yaml", b"\xff"),
        ("metrics.jsonl", None),
        ("mlflow.json", b"\xff{"),
        ("submission.json", b"{"),
        ("launch.json", b"{"),
    ],
)
def test_a_damaged_file_of_one_run_does_not_stop_report_and_status_of_the_study(
    tmp_path: Path, file: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, configs = broken_study(tmp_path)
    broken = lab.runs_dir / configs[2].name / file
    if content is None:
        broken.unlink()
        broken.mkdir()
    else:
        broken.write_bytes(content)
    where = f"runs_dir={lab.runs_dir}"
    assert cli.main(["report", "mine", where]) == 0
    page = (lab.runs_dir / "studies" / "mine" / "report" / "report.md").read_text()
    assert f"{math.exp(2.6):.2f}" in page, "the undamaged arm has its perplexity"
    stops_the_run = file in ("status.json", "config.yaml", "metrics.jsonl")
    assert (str(broken) in page) == stops_the_run
    assert cli.main(["status", "mine", where]) == (1 if stops_the_run else 0)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (row,) = [line for line in shown.out.splitlines() if line.startswith(configs[2].name) and " arm " in line]
    assert ("unreadable" in row) == stops_the_run
    if not stops_the_run:
        assert "finished" in row


def test_a_damaged_config_does_not_stop_commands_for_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, configs = broken_study(tmp_path)
    undamaged, broken = configs[1].run_dir, lab.runs_dir / configs[2].name / "config.yaml"
    (undamaged / "log.txt").write_text("it went well\n")
    broken.write_text("\t{")
    where = f"runs_dir={lab.runs_dir}"
    for name in (configs[1].name, f"mine/{configs[1].name}"):
        assert cli.main(["logs", name, where]) == 0
        assert "it went well" in capsys.readouterr().out
    assert cli.main(["status", configs[1].name, where]) == 0
    assert cli.main(["cancel", configs[1].name, where]) == 0
    capsys.readouterr()
    assert cli.main(["logs", configs[2].name, where]) == 2
    assert "read as a config" in line_about(capsys, broken)


def test_relora_ui_skips_a_damaged_run_and_names_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab, configs = broken_study(tmp_path)
    for config in configs:
        (config.run_dir / "submission.json").write_text('{"job": "1"}')
    broken = lab.runs_dir / configs[2].name / "config.yaml"
    broken.write_text("\t{")
    named: set[Path] = set()
    for _ in range(2):
        runs = submitted_runs(lab.runs_dir, named)
        assert {item.config.name for item in runs} == {config.name for config in configs[:2]}
    assert "MLflow gets nothing" in line_about(capsys, broken)


def test_the_report_names_lost_rows_of_a_run(tmp_path: Path) -> None:
    lab, configs = broken_study(tmp_path)
    file = lab.runs_dir / configs[1].name / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:1], b"garbage\n", *lines[2:]]))
    assert cli.main(["report", "mine", f"runs_dir={lab.runs_dir}"]) == 0
    page = (lab.runs_dir / "studies" / "mine" / "report" / "report.md").read_text()
    assert "line 2 cannot be read" in page


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"runs": {"a": {}}, "launches": []}'])
def test_a_damaged_manifest_is_named_and_a_launch_writes_it_again(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, configs = broken_study(tmp_path)
    file = lab.runs_dir / "studies" / "mine" / "study.json"
    file.write_bytes(content)
    for verb in (["report", "mine"], ["status", "mine"], ["clean"]):
        assert cli.main([*verb, f"runs_dir={lab.runs_dir}"]) == 1
        assert str(file) in line_about(capsys, file)
    lab.study(*configs)
    assert "study.json.damaged" in line_about(capsys, file)
    assert cli.main(["status", "mine", f"runs_dir={lab.runs_dir}"]) == 0
