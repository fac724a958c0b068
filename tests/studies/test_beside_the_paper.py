"""A study beside the figures of a paper: the report, results.csv, and a trained study with cut budgets."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import FULL, RELORA, Lab
from transformers import AutoModelForCausalLM

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.frozen import read_frozen
from relora.data.corpus import prepare
from relora.runs.rundir import RunDir
from relora.studies.compare import load_study
from relora.studies.published import HEADING, beside_the_paper
from relora.studies.report import answer, write_report
from relora.training.job import launch

GALORE_60M = "experiments=paper/galore_60m"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs", noted=True)


@pytest.fixture
def paper(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("some text\n")
    return (GALORE_60M, "data=text", f"data.path={tmp_path / 'text.txt'}")


def printed(perplexity: float, batches: int = 153) -> dict[str, Any]:
    return {
        "summary": {"test_perplexity_as_published": perplexity, "test_batches_as_published": batches},
        "corpus": {"corpus_digest": "c", "tokenizer_digest": "t"},
    }


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a report in Markdown, by heading. Each row is column -> cell."""
    found: dict[str, list[dict[str, str]]] = {}
    heading = ""
    header: list[str] = []
    for line in page.splitlines():
        if line.startswith("## "):
            heading, header = line.removeprefix("## "), []
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not header:
                header = cells
            elif set(cells) - {"---", "---:"}:
                found.setdefault(heading, []).append(dict(zip(header, cells, strict=True)))
    return found


def test_the_report_has_both_perplexities_and_the_papers_figure(lab: Lab, paper: tuple[str, ...]) -> None:
    full = [
        lab.run(*FULL, *paper, f"trainer.seed={seed}", loss=loss, **printed(34.0 + seed))
        for seed, loss in enumerate((3.0, 3.1))
    ]
    study = lab.study(*full, lab.run("method=galore", *paper, loss=3.2, **printed(35.5)))
    folder = write_report(study, lab.runs_dir)
    page = (folder / "report.md").read_text()
    rows = {row["method"]: row for row in tables(page)[HEADING]}
    assert list(rows) == ["full", "galore", *(f"{name} (not in this study)" for name in ("lowrank", "lora", "relora"))]
    mean = (math.exp(3.1) + math.exp(3.2)) / 2
    assert rows["full"]["ours, true perplexity"].startswith(f"{mean:.2f} ± ")
    assert rows["full"]["ours, as their code prints it"] == f"34.50 ± {1 / math.sqrt(2):.2f}"
    assert rows["full"]["the paper's figure"] == "34.06"
    assert list(rows["galore"].values()) == [
        "galore",
        f"{math.exp(3.3):.2f}",
        "35.50",
        "34.88",
        "arXiv 2403.03507, table 2",
    ]
    assert list(rows["lora (not in this study)"].values())[1:4] == ["-", "-", "34.99"]
    text = " ".join(page.split())
    assert "Only this column may be compared with the paper's figure" in text
    assert "docs/protocol.md" in text
    assert "divides by n + 1" in text
    assert "n is about 182 (batches of 256 sequences, 1 GPU)" in text
    here, there = (f"{math.expm1(-3.1 / (n + 1)):+.1%}" for n in (153, 182))
    assert f"n is 153, which changes a perplexity of {math.exp(3.1):.2f} by {here}" in text
    assert f"With the paper's n it would change by {there}" in text
    assert "Not the setting of the paper, so not to be compared with its figures: full, galore" in text
    assert "trainer.total_steps=40, in the experiment 10000" in text
    with (folder / "results.csv").open() as file:
        by_run = {row["run"]: row for row in csv.DictReader(file)}
    row = by_run[full[0].name]
    assert float(row["test_perplexity_as_published"]) == 34.0
    assert float(row["published_perplexity"]) == 34.06
    assert row["published_source"] == "arXiv 2403.03507, table 2"
    assert float(row["test_perplexity"]) == pytest.approx(math.exp(3.1))


@pytest.mark.slow
def test_other_studies_have_no_such_table_and_empty_columns(lab: Lab) -> None:
    folder = write_report(lab.study(lab.run(*FULL), lab.run(*RELORA)), lab.runs_dir)
    page = (folder / "report.md").read_text()
    assert HEADING not in page
    assert "paper" not in page
    assert tables(page)["Arms"][0]["bits per byte"] == "-"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("test_perplexity_as_published", "published_perplexity", "published_source", "test_bits_per_byte")
    assert all(row[name] == "" for row in rows for name in names)


def test_a_run_that_an_earlier_version_finished_is_in_the_table_without_the_new_figure(
    lab: Lab, paper: tuple[str, ...]
) -> None:
    run = lab.run(*FULL, *paper, loss=3.0)
    found = beside_the_paper(lab.study(run))
    assert found is not None
    assert found.rows[0] == ["full", f"{math.exp(3.1):.2f}", "-", "34.06", "arXiv 2403.03507, table 2"]
    assert any(run.name in remark and "an earlier version" in remark for remark in found.remarks)
    # The frozen config of an earlier version has no such block.
    file = RunDir(run.run_dir).config_file
    text = file.read_text()
    file.write_text(text[: text.index("published:")])
    assert read_frozen(file).published is None
    assert beside_the_paper(load_study(lab.runs_dir, "mine")) is None


def test_runs_that_did_not_finish_or_diverged_are_in_the_table(lab: Lab, paper: tuple[str, ...]) -> None:
    figures = printed(math.inf)
    figures["summary"] |= {"test_loss": math.inf, "test_perplexity": math.inf, "eval_loss": math.inf}
    study = lab.study(
        lab.run(*FULL, *paper, **figures), lab.run("method=lora", *paper, state="failed", message="no luck")
    )
    found = beside_the_paper(study)
    assert found is not None
    rows = {row[0]: row[1:4] for row in found.rows}
    assert rows["full"] == ["diverged", "diverged", "34.06"]
    assert rows["lora"] == ["-", "-", "34.99"]


def test_of_several_rates_of_a_method_the_best_is_named(lab: Lab, paper: tuple[str, ...]) -> None:
    rates = {1e-3: 3.0, 2e-3: 2.9, 4e-3: 3.2}
    runs = [lab.run(*FULL, *paper, f"optimizer.learning_rate={rate}", loss=loss) for rate, loss in rates.items()]
    found = beside_the_paper(lab.study(*runs))
    assert found is not None
    assert [row[0] for row in found.rows[:3]] == [
        "full lr=0.001, one of 3 rates",
        "full lr=0.002, the best of 3 rates",
        "full lr=0.004, one of 3 rates",
    ]


def test_a_paper_whose_code_divides_right_says_so(lab: Lab, paper: tuple[str, ...]) -> None:
    setting = ("experiments=paper/relora_60m", *paper[1:])
    run = lab.run(*FULL, *setting, summary={"test_perplexity_as_published": math.exp(3.1)})
    found = beside_the_paper(lab.study(run))
    assert found is not None
    assert found.rows == [["full", f"{math.exp(3.1):.2f}", f"{math.exp(3.1):.2f}", "-", "arXiv 2307.05695"]]
    assert "divides by the right number" in found.remarks[0]


def test_arms_with_different_tokenizers_are_compared_in_bits_per_byte(lab: Lab) -> None:
    def run(size: int, tokenizer: str, text: str = "same", **summary: float):
        return lab.run(
            *FULL,
            f"data.vocab_size={size}",
            corpus={"corpus_digest": text, "tokenizer_digest": tokenizer},
            summary=summary,
        )

    small, large = run(300, "a", test_bits_per_byte=1.5), run(1000, "b", test_bits_per_byte=1.25)
    study = lab.study(small, large)
    (sentence,) = [line for line in answer(study) if "tokenizers" in line]
    assert "2 different tokenizers" in sentence
    assert "cannot be compared between tokenizers" in sentence
    assert "Bits per byte can be compared" in sentence
    assert "No bits per byte" not in sentence
    assert "Their texts differ" not in sentence
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert {row["bits per byte"] for row in tables(page)["Arms"]} == {"1.5000", "1.2500"}
    assert sentence in page

    third = run(2000, "c", "another")
    (sentence,) = [line for line in answer(lab.study(small, large, third)) if "tokenizers" in line]
    assert f"No bits per byte: {third.name}" in sentence
    assert "Their texts differ too" in sentence
    assert not [line for line in answer(lab.study(small, name="one")) if "tokenizers" in line]


# ------------------------------------------------------------------------------------------------- a trained study


def simulated(run: RunDir, micro_batch: int, gpus: int) -> tuple[float, float]:
    """The true perplexity on test and the printed one, with Hugging Face's own mean loss of each batch."""
    config = read_frozen(run.config_file)
    test = prepare(config.data, Path(config.runs_dir) / "corpora", print).sequences("test", config.data)
    model = AutoModelForCausalLM.from_pretrained(run.model).double()
    counters, totals, nats, tokens = [1] * gpus, [0.0] * gpus, 0.0, 0
    for number, first in enumerate(range(0, test.count, micro_batch)):
        last = min(first + micro_batch, test.count)
        inputs, targets, _ = test.batch(np.arange(first, last))
        batch = torch.cat([inputs, targets[:, -1:]], dim=1)
        with torch.no_grad():
            loss = model(input_ids=batch, labels=batch).loss.item()
        counters[number % gpus] += 1
        totals[number % gpus] += loss
        nats, tokens = nats + loss * targets.numel(), tokens + targets.numel()
    means = [total / counter for total, counter in zip(totals, counters, strict=True)]
    return math.exp(nats / tokens), math.exp(sum(means) / gpus)


@pytest.mark.slow
def test_a_study_of_a_paper_with_cut_budgets_has_the_table(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is a folder of gzipped json lines, as C4 is."""
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    documents = [file.read_text() for file in sorted(text.glob("*.txt"))]
    for shard in range(2):
        lines = [json.dumps({"text": each, "url": "x", "timestamp": "y"}) for each in documents[shard::2]]
        with gzip.open(folder / f"train.0000{shard}-of-00002.jsonl.gz", "wt") as file:
            file.write("\n".join(lines))
    small = ["model=llama_tiny", "model.layers=1", "data=text", f"data.path={folder}", "data.vocab_size=300"]
    small += ["data.sequence_length_tokens=16", "data.test_fraction=0.1", "data.validation_fraction=0.05"]
    small += ["trainer.precision=fp32", "trainer.total_steps=8", "trainer.sequences_per_step=4"]
    small += ["schedule.warmup_steps=2", "published.micro_batch_sequences=10", "published.gpus=2", "tracker=jsonl"]
    small += ["cluster=debug"]
    runs_dir = tmp_path / "runs"
    launch = ["-m", GALORE_60M, "method=full,galore", "study=table", "baseline_rates=[1]", f"runs_dir={runs_dir}"]
    assert cli.run([*launch, *small]) == 0
    capsys.readouterr()

    rows = {row["method"]: row for row in tables((runs_dir / "studies/table/report/report.md").read_text())[HEADING]}
    for method, figure in (("full", "34.06"), ("galore", "34.88")):
        (path,) = runs_dir.glob(f"llama_tiny-{method}-*")
        run = RunDir(path)
        assert run.status is not None
        summary = run.status.summary
        true, printed_by_theirs = simulated(run, 10, 2)
        assert summary["test_perplexity"] == pytest.approx(true, rel=1e-5)
        assert summary["test_perplexity_as_published"] == pytest.approx(printed_by_theirs, rel=1e-5)
        assert list(rows[method].values())[1:4] == [f"{true:.2f}", f"{printed_by_theirs:.2f}", figure]
        assert cli.main(["evaluate", "--json", str(run.model), *small[2:8], f"runs_dir={runs_dir}"]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-9)


@pytest.mark.slow
def test_the_block_does_not_change_a_run(tiny: list[str]) -> None:
    """The micro-batch of 8 consists of whole batches of the run's own evaluation, so the loss is equal to the bit."""
    paper = ["method=full", *(text for text in tiny if not text.startswith("method."))]
    paper += [GALORE_60M, "published.micro_batch_sequences=8", "trainer.precision=fp32"]
    results = []
    for name, block in (("with", []), ("without", ["published=null"])):
        config = compose([*paper, *block, f"runs_dir={Path(compose(paper).runs_dir) / name}"])
        status = launch(config)
        assert status.state == "finished"
        weights = (Path(config.run_dir) / "model" / "model.safetensors").read_bytes()
        results.append((config.name, status.summary["test_loss"], status.summary["eval_loss"], weights))
        assert ("test_perplexity_as_published" in status.summary) == (name == "with")
    assert results[0] == results[1]
