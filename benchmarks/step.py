"""Measure step time, tokens/s, FLOP utilisation and peak memory of low-rank training against full rank.

Also the time of a restart.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/step.py --threads 1 --out docs/performance    # .json, .md, .png

A step is one optimizer step of the trainer: forward, backward, clip, AdamW, and for the fast paths the refresh.

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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from relora.budget.cost import Cost, cost
from relora.budget.memory import peak_bytes
from relora.config.compose import composed
from relora.config.groups import ModelConfig
from relora.core.exact_ways import refresh
from relora.core.lowrank import ReLoRAConfig, low_rank_layers, merge_and_reinit, wrap
from relora.core.reset import reset_optimizer
from relora.training.model import build, precision_context, summed_cross_entropy

VOCAB_SIZE = 32_100
SEQUENCE_LENGTH_TOKENS = 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("full", "peft", "never", "rebuilt", "resident")
NAMES = {
    "full": "full rank",
    "peft": "PEFT",
    "never": "reference path",
    "rebuilt": "fast, merged weight rebuilt",
    "resident": "fast, merged weight resident",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A setting in which all arms are compared."""

    size: str
    rank: int
    precision: str
    tokens: int
    micro_steps: int
    layers: int

    def model_config(self) -> ModelConfig:
        """The model config of this size, with at most `layers` layers."""
        values = dict(composed([f"model=llama_{self.size}"]).model)
        return ModelConfig(**{**values, "layers": min(self.layers, values["layers"])})

    def cost(self, arm: str) -> Cost:
        """The cost of the measured model in this arm."""
        factors = {} if arm == "full" else {"rank": self.rank, "target_modules": TARGETS}
        return cost(
            self.model_config().shape(VOCAB_SIZE),
            sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
            precision=self.precision,
            **factors,
        )

    def flops(self, arm: str) -> int:
        """FLOPs of one step in this arm."""
        if arm == "full":
            return self.cost(arm).flops_per_update(self.tokens)
        way = "never" if arm == "peft" else arm
        return self.cost(arm).flops_per_update(self.tokens, merged_weight=way, micro_steps=self.micro_steps)


class Arm:
    """A model and its optimizer, which can make steps and restarts."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        self.case, self.name, self.device = case, name, device
        config = case.model_config()
        model = build(config, config.shape(VOCAB_SIZE), end_of_text_id=0, seed=0)
        self.storage = torch.bfloat16 if case.precision == "bf16" else torch.float32
        self.model = model.to(device, self.storage)
        if name == "peft":
            _peft(self.model, case.rank)
        elif name != "full":
            wrap(self.model, ReLoRAConfig(rank=case.rank, target_modules=TARGETS))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        sequences = case.tokens // SEQUENCE_LENGTH_TOKENS
        shape = (sequences, SEQUENCE_LENGTH_TOKENS)
        self.tokens = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0)).to(device)
        self._refresh()

    def _refresh(self) -> None:
        if self.name in ("resident", "rebuilt"):
            refresh(
                self.model,
                merged_weight=self.name,
                tokens_per_micro_step=self.case.tokens // self.case.micro_steps,
                micro_steps=self.case.micro_steps,
                dtype=torch.float32 if self.case.precision == "fp32" else torch.bfloat16,
            )

    def step(self) -> None:
        """Make one optimizer step as the trainer does."""
        for tokens in self.tokens.chunk(self.case.micro_steps):
            with precision_context(self.case.precision, self.device):
                loss = summed_cross_entropy(self.model, tokens, tokens)
            (loss / self.case.tokens).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._refresh()

    def kept_bytes(self) -> int:
        """Bytes of weights, resident merged weights and optimizer state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        merged = [layer._merged for _, layer in low_rank_layers(self.model) if layer._merged is not None]
        return sum(each.numel() * each.element_size() for each in [*self.model.parameters(), *state, *merged])

    def planned_bytes(self) -> int:
        """The peak memory that relora.budget.memory estimates. PEFT gets the estimate of the reference path."""
        case = self.case
        return peak_bytes(
            case.model_config().shape(VOCAB_SIZE),
            case.cost(self.name),
            sequences_per_micro_step=case.tokens // case.micro_steps // SEQUENCE_LENGTH_TOKENS,
            sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
            micro_steps=case.micro_steps,
            precision=case.precision,
            merged_weight={"full": "never", "peft": "never"}.get(self.name, self.name),
            activation_checkpointing=False,
            update_in_backward=False,
            world_size=1,
        )

    def restart(self) -> None:
        """Make one restart: merge, reinitialise the factors, and prune the optimizer state."""
        merge_and_reinit(self.model, seed=0, restart=1)
        reset_optimizer(self.optimizer, self.model)


def _peft(model: nn.Module, rank: int) -> None:
    """Put PEFT's LoRA into the same matrices. Everything else stays trainable, as in ReLoRA."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank / 4, target_modules=TARGETS), model)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".base_layer." not in name)


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


def measured(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure a case. Return a row for each arm, and one for the restart."""
    arms = {name: Arm(case, name, device) for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(-1, rounds):
        # Another arm is first in each round. Any arm that was last in every round was measured 5% slower.
        first = number % len(ARMS)
        for name in (*ARMS[first:], *ARMS[:first]):
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
                "flop_ratio": case.flops(name) / case.flops("full"),
                "tokens_per_second": case.tokens / median(times),
                "flop_utilisation": case.flops(name) / median(times) / peak,
                "peak_bytes": arms[name].kept_bytes() + most_allocated_bytes(arms[name].step, device),
                "planned_bytes": arms[name].planned_bytes(),
            }
        )
    restart = [timed(arms["resident"].restart, device) for _ in range(3)]
    rows.append({**asdict(case), "arm": "restart", "seconds": median(restart), "wrapped": _wrapped(case)})
    return rows


def _wrapped(case: Case) -> int:
    return sum(i * o for i, o in case.cost("resident").wrapped)


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
            f"| {_size(row)} | {row['rank']} | {row['precision']} | {row['tokens']:,} | {NAMES[row['arm']]} "
            f"| {row['seconds'] * 1000:,.0f} ms | {row['ratio']:.3f}{spread} | {row['flop_ratio']:.3f} "
            f"| {row['tokens_per_second']:,.0f} | {row['flop_utilisation']:.0%} | {held} |"
        )
    lines += [
        "",
        "| size (layers) | rank | parameters wrapped | restart | per million parameters |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["arm"] == "restart":
            millions = row["wrapped"] / 1e6
            lines.append(
                f"| {_size(row)} | {row['rank']} | {millions:.2f}M | {row['seconds'] * 1000:.0f} ms "
                f"| {row['seconds'] * 1000 / millions:.1f} ms |"
            )
    return "\n".join(lines) + "\n"


def _size(row: dict[str, Any]) -> str:
    return f"{row['size']} ({row['layers']})"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the measured ratios and the FLOP limit of each case."""
    import matplotlib.pyplot as plt

    arms = [arm for arm in ARMS if arm != "full"]
    found = {(_size(r), r["rank"], r["precision"], r["tokens"], r["arm"]): r for r in rows}
    cases = list(dict.fromkeys(key[:-1] for key in found))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.32 * len(cases)), layout="constrained")
    for arm, colour, marker in zip(arms, ("#D55E00", "#E69F00", "#56B4E9", "#0072B2"), "XsvD", strict=True):
        ratios = [found[*case, arm]["ratio"] for case in cases]
        axes.scatter(ratios, range(len(cases)), c=colour, marker=marker, label=NAMES[arm])
    limit = [found[*case, "resident"]["flop_ratio"] for case in cases]
    axes.scatter(limit, range(len(cases)), c="black", marker="|", s=120, label="FLOP limit")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{s} r={r} {p}, {t:,} tokens" for s, r, p, t in cases])
    axes.invert_yaxis()
    axes.set_xlabel("step time / full-rank step time")
    axes.margins(y=0.02)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the benchmark. The module's docstring describes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["9m:8,32,64", "20m:8,64,128", "60m:8,128,256", "350m:128,512"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens-at-a-time", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("performance"), help="output path without a suffix")
    options = parser.parse_args()
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
                    found = measured(case, options.rounds, device)
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
