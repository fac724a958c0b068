"""The base classes of methods: their settings, and the hooks that configs, plans, the trainer and reports call.

A method is one subclass of `Method` in one file. Its dataclass fields are the keys under `method:`. The default hooks
train the whole model at full rank. The file imports torch inside the hooks that need it, so that a config is composed
and checked without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.cost import FACTORS, MATRICES, REST, SCALES, VALUES, Cost, LlamaShape, cost
from relora.common.checks import MOST_STEPS, at_least, at_most, positive
from relora.common.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What the trainer logs of one restart."""

    metrics: dict[str, float]
    """Values, which are logged as restart/NAME."""
    message: str
    """One clause for the user, without a full stop."""


@dataclass(kw_only=True, slots=True)
class Method:
    """The settings that every method has, and the defaults of all hooks.

    A method with a rank has the field `rank`. A method that restarts has a field for the interval, which
    `restart_interval_field` names (None: no restarts). Hooks get the config of the whole run as `run`.
    """

    is_full_rank: ClassVar[bool] = False
    """Whether the method trains the whole model at full rank and is the baseline of other methods."""

    short_names: ClassVar[dict[str, str]] = {
        "method.warm_start_steps": "warm_start",
        "method.warm_start_learning_rate": "warm_start_lr",
    }
    """Setting, by dotted name -> its name in the labels of a comparison. Other settings have their last word."""

    model_type: ClassVar[str | None] = None
    """The model_type in config.json of an exported model that is no plain Llama."""

    modelling_module: ClassVar[str | None] = None
    """The module that defines this model for transformers, if `model_type` is set.

    The export copies its file, which therefore imports torch and transformers only. AUTO_CLASSES names the classes: see
    relora.training.modeling_cola. `finish` leaves a model whose weights have the names of the class there.
    """

    restart_interval_field: ClassVar[str] = "reset_interval_steps"
    """The name of the field with the steps between two restarts. A method without this field never restarts."""

    name: str
    warm_start_steps: int = 0
    """Steps at full rank before the method begins. They are part of the budget."""
    warm_start_learning_rate: float | None = None
    """None: the learning rate of the optimizer."""

    def __post_init__(self) -> None:
        at_least("method.warm_start_steps", self.warm_start_steps, 0)
        at_most("method.warm_start_steps", self.warm_start_steps, MOST_STEPS, "no run has that many steps")
        positive("method.warm_start_learning_rate", self.warm_start_learning_rate)

    # ---------------------------------------------------------------- used when a run is composed, without torch

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError for settings that do not fit the rest of the run."""

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Return the fields for the hash of the run. Runs with equal results should get equal fields.

        Write values that mean the same in the same way, and leave out fields that have no effect.

        Args:
            fields: All fields of the run, by dotted name.
            run: The config of the whole run.
        """
        return fields

    @property
    def written_out(self) -> dict[str, Any]:
        """The values that None means, by the dotted name of the field."""
        return {}

    def trained_shape(self, shape: LlamaShape, run: "RunConfig") -> LlamaShape:
        """Return the sizes of the trained model. `shape` has the configured sizes. Raises ConfigError if none fit."""
        return shape

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of training a model with the sizes `shape`, after the warm start."""
        return cost(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            precision=run.trainer.precision,
            optimizer=run.optimizer,
        )

    def break_even_rank(self, shape: LlamaShape, run: "RunConfig", *, micro_steps: int) -> int | None:
        """Return the highest rank at which a step takes fewer FLOPs than at full rank, or None without a rank.

        Args:
            shape: The sizes of the model.
            run: The config of the whole run.
            micro_steps: The number of micro-steps in one optimizer step, summed over all processes.
        """
        return None

    def update_rank(self, run: "RunConfig") -> int | None:
        """Return the greatest rank that the sum of all updates of one matrix can reach. None: the method sets no limit.

        The updates of a warm start are not counted.
        """
        return None

    @property
    def restarts(self) -> bool:
        """Whether the method can restart: whether it has the field for the interval."""
        return hasattr(self, self.restart_interval_field)

    @property
    def interval_steps(self) -> int | None:
        """The steps between two restarts. None without restarts."""
        return getattr(self, self.restart_interval_field, None)

    @property
    def may_be_baseline(self) -> bool:
        """Whether a run of this method may be the full-rank baseline of other runs."""
        return self.is_full_rank and not self.warm_start_steps

    @property
    def merged_weight_in_use(self) -> str:
        """How matrix products use a merged weight: resident, rebuilt or never (relora.core.exact_ways.refresh)."""
        return "never"

    @property
    def switches(self) -> dict[str, Any]:
        """The settings that change only speed or memory and not the results, by dotted name."""
        return {}

    @property
    def memory_options(self) -> Sequence[str]:
        """Overrides that save memory and are not used yet."""
        return ()

    # ------------------------------------------------------------------------------------ used by the trainer

    def begin(self, model: "nn.Module", run: "RunConfig") -> str | None:
        """Change the model when the warm start ends. Without a warm start, this is the start of the run.

        Returns:
            One clause for the user about the change, without a full stop, or None.
        """
        return None

    def build_optimizer(self, model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
        """Build the optimizer of the method's own phase, after the warm start.

        Each group has a `base_learning_rate`, which the schedule scales.
        """
        return run.optimizer.build(self.parameter_groups(model, run))

    def parameter_groups(self, model: "nn.Module", run: "RunConfig") -> list[dict[str, Any]]:
        """Return the groups from which the optimizer is built: trained parameters with equal settings."""
        return parameter_groups(model, run, run.optimizer.learning_rate)

    def refresh(self, model: "nn.Module", run: "RunConfig", *, sequences_per_micro_step: int, micro_steps: int) -> None:
        """Prepare the forward pass after the weights or the micro-step size changed. Called after `begin`.

        Args:
            model: The model in training.
            run: The config of the whole run.
            sequences_per_micro_step: The number of sequences in one micro-step of this process.
            micro_steps: The number of micro-steps in one optimizer step of this process.
        """

    def before_update(self, model: "nn.Module", run: "RunConfig", step: int) -> None:
        """Read or change the gradients of `step` before they are clipped.

        Not called with trainer.update_in_backward, where the gradients are never in memory together.
        """

    def after_update(self, model: "nn.Module", run: "RunConfig", step: int) -> None:
        """Read or change the weights after the optimizer step `step`."""

    def messages(self, model: "nn.Module", optimizer: "torch.optim.Optimizer") -> Sequence[str]:
        """Return messages for the user about the optimizer step that was just made. The trainer logs them."""
        return ()

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Do restart `number` (counted from 1). Called every `interval_steps` steps."""
        raise NotImplementedError(
            f"method={self.name} has the field {self.restart_interval_field}, but no restart(); define it"
        )

    def finish(self, model: "nn.Module", run: "RunConfig") -> None:
        """Turn the model into a plain model for the export. Called once, after the last step."""

    def exported_config(self, run: "RunConfig") -> dict[str, Any]:
        """Return more entries of config.json, for `modelling_module`."""
        return {}


def role_of(name: str, parameter: "nn.Parameter") -> str:
    """Return the role of the parameter `name` of a model (relora.budget.cost)."""
    if name.endswith((".lora_A", ".lora_B", ".factor_A", ".factor_B")):
        return FACTORS
    if name.endswith(".scaling"):
        return SCALES
    if name.endswith(".sparse_values"):
        return VALUES
    return MATRICES if name.startswith("model.layers.") and parameter.ndim == 2 else REST


def trained_parameters(model: "nn.Module") -> list[tuple[str, str, "nn.Parameter"]]:
    """Return (name, role, parameter) of every trained parameter, in the order of the model."""
    return [
        (name, role_of(name, parameter), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def parameter_groups(
    model: "nn.Module", run: "RunConfig", learning_rate: float, *, b_rate_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return groups of the trained parameters with `params`, `role`, `base_learning_rate` and `weight_decay`.

    The groups are, in this order:

    - Matrices and factors, with weight decay.
    - Embeddings, head, norms and biases, without weight decay. Their learning rate is
      `optimizer.embedding_learning_rate`, if that is set.
    - Trained scales, without weight decay, if there are any.
    - The factors B, with weight decay, if `b_rate_ratio` is not 1. They are then not in the first group.
    - Sparse values, with weight decay, if there are any.

    Args:
        model: The model in training.
        run: The config of the whole run.
        learning_rate: The base learning rate of all groups without another one.
        b_rate_ratio: The learning rate of B divided by `learning_rate`.
    """
    held: dict[str, list[Any]] = {MATRICES: [], REST: [], SCALES: [], FACTORS: [], VALUES: []}
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
            "weight_decay": settings.weight_decay if role in (MATRICES, FACTORS, VALUES) else 0.0,
        }
        for role, parameters in held.items()
        if parameters or role in (MATRICES, REST)
    ]


def warm_start_optimizer(model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
    """Build the optimizer of the warm start."""
    return run.optimizer.build(parameter_groups(model, run, run.warm_start_learning_rate))


# -------------------------------------------------------------------------------------------- methods with a rank


def all_targets() -> list[str]:
    """Return the name endings of all matrices of the decoder."""
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(kw_only=True, slots=True)
class Targeted(Method):
    """The base class of methods with a rank, which apply to chosen matrices of the decoder."""

    rank: int
    target_modules: list[str] = field(default_factory=all_targets)

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        at_least("method.rank", self.rank, 1)

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError if a target is not a matrix of the model, or if the rank is too high for one."""
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
        """Return `fields` with the targets in the order of the model, each matrix once.

        A kind of matrix that is targeted in all layers is written as its ending. Otherwise the full names are written.
        """
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
    """Return all names in `target_modules` that match the module `name` (relora.budget.cost.module_matches)."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
