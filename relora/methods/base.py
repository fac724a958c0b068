"""What a method is: its settings, and the questions that configs, plans, the trainer and reports ask it.

A method is one subclass of `Method` in one file. Its dataclass fields are the keys under `method:`. Its hooks have
defaults that train the whole model at full rank. The file imports torch inside the hooks that need it, so that a config
is composed and checked without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.cost import FACTORS, MATRICES, REST, SCALES, Cost, LlamaShape, cost
from relora.common.checks import MOST_STEPS, at_least, at_most, positive
from relora.common.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What one restart did."""

    relative_update: float
    """|dW| / |W| of the merge."""
    rounding_loss: float
    """Share of the merged update that the storage type could not hold."""
    reset_fraction: float
    """Share of the factors' optimizer state that was zeroed."""


@dataclass(kw_only=True, slots=True)
class Method:
    """The settings that every method has, and the defaults of all hooks.

    A method with a rank has the field `rank`; a method that restarts has the field `reset_interval_steps` (None: it
    never does). Hooks get the whole run's config as `run`.
    """

    is_full_rank: ClassVar[bool] = False
    """Whether it trains the whole model at full rank and other methods are measured against it."""

    name: str
    warm_start_steps: int = 0
    """Updates at full rank before the method begins; part of the budget."""
    warm_start_learning_rate: float | None = None
    """None: that of the optimizer."""

    def __post_init__(self) -> None:
        at_least("method.warm_start_steps", self.warm_start_steps, 0)
        at_most("method.warm_start_steps", self.warm_start_steps, MOST_STEPS, "no run has as many updates")
        positive("method.warm_start_learning_rate", self.warm_start_learning_rate)

    # --------------------------------------------------------------- asked when a run is composed, without torch

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError for settings that do not fit the rest of the run."""

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """The run's hashed fields, by dotted name, with equal meanings written in one way.

        Fields without effect are left out. Runs with equal results are to get equal fields.
        """
        return fields

    @property
    def written_out(self) -> dict[str, Any]:
        """Fields, by dotted name, whose None stands for a value: that value."""
        return {}

    def trained_shape(self, shape: LlamaShape, run: "RunConfig") -> LlamaShape:
        """The sizes of the model that is trained, where `shape` is configured. Raises ConfigError."""
        return shape

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """What an update of a model with the sizes `shape` takes, after the warm start."""
        return cost(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            precision=run.trainer.precision,
            optimizer=run.optimizer,
        )

    def break_even_rank(self, shape: LlamaShape, run: "RunConfig", *, micro_steps: int) -> int | None:
        """The highest rank at which an update takes fewer FLOPs than at full rank; None where that has no meaning.

        micro_steps: of one update, in all processes.
        """
        return None

    @property
    def may_be_baseline(self) -> bool:
        """Whether a run may serve as the full-rank baseline of others."""
        return self.is_full_rank and not self.warm_start_steps

    @property
    def merged_weight_in_use(self) -> str:
        """Whether matrix products use a merged weight: resident, rebuilt or never (relora.core.exact_ways.refresh)."""
        return "never"

    @property
    def switches(self) -> dict[str, Any]:
        """The settings, by dotted name, that change speed or memory and not the results."""
        return {}

    @property
    def memory_options(self) -> Sequence[str]:
        """Overrides that save memory and are not taken yet."""
        return ()

    # ----------------------------------------------------------------------------------- asked by the trainer

    def begin(self, model: "nn.Module", run: "RunConfig") -> None:
        """Change the model when the warm start ends; at the start of the run where there is no warm start."""

    def build_optimizer(self, model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
        """The optimizer of the method's own phase; each group has a `base_learning_rate`, which the schedule scales."""
        return run.optimizer.build(self.parameter_groups(model, run))

    def parameter_groups(self, model: "nn.Module", run: "RunConfig") -> list[dict[str, Any]]:
        """What the optimizer is built from: groups of trained parameters with equal settings."""
        return parameter_groups(model, run, run.optimizer.learning_rate)

    def refresh(self, model: "nn.Module", run: "RunConfig", *, sequences_per_micro_step: int, micro_steps: int) -> None:
        """Prepare the forward pass after the weights or the micro-batch changed. Called after `begin`."""

    def before_update(self, model: "nn.Module", run: "RunConfig", step: int) -> None:
        """Read or change the gradients of the update of `step`, before they are clipped.

        Not called with trainer.update_in_backward, where the gradients are never there all at once.
        """

    def after_update(self, model: "nn.Module", run: "RunConfig", step: int) -> None:
        """Read or change the weights after the update of `step`."""

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Make restart `number` (from 1). Called every `reset_interval_steps` updates."""
        raise NotImplementedError(f"method={self.name} has the field reset_interval_steps and no restart()")

    def finish(self, model: "nn.Module", run: "RunConfig") -> None:
        """Turn the model into a plain one, which is exported. Called once, after the last update."""


def role_of(name: str, parameter: "nn.Parameter") -> str:
    """The role of the parameter `name` of a model."""
    if name.endswith((".lora_A", ".lora_B")):
        return FACTORS
    if name.endswith(".scaling"):
        return SCALES
    return MATRICES if name.startswith("model.layers.") and parameter.ndim == 2 else REST


def trained_parameters(model: "nn.Module") -> list[tuple[str, str, "nn.Parameter"]]:
    """(name, role, parameter) of everything that is trained, in the model's order."""
    return [
        (name, role_of(name, parameter), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def parameter_groups(
    model: "nn.Module", run: "RunConfig", learning_rate: float, *, b_rate_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trained parameters, each with `params`, `role`, `base_learning_rate` and `weight_decay`.

    The first holds matrices and factors, with weight decay. The second holds embeddings, head, norms and biases, at
    `optimizer.embedding_learning_rate` where that is set, without decay. Trained scales follow, at the factors'
    learning rate, without decay. Where `b_rate_ratio` is not 1, the factors B are a last group, at that multiple of the
    learning rate, with weight decay.
    """
    held: dict[str, list[Any]] = {MATRICES: [], REST: [], SCALES: [], FACTORS: []}
    for name, role, parameter in trained_parameters(model):
        is_b = b_rate_ratio != 1 and name.endswith(".lora_B")
        held[MATRICES if role == FACTORS and not is_b else role].append(parameter)
    settings = run.optimizer
    rates = {REST: settings.embedding_learning_rate or learning_rate, FACTORS: b_rate_ratio * learning_rate}
    return [
        {
            "params": parameters,
            "role": role,
            "base_learning_rate": rates.get(role, learning_rate),
            "weight_decay": settings.weight_decay if role in (MATRICES, FACTORS) else 0.0,
        }
        for role, parameters in held.items()
        if parameters or role in (MATRICES, REST)
    ]


def warm_start_optimizer(model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
    """That of the full-rank updates before a method begins."""
    return run.optimizer.build(parameter_groups(model, run, run.warm_start_learning_rate))


# -------------------------------------------------------------------------------------------- methods with a rank


def all_targets() -> list[str]:
    """Every kind of matrix of the decoder."""
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(kw_only=True, slots=True)
class Targeted(Method):
    """A method with a rank, for a choice of the decoder's matrices."""

    rank: int
    target_modules: list[str] = field(default_factory=all_targets)

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        at_least("method.rank", self.rank, 1)

    def check(self, run: "RunConfig") -> None:
        """Every target is a matrix of the model, and the rank fits each."""
        Method.check(self, run)
        linears = run.model.shape(vocab_size=1).linears()
        endings = sorted({name.rpartition(".")[2] for name in linears})
        if not self.target_modules:
            raise ConfigError(f"method.target_modules is empty; name some of {', '.join(endings)}")
        known = {ending for name in linears for ending in _endings(name)}
        for ending in self.target_modules:
            if ending not in known:
                raise ConfigError(
                    f"method.target_modules: {shown(repr(ending))} matches no linear layer; the model has "
                    f"{', '.join(endings)}"
                )
        chosen = set(self.target_modules)
        for name, (i, o) in linears.items():
            if self.rank > min(i, o) and not chosen.isdisjoint(_endings(name)):
                raise ConfigError(
                    f"rank={shown(self.rank)} exceeds min(in, out)={min(i, o)} of {name}; lower method.rank"
                )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Targets in the model's order, each matrix once: by its ending, or whole where not all layers are targeted."""
        chosen = set(self.target_modules)
        by_ending: dict[str, list[str]] = {}
        for name in run.model.shape(vocab_size=1).linears():
            by_ending.setdefault(name.rpartition(".")[2], []).append(name)
        targeted: list[str] = []
        for ending, names in by_ending.items():
            found = [name for name in names if not chosen.isdisjoint(_endings(name))]
            targeted += [ending] if found == names else found
        return {**fields, "method.target_modules": targeted}


def _endings(name: str) -> list[str]:
    """What a name in `target_modules` may be to match the module `name` (relora.budget.cost.module_matches)."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
