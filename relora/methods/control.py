"""Full-rank training of a smaller model: the "control" of Lialin et al. 2023 (arXiv 2307.05695), section 4."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relora.budget.cost import LlamaShape, control_shape, cost
from relora.common.errors import ConfigError
from relora.methods.base import Targeted

if TYPE_CHECKING:
    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class Control(Targeted):
    """A smaller model, with as many trainable parameters as the configured model would have with factors of `rank`."""

    def trained_shape(self, shape: LlamaShape, run: "RunConfig") -> LlamaShape:
        """Return the sizes of the smaller model. Raises ConfigError if there is no such model."""
        matched = cost(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            rank=self.rank,
            target_modules=self.target_modules,
        )
        try:
            return control_shape(shape, matched.trainable_parameters)
        except ValueError as error:
            raise ConfigError(f"method=control, method.rank={self.rank}: {error}") from error
