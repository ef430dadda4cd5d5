"""One optimiser step for several scenes."""

from __future__ import annotations

import torch

from generation.generators.dreamgaussian.adam import step_together

RATES = {"means": 1e-2, "quats": 5e-3, "scales": 5e-3}


def scene(rows: int, rate: float) -> torch.optim.Adam:
    """Parameters of an own learning rate and of ones that others have, too."""
    generator = torch.Generator().manual_seed(rows)
    groups = [
        {"params": [torch.randn(rows, 3, generator=generator).requires_grad_()], "lr": each, "name": name}
        for name, each in {**RATES, "means": rate}.items()
    ]
    return torch.optim.Adam(groups, lr=0.0, eps=1e-15, fused=True)


def pull(optimiser: torch.optim.Adam, step: int) -> None:
    for i, group in enumerate(optimiser.param_groups):
        (tensor,) = group["params"]
        tensor.grad = torch.sin(tensor.detach() * (1 + i) + step)


def test_scenes_are_stepped_together_as_each_would_be_alone():
    rows_and_rates = [(5, 1e-2), (9, 2e-2), (7, 1e-2)]
    together = [scene(*each) for each in rows_and_rates]
    alone = [scene(*each) for each in rows_and_rates]
    for step in range(4):
        now = slice(0, 2) if step < 2 else slice(0, 3)  # the third joins later
        for optimiser in (*together[now], *alone[now]):
            pull(optimiser, step)
        step_together(together[now])
        for optimiser in alone[now]:
            optimiser.step()
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            (a,), (b,) = one["params"], other["params"]
            assert torch.equal(a, b)
            assert all(torch.equal(ours.state[a][key], theirs.state[b][key]) for key in theirs.state[b])
            assert theirs.state[b].keys() == ours.state[a].keys()


def test_what_has_no_gradient_is_left_as_it_is():
    optimiser = scene(5, 1e-2)
    pull(optimiser, 0)
    (tensor,) = optimiser.param_groups[1]["params"]
    tensor.grad, before = None, tensor.detach().clone()
    step_together([optimiser])
    assert torch.equal(tensor, before)
    assert tensor not in optimiser.state
