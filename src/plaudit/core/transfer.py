"""Copies to a device for which nobody waits."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same tensor on `device`; from the CPU to a GPU by way of pinned memory, so that the CPU goes on at once.

    A plain copy waits until the GPU has done all that it was given before. What is pinned is given back by torch's
    allocator only when the copy is over.

    Args:
        tensor: `[…]`, of any kind.
        device: where to.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
