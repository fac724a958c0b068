"""docs/your-own-method.md works as written: a package outside of the checkout provides a method."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_method import blocks, environment, install
from small import REPOSITORY, TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("own"))


def run(site: Path, *command: str, code: int = 0) -> str:
    """The output of a command with the package installed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment(site),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_page_works_as_written(site: Path, text: Path, tmp_path: Path) -> None:
    (commands,) = (text for _, language, text in blocks() if language == "sh")
    runs_dir = tmp_path / "runs"
    tiny = [*TINY, "data=text", f"data.path={text}", "tracker=jsonl"]
    outputs: list[str] = []
    for line in commands.splitlines()[1:]:  # after the installation
        program, *arguments = shlex.split(line)
        command = arguments if program == "python" else ["-m", "relora", *arguments]
        settings = [] if "report" in arguments else tiny
        outputs.append(run(site, *command, *settings, f"runs_dir={runs_dir}"))
    trained, _, planned, report = outputs
    assert "orthogonal on cpu" in trained
    assert "restart 2, merged" in trained
    assert "-orthogonal-r4-" in planned
    folder = runs_dir / "studies" / "orthogonal" / "report"
    assert os.fspath(folder) in report
    page = (folder / "report.md").read_text()
    assert re.search(r"\| orthogonal[^|]*\|.*[+-]\d+\.\d%", page)
    assert "rates not tuned for this setting" in page
    (finished,) = runs_dir.glob("*-orthogonal-r4-*/status.json")
    assert json.loads(finished.read_text())["state"] == "finished"
    # Without the package, the command names its runs and the remedy, and reports the other runs.
    outputs = [run(tmp_path, "-m", "relora", "report", "orthogonal", f"runs_dir={runs_dir}")]
    page = (folder / "report.md").read_text()
    assert re.search(r"method\.name='?orthogonal.*install that package", page + outputs[0])
    assert re.search(r"\| relora[^|]*\|.*[+-]\d+\.\d%", page)


def test_its_new_a_is_orthogonal_to_the_last_one(site: Path) -> None:
    script = """
import torch
from types import SimpleNamespace
from orthogonal_relora import Orthogonal
from relora import ReLoRAConfig, wrap
model = wrap(torch.nn.Sequential(torch.nn.Linear(16, 8)), ReLoRAConfig(rank=4, target_modules=["0"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
method = Orthogonal(name="orthogonal", rank=4, reset_interval_steps=10)
last = model[0].lora_A.detach().clone()
method.restart(model, optimizer, SimpleNamespace(trainer=SimpleNamespace(seed=0)), 1)
print((model[0].lora_A @ last.T).abs().max().item() < 1e-6, model[0].lora_A.norm().item() > 0.1)
"""
    assert run(site, "-c", script).split() == ["True", "True"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("import no_such_module", "cannot be loaded: .*'no_such_module'"),
        ("Orthogonal = dict", r"not a subclass of relora\.methods\.base\.Method"),
    ],
)
def test_a_method_that_cannot_be_used_gives_one_line(site: Path, tmp_path: Path, change: str, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(site, broken)
    with (broken / "orthogonal_relora" / "__init__.py").open("a") as file:
        file.write(f"\n{change}\n")
    output = run(broken, "-m", "relora", "plan", "method=orthogonal", code=2)
    assert re.search(f"method=orthogonal of .*orthogonal-relora .*{message}", output)
    assert len(output.splitlines()) == 1
