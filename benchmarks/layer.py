"""Time one low-rank layer by each exact way, relative to a full-rank layer. Check the choice in relora.budget.cost.

    OMP_NUM_THREADS=1 python benchmarks/layer.py --threads 1

The time is that of forward, backward and forming W + sBA. In each round all ways take turns. The table shows each
measured ratio, and beside it the ratio of the multiply-adds. It marks a case if another way was faster than the chosen
one by more than `TOLERANCE`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from step import timed
from torch import Tensor, nn

from relora.budget.cost import FACTORED, PLAIN, PROJECTED, cheapest_way, way_multiply_adds
from relora.core.lowrank import LowRankLinear, ReLoRAConfig

CASES = (
    *((128, 128, 8, 2048), (128, 128, 32, 2048), (128, 352, 8, 2048), (128, 352, 32, 2048)),
    *((256, 256, 8, 2048), (256, 256, 64, 2048), (256, 688, 64, 2048)),
    *((512, 512, 32, 1024), (512, 512, 128, 1024), (512, 1376, 128, 1024)),
    *((1024, 1024, 128, 1024), (1024, 2736, 128, 1024), (1024, 1024, 512, 1024), (2048, 2048, 128, 512)),
)
WAYS = (
    ("never", PLAIN),
    ("resident", FACTORED),
    ("resident", PROJECTED),
    ("rebuilt", FACTORED),
    ("rebuilt", PROJECTED),
)
TOLERANCE = 0.03


@dataclass(frozen=True)
class Case:
    """The shape of a matrix, the rank, and the number of tokens in an optimizer step."""

    in_features: int
    out_features: int
    rank: int
    tokens: int

    def multiply_adds(self, merged_weight: str, way: str) -> float:
        """The multiply-adds by this way, divided by those of a full-rank layer."""
        ways = way_multiply_adds(
            self.in_features,
            self.out_features,
            self.rank,
            merged_weight=merged_weight,
            tokens_per_micro_step=self.tokens,
            micro_steps=1,
        )
        return ways[way] / (3 * self.in_features * self.out_features * self.tokens)

    def chosen(self, merged_weight: str) -> str:
        """The way that `refresh` chooses."""
        shape = (self.in_features, self.out_features, self.rank)
        return cheapest_way(*shape, merged_weight=merged_weight, tokens_per_micro_step=self.tokens)


def passes(case: Case, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """Functions that do one pass: the first through a full-rank layer, then one for each of `WAYS`."""

    def linear() -> nn.Linear:
        return nn.Linear(case.in_features, case.out_features, bias=False, device=device, dtype=dtype)

    x_NxI = torch.randn(case.tokens, case.in_features, device=device, dtype=dtype, requires_grad=True)
    g_NxO = torch.randn(case.tokens, case.out_features, device=device, dtype=dtype)

    def through(layer: nn.Module, prepare: Callable[[], object]) -> Callable[[], object]:
        parameters: list[Tensor] = [each for each in layer.parameters() if each.requires_grad]

        def one_pass() -> object:
            prepare()
            return torch.autograd.grad(layer(x_NxI), [x_NxI, *parameters], g_NxO)

        return one_pass

    found = [through(linear(), lambda: None)]
    for merged_weight, way in WAYS:
        layer = LowRankLinear(linear(), ReLoRAConfig(rank=case.rank, target_modules=()))
        layer.initialise(seed=0, restart=0, name="layer")
        resident = merged_weight == "resident"
        found.append(
            through(layer, lambda layer=layer, way=way, kept=resident: layer.refresh(way, resident=kept, dtype=dtype))
        )
    return found


def ratios(case: Case, rounds: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """The measured time ratio of each of `WAYS` to full rank, as the median over the rounds.

    Each pass is repeated until one measurement takes a few milliseconds.
    """
    actions = passes(case, dtype, device)
    repeats = max(1, round(3e9 / (6 * case.in_features * case.out_features * case.tokens)))
    times: list[list[float]] = [[] for _ in actions]
    for number in range(-1, rounds):
        order = range(len(actions))
        for position in (*order[number % len(order) :], *order[: number % len(order)]):
            took = timed(lambda action=actions[position]: [action() for _ in range(repeats)], device)
            if number >= 0:
                times[position].append(took)
    full, *others = times
    return [median(own / whole for own, whole in zip(each, full, strict=True)) for each in others]


def main() -> None:
    """Run the benchmark. The module's docstring describes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16

    heads = [way if merged_weight == "never" else f"{way}, {merged_weight}" for merged_weight, way in WAYS]
    print(f"| in x out, rank, tokens | {' | '.join(heads)} | chosen |\n|---|{'---:|' * len(heads)}---|")
    for each in CASES:
        case = Case(*each)
        found = dict(zip(WAYS, ratios(case, options.rounds, dtype, torch.device(options.device)), strict=True))
        cells = [f"{found[key]:.3f} ({case.multiply_adds(*key):.3f})" for key in WAYS]
        chosen = []
        for merged_weight in ("resident", "rebuilt"):
            way = case.chosen(merged_weight)
            own = found["never" if way == PLAIN else merged_weight, way]
            best = min(value for key, value in found.items() if key[0] in (merged_weight, "never"))
            chosen.append(way + (f" ({own / best - 1:.0%} slower)" if own > (1 + TOLERANCE) * best else ""))
        shape = f"{case.in_features} x {case.out_features}, {case.rank}, {case.tokens:,}"
        print(f"| {shape} | {' | '.join(cells)} | {', '.join(dict.fromkeys(chosen))} |", flush=True)


if __name__ == "__main__":
    main()
