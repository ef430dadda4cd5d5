"""One fused Adam step for several scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def step_together(optimisers: Sequence[torch.optim.Adam]) -> None:
    """`step` of all optimisers, which differ only in parameters, state and learning rates.

    PyTorch's fused kernel assigns 65,536 values to a multiprocessor. A single scene's tensors would occupy few of them.
    Here one kernel takes all tensors of one learning rate.
    """
    owners: dict[Tensor, torch.optim.Adam] = {}
    rates: dict[float, list[Tensor]] = defaultdict(list)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for optimiser in optimisers:
        state.update(optimiser.state)
        for group in optimiser.param_groups:
            rates[group["lr"]] += group["params"]
            owners |= dict.fromkeys(group["params"], optimiser)
    groups = [{"params": tensors, "lr": rate} for rate, tensors in rates.items()]
    together = torch.optim.Adam(groups, **optimisers[0].defaults)
    together.state = state
    together.step()
    for tensor, owner in owners.items():
        if tensor in state:
            owner.state[tensor] = state[tensor]
