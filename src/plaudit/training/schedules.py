"""Learning-rate schedules as pure functions of the step number, so that the step number is all their state."""

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_factor(
    step: int, *, schedule: str, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step`, counted from 0.

    With `w` warm-up steps of `n` in total and `f` the final fraction:
        warm-up, `s < w`:   `(s + 1) / (w + 1)` (the first step moves the weights, the peak follows the warm-up)
        `constant`:         `1`
        `linear`:           `f + (1 − f) · (1 − p)`, `p = (s − w) / max(1, n − w)`, limited to `[0, 1]`
        `cosine`:           `f + (1 − f) · (1 + cos πp) / 2` (Loshchilov and Hutter 2017, eq. 5, without restarts)

    Args:
        step: 0 for the first update.
        schedule: one of `SCHEDULES`.
        total_steps: `n`; past it the factor stays at its last value.
        warmup_steps: `w`.
        final_fraction: `f` in `[0, 1]`.

    Returns:
        A factor in `[0, 1]`.

    Raises:
        ValueError: for an unknown schedule or a negative step.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
    if step < 0:
        raise ValueError(f"step {step} is negative")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shape = 1.0 - progress if schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return final_fraction + (1.0 - final_fraction) * shape


def warmup_steps_of(warmup: float, total_steps: int) -> int:
    """Warm-up in steps: a number below 1 is a fraction of all steps (rounded up), 1 or more is a number of steps."""
    if warmup < 0:
        raise ValueError(f"warmup {warmup} is negative")
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
