"""`torch.compile` for the parts of a network in which many small operations follow one another."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from plaudit.training.messages import say, warn


def compile_model(model: nn.Module, device: torch.device, *, quiet: bool = False) -> bool:
    """Compile every layer's norms and feed-forward parts, once for all lengths; say why where that cannot be done.

    The numbers change by rounding alone. Attention stays as it is: its kernels are compiled already, and its layout
    differs from row to row. Names of parameters and what is saved do not change.

    Args:
        model: with layers in lists, as transformers builds them; it is changed.
        device: where it is trained.
        quiet: say nothing but warnings.

    Returns:
        Whether anything was compiled; if not, the run goes on as it would without.
    """
    found = list(regions(model))
    fault = compiler_fault(device) if found else "the model has no list of layers"
    if fault is not None:
        warn(f"compile: not possible here, training goes on without: {fault}")
        return False
    for region in found:
        region.compile(dynamic=True)
    if not quiet:
        say(f"compile: {len(found)} parts of the layers; the first step takes half a minute longer")
    return True


def regions(model: nn.Module) -> Iterator[nn.Module]:
    """The children of every layer that have weights and are not its attention; lists inside them are left alone."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{other}.") for other in outer):
            continue
        outer.append(name)
        for layer in module:
            for child in layer.children():
                if "attention" not in type(child).__name__.lower() and any(True for _ in child.parameters()):
                    yield child


def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device (mostly a missing C++ compiler), in one line; None if it works."""
    try:
        # A fresh function each time: torch keeps what it once compiled, and the fault would be that of the first try.
        def probe(x: Tensor) -> Tensor:
            return torch.nn.functional.silu(x).sum()

        ones = torch.ones(3, device=device, requires_grad=True)
        torch.autograd.grad(torch.compile(probe, dynamic=True)(ones), ones)
    except Exception as error:  # whatever the compiler's tools raise: it is said, and the run needs none of them
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None
