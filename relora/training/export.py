"""The end of a run: export the model to a Hugging Face folder, check and evaluate it, and generate a sample text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from relora.common import signals
from relora.common.errors import DamagedFile, RunError, TrainingError
from relora.config.data import SEQUENCE_KEYS
from relora.config.run import RunConfig
from relora.runs.rundir import RunDir
from relora.training.architecture import Architecture
from relora.training.evaluate import Evaluation, evaluate
from relora.training.figures import sequences_per_batch
from relora.training.model import precision_context, summed_cross_entropy
from relora.training.pretrained import check_same_weights, load_pretrained, save_pretrained
from relora.training.sampling import sample

if TYPE_CHECKING:
    from relora.data.corpus import Corpus
    from relora.training.trainer import Trainer

MERGE_TOLERANCE = {"fp32": 1e-4, "bf16_autocast": 5e-3, "bf16": 5e-3}
"""Largest difference between the losses before and after the merge that rounding explains, by precision.

It is an absolute tolerance in nats per token, and also a relative one. Rounding of the stored weights, and the other
order of summation in a compiled model, cause differences of this size. The loss is an average over many tokens and
hardly depends on the depth of the model.
"""

SAMPLE_TOKENS = 80
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export."""

    test: Evaluation
    """Evaluation of the exported model on the test split."""
    doubts: list[str]
    """Warnings about the model for the user, one line each."""


def check_finite(name: str, evaluation: Evaluation, config: RunConfig) -> None:
    """Raise TrainingError if a loss at the end of a run is not finite. `name` is the split, for the message."""
    if not math.isfinite(evaluation.loss):
        raise TrainingError(
            f"the run diverged: its {name} loss is {evaluation.loss} after {config.total_steps} steps; lower "
            "optimizer.learning_rate, lengthen schedule.warmup_steps or use trainer.precision=fp32"
        )


def export(trainer: "Trainer", corpus: "Corpus", run: RunDir, tokenizer_config: dict[str, Any] | None) -> Exported:
    """Merge the trainer's model, save it in `run.model`, a Hugging Face folder, and evaluate the saved model.

    Args:
        trainer: A trainer whose training is finished. Its model is merged in place.
        corpus: Provides the test split and the tokenizer.json.
        run: The folder of the run.
        tokenizer_config: Content of the tokenizer_config.json in the model's folder; None without a tokenizer.

    Raises:
        RunError: The saved weights differ from the merged model in at least one bit.
        TrainingError: The loss on the test split is not finite.
    """
    config, device, model = trainer.config, trainer.device, trainer.model
    size = trainer.micro.sequences_per_micro_step
    settings: dict[str, Any] = {
        "sequences_per_batch": sequences_per_batch(config.published, size),
        "precision": config.trainer.precision,
    }
    indices = np.arange(min(size, trainer.validation.count), dtype=np.int64)
    probe = trainer.validation.batch(indices)
    inputs, targets, positions = probe.to(device)

    @torch.no_grad()
    def loss(of: torch.nn.Module) -> float:
        with precision_context(config.trainer.precision, device):
            summed = summed_cross_entropy(of.eval(), inputs, targets, positions_BxT=positions)
        return summed.item() / probe.target_tokens

    trained_loss = loss(model)
    trainer.method.finish(model, config)
    as_sequences = {key: getattr(config.data, key) for key in SEQUENCE_KEYS}
    about = {"run": config.name, **as_sequences, **settings, **corpus.identity}
    save_pretrained(model, corpus.tokenizer_file, run.model, about, tokenizer_config, Architecture.of(config))
    try:
        exported = load_pretrained(run.model, device)
        check_same_weights(model, exported)
    except (ValueError, DamagedFile) as error:
        why = f"{error.path}: {error.why}" if isinstance(error, DamagedFile) else error
        raise RunError(
            f"the exported model differs from the trained model: {why}; check the disk, and run the same command "
            f"again: the training state is kept in {run.checkpoints}"
        ) from error
    doubts: list[str] = []
    merged_loss, tolerance = loss(exported), MERGE_TOLERANCE[config.trainer.precision]
    if not math.isclose(merged_loss, trained_loss, rel_tol=tolerance, abs_tol=tolerance):
        doubts.append(
            f"the merge may have changed the model: on {probe.target_tokens:,} validation tokens its loss is "
            f"{merged_loss:.5f}, before the merge it was {trained_loss:.5f}, and rounding explains a difference of "
            f"{tolerance:g}; the training state is kept in {run.checkpoints}"
        )
    test = evaluate(exported, corpus.sequences("test", config.data), device=device, stop=signals.reason, **settings)
    check_finite("test", test, config)
    vocab_size = exported.config.vocab_size
    if test.loss > math.log(vocab_size) - 1e-3:
        doubts.append(
            f"the run diverged, or had too few steps to learn anything: its test loss of {test.loss:.4g} is not lower "
            f"than the loss of uniform guessing, ln {vocab_size} = {math.log(vocab_size):.4g}; lower "
            "optimizer.learning_rate or lengthen schedule.warmup_steps"
        )
    return Exported(test=test, doubts=doubts)


def closing_sample(folder: Path, prompt: str, seed: int) -> str:
    """Return `prompt` with the text that the model in `folder` generates after it, for the end of a run."""
    return sample(folder, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=seed)
