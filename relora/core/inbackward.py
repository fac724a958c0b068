"""Update in backward: the optimizer steps each parameter as soon as the backward pass has its gradient.

LOMO calls this fused update (arXiv 2306.09782, section 3.1), and GaLore calls it per-layer weight update (arXiv
2403.03507, section 4.3). The gradients of all parameters are never in memory together. Needs torch only.
"""

import torch
from torch import Tensor, nn


class UpdateInBackward:
    """Makes every backward pass update the parameters of `optimizer`, and frees each gradient immediately.

    If all gradients are finite, the result equals `optimizer.step()` on all gradients together, bit by bit. A parameter
    whose gradient is not finite does not change. An operation that needs all gradients first is impossible: clipping, a
    second micro-step, or a sum over ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # The index of the group and not the group: loading a state replaces the groups.
        self._group_of = {each: i for i, group in enumerate(optimizer.param_groups) for each in group["params"]}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._hooks = [each.register_post_accumulate_grad_hook(self._step) for each in self._group_of]

    def _step(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert isinstance(parameter, nn.Parameter)
        assert gradient is not None
        self._norms[parameter] = norm = torch.linalg.vector_norm(gradient)
        # During this step the optimizer has only this parameter: a search for parameters with a gradient takes time.
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[self._group_of[parameter]], "params": [parameter]}]
        try:
            step_where_finite(self._optimizer, norm.isfinite())
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def pop_norm(self) -> Tensor:
        """Return the norm of the whole gradient of the backward pass since the last call, and forget it."""
        norms = [self._norms[each] for each in self._group_of if each in self._norms]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms))

    def remove(self) -> None:
        """Remove the hooks: backward passes no longer update parameters."""
        for hook in self._hooks:
            hook.remove()


def step_where_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Call `optimizer.step()` if `finite` is true. Torch's fused optimizers decide this on the device."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined] -- as torch.amp.GradScaler does
        optimizer.step()
    elif finite.item():
        optimizer.step()
