"""A CoLA model is exported with its modelling file. relora loads it with its own class, transformers with the file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.cli import main as cli
from relora.common.errors import RunError
from relora.config.compose import compose
from relora.runs.rundir import RunDir
from relora.training import modeling_cola
from relora.training.architecture import Architecture
from relora.training.job import launch
from relora.training.model import build, logits, summed_cross_entropy
from relora.training.pretrained import load_pretrained

pytestmark = pytest.mark.slow

ALONE = """
import sys
import torch
sys.modules["relora"] = None  # any import of relora fails
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("refused" if "trust_remote_code" in str(error) else error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
tokens = torch.arange(12)[None]
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, sys.argv[2])
print(type(model).__name__, model.generate(tokens, max_new_tokens=5, do_sample=False).shape[1])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> RunDir:
    from small import TINY

    own = [each for each in TINY if not each.startswith("method.")]
    arm = ["method=cola", "method.rank=6", "method.target_modules=[q_proj,mlp.up_proj,down_proj]"]
    overrides = [*own, *arm, "data=text", f"data.path={text}", f"runs_dir={tmp_path_factory.mktemp('runs')}"]
    overrides += ["tracker=jsonl"]
    config = compose(overrides)
    status = launch(config, overrides)
    assert status.state == "finished", status.message
    return RunDir(config.run_dir)


def test_relora_loads_the_export_with_its_own_class(run: RunDir) -> None:
    """The export has compared all weights and the loss already. Here the folder's own file cannot be run at all."""
    config = json.loads((run.model / "config.json").read_text())
    assert config["model_type"] == "cola_llama"
    assert config["architectures"] == ["CoLALlamaForCausalLM"]
    assert (config["cola_rank"], config["cola_target_modules"]) == (6, ["q_proj", "mlp.up_proj", "down_proj"])
    file = run.model / "modeling_cola.py"
    assert file.read_text() == Path(modeling_cola.__file__).read_text()
    text = file.read_text()
    try:
        file.write_text("raise SystemExit('the code of a folder was run')\n")
        model = load_pretrained(run.model)
    finally:
        file.write_text(text)
    assert type(model) is modeling_cola.CoLALlamaForCausalLM
    kinds = {name: type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    cola = [name for name, kind in kinds.items() if kind is modeling_cola.CoLALinear]
    assert sorted(cola) == sorted(name for name in kinds if name.endswith(("q_proj", "up_proj", "down_proj")))


def test_evaluate_and_sample_work_on_the_export(run: RunDir, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run.status
    assert status is not None
    data = [f"data.path={text}", "data=text", "data.vocab_size=300", "data.sequence_length_tokens=16"]
    data += ["data.validation_fraction=0.05", "data.test_fraction=0.05", f"runs_dir={run.path.parent}"]
    assert cli.main(["evaluate", str(run.model), "--json", *data]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(status.summary["test_loss"], rel=1e-6)
    assert cli.main(["sample", str(run.model), "--prompt", "def"]) == 0
    assert "def" in capsys.readouterr().out


def test_transformers_loads_the_folder_without_relora(run: RunDir, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, os.fspath(run.model), os.fspath(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": os.fspath(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "CoLALlamaForCausalLM", "17"]
    model = load_pretrained(run.model)
    with torch.no_grad():
        ours = logits(model, torch.arange(12)[None])
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), ours, atol=1e-5)


def test_the_class_of_the_export_computes_as_the_trained_model() -> None:
    config = compose(["method=cola", "method.rank=6", "model.layers=2", "model.hidden_size=32", "model.heads=2"])
    trained = build(config.model, config.model.shape(64), end_of_text_id=0, seed=0).double()
    config.method.begin(trained, config)
    settings = {**trained.config.to_dict(), **config.method.exported_config(config)}  # type: ignore[union-attr, operator]
    exported = modeling_cola.CoLALlamaForCausalLM(modeling_cola.CoLALlamaConfig(**settings)).double()
    exported.load_state_dict(trained.state_dict())
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        one, other = (summed_cross_entropy(model.eval(), tokens, tokens.flip(1)) for model in (trained, exported))
        assert one.item() == pytest.approx(other.item(), rel=1e-9)
        full = torch.nn.functional.cross_entropy(logits(exported, tokens).flatten(0, 1), tokens.flip(1).flatten())
    assert one.item() / 20 == pytest.approx(full.item(), rel=1e-6)


def test_new_weights_of_the_class_are_random_and_not_empty() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    own: dict[str, Any] = {**sizes, "vocab_size": 50, "cola_rank": 16, "cola_target_modules": ["q_proj"]}
    config = modeling_cola.CoLALlamaConfig(**own)
    model = modeling_cola.CoLALlamaForCausalLM(config)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, modeling_cola.CoLALinear)
    product = layer.factor_B @ layer.factor_A
    assert product.std().item() == pytest.approx(config.initializer_range, rel=0.2)


def test_a_plain_method_has_no_architecture() -> None:
    for method in ("full", "lowrank", "sltrain", "relora"):
        assert Architecture.of(compose([f"method={method}"])) is None


def test_weights_that_are_missing_are_an_error(run: RunDir, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "cola_target_modules": ["k_proj"]}))
    with pytest.raises(RunError, match=r"config\.json requires .*, which the weights do not have"):
        load_pretrained(tmp_path / "model")
