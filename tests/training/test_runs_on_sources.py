"""Whole runs on sources other than text: the papers' experiments on a copy of the layout of C4, and token ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from hub_server import like_c4
from small import TINY

from relora.cli import main as cli
from relora.config.compose import compose
from relora.runs.rundir import RunDir, Status
from relora.studies.published import HEADING
from relora.studies.sweeps import expand

pytestmark = pytest.mark.slow

SMALL = (
    *(each for each in TINY if not each.startswith(("method.", "optimizer.", "schedule."))),
    "schedule.warmup_steps=2",
    "data.tokenizer=null",
    "data.limit_tokens=30k",
    "data.held_out_tokens=2k",
    "tracker=jsonl",
)
RESTARTS = ("method.rank=4", "method.reset_interval_steps=4", "schedule.restart_warmup_steps=2")
OF_RELORA = (*RESTARTS, "method.warm_start_steps=3")
ARMS = (*RESTARTS, "method.restart_interval_steps=4")
"""Full rank has no rank, and the interval has two names: a sweep gives each key to the methods that have it."""


def finished(folder: Path) -> Status:
    status = RunDir(folder).status
    assert status is not None
    assert status.state == "finished"
    return status


def trained(overrides: list[str]) -> Status:
    assert cli.run(overrides) == 0
    return finished(compose(overrides).run_dir)


def test_the_table_of_a_paper_is_trained_on_a_dataset_with_the_layout_of_c4(tmp_path: Path) -> None:
    """The command of sweeps/paper_table.yaml, with cut budgets and without other learning rates of full rank."""
    like_c4(tmp_path / "c4")
    own = [f"data.dataset={tmp_path / 'c4'}", f"runs_dir={tmp_path / 'runs'}", "experiments=paper/galore_60m", *SMALL]
    own += ["baseline_rates=[1]", "cluster=debug"]
    assert cli.run(["-m", "sweeps=paper_table", *own, *ARMS]) == 0
    found: dict[str, Status] = {}
    for run in expand(["sweeps=paper_table", *own, *ARMS]).runs:
        found[run.method.name] = finished(run.run_dir)
        assert run.data.packing == "pad"
        assert run.trainer.precision == "bf16"
        positions = run.total_steps * run.tokens_per_step
        assert found[run.method.name].summary["tokens"] < positions, "padding is not counted"
    assert set(found) == {"full", "lowrank", "lora", "relora", "galore"}
    assert len({json.dumps(status.corpus) for status in found.values()}) == 1
    (folder,) = (tmp_path / "runs" / "corpora").glob("hub-*/meta.json")
    splits = json.loads(folder.read_text())["splits"]
    assert splits["train"]["tokens"] >= 30_000
    assert splits["validation"]["tokens"] >= 2000
    report = (tmp_path / "runs/studies/paper_table/report/report.md").read_text()
    assert HEADING in report
    for method, status in found.items():
        printed, true = status.summary["test_perplexity_as_published"], status.summary["test_perplexity"]
        assert printed < true
        assert f"| {method} | {true:.2f} | {printed:.2f} |" in report
    assert found["relora"].summary["restarts"] == 3


@pytest.mark.parametrize("method", ["full", "relora"])
def test_relora_as_its_paper_trains_it_runs_on_a_dataset_with_the_layout_of_c4(tmp_path: Path, method: str) -> None:
    like_c4(tmp_path / "c4")
    own = [f"data.dataset={tmp_path / 'c4'}", f"runs_dir={tmp_path / 'runs'}", "experiments=paper/relora_60m", *SMALL]
    own += [f"method={method}", *(OF_RELORA if method == "relora" else [])]
    status = trained(own)
    assert compose(own).data.packing == "pad"
    printed, true = status.summary["test_perplexity_as_published"], status.summary["test_perplexity"]
    assert printed == pytest.approx(true, rel=1e-6)
    assert status.summary["restarts"] == (2 if method == "relora" else 0)


def test_a_run_on_token_ids_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = np.random.default_rng(0)
    folder = tmp_path / "ids"
    folder.mkdir()
    for name, count in (("train", 20_000), ("val", 2000)):
        ids = chance.integers(0, 260, count)
        ids[::50] = 260
        ids.astype(np.uint16).tofile(folder / f"{name}.bin")
    small = [each for each in TINY if "vocab_size" not in each]
    own = [*small, "data=tokens", f"data.path={folder}", "data.vocab_size=261", "data.end_of_text_id=260"]
    own += [f"runs_dir={tmp_path / 'runs'}", "tracker=jsonl"]
    status = trained(own)
    assert "sample" not in status.summary
    output = capsys.readouterr().out
    assert "write more" not in output
    model = compose(own).run_dir / "model"
    assert not list(model.glob("token*"))
    evaluated = [own[len(small)], *own[len(small) + 1 :], "data.validation_fraction=0.05", "data.test_fraction=0.05"]
    assert cli.main(["evaluate", str(model), "--json", *evaluated]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["loss"] == pytest.approx(status.summary["test_loss"], rel=1e-6)
    assert values["bits_per_byte"] is None
    assert cli.main(["sample", str(model)]) == 1
    error = capsys.readouterr().err
    assert "has no tokenizer" in error
    assert "tokenizer.json" in error
