"""How a batch of experience is cut: into optimizer steps, and each step into what fits through the network at once."""

import itertools

import torch
from torch import Tensor

from plaudit.rollout.trajectory import Policy, Trajectory


def plan_minibatches(
    trajectory: Trajectory,
    *,
    epochs: int,
    minibatches: int,
    keep_groups: bool = False,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Row indices of every optimizer step, all epochs in order, each epoch in an order of its own.

    A step that takes all rows takes them in their own order. The rows of a prompt stay together as long as there are at
    least as many prompts as minibatches. Rows without a counted step are in none; fewer rows than minibatches give
    fewer steps.

    Args:
        trajectory: `B` rows.
        epochs: passes over the rows.
        minibatches: steps per pass.
        keep_groups: rows of a prompt stay together however few prompts there are.
        generator: orders; None for torch's own.
    """
    rows = trajectory.mask.any(1).nonzero().flatten().cpu()
    if not len(rows):
        return []
    units = list(torch.split(rows, 1))
    if trajectory.group_ids is not None:
        ids = trajectory.group_ids.cpu()[rows]
        sizes = torch.unique(ids, return_counts=True)[1].tolist()
        groups = list(torch.split(rows[ids.argsort(stable=True)], sizes))
        if len(groups) >= minibatches or keep_groups:
            units = groups
    steps: list[Tensor] = []
    parts = min(minibatches, len(units))
    for _ in range(epochs):
        order = torch.randperm(len(units), generator=generator).tolist() if parts > 1 else list(range(len(units)))
        bounds = [len(order) * part // parts for part in range(parts + 1)]
        steps += [
            torch.cat([units[place] for place in order[start:stop]]) for start, stop in itertools.pairwise(bounds)
        ]
    return steps


def micro_batches(policy: Policy, trajectory: Trajectory, *, whole_groups: bool = False) -> list[Tensor]:
    """Rows of each forward pass by the policy's own `micro_batches`, in their own order where one pass takes all.

    Args:
        policy: says how many rows it takes at a time, if it cares.
        trajectory: `B` rows.
        whole_groups: rows of a prompt that the policy would take apart go together, where the first of them goes.

    Raises:
        ValueError: if the policy leaves a row out or takes one twice.
    """
    split = getattr(policy, "micro_batches", None)
    places = torch.arange(trajectory.num_rows, device=trajectory.mask.device)
    parts = [places] if split is None else [part.to(places.device) for part in split(trajectory)]
    if not torch.equal(torch.cat(parts).sort().values, places):
        raise ValueError(
            f"micro-batches must hold each of {len(places)} rows once, got {[part.tolist() for part in parts]}"
        )
    if whole_groups and trajectory.group_ids is not None and len(parts) > 1:
        _, group = torch.unique(trajectory.group_ids, return_inverse=True)
        part_of = torch.empty_like(places)
        for number, part in enumerate(parts):
            part_of[part] = number
        first = torch.full_like(places, len(parts)).scatter_reduce(0, group, part_of, "amin")[group]
        parts = [rows for number in range(len(parts)) if len(rows := (first == number).nonzero().flatten())]
    return [places] if len(parts) == 1 else parts
