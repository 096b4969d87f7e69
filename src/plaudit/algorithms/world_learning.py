"""Learning a world from play: its encoder and its dynamics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plaudit.algorithms.stepping import guarded_step
from plaudit.core.world_losses import autoencoder_loss, mixture_density_loss, reward_continuation_loss
from plaudit.models.world import RecurrentDynamics, VariationalEncoder
from plaudit.rollout.trajectory import Trajectory, concatenate

ROWS_PER_STEP, PICTURES_PER_STEP = 32, 64


def segments(play: Sequence[Trajectory], length: int) -> Trajectory:
    """Play as rows of at most `length` steps in which nothing ends before the last one.

    A row may begin in the middle of an episode. `state`, which belongs to whole rows, is left out.

    Args:
        play: `[B, T_i]` each, one behind the other from the same `B` environments; a row may go on from one into the
            next.
        length: most steps of a row.

    Raises:
        ValueError: if there is no counted step, or the number of environments changes.
    """
    if len({each.num_rows for each in play}) > 1:
        raise ValueError(f"play must be of the same environments, got {sorted({each.num_rows for each in play})} rows")
    found = [each.with_fields(state=None, group_ids=None, policy_version=None).tensors() for each in play]
    if not any(bool(each["mask"].any()) for each in found):
        raise ValueError("there is no play to learn a world from")
    whole = {name: torch.cat([each[name] for each in found], 1) for name in found[0]}
    rows: list[Trajectory] = []
    for row, ends in enumerate(((whole["continues"] == 0) | whole["truncated"]).tolist()):
        start = 0
        for step, ended in enumerate(ends):
            if ended or step - start + 1 == length or step + 1 == len(ends):
                piece = {name: tensor[row : row + 1, start : step + 1] for name, tensor in whole.items()}
                if bool(piece["mask"].any()):
                    rows.append(Trajectory(**piece))
                start = step + 1
    return concatenate(rows)


def fit_encoder(
    encoder: VariationalEncoder,
    observations: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    noise: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Learn the autoencoder on observations `[N, *shape]`; returns the metrics of the last pass."""
    steps = epochs * math.ceil(len(observations) / PICTURES_PER_STEP)
    optimizer, schedule = _optimizer(encoder, learning_rate, steps)
    tally: list[dict[str, float]] = []
    for _ in range(epochs):
        tally = []
        for rows in _batches(len(observations), PICTURES_PER_STEP, generator):
            seen = observations[rows]
            means, log_variances = encoder.distribution(seen)
            drawn = torch.randn(means.shape, generator=generator)
            found = encoder.decode(means + (log_variances / 2).exp() * drawn)
            loss, metrics = autoencoder_loss(found, seen, means, log_variances, scale=noise)
            _take_step(encoder, optimizer, schedule, loss)
            tally.append({"loss": loss.item(), **{name: float(value) for name, value in metrics.items()}})
    return {f"encoder/{name}": sum(each[name] for each in tally) / len(tally) for name in tally[0]}


def fit_dynamics(
    dynamics: RecurrentDynamics,
    codes: Tensor,
    next_codes: Tensor,
    rows: Trajectory,
    *,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Learn what follows, on segments `[B, T]` of play.

    Args:
        dynamics: is changed; its units are taken from the data first.
        codes, next_codes: `[B, T, Z]`, of `rows.observations` and `rows.next_observations`.
        rows: from `segments`.
        epochs, learning_rate: how long and how fast.
        generator: orders the rows.

    Returns:
        the metrics of the last pass.
    """
    mask = rows.mask
    rewards, continues = rows.rewards.to(codes.dtype), rows.continues.to(codes.dtype)
    dynamics.set_scales(codes[mask], next_codes[mask], rewards[mask])
    steps = epochs * math.ceil(len(codes) / ROWS_PER_STEP)
    optimizer, schedule = _optimizer(dynamics, learning_rate, steps)
    tally: list[dict[str, float]] = []
    for _ in range(epochs):
        tally = []
        for chosen in _batches(len(codes), ROWS_PER_STEP, generator):
            found, _ = dynamics(codes[chosen], rows.actions[chosen], dynamics.initial(len(chosen)))
            ahead, spread = mixture_density_loss(
                next_codes[chosen], found.log_weights, found.means, found.log_scales, mask[chosen]
            )
            # Rewards count in their own unit, whatever the task's is.
            paid, metrics = reward_continuation_loss(
                found.rewards / dynamics.reward_scale,
                found.continuation_logits,
                rewards[chosen] / dynamics.reward_scale,
                continues[chosen],
                mask[chosen],
            )
            _take_step(dynamics, optimizer, schedule, ahead + paid)
            metrics = {"density_loss": ahead.detach(), **spread, **metrics}
            tally.append({name: float(value) for name, value in metrics.items()})
    return {f"dynamics/{name}": sum(each[name] for each in tally) / len(tally) for name in tally[0]}


def _batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """All of `count` places in a random order, `size` at a time."""
    return torch.split(torch.randperm(count, generator=generator), size)


def _optimizer(
    module: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _take_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    guarded_step(optimizer, loss.item(), max_norm=100.0, where=f"learning a {type(module).__name__}")
    schedule.step()
