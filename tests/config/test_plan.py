import json
import re
import subprocess
import sys

import pytest
from small import TINY

from relora.budget.cost import break_even_rank
from relora.config.compose import compose
from relora.config.plan import run_plan
from relora.config.plan_text import as_dict, text, warnings


def test_a_plan_has_the_values_that_the_run_will_record(tiny: list[str]) -> None:
    config = compose([*tiny, "method.rank=12"])
    made = run_plan(config)
    assert (made.total_steps, made.restarts, made.tokens) == (14, 2, 14 * 64)
    own, full = config.cost(300), config.cost(300, warm_start=True)
    assert made.total_flops == 3 * full.flops_per_update(64) + 11 * own.flops_per_update(64) + 2 * own.merge_flops
    merged_weight_bytes = own.merged_weight_bytes(tokens_per_micro_step=64, micro_steps=1)
    assert made.state_bytes == own.weight_bytes + own.gradient_bytes + own.optimizer_bytes + merged_weight_bytes
    rebuilt = run_plan(compose([*tiny, "method.rank=12", "method.merged_weight=rebuilt"]))
    assert rebuilt.state_bytes == made.state_bytes - merged_weight_bytes
    assert made.name == rebuilt.name


@pytest.mark.parametrize("merged_weight", ["resident", "never"])
def test_the_break_even_rank_is_the_highest_that_takes_fewer_flops(merged_weight: str) -> None:
    base = ["model=llama_60m", "data.vocab_size=32000", "trainer.sequences_per_step=32", "method=lora"]
    base += [f"method.merged_weight={merged_weight}"]
    config = compose([*base, "method.rank=8"])
    tokens = config.tokens_per_step
    settings = {"sequence_length_tokens": 128, "target_modules": config.method.target_modules}  # type: ignore[attr-defined]
    rank = break_even_rank(
        config.model.shape(32_000), **settings, tokens_per_update=tokens, merged_weight=merged_weight
    )
    full = config.cost(32_000, warm_start=True).flops_per_update(tokens)
    below, above = (
        compose([*base, f"method.rank={r}"]).cost(32_000).flops_per_update(tokens, merged_weight=merged_weight)
        for r in (rank, rank + 1)
    )
    assert below < full <= above
    assert rank > 100


@pytest.mark.slow
def test_a_rank_above_the_break_even_gives_a_warning() -> None:
    few = [*TINY, "method.rank=4"]
    many = [*TINY, "method.rank=30"]
    assert warnings(run_plan(compose(few)), compose(few)) == []
    (found,) = warnings(run_plan(compose(many)), compose(many))
    assert re.match(r"method\.rank=30 is above the break-even of \d+.* lower method\.rank", found)
    assert found in text(run_plan(compose(many)), compose(many))
    assert as_dict(run_plan(compose(many)), compose(many))["warning"] == found


@pytest.mark.slow
def test_a_plan_of_several_processes_has_the_values_of_one_process_and_says_so() -> None:
    base = ["model=llama_60m", "data.vocab_size=32000", "method.rank=128", "trainer.sequences_per_step=512"]
    several = compose([*base, "cluster=slurm", "cluster.nodes=2", "cluster.tasks_per_node=8"])
    share = compose([*base, "trainer.sequences_per_step=32"])
    assert re.search("32 sequences at a time .*16 processes", text(run_plan(several), several))
    buffer_bytes = 4 * run_plan(share).trainable_parameters
    assert run_plan(several).peak_bytes == run_plan(share).peak_bytes + buffer_bytes, (
        "the buffer in which the processes sum gradients"
    )
    uneven = compose([*base, "cluster=slurm", "cluster.nodes=2", "trainer.sequences_per_micro_step=512"])
    assert re.search("256 sequences at a time .*2 processes", text(run_plan(uneven), uneven))


@pytest.mark.slow
def test_flops_are_those_of_the_computation_that_the_run_uses() -> None:
    base = ["model=llama_350m", "data.vocab_size=32100", "data.sequence_length_tokens=256", "method.rank=128"]
    base += ["method.merged_weight=rebuilt", "trainer.sequences_per_step=64"]
    at_once, one_by_one = (compose([*base, *more]) for more in ([], ["trainer.sequences_per_micro_step=1"]))
    never = compose([*base, "method.merged_weight=never"])
    assert (
        run_plan(at_once).flops_per_update < run_plan(one_by_one).flops_per_update == run_plan(never).flops_per_update
    )
    assert run_plan(at_once).break_even_rank > run_plan(one_by_one).break_even_rank  # type: ignore[operator]


@pytest.mark.slow
def test_with_dropout_nothing_is_computed_on_a_merged_weight() -> None:
    never, dropout = (compose([*TINY, item]) for item in ("method.merged_weight=never", "method.dropout=0.1"))
    assert run_plan(dropout).merged_weight_bytes == run_plan(never).merged_weight_bytes == 0
    for made in (run_plan(dropout), run_plan(never)):
        assert made.flops_per_update > run_plan(compose(TINY)).flops_per_update
    assert run_plan(dropout).flops_per_update == run_plan(never).flops_per_update
    assert run_plan(dropout).break_even_rank == run_plan(never).break_even_rank
    recorded = [config.cost(300).flops_per_update(config.tokens_per_step) for config in (never, dropout)]
    assert recorded[0] < recorded[1], "a run records the fewest FLOPs that its method needs, even if it computes more"


def test_a_control_model_is_compared_with_the_model_that_it_controls_for() -> None:
    config = compose([item for item in TINY if not item.startswith("method")] + ["method=control", "method.rank=4"])
    full = compose([item for item in TINY if not item.startswith("method")] + ["method=full"])
    made = run_plan(config)
    assert made.flops_per_update < made.flops_per_update_at_full_rank == run_plan(full).flops_per_update
    assert made.state_bytes < made.bytes_at_full_rank == run_plan(full).state_bytes


def test_a_method_without_factors_has_no_break_even() -> None:
    config = compose(["method=full"])
    made = run_plan(config)
    assert made.break_even_rank is None
    assert "break-even" not in text(made, config)
    assert made.state_bytes == made.bytes_at_full_rank


@pytest.mark.slow
def test_relora_plan_does_not_import_torch() -> None:
    code = (
        "import sys; from relora.cli.main import main; code = main(['plan', '--json', 'method.rank=8']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output)["trainable_parameters"] < json.loads(output)["parameters"]


@pytest.mark.slow
def test_a_wrong_option_is_reported_with_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relora", "plan", "method.rank=600"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.match(r"relora: .*rank=600 exceeds .* lower method\.rank", done.stderr)
    assert "Traceback" not in done.stderr
