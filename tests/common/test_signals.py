"""Ctrl-C, SIGTERM and SIGUSR2 in the first and last moments of real processes. test_job.py tests the time between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import REPOSITORY

from relora.common import signals
from relora.config.compose import compose
from relora.config.frozen import freeze
from relora.launching import local
from relora.runs.checkpoint import latest_step
from relora.runs.rundir import RunDir, Status, write_json
from relora.studies.study import Planned

pytestmark = pytest.mark.slow


NUMBERS = list(signals.NAMES)
ids = [number.name for number in NUMBERS]


def prepared(overrides: list[str]) -> Planned:
    config = compose(overrides)
    run = RunDir(config.run_dir)
    run.path.mkdir(parents=True)
    freeze(config, run.config_file)
    write_json(run.launch_file, {"overrides": overrides})
    return Planned(config=config, role="arm")


def status_of(run: RunDir) -> Status:
    status = run.status
    assert status is not None
    return status


def run_py(overrides: list[str], before: str) -> subprocess.CompletedProcess[str]:
    """Run `python run.py` in a process that first executes `before`. There, `send()` sends a signal to the process."""
    script = f"""
import os, runpy, signal, sys
def send(number=signal.SIGUSR2):
    os.kill(os.getpid(), number)
{before}
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""
    command = [sys.executable, "-c", script, *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=env)


# -------------------------------------------------------------------------------------------------- the first second


@pytest.mark.parametrize("number", NUMBERS, ids=ids)
def test_a_signal_right_after_the_start_stops_the_run(tiny: list[str], number: signal.Signals) -> None:
    item = prepared(tiny)
    process = local.start_process(item, 1)
    process.send_signal(number)  # long before Python runs
    assert process.wait(60) == 130
    status = status_of(item.run)
    assert (status.state, status.stopped_by) == ("interrupted", signals.NAMES[number])
    shown = (item.run.path / "log.txt").read_text()
    assert re.search(f"interrupted: {signals.NAMES[number]}; .*checkpoint is kept\ngo on with: ", shown)
    assert "Traceback" not in shown


def test_a_signal_before_anything_begins_prints_one_short_line(tiny: list[str]) -> None:
    done = run_py(
        tiny,
        """
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == "relora.cli.main":
            send()
sys.meta_path.insert(0, AtImport())
""",
    )
    assert (done.returncode, done.stderr) == (130, "relora: interrupted\n")
    assert not compose(tiny).run_dir.exists()


@pytest.mark.parametrize("number", NUMBERS, ids=ids)
def test_signals_during_the_imports_stop_the_run_and_break_no_import(tiny: list[str], number: signal.Signals) -> None:
    done = run_py(
        tiny,
        f"""
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch.optim", "transformers.models.llama.modeling_llama", "relora.training.trainer"):
            send({number.value})
sys.meta_path.insert(0, AtImport())
""",
    )
    assert done.returncode == 130, done.stdout + done.stderr
    status = status_of(RunDir(compose(tiny).run_dir))
    assert status.state == "interrupted"
    assert status.message == f"{signals.NAMES[number]}; the newest checkpoint is kept"
    assert "Traceback" not in done.stderr


def test_an_interruption_is_recorded_also_if_a_library_raises_another_error(tiny: list[str]) -> None:
    done = run_py(
        tiny,
        """
import relora.training.job
def build_trainer(*args, **settings):
    try:
        send(signal.SIGTERM); send(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ModuleNotFoundError("Could not import module LlamaForCausalLM")
relora.training.job.build_trainer = build_trainer
""",
    )
    assert done.returncode == 130
    assert status_of(RunDir(compose(tiny).run_dir)).message == "SIGTERM; the newest checkpoint is kept"


# --------------------------------------------------------------------------------------------------- the last second


def test_signals_while_the_end_is_recorded_and_the_interpreter_shuts_down_change_nothing(tiny: list[str]) -> None:
    """When Python shuts down, it replaces signal handlers by the default action, which kills the process."""
    done = run_py(
        tiny,
        """
import relora.training.job
write = relora.training.job._Attempt._write_status
def send_all(times=1, kill=os.kill, own=os.getpid(), numbers=(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)):
    for number in numbers * times:
        kill(own, number)
def write_status(self):
    send_all(2)
    write(self)
relora.training.job._Attempt._write_status = write_status
class Last:
    def __del__(self, send_all=send_all, write=os.write):
        write(1, b"shutting down")
        send_all()
        write(1, b" undisturbed")
last = Last()
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("shutting down undisturbed")
    assert status_of(RunDir(compose(tiny).run_dir)).state == "finished"


def test_a_signal_in_the_export_stops_before_the_evaluation_and_the_run_can_resume(tiny: list[str]) -> None:
    done = run_py(
        tiny,
        """
import relora.training.pretrained, relora.training.sampling
save = relora.training.pretrained.save_pretrained
def and_send(*args):
    save(*args); send()
relora.training.pretrained.save_pretrained = and_send
relora.training.sampling.sample = lambda *args, **settings: 1 / 0
""",
    )
    assert done.returncode == 130, done.stdout + done.stderr
    run = RunDir(compose(tiny).run_dir)
    assert status_of(run).state == "interrupted"
    assert latest_step(run.checkpoints) == 14
    assert run_py(tiny, "").returncode == 0
    assert status_of(run).state == "finished"


# ------------------------------------------------------------------------------------------------------ what is left


def test_files_of_killed_writes_are_removed_and_files_of_other_processes_are_kept(tiny: list[str]) -> None:
    item = prepared(tiny)
    run = item.run
    (run.checkpoints / "step-00000005.tmp").mkdir(parents=True)
    torn = [run.path / "status.json.7.tmp", run.checkpoints / "step-00000005.pt.tmp", run.path / "mlflow.json.7.tmp"]
    for file in torn:
        file.write_text("half")
    long_ago = time.time() - 3600
    os.utime(torn[-1], (long_ago, long_ago))
    fresh = run.path / "submission.json.8.tmp"
    fresh.write_text("half")
    with run.locked():
        run.remove_leftovers()
    assert list(run.path.rglob("*.tmp")) == [fresh]


# ------------------------------------------------------------------------------------------------------------ modes


def test_the_first_signal_is_recorded_and_the_second_interrupts() -> None:
    names: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with signals.asked(names.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.reason(), signals.interrupted(), names) == ("SIGTERM", False, ["SIGTERM"])
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # no second exception disturbs the handling of the first
        assert signals.interrupted()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signals.reason() is None


def test_the_warning_of_slurm_may_be_repeated_and_a_later_sigterm_interrupts() -> None:
    with signals.asked(lambda name: None):
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reason() == "SIGUSR2"


def test_a_signal_before_a_wait_ends_the_wait_and_a_handled_signal_does_not() -> None:
    with signals.held():
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(KeyboardInterrupt), signals.raising():
            raise AssertionError("not reached")
        signals.forget()
        with signals.raising():
            pass


def test_a_process_started_with_signals_blocked_gets_them_when_it_holds_them(tmp_path: Path) -> None:
    script = "import json, time; from relora.common import signals; time.sleep(0.5); signals.hold(); "
    script += "print(json.dumps(signals.reason()))"
    with signals.blocked():
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path)
    process.send_signal(signal.SIGUSR2)
    assert json.loads(process.communicate(timeout=300)[0]) == "SIGUSR2"
