"""Checkpoints that survive a kill at any moment: written aside, flushed, renamed; verified before they are used."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plaudit.training.messages import warn

MANIFEST = "manifest.json"
STATE = "state.pt"
PREFIX = "step-"
PARTIAL = ".partial-"


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are missing, cut short or changed since they were written."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint: where it stands, its step, and the state that was saved."""

    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as `folder/step-<step>` so that the folder holds either all of it or nothing of it.

    The files are written to a temporary directory beside it, flushed to the disk together with a manifest of their
    SHA-256 sums, and then renamed; the rename is flushed too. A kill at any moment leaves the older checkpoints as
    they were. A checkpoint of the same step is replaced.

    Args:
        folder: directory of the run's checkpoints; made when missing.
        step: number of optimizer steps that `state` has seen.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Returns:
        The directory of the new checkpoint.

    Raises:
        ValueError: if `state` holds anything else, naming where.
    """
    _require_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partial(folder)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    torch.save(state, partial / STATE)
    _flush(partial / STATE)
    manifest = {"step": step, "sha256": {STATE: _sha256(partial / STATE)}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _flush(partial / MANIFEST)
    _flush(partial)
    target = checkpoint_path(folder, step)
    _replace(target, partial)
    _flush(folder)
    return target


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands; the zeros make the names sort as the numbers do."""
    return folder / f"{PREFIX}{step:09d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """`(step, directory)` of every checkpoint in `folder`, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.startswith(PREFIX)]
    return sorted((int(path.name.removeprefix(PREFIX)), path) for path in found if path.name[len(PREFIX) :].isdigit())


def holds_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`, damaged ones and one that was just being replaced included."""
    return any(folder.glob(f"{PREFIX}*")) or any(folder.glob(f"{PARTIAL}old-*"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint against its manifest and read it on the CPU with `weights_only=True`.

    Raises:
        DamagedCheckpointError: if the manifest or a file is missing, unreadable, or not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, sums = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path}: the manifest cannot be read ({error})") from error
    for name in {STATE, *sums}:
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        if _sha256(path / name) != sums.get(name):
            raise DamagedCheckpointError(f"{path}: {name} is not what was written (its SHA-256 differs)")
    return Checkpoint(path, step, torch.load(path / STATE, map_location="cpu", weights_only=True))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that another process has verified, without checking it again.

    Raises:
        ValueError: if it is not visible here.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not there, although the first process has read it: output must be on a disk that all machines "
            "of the run share"
        ) from None
    return Checkpoint(path, int(path.name.removeprefix(PREFIX)), state)


def load_last_good(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None when there is none at all; every damaged one is reported.

    Raises:
        DamagedCheckpointError: if there are checkpoints and none of them is whole: starting afresh in silence
            would throw the work away.
    """
    damaged: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpointError as error:
            warn(f"DAMAGED CHECKPOINT, trying the one before it: {error}")
            damaged.append(str(error))
            continue
        if damaged:
            warn(f"using the last good checkpoint, step {checkpoint.step}: {path}")
        return checkpoint
    if damaged:
        raise DamagedCheckpointError(
            "no checkpoint is whole: " + "; ".join(damaged) + f". Remove {folder} to start from the beginning"
        )
    return None


def prune_checkpoints(folder: Path, *, keep_last: int, keep_steps: set[int]) -> list[Path]:
    """Remove all but the last `keep_last` checkpoints and those of `keep_steps` (the best one); returns the removed."""
    checkpoints = list_checkpoints(folder)
    kept = {step for step, _ in checkpoints[-keep_last:]} | keep_steps
    removed = [path for step, path in checkpoints if step not in kept]
    for path in removed:
        shutil.rmtree(path)
    return removed


def publish_directory(partial: Path, target: Path) -> None:
    """Put a directory that was written aside in its final place, replacing what stood there, after flushing it."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _flush(path)
    _replace(target, partial)
    _flush(target.parent)


def _replace(target: Path, partial: Path) -> None:
    """Rename `partial` to `target`; what stood there is renamed away first and removed only after that."""
    old = target.with_name(f"{PARTIAL}old-{target.name}")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.exists():
        shutil.rmtree(old)


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"checkpoint: {where} has the key {key!r}; only strings and whole numbers are saved")
            _require_plain(inner, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_plain(inner, f"{where}[{index}]")
    elif not isinstance(value, Tensor | bool | int | float | str | None):
        raise ValueError(
            f"checkpoint: {where} is a {type(value).__name__}; only tensors, numbers and strings are saved"
        )


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
