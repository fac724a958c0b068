"""What a method does to the model, the optimizer and the clock; the trainer never looks at the method's name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from relora.budget.cost import module_matches
from relora.config.groups import GaLoreConfig, LoRAConfig, ReLoRAMethodConfig
from relora.config.run import RunConfig
from relora.core.lowrank import ReLoRAConfig, merge_and_reinit, refresh, unwrap, wrap
from relora.core.reset import reset_optimizer
from relora.core.schedule import JaggedCosine, RestartClock
from relora.optimizers.galore import GaLoreAdamW


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What one restart did."""

    relative_update: float
    """|dW| / |W| of the merge."""
    rounding_loss: float
    """Share of the merged update that the storage type could not hold."""
    reset_fraction: float
    """Share of the factors' optimizer state that was zeroed."""


class Method:
    """Full-rank training: the whole model is trained from first to last."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.clock = config.clock

    def begin(self, model: nn.Module) -> None:
        """What happens to the model when the warm start ends (at once where there is none)."""

    def refresh(self, model: nn.Module, sequences_per_micro_step: int, micro_steps: int) -> None:
        """What the forward pass wants to be told after every change of the weights."""

    def restart(self, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Restart:
        """Restart `number` (from 1): merge, re-initialise, reset."""
        raise AssertionError(f"{self.config.method.name} has no restarts")

    def finish(self, model: nn.Module) -> None:
        """Turn the model into a plain one."""


class LowRank(Method):
    """LoRA and ReLoRA: factors in the targeted matrices, everything else at full rank."""

    _begun = False

    def begin(self, model: nn.Module) -> None:
        """Wrap."""
        method = self.config.method
        assert isinstance(method, LoRAConfig)
        factors = ReLoRAConfig(
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            target_modules=method.target_modules,
            reinit=method.reinit,
            trainable_scaling=method.trainable_scaling,
        )
        wrap(model, factors, seed=self.config.trainer.seed)
        self._begun = True

    def refresh(self, model: nn.Module, sequences_per_micro_step: int, micro_steps: int) -> None:
        """The cheapest exact way for so many tokens at a time; nothing before the method has begun."""
        method = self.config.method
        assert isinstance(method, LoRAConfig)
        if self._begun:
            refresh(
                model,
                merged_weight=method.merged_weight_in_use,
                tokens_per_micro_step=sequences_per_micro_step * self.config.data.sequence_length_tokens,
                micro_steps=micro_steps,
                dtype=torch.float32 if self.config.trainer.precision == "fp32" else torch.bfloat16,
            )

    def restart(self, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Restart:
        """Lialin et al. 2023, Algorithm 1, the lines under "if t mod q = 0"."""
        method, seed = self.config.method, self.config.trainer.seed
        assert isinstance(method, ReLoRAMethodConfig)
        merged = merge_and_reinit(model, seed=seed, restart=number)
        reset = method.optimizer_reset
        fraction = reset_optimizer(
            optimizer,
            model,
            mode=reset.mode,
            pruning_ratio=reset.pruning_ratio,
            moments=reset.moments,
            reset_step=reset.reset_step,
            seed=seed,
            restart=number,
        )
        return Restart(
            relative_update=merged.relative_update, rounding_loss=merged.rounding_loss, reset_fraction=fraction
        )

    def finish(self, model: nn.Module) -> None:
        """Unwrap."""
        unwrap(model)


def build_method(config: RunConfig) -> Method:
    """The method that `config` names."""
    return LowRank(config) if isinstance(config.method, LoRAConfig) else Method(config)


def build_optimizer(
    model: nn.Module, config: RunConfig, learning_rate: float, *, warm_start: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters in groups, each with its `base_learning_rate`.

    The first holds the decoder's matrices or their factors, with weight decay; the second embeddings, head, norms and
    biases, at `optimizer.embedding_learning_rate` where that is set, without decay. Scales that are trained are a third
    group, at the factors' learning rate, without decay. AdamW, but for GaLore after its
    warm start, whose matrices that are not targeted go with the first group's settings and no projection.
    """
    method = config.method
    galore = method if isinstance(method, GaLoreConfig) and not warm_start else None
    matrices: list[nn.Parameter] = []
    projected: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".scaling"):
            scales.append(parameter)
        elif not (name.startswith("model.layers.") and parameter.ndim == 2):
            rest.append(parameter)
        elif galore is not None and module_matches(name.removesuffix(".weight"), galore.target_modules):
            projected.append(parameter)
        else:
            matrices.append(parameter)
    settings = config.optimizer
    groups = [
        {"params": matrices, "base_learning_rate": learning_rate, "weight_decay": settings.weight_decay},
        {
            "params": rest,
            "base_learning_rate": settings.embedding_learning_rate or learning_rate,
            "weight_decay": 0.0,
        },
    ]
    if scales:
        groups.append({"params": scales, "base_learning_rate": learning_rate, "weight_decay": 0.0})
    betas = (settings.beta1, settings.beta2)
    if galore is None:
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=settings.epsilon, fused=True)
    subspace = {
        "rank": galore.rank,
        "update_interval_steps": galore.update_interval_steps,
        "scale": galore.scale,
    }
    groups.insert(0, {**groups[0], "params": projected, **subspace})
    return GaLoreAdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=settings.epsilon
    )


def learning_rate_factor(config: RunConfig) -> Callable[[int], float]:
    """Step -> factor of the base learning rates, for the whole run.

    The warm start is the beginning of a full-rank run of the same budget: a cosine over all steps, left where the
    warm start ends. The method then has a schedule of its own over the remaining steps.
    """
    schedule, clock = config.schedule, config.clock
    full_rank = JaggedCosine(
        RestartClock(total_steps=clock.total_steps),
        warmup_steps=schedule.warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )
    method = JaggedCosine(
        clock,
        warmup_steps=schedule.warmup_steps,
        restart_warmup_steps=schedule.restart_warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )
    return lambda step: full_rank(step) if step < clock.warm_start_steps else method(step)
