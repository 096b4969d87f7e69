"""Modules that are saved beside a language model: their weights, and the few numbers that they cannot do without."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def files_of(kind: str) -> tuple[str, str]:
    """Names of the files of `styles` or `goals`: weights and description."""
    return f"{kind}.safetensors", f"{kind}.json"


def write_beside(module: nn.Module, folder: Path, kind: str, description: dict[str, Any]) -> None:
    """Write a module's state and its description into the folder of a saved model."""
    weights, described = files_of(kind)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / weights)
    (folder / described).write_text(json.dumps(description) + "\n", encoding="utf-8")


def read_beside(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and description that `write_beside` wrote.

    Raises:
        ValueError: if the folder holds none of this kind.
    """
    weights, described = files_of(kind)
    if not (folder / weights).is_file():
        raise ValueError(f"{folder} holds no {kind} ({weights} is missing)")
    description: dict[str, Any] = json.loads((folder / described).read_text(encoding="utf-8"))
    return load_file(folder / weights), description
