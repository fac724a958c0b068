"""The table of a study; what stands in it comes from tests/test_state.py and tests/slurm."""

from relora.runs.state import ObservedState
from relora.studies.status import StatusRow, render_plain

QUEUED = StatusRow(
    run="llama_tiny-relora-r128-b8382e77",
    role="baseline",
    state=ObservedState(name="queued", message="Priority", requeues=2),
    step=12000,
    total_steps=20000,
    attempts=3,
    validation_perplexity=103.25,
    tokens_per_second=123456.0,
)
RUNNING = StatusRow(
    run="llama_tiny-relora-r4-38e2b877",
    role="arm",
    state=ObservedState(name="running", message="on n1"),
    step=300,
    total_steps=20000,
    seconds_left=3661.0,
    attempts=1,
)


def test_how_often_slurm_put_a_job_back_has_a_column_where_it_has() -> None:
    headings, first, second = (line.split() for line in render_plain([QUEUED, RUNNING]).splitlines())
    assert first[headings.index("requeues") - 1] == "2", "no time left is told of a run that waits"
    assert "2" not in second
    assert "requeues" not in render_plain([RUNNING])


def test_columns_with_nothing_in_them_are_left_out() -> None:
    assert render_plain([RUNNING]).split("\n")[0].split() == ["run", "role", "state", "step", "left", "note"]
