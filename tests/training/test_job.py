import hashlib
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from small import REPOSITORY, skip_or_fail
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora.cli import main as cli
from relora.common.errors import RunError
from relora.config.compose import compose
from relora.config.frozen import thaw
from relora.config.plan import run_plan
from relora.core.lowrank import low_rank_layers, unwrap
from relora.data.corpus import prepare
from relora.data.sequences import TokenSequences
from relora.methods.lora import LoRA
from relora.runs.checkpoint import latest_step
from relora.runs.code import code_of
from relora.runs.metrics import read_rows, row_metrics
from relora.runs.rundir import RunDir
from relora.training.device_memory import peak_memory_bytes
from relora.training.job import launch
from relora.training.pretrained import save_pretrained

pytestmark = pytest.mark.slow


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def run_of(overrides: list[str]) -> RunDir:
    return RunDir(compose(overrides).run_dir)


def elsewhere(overrides: list[str], folder: Path) -> list[str]:
    return [*overrides, f"runs_dir={folder}"]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[str]]:
    """One finished tiny run, recorded in MLflow, and its overrides. Tests only read it."""
    from small import TINY

    runs_dir = tmp_path_factory.mktemp("finished")
    overrides = [*TINY, "data=text", f"data.path={text}", f"runs_dir={runs_dir}"]
    assert launch(compose(overrides), overrides).state == "finished"
    return run_of(overrides), overrides


# ------------------------------------------------------------------------------------------------- a run that ends


@pytest.mark.parametrize("method", ["full", "relora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_every_precision_ends_with_a_model_of_the_logged_perplexity(
    tiny: list[str], precision: str, method: str, capsys
) -> None:
    own = [item for item in tiny if method == "relora" or not item.startswith("method.")]
    overrides = [*own, f"method={method}", f"trainer.precision={precision}"]
    status = launch(compose(overrides), overrides)
    assert status.state == "finished", status.message
    data = [item for item in tiny if item.startswith(("data", "runs_dir"))]
    capsys.readouterr()
    assert cli.main(["evaluate", "--json", str(run_of(overrides).model), *data, "trainer.device=cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(status.summary["test_perplexity"], rel=1e-9)


@pytest.mark.parametrize(
    ("has_checksum", "reason"),
    [
        (True, "model.safetensors: its checksum is"),
        (False, "model.layers.0.mlp.up_proj.weight differs in 1 of 1,536"),
    ],
)
def test_an_exported_model_with_other_weights_than_the_trained_model_fails_the_run(
    tiny: list[str], monkeypatch, capsys, has_checksum: bool, reason: str
) -> None:

    def corrupt(model, tokenizer_file: Path, folder: Path, *others: Any) -> None:
        save_pretrained(model, tokenizer_file, folder, *others)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] *= 1.0000002  # its last bit
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        about = json.loads((folder / "relora.json").read_text())
        if not has_checksum:
            (folder / "relora.json").write_text(json.dumps({k: v for k, v in about.items() if k != "crc32"}))

    monkeypatch.setattr("relora.training.export.save_pretrained", corrupt)
    status = launch(compose(tiny), tiny)
    assert status.state == "failed"
    assert status.message.startswith("the exported model differs")
    assert reason in status.message
    assert "run the same command again" in status.message
    assert latest_step(run_of(tiny).checkpoints) == 14
    assert "the model writes" not in capsys.readouterr().out
    monkeypatch.undo()
    assert launch(compose(tiny), tiny).state == "finished"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merge_that_changes_the_model_gives_a_warning_and_the_run_finishes(
    tiny: list[str], precision: str, monkeypatch, capsys
) -> None:
    overrides = [*tiny, f"trainer.precision={precision}", "method=lora", "optimizer.learning_rate=5e-2"]
    overrides = [item for item in overrides if "reset_interval" not in item]
    monkeypatch.setattr(LoRA, "finish", lambda self, model, run: zero_factors_and_unwrap(model))
    status = launch(compose(overrides), overrides)
    assert status.state == "finished"
    run = run_of(overrides)
    warning = re.search(rf"merge .*changed the model: .*state is kept in {run.checkpoints}", status.message)
    assert warning is not None
    shown = capsys.readouterr().out
    assert re.search("warning: .*merge .*changed the model", shown)
    assert warning[0] in shown
    assert "the model writes" in shown


@pytest.mark.parametrize("way", ["resident", "never"])
def test_a_deep_healthy_bf16_model_is_exported_without_a_warning(tiny: list[str], way: str) -> None:
    deep = [item for item in tiny if not item.startswith("model.")]
    deep += ["model.hidden_size=32", "model.intermediate_size=48", "model.layers=24", "model.heads=2"]
    overrides = [*deep, "trainer.precision=bf16", f"method.merged_weight={way}"]
    status = launch(compose(overrides), overrides)
    assert (status.state, status.message) == ("finished", "")


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_compiled_by_inductor_is_exported_and_resumes_to_the_bit(tiny: list[str], precision: str) -> None:
    if shutil.which("g++") is None:
        skip_or_fail("compiler", "torch.compile's own backend needs a C++ compiler")
    torch.compiler.reset()
    overrides = [*tiny, f"trainer.precision={precision}", "trainer.compile=true", "model.layers=1"]
    overrides += ["method.warm_start_steps=0", "method.reset_interval_steps=null", "trainer.total_steps=4"]
    overrides += ["trainer.checkpoint_interval_steps=2"]
    status = launch(compose(overrides), overrides)
    assert (status.state, status.message) == ("finished", "")
    if precision == "bf16":
        return

    plain = [*overrides, "trainer.compile=false", f"runs_dir={run_of(overrides).path.parent.parent / 'plain'}"]
    assert launch(compose(plain), plain).summary["test_loss"] == pytest.approx(status.summary["test_loss"], abs=1e-4)

    # A run that stopped after step 2 leaves this state. The next launch is like one in a new process.
    again = [*overrides, f"runs_dir={run_of(overrides).path.parent.parent / 'again'}"]
    run = run_of(again)
    run.checkpoints.mkdir(parents=True)
    shutil.copy(run_of(overrides).checkpoints / "step-00000002.pt", run.checkpoints)
    torch.compiler.reset()
    assert launch(compose(again), again).state == "finished"
    assert digest(run.model) == digest(run_of(overrides).model)


# ------------------------------------------------------------------------------------ results first, then decoration


def tokenizer_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Make a folder with a small tokenizer, and with `settings` as its tokenizer_config.json."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["text 1: abc abd"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"auto_map": {"AutoTokenizer": ["tok.Mine", None]}, "tokenizer_class": "Mine"}, "auto_map, which is never"),
        ({"tokenizer_class": "BertTokenizer"}, "BertTokenizer"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "many", "extra_special_tokens": 3}, ""),
    ],
    ids=["auto_map", "other kind", "wrong values"],
)
def test_a_tokenizer_config_that_does_not_fit_gives_a_note_and_the_run_finishes(
    tiny: list[str], tmp_path: Path, settings: dict[str, Any], reason: str, capsys
) -> None:
    overrides = [*tiny, f"data.tokenizer={tokenizer_folder(tmp_path / 'own', settings)}"]
    (tmp_path / "own" / "tok.py").write_text("raise SystemExit('code of the folder was run')")
    status = launch(compose(overrides), overrides)
    assert (status.state, status.message) == ("finished", "")
    assert status.summary["sample"]
    shown = capsys.readouterr().out
    assert "gets PreTrainedTokenizerFast instead" in shown.partition("validation perplexity")[0]
    assert reason in shown
    tokenizer = AutoTokenizer.from_pretrained(run_of(overrides).model)
    expected = Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json")).encode("text 12: abc").ids
    assert tokenizer("text 12: abc", add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.eos_token == "<end>"


def test_a_closing_sample_that_fails_gives_a_warning_and_the_results_are_kept(
    tiny: list[str], monkeypatch, capsys
) -> None:
    def fail(*_: object, **__: object) -> str:
        rows = [row for row in read_rows(run_of(tiny).metrics_file) if "summary/test_loss" in row]
        assert len(rows) == 1, "the results are recorded first"
        raise RuntimeError("no text today")

    monkeypatch.setattr("relora.training.export.sample", fail)
    assert cli.run(tiny) == 0
    status = run_of(tiny).status
    assert status is not None
    assert status.state == "finished"
    assert re.fullmatch("the closing sample [^:]*: RuntimeError: no text today", status.message)
    assert math.isfinite(status.summary["test_loss"])
    assert "sample" not in status.summary
    assert re.search(rf"warning +{re.escape(status.message)}", capsys.readouterr().out)
    assert cli.run(tiny) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_run_that_failed_in_its_last_second_is_finished_by_the_same_command(tiny: list[str], monkeypatch) -> None:
    monkeypatch.setattr("relora.training.job.summary_text", lambda *_: "")
    monkeypatch.setattr("relora.training.export.evaluate", lambda *_, **__: 1 / 0)
    assert launch(compose(tiny), tiny).state == "failed"
    monkeypatch.undo()
    status = launch(compose(tiny), tiny)
    assert (status.state, status.attempt) == ("finished", 2)
    assert status.summary["sample"]


@pytest.mark.parametrize("rate", ["1e3", "1e6"])
@pytest.mark.parametrize("method", ["full", "relora"])
def test_a_run_that_diverged_to_finite_weights_is_finished_with_a_warning(
    tiny: list[str], method: str, rate: str, capsys
) -> None:
    own = [item for item in tiny if method == "relora" or not item.startswith("method.")]
    overrides = [*own, f"method={method}", f"optimizer.learning_rate={rate}"]
    overrides += ["trainer.max_consecutive_skipped_updates=100"]
    assert cli.run(overrides) == 0
    status = run_of(overrides).status
    assert status is not None
    assert status.state == "finished"
    assert "the run diverged" in status.message
    assert "lower optimizer.learning_rate" in status.message
    assert status.summary["test_loss"] > math.log(300) - 1e-3
    shown = capsys.readouterr().out
    assert "warning: the run diverged" in shown
    assert "Traceback" not in shown


def test_a_run_that_ends_without_a_finite_loss_fails_with_the_reason_at_every_launch(tiny: list[str], capsys) -> None:
    overrides = [*tiny, "optimizer.learning_rate=1e30", "trainer.max_consecutive_skipped_updates=1000"]
    messages = []
    for _ in range(2):
        assert cli.run(overrides) == 1
        status = run_of(overrides).status
        assert status is not None
        assert status.state == "failed"
        messages.append(status.message)
    assert messages[0] == messages[1]
    assert re.search("the run diverged: .*validation loss is nan after 14 steps", messages[0])
    assert "lower optimizer.learning_rate" in messages[0]
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err


def zero_factors_and_unwrap(model) -> None:
    for _, layer in low_rank_layers(model):
        layer.lora_B.data.zero_()
    unwrap(model)


def test_the_peak_memory_does_not_include_earlier_work_of_the_process(tiny: list[str]) -> None:
    """Earlier work is another run of cluster=debug, or the preparation of a corpus."""
    block = np.ones(2**29, dtype=np.uint8)
    high = peak_memory_bytes(torch.device("cpu"))
    del block
    status = launch(compose(tiny), tiny)
    assert 50e6 < status.summary["peak_memory_bytes"] < high - 2**28


def test_the_model_loads_with_hugging_face_alone_and_computes_the_logged_perplexity(finished) -> None:
    run, overrides = finished
    config = compose(overrides)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    names = set(model.state_dict())
    assert not any("lora" in name for name in names)
    test = prepare(config.data, Path(config.runs_dir) / "corpora", print).sequences("test", config.data)
    assert isinstance(test, TokenSequences)
    total = 0.0
    for number in range(test.count):
        window = torch.tensor(test.tokens[number * 16 : number * 16 + 17].astype(int))[None]
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits
        total += F.cross_entropy(logits[0].double(), window[0, 1:], reduction="sum").item()
    summary = run.status.summary  # type: ignore[union-attr]
    assert math.exp(total / (test.count * 16)) == pytest.approx(summary["test_perplexity"], rel=1e-5)
    ids = tokenizer("text 5: abc.")["input_ids"]
    assert tokenizer.decode(ids) == "text 5: abc."


def test_the_summary_has_the_figures_of_the_run(finished) -> None:
    run, _ = finished
    summary = run.status.summary  # type: ignore[union-attr]
    assert summary["tokens"] == 14 * 4 * 16
    assert summary["restarts"] == 2
    assert summary["skipped_updates"] == 0
    assert summary["wall_clock_seconds"] > summary["training_seconds"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    assert summary["trainable_parameters"] < summary["parameters"]
    plan = run_plan(thaw(run.config_file), json.loads((run.model / "config.json").read_text())["vocab_size"])
    assert (plan.parameters, plan.state_bytes) == (summary["parameters"], summary["state_bytes"])
    last = [row for row in read_rows(run.metrics_file) if "eval/perplexity" in row][-1]
    assert summary["eval_perplexity"] == last["eval/perplexity"]


def test_mlflow_has_every_metric_of_the_file_and_the_correct_status(finished) -> None:
    from mlflow import MlflowClient

    run, overrides = finished
    client = MlflowClient(compose(overrides).mlflow_uri)
    state = json.loads(run.mirror_file.read_text())
    recorded = client.get_run(state["run_id"])
    assert recorded.info.status == "FINISHED"
    for row in read_rows(run.metrics_file):
        for name, value in row_metrics(row).items():
            assert recorded.data.metrics[name] is not None
            if name == "train/loss":
                points = list(client.get_metric_history(state["run_id"], name))
                assert [p.value for p in points if p.step == row["step"]] == [value]
    assert recorded.data.metrics["summary/test_perplexity"] == run.status.summary["test_perplexity"]  # type: ignore[union-attr]
    assert recorded.data.tags["corpus_digest"] == run.status.corpus["corpus_digest"]  # type: ignore[union-attr]


def test_the_same_command_sends_a_finished_run_that_was_killed_before_mlflow_had_it(
    finished, tmp_path: Path, empty_store: Path, capsys
) -> None:
    from mlflow import MlflowClient

    overrides = elsewhere(finished[1], tmp_path)
    run = RunDir(tmp_path / finished[0].path.name)
    shutil.copytree(finished[0].path, run.path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    run.mirror_file.unlink()
    assert launch(compose(overrides), overrides).state == "finished"
    assert "finished already" in capsys.readouterr().out
    recorded = MlflowClient(compose(overrides).mlflow_uri).get_run(json.loads(run.mirror_file.read_text())["run_id"])
    assert recorded.info.status == "FINISHED"
    summary = json.loads((run.path / "status.json").read_text())["summary"]
    assert recorded.data.metrics["summary/test_perplexity"] == summary["test_perplexity"]


def test_evaluate_gives_the_perplexity_that_the_run_logged(finished, capsys) -> None:
    run, overrides = finished
    data = [item for item in overrides if item.startswith(("data=", "data.path", "data.v", "data.t", "runs_dir"))]
    assert cli.main(["evaluate", "--json", str(run.model), *data, "trainer.device=cpu"]) == 0
    shown = capsys.readouterr()
    assert "note:" not in shown.err
    result = json.loads(shown.out)
    assert result["perplexity"] == pytest.approx(run.status.summary["test_perplexity"], rel=1e-9)  # type: ignore[union-attr]
    assert cli.main(["evaluate", "--split", "validation", "--json", str(run.model), *data, "trainer.device=cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(run.status.summary["eval_perplexity"], rel=1e-5)  # type: ignore[union-attr]


def test_evaluate_on_another_text_than_the_run_used_prints_a_note(finished, tmp_path: Path, capsys) -> None:
    run, overrides = finished
    data = [item for item in overrides if item.startswith(("data=", "data.v", "data.t"))]
    (tmp_path / "other.txt").write_text("".join(f"line {number} of another text\n" for number in range(2000)))
    data += [f"data.path={tmp_path / 'other.txt'}", f"runs_dir={tmp_path / 'runs'}"]
    assert cli.main(["evaluate", "--json", str(run.model), *data, "trainer.device=cpu"]) == 0
    shown = capsys.readouterr()
    assert re.search(rf"note: data=text is not the text.* {run.path.name}: .*cannot be compared", shown.err)
    assert json.loads(shown.out)["perplexity"] > 1


def test_sample_continues_the_prompt_and_gives_the_same_text_for_the_same_seed(finished, capsys) -> None:
    run, _ = finished
    texts = []
    for seed in ("0", "0", "1"):
        command = ["sample", str(run.model), "--prompt", "text 1", "--tokens", "30", "--json", "--seed", seed]
        assert cli.main(command) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("text 1")


def test_verbs_on_a_folder_that_is_no_model_say_so(tmp_path: Path, capsys) -> None:
    for verb in ("evaluate", "sample"):
        assert cli.main([verb, str(tmp_path)]) == 2
        assert "is not a model folder" in capsys.readouterr().err


def test_a_second_launch_of_a_finished_run_says_so_and_trains_nothing(finished, capsys) -> None:
    run, overrides = finished
    before = digest(run.model), run.metrics_file.read_bytes()
    assert cli.run(overrides) == 0
    shown = capsys.readouterr().out
    assert "is finished already" in shown
    assert "other switches" not in shown
    assert "perplexity" in shown
    assert (digest(run.model), run.metrics_file.read_bytes()) == before


def test_a_finished_run_of_another_commit_or_with_other_switches_is_reported(
    tiny: list[str], capsys, monkeypatch
) -> None:
    launch(compose(tiny), tiny)
    code = replace(code_of(["relora"]), commit="another")
    monkeypatch.setattr("relora.training.job.code_of", lambda modules: code)
    launch(compose([*tiny, "trainer.activation_checkpointing=true"]), tiny)
    shown = capsys.readouterr().out
    assert "this is commit another" in shown
    assert "other switches (trainer.activation_checkpointing False against True)" in shown


def test_a_run_that_goes_on_with_other_code_says_so(tiny: list[str], capsys, monkeypatch) -> None:
    def fail(*given: object) -> None:
        raise RunError("no export")

    own = code_of(["relora"])
    with monkeypatch.context() as patched:
        patched.setattr("relora.training.export.export", fail)
        assert launch(compose(tiny), tiny).message == "no export"
    monkeypatch.setattr("relora.training.job.code_of", lambda modules: replace(own, content_hash="0123456789ab"))
    status = launch(compose(tiny), tiny)
    assert status.state == "finished"
    assert [attempt.code for attempt in status.attempts] == [own.content_hash, "0123456789ab"]
    note = f"its code was {own.content_hash} until now, and is 0123456789ab from here on"
    assert capsys.readouterr().out.count(note) == 1


def test_the_summary_gives_commands_that_work(finished, capsys) -> None:
    _run, overrides = finished
    cli.run(overrides)
    lines = capsys.readouterr().out.splitlines()
    commands = {
        line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if line.startswith(("base", "MLf"))
    }
    assert commands["MLflow UI"] == f"relora ui {overrides[-1]}"
    baseline = shlex.split(commands["baseline"].removeprefix("python run.py "))
    config = compose(baseline)
    assert config.method.name == "full"
    assert config.comparison_key == compose(overrides).comparison_key


# ---------------------------------------------------------------------------------------------- what can go wrong


def test_a_text_that_changed_since_the_run_began_is_refused(tiny: list[str], tmp_path: Path, capsys) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for number in range(120):
        (own / f"{number}.txt").write_text(f"text {number} " * 30)
    overrides = [*tiny, f"data.path={own}"]
    assert launch(compose(overrides), overrides).state == "finished"
    run = run_of(overrides)
    status = run.status
    assert status is not None
    status.state = "interrupted"
    run.status = status
    (own / "7.txt").write_text("another text " * 30)
    assert launch(compose(overrides), overrides).state == "failed"
    shown = capsys.readouterr().out
    assert re.search(rf"data=text has changed since .*; restore it, or remove {run.path} ", shown)


def test_a_run_that_is_being_trained_is_not_trained_twice(tiny: list[str], capsys) -> None:
    run = run_of(tiny)
    run.path.mkdir(parents=True)
    with run.locked():
        assert cli.run(tiny) == 1
    assert "is being trained by" in capsys.readouterr().err


def test_a_sweep_without_m_is_refused(tiny: list[str], capsys) -> None:
    assert cli.run([*tiny, "sweeps=methods"]) == 2
    assert re.search(r"sweeps=methods is a sweep .*; write python run\.py -m", capsys.readouterr().err)


def test_a_runs_dir_that_cannot_be_made_gives_one_line(tiny: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("no folder")
    assert cli.run([*tiny, f"runs_dir={tmp_path / 'file' / 'runs'}"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("relora: ")
    assert len(shown.splitlines()) == 1


def test_a_missing_gpu_gives_a_message_without_a_traceback(tiny: list[str], capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    overrides = [*tiny, "trainer.device=cuda"]
    assert cli.run(overrides) == 1
    shown = capsys.readouterr()
    assert re.search(r"trainer\.device=cuda: .*0 CUDA devices; use trainer\.device=auto or cpu", shown.out)
    assert "Traceback" not in shown.out + shown.err


def test_a_diverged_run_is_recorded_as_failed(tiny: list[str]) -> None:
    from mlflow import MlflowClient

    overrides = [*tiny, "tracker=mlflow", "optimizer.learning_rate=1e30", "trainer.max_consecutive_skipped_updates=2"]
    assert cli.run(overrides) == 1
    run = run_of(overrides)
    assert run.status is not None
    assert run.status.state == "failed"
    assert "diverged" in run.status.message
    state = json.loads(run.mirror_file.read_text())
    recorded = MlflowClient(compose(overrides).mlflow_uri).get_run(state["run_id"])
    assert recorded.info.status == "FAILED"
    assert "diverged" in recorded.data.tags["message"]


def test_an_unexpected_error_is_in_the_status_and_its_traceback_is_printed(
    tiny: list[str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr("relora.training.trainer.Trainer.restart", lambda self, step: 1 / 0)
    assert cli.run(tiny) == 1
    run = run_of(tiny)
    assert run.status is not None
    assert run.status.message == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


def test_a_run_finishes_while_mlflow_is_down(tiny: list[str], capsys) -> None:
    overrides = [*tiny, "tracker=mlflow", "tracker.uri=http://127.0.0.1:9"]
    assert cli.run(overrides) == 0
    assert "relora sync" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ killed, stopped and resumed

KILL_AT = {
    "in the warm start, before any checkpoint": """
        from relora.tracking.console import Console
        Console.progress = lambda self, progress: kill() if progress.step == 2 else None
    """,
    "before a merge": """
        import relora.core.lowrank
        relora.core.lowrank.merge_and_reinit = lambda *args, **settings: kill()
    """,
    "in a merge": """
        from relora.core.lowrank import LowRankLinear
        merge, merged = LowRankLinear.merge, []
        LowRankLinear.merge = lambda self: kill() if len(merged) == 5 else (merged.append(0), merge(self))[1]
    """,
    "between the merge and the reset": """
        import relora.core.reset
        relora.core.reset.reset_optimizer = lambda *args, **settings: kill()
    """,
    "in a re-warm-up": """
        from relora.tracking.console import Console
        Console.progress = lambda self, progress: kill() if progress.step == 12 else None
    """,
    "in the middle of a save": """
        import torch
        save, saved = torch.save, []
        def half(state, file):
            saved.append(0)
            if len(saved) == 2:
                file.write(b"half of it"); file.flush(); kill()
            save(state, file)
        torch.save = half
    """,
    "in the export": """
        import relora.training.pretrained, shutil
        relora.training.pretrained.shutil.copyfile = lambda *names: kill()
    """,
}


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights of the undisturbed tiny run."""
    from small import TINY

    overrides = [
        *(*TINY, "data=text", f"data.path={text}", "tracker=jsonl", "trainer.checkpoint_interval_steps=4"),
        f"runs_dir={tmp_path_factory.mktemp('undisturbed')}",
    ]
    launch(compose(overrides), overrides)
    return digest(run_of(overrides).model)


@pytest.mark.parametrize("where", KILL_AT)
def test_a_killed_run_started_again_ends_with_the_same_weights(tiny: list[str], undisturbed: str, where: str) -> None:
    overrides = [*tiny, "trainer.checkpoint_interval_steps=4"]
    lines = [line.removeprefix(" " * 8) for line in KILL_AT[where].splitlines()]
    script = "\n".join(
        [
            "import os, signal, sys",
            "def kill(): os.kill(os.getpid(), signal.SIGKILL)",
            *lines,
            "from relora.cli.main import run",
            "sys.exit(run(sys.argv[1:]))",
        ]
    )
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script, *overrides], env=threads, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    run = run_of(overrides)
    assert run.status is not None
    assert run.status.state == "running"
    assert not run.is_locked
    status = launch(compose(overrides), overrides)
    assert status.state == "finished"
    assert status.attempt == 2
    assert digest(run.model) == undisturbed
    assert sorted(path.name for path in run.path.rglob("*.tmp")) == []


def started(overrides: list[str]) -> subprocess.Popen[str]:
    """Start a run in a separate process, and wait until it trains."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *overrides],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = run_of(overrides)
    while not any(row["step"] > 20 for row in read_rows(run.metrics_file)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


LONG = ["trainer.total_steps=203", "method.reset_interval_steps=100", "trainer.checkpoint_interval_steps=1000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_write_a_checkpoint_and_print_the_command_to_resume(
    tiny: list[str], number: signal.Signals
) -> None:
    from mlflow import MlflowClient

    overrides = [*tiny, *LONG, "tracker=mlflow", "trainer.validation_interval_steps=1000"]
    process = started(overrides)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in shown
    run = run_of(overrides)
    assert run.status is not None
    assert run.status.state == "interrupted"
    stopped_at = max(row["step"] for row in read_rows(run.metrics_file))
    assert latest_step(run.checkpoints) == stopped_at
    commands = [line for line in shown.splitlines() if line.startswith("go on with: python run.py ")]
    assert len(commands) == 1
    client = MlflowClient(compose(overrides).mlflow_uri)
    run_id = json.loads(run.mirror_file.read_text())["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"

    resumed = shlex.split(commands[0].removeprefix("go on with: python run.py "))
    assert launch(compose(resumed), resumed).state == "finished"
    recorded = client.get_run(run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["attempt"] == "2"
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
    assert steps == list(range(1, 204))


def test_cfg_job_prints_the_config_without_torch(tmp_path: Path) -> None:
    script = "import sys; from relora.cli.main import run; run(['--cfg', 'job']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "reset_interval_steps: 100" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_groups(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "run.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    listed = "apollo, apollo_mini, cola, control, fira, full, galore, lora, lowrank, relora, sltrain"
    assert f"method: {listed}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_hydras_own_multirun_runs_every_job(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "run.py"), "-m", *tiny, "trainer.seed=0,1", "hydra/launcher=basic"]
    subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for seed in (0, 1):
        status = run_of([*tiny, f"trainer.seed={seed}"]).status
        assert status is not None
        assert status.state == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def on_a_terminal(overrides: list[str], columns: int = 150) -> str:
    """Return what `python run.py` shows on a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "run.py", *overrides],
        cwd=REPOSITORY,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_shows_a_live_bar_with_all_values(tiny: list[str]) -> None:
    overrides = [*tiny, "trainer.total_steps=203", "method.reset_interval_steps=50"]
    text = on_a_terminal(overrides)
    for part in ("203/203", "loss ", "lr ", "tokens/s", " left", "next restart 53"):
        assert part in text, part
    assert "restart 1, merged" in text


def test_a_terminal_shows_a_study_as_a_live_table(tiny: list[str]) -> None:
    overrides = [*tiny, "method.rank=2,4", "study=ranks", "trainer.total_steps=203"]
    text = on_a_terminal(["-m", *overrides, "method.reset_interval_steps=50"], columns=220)
    table, note, below = text.rpartition("gap to full: at equal tokens")
    assert note
    drawn, _, last = table.rpartition("gap to full")
    assert drawn.count("gap to full") > 3, "the table is drawn several times"
    for part in ("running", "missing", "/203", "baseline", "finished"):
        assert part in drawn, part
    assert "\x1b[" in drawn
    rows = [line for line in last.splitlines() if "llama_tiny-" in line and "finished" in line]
    assert len(rows) == 3
    assert all("203/203" in row and "MiB" in row for row in rows)
    assert "report.html" in below
