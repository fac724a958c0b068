"""Two torch optimizers over different parameters as one optimizer. Needs torch only."""

from collections.abc import Callable
from typing import Any

import torch


class Joined(torch.optim.Optimizer):
    """Steps each group with the optimizer in `parts` that it belongs to. Groups and state are in one place.

    The parts use the groups and the state of this optimizer, so that its state_dict is the whole state. The key `part`
    of a group is the index of its optimizer in `parts`.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        groups: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            groups += [{**group, "part": number} for group in part.param_groups]
        super().__init__(groups, {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Return the loss of `closure`, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, part in enumerate(self._parts):
            groups = [group for group in self.param_groups if group["part"] == number]
            if groups:
                part.param_groups, part.state = groups, self.state
                part.step()
        return loss


def muon_and_adamw(
    groups: list[dict[str, Any]],
    adamw: torch.optim.Optimizer,
    *,
    learning_rate: float,
    momentum: float,
    newton_schulz_steps: int,
) -> torch.optim.Optimizer:
    """Join torch's Muon over `groups` with `adamw` over all other parameters.

    Args:
        groups: Groups that hold only matrices.
        adamw: The optimizer of all other parameters.
        learning_rate: Muon's learning rate.
        momentum: Muon's momentum.
        newton_schulz_steps: Iterations of the orthogonalisation.
    """
    muon = torch.optim.Muon(
        groups,
        lr=learning_rate,
        momentum=momentum,
        ns_steps=newton_schulz_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return Joined([muon, adamw])
