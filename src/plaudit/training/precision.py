"""Devices, number formats, threads."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: if the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:1'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA device is visible; use 'cpu' or 'auto'")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which the backbone runs: nothing for `float32`, bfloat16 autocast for `bf16`.

    Weights, gradients and optimizer states stay in float32; matrix products of the backbone are in bfloat16. The
    reward head and the losses stay in float32 (a difference of two bfloat16 scores near 10 has steps of 1/16).

    Raises:
        ValueError: for another name.
    """
    if precision == "float32":
        return nullcontext()
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    raise ValueError(f"precision {precision!r} is unknown: use 'float32' or 'bf16'")


@contextmanager
def threads(choice: int | str) -> Iterator[int]:
    """Set how many threads share an operation on the CPU, for the length of a block.

    Args:
        choice: a number, or `auto`: torch's own number, but no more than `usable_processors`.

    Yields:
        The number.
    """
    before = torch.get_num_threads()
    number = min(before, usable_processors()) if isinstance(choice, str) else choice
    torch.set_num_threads(number)
    try:
        yield number
    finally:
        torch.set_num_threads(before)


def usable_processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may use: its affinity, and the quota of its container (rounded up), at least 1.

    Args:
        cgroup: where the quota stands: `cpu.max` (version 2), or `cpu/cpu.cfs_quota_us` and `cpu.cfs_period_us`.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return count if quota is None else max(1, min(count, quota))


def _quota(cgroup: Path) -> int | None:
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period")
            )
    except (OSError, ValueError):
        # Not a container, or one that does not say: no limit is known.
        return None
    return None if not quota.isdigit() or not period.isdigit() else -(-int(quota) // int(period))
