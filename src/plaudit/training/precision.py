"""Devices and number formats."""

from contextlib import AbstractContextManager, nullcontext

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
