"""Update in backward: each parameter is stepped as soon as the backward pass has its gradient. Needs torch only.

Called fused update in LOMO (arXiv 2306.09782, section 3.1) and per-layer weight update in GaLore (arXiv 2403.03507,
section 4.3): the gradients of all parameters never stand in memory together.
"""

import torch
from torch import Tensor, nn


class UpdateInBackward:
    """Makes every backward pass an update of the parameters of `optimizer`, and frees each gradient at once.

    The step is that of `optimizer.step()` on all gradients together, to the bit, so long as all are finite: a parameter
    whose own gradient is not is left as it was. Nothing that needs all gradients first can come between: no clipping,
    no second micro-step, no sum over ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # The group's number and not the group: loading a state puts others in their place.
        self._group_of = {each: i for i, group in enumerate(optimizer.param_groups) for each in group["params"]}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._hooks = [each.register_post_accumulate_grad_hook(self._step) for each in self._group_of]

    def _step(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert isinstance(parameter, nn.Parameter)
        assert gradient is not None
        self._norms[parameter] = norm = torch.linalg.vector_norm(gradient)
        # For the time of a step the optimizer has no other parameter: looking for those with a gradient takes time.
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[self._group_of[parameter]], "params": [parameter]}]
        try:
            step_where_finite(self._optimizer, norm.isfinite())
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def pop_norm(self) -> Tensor:
        """The norm of the whole gradient of the backward pass since the last call."""
        norms = [self._norms[each] for each in self._group_of if each in self._norms]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms))

    def remove(self) -> None:
        """Backward passes are what they were."""
        for hook in self._hooks:
            hook.remove()


def step_where_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` if `finite` holds, nothing otherwise. Torch's fused optimizers decide it on the device."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined] -- as torch.amp.GradScaler does
        optimizer.step()
    elif finite.item():
        optimizer.step()
