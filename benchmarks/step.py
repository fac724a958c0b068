"""Measure step time, tokens/s, FLOP utilisation and peak memory of every method against full rank.

Also the time of a restart.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/step.py --threads 1 --out docs/steps    # .json, .md, .png
    OMP_NUM_THREADS=1 python benchmarks/step.py --threads 1 --out docs/arms --arms full relora galore fira apollo \
        apollo_mini lowrank sltrain cola --cases 60m:128 --layers 8 --tokens 4096

A step is one optimizer step of the trainer: forward, backward, clip, the method's optimizer, and the refresh. It is the
trainer's own code, except for PEFT. GaLore and Fira compute their projections in the first step, which is not measured.

All arms of a case are in one process and take turns: each makes one step in a round. So other load on the machine hits
all arms equally. Each arm is first and last equally often if `--rounds` is a multiple of the number of arms. A ratio is
the median over the rounds of an arm's step time divided by the full-rank step time of the same round.

On the CPU with one thread, the time is the CPU time of that thread, and with more threads the wall-clock time. On CUDA
it is measured with events. The peak is the most memory that torch allocates in one more step, with weights and
optimizer state. Beside it is the estimate of relora.budget.memory. Models have the width, heads and vocabulary of
conf/model, and `--layers` layers. Cases that are in the .json file already are not measured again.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import nn

from relora.config.compose import compose, composed
from relora.config.plan import run_plan
from relora.config.run import RunConfig
from relora.core.lowrank import low_rank_layers
from relora.data.sequences import TokenSequences
from relora.runs.metrics import Broadcast
from relora.studies.drawing import MARKERS, line_styles
from relora.training.model import build, precision_context, summed_cross_entropy
from relora.training.trainer import Trainer

VOCAB_SIZE = 32_100
SEQUENCE_LENGTH_TOKENS = 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT_WAYS = ("full", "peft", "never", "rebuilt", "resident")
"""The arms that are measured unless others are named: full rank, and the ways to compute ReLoRA."""
NAMES = {
    "full": "full rank",
    "peft": "PEFT",
    "never": "reference path",
    "rebuilt": "fast, merged weight rebuilt",
    "resident": "fast, merged weight resident",
}
"""Names of the arms in tables. Any other arm is the name of a method."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting in which all arms are compared."""

    size: str
    rank: int
    precision: str
    tokens: int
    micro_steps: int
    layers: int

    def config(self, arm: str) -> RunConfig:
        """The run of an arm. PEFT has that of the reference path."""
        way = "never" if arm == "peft" else arm
        method = "relora" if way in EXACT_WAYS[1:] else way
        layers = min(self.layers, composed([f"model=llama_{self.size}"]).model.layers)
        chosen = [f"method={method}"]
        keys = composed(chosen).method
        if keys.get("rank", 1) > 1:  # a rank of 1 is what the method is
            chosen.append(f"method.rank={self.rank}")
        if "merged_weight" in keys and way in EXACT_WAYS:
            chosen.append(f"method.merged_weight={way}")
        sequences = self.tokens // SEQUENCE_LENGTH_TOKENS
        return compose(
            [
                *chosen,
                *(f"model=llama_{self.size}", f"model.layers={layers}", f"model.vocab_size={VOCAB_SIZE}"),
                *("method.warm_start_steps=0", f"data.sequence_length_tokens={SEQUENCE_LENGTH_TOKENS}"),
                f"trainer.precision={self.precision}",
                f"trainer.sequences_per_step={sequences}",
                f"trainer.sequences_per_micro_step={sequences // self.micro_steps}",
            ]
        )


class Arm:
    """A trainer that can make steps and restarts."""

    def __init__(self, case: Case, name: str, device: torch.device, folder: Path) -> None:
        self.case, self.name, self.device, self.steps = case, name, device, 0
        self.config = case.config(name)
        tokens = torch.randint(VOCAB_SIZE, (case.tokens + 1,), generator=torch.Generator().manual_seed(0))
        path = folder / f"{name}.bin"
        path.write_bytes(tokens.numpy().astype(np.uint16).tobytes())
        sequences = TokenSequences(path, "uint16", SEQUENCE_LENGTH_TOKENS)
        self.trainer = Trainer(
            self.config,
            build(self.config.model, self.config.trained_shape(VOCAB_SIZE), end_of_text_id=0, seed=0),
            sequences,
            sequences,
            Broadcast([]),
            vocab_size=VOCAB_SIZE,
            checkpoint_folder=folder / name,
            device=device,
        )
        self.trainer.model.train()
        self.trainer.begin_method(0)

    def step(self) -> None:
        """Make one optimizer step as `Trainer.train` does."""
        trainer = self.trainer
        trainer.set_learning_rate(self.steps)
        trainer.update(self.steps, trainer.forward_backward(self.steps))
        trainer.refresh()
        self.steps += 1

    def kept_bytes(self) -> int:
        """Bytes of weights, resident merged weights, positions of sparse values, and optimizer state."""
        trainer = self.trainer
        return sum(each.numel() * each.element_size() for each in _kept(trainer.model, trainer.optimizer))

    def restart(self) -> None:
        """Make one restart: merge, reinitialise the factors, and prune the optimizer state."""
        self.trainer.method.restart(self.trainer.model, self.trainer.optimizer, self.config, 1)


class PEFTArm(Arm):
    """PEFT's LoRA in the same matrices, in a plain loop. Everything else stays trainable, as in ReLoRA."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.case, self.name, self.device = case, "peft", device
        self.config = case.config(self.name)
        model = build(self.config.model, self.config.trained_shape(VOCAB_SIZE), end_of_text_id=0, seed=0)
        self.model = model.to(device, torch.bfloat16 if case.precision == "bf16" else torch.float32)
        adapter = LoraConfig(r=case.rank, lora_alpha=case.rank / 4, target_modules=TARGETS)  # type: ignore[arg-type]
        inject_adapter_in_model(adapter, self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".base_layer." not in name)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        shape = (case.tokens // SEQUENCE_LENGTH_TOKENS, SEQUENCE_LENGTH_TOKENS)
        self.tokens = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step(self) -> None:
        """Make one optimizer step."""
        for tokens in self.tokens.chunk(self.case.micro_steps):
            with precision_context(self.case.precision, self.device):
                loss = summed_cross_entropy(self.model, tokens, tokens)
            (loss / self.case.tokens).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """Bytes of weights and optimizer state."""
        return sum(each.numel() * each.element_size() for each in _kept(self.model, self.optimizer))


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that stay between steps."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    merged = [layer._merged for _, layer in low_rank_layers(model) if layer._merged is not None]
    support = [buffer for name, buffer in model.named_buffers() if name.endswith(".support")]
    return [each for each in [*model.parameters(), *state, *merged, *support] if isinstance(each, torch.Tensor)]


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Run `action` and return the seconds that it took."""
    if device.type == "cuda":
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        action()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1000
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    action()
    return clock() - start


def peak_flops_per_second(precision: str, device: torch.device) -> float:
    """The FLOPs per second of a square matrix product on this device. Utilisation is relative to this."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(2):
        _ = a @ a
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(8))


def measured(case: Case, names: Sequence[str], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure a case. Return a row for each arm, and one for the restart if an arm is "resident"."""
    with tempfile.TemporaryDirectory() as folder:
        return _measured(case, names, rounds, device, Path(folder))


def _measured(
    case: Case, names: Sequence[str], rounds: int, device: torch.device, folder: Path
) -> list[dict[str, Any]]:
    arms = {name: PEFTArm(case, device) if name == "peft" else Arm(case, name, device, folder) for name in names}
    plans = {name: run_plan(arm.config) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        # Another arm is first in each round. Any arm that was last in every round was measured 5% slower.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            took = timed(arms[name].step, device)
            if number >= 0:
                seconds[name].append(took)
    peak = peak_flops_per_second(case.precision, device)
    rows = []
    for name, times in seconds.items():
        ratios = [own / full for own, full in zip(times, seconds["full"], strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                **asdict(case),
                "arm": name,
                "seconds": median(times),
                "ratio": median(ratios),
                "ratio_quartiles": [low, high],
                "flop_ratio": plans[name].flops_per_update / plans["full"].flops_per_update,
                "tokens_per_second": case.tokens / median(times),
                "flop_utilisation": plans[name].flops_per_update / median(times) / peak,
                "peak_bytes": arms[name].kept_bytes() + most_allocated_bytes(arms[name].step, device),
                "planned_bytes": plans[name].peak_bytes,
            }
        )
    if "resident" in arms:
        wrapped = sum(i * o for i, o in arms["resident"].config.cost(VOCAB_SIZE).wrapped)
        restart = [timed(arms["resident"].restart, device) for _ in range(3)]
        rows.append({**asdict(case), "arm": "restart", "seconds": median(restart), "wrapped": wrapped})
    return rows


def most_allocated_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The peak of torch's allocated memory during `action`, minus the memory that was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))  # type: ignore[attr-defined]
    return max(accumulate(changes))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as two Markdown tables: arms and restarts."""
    lines = [
        "| size (layers) | rank | precision | tokens | arm | step | ratio to full | FLOP ratio "
        "| tokens/s | use | peak (plan) |"
    ]
    lines += ["|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        if row["arm"] == "restart":
            continue
        low, high = row["ratio_quartiles"]
        spread = "" if row["arm"] == "full" else f" ({low:.3f} to {high:.3f})"
        held = f"{row['peak_bytes'] / 2**20:,.0f} MiB ({row['planned_bytes'] / row['peak_bytes']:.2f})"
        lines.append(
            f"| {_size(row)} | {row['rank']} | {row['precision']} | {row['tokens']:,} "
            f"| {NAMES.get(row['arm'], row['arm'])} | {row['seconds'] * 1000:,.0f} ms "
            f"| {row['ratio']:.3f}{spread} | {row['flop_ratio']:.3f} "
            f"| {row['tokens_per_second']:,.0f} | {row['flop_utilisation']:.0%} | {held} |"
        )
    restarts = [row for row in rows if row["arm"] == "restart"]
    if not restarts:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| size (layers) | rank | parameters wrapped | restart | per million parameters |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in restarts:
        millions = row["wrapped"] / 1e6
        lines.append(
            f"| {_size(row)} | {row['rank']} | {millions:.2f}M | {row['seconds'] * 1000:.0f} ms "
            f"| {row['seconds'] * 1000 / millions:.1f} ms |"
        )
    return "\n".join(lines) + "\n"


def _size(row: dict[str, Any]) -> str:
    return f"{row['size']} ({row['layers']})"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the measured ratio of each arm, and its FLOP limit as a line of the same colour."""
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] not in ("full", "restart")))
    found = {(_size(r), r["rank"], r["precision"], r["tokens"], r["arm"]): r for r in rows}
    cases = list(dict.fromkeys(key[:-1] for key in found))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.32 * len(cases)), layout="constrained")
    for number, (arm, style) in enumerate(zip(arms, line_styles(len(arms)), strict=True)):
        colour, marker = style["color"], MARKERS[number % len(MARKERS)]
        own = [(place, found[*case, arm]) for place, case in enumerate(cases) if (*case, arm) in found]
        places = [place for place, _ in own]
        axes.scatter([r["ratio"] for _, r in own], places, color=colour, marker=marker, label=NAMES.get(arm, arm))
        axes.scatter([r["flop_ratio"] for _, r in own], places, color=colour, marker="|", s=120)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{s} r={r} {p}, {t:,} tokens" for s, r, p, t in cases])
    axes.invert_yaxis()
    axes.set_xlabel("step time / full-rank step time (lines: FLOPs / full-rank FLOPs)")
    axes.margins(y=0.02)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the benchmark. The module's docstring describes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["9m:8,32,64", "20m:8,64,128", "60m:8,128,256", "350m:128,512"])
    parser.add_argument("--arms", nargs="+", default=list(EXACT_WAYS), help="full, ways to compute ReLoRA, or methods")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens-at-a-time", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("performance"), help="output path without a suffix")
    options = parser.parse_args()
    if "full" not in options.arms:
        parser.error("--arms needs full, with which all other arms are compared")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    results = options.out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    for text in options.cases:
        size, _, ranks = text.partition(":")
        for tokens in options.tokens:
            for precision in options.precisions:
                for rank in map(int, ranks.split(",")):
                    micro = -(-tokens // options.tokens_at_a_time)
                    case = Case(
                        size=size,
                        rank=rank,
                        precision=precision,
                        tokens=tokens,
                        micro_steps=micro,
                        layers=options.layers,
                    )
                    if any(row.items() >= asdict(case).items() for row in rows):
                        continue
                    found = measured(case, options.arms, options.rounds, device)
                    rows += found
                    print(table(found), flush=True)
                    machine = {"torch": torch.__version__, "device": str(device), "threads": options.threads}
                    machine["processor"] = (
                        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
                    )
                    for row in found:
                        row |= {"rounds": options.rounds}
                    results.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(rows))
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
