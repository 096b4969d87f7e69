"""The state of a run between two optimizer steps: how it is saved, found again, and never mixed up with another's."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plaudit.configs.base import dump_config
from plaudit.configs.training import FolderConfig, RunConfig, TrainingConfig
from plaudit.training.checkpoints import (
    Checkpoint,
    DamagedCheckpointError,
    checkpoint_path,
    load_checkpoint,
    load_last_good,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from plaudit.training.messages import say, warn
from plaudit.training.parallel import put_optimizer, put_state, whole
from plaudit.training.processes import OtherProcessError, Processes
from plaudit.training.random_state import random_state, set_random_state
from plaudit.training.stopping import BestSoFar

FREE_KEYS = frozenset(
    {"output", "overwrite", "resume", "patience", "tolerance", "keep_last", "log_every", "trackers"}
    | {
        "quiet",
        "save_every",
        "keep_model_every",
        "device",
        "prefetch",
        "token_cache",
        "threads",
        "parallel",
        "process_timeout",
        # What is only watched.
        "episodes",
        "episode_limit",
        "video",
    }
)
LENGTH_KEYS = frozenset({"epochs", "max_steps", "iterations", "total_steps"})
MEMORY_KEYS = frozenset({"tokens_per_micro_batch", "max_rows", "gradient_checkpointing"})
"""How much goes through the network at once, not what: a run that ran out of memory goes on with less."""


class Stateful(Protocol):
    """What belongs into a checkpoint besides weights and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, tensors and strings, in dicts and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done, which is also the place in the data and in the learning-rate schedule.
        tokens: tokens put through the network in training, forward only counted once.
        records: records seen, repetitions counted.
        evaluation: the metrics of the last evaluation.
        best_evaluation: the metrics of the best one.
    """

    step: int = 0
    tokens: int = 0
    records: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    best_evaluation: dict[str, float] = field(default_factory=dict)


class Session:
    """Saves and restores one run: weights, optimizer, random state, place in the data, history of the evaluations.

    Only trainable parameters and buffers are saved; frozen ones (under LoRA) come from their source again and are
    compared by SHA-256. A checkpoint knows its configuration and its data and refuses to go on with others.
    """

    def __init__(
        self,
        config: RunConfig,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data_hash: str,
        held_out_hash: str = "",
        processes: Processes | None = None,
        parts: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            config: of the run.
            trained: everything with weights.
            optimizer: over its trainable parameters.
            data_hash: what the run learns from.
            held_out_hash: what it is measured on, by which the best checkpoint is chosen.
            processes: who shares the run.
            parts: whatever else has a state of numbers, tensors and strings, by name.
        """
        self.config, self.trained, self.optimizer = config, trained, optimizer
        self.parts = dict(parts or {})
        self.processes = processes or Processes()
        self.folder = config.output / "checkpoints"
        self.state = RunState()
        self.keeps_best = isinstance(config, TrainingConfig) and config.keep_best
        self.best = BestSoFar()
        if isinstance(config, TrainingConfig):
            self.best = BestSoFar(tolerance=config.tolerance, patience=config.patience)
        self._identity = {"data": data_hash, "held_out": held_out_hash, "frozen": frozen_hash(trained)}
        self.saved_step = 0

    @property
    def saved_path(self) -> Path | None:
        """The checkpoint of the step at which the run stands, where this run wrote or read it already."""
        path = checkpoint_path(self.folder, self.state.step)
        return self.processes.from_first(lambda: path if self.saved_step == self.state.step and path.is_dir() else None)

    def save(self, randomness: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of the run as it stands, and remove those that need not be kept.

        Every process has to call it; the first one writes whole tensors and the random state of all.

        Args:
            randomness: the random state to save where it is not that of this moment (a step was broken off).
        """
        first = self.processes.first
        tensors = {"trained": trainable_state(self.trained), "optimizer": self.optimizer.state_dict()}
        if any(isinstance(each, DTensor) for each in self.trained.parameters()):
            tensors = whole(tensors, keep=first)
        state = {
            "run": dict(vars(self.state)),
            "best": self.best.state_dict(),
            **tensors,
            "random": self.processes.gather(random_state() if randomness is None else randomness),
            "identity": self._identity,
            "config": self.config.model_dump_json(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        keep = {self.best.step} if self.keeps_best else set()

        def write() -> Path:
            path = save_checkpoint(self.folder, self.state.step, state)
            prune_checkpoints(self.folder, keep_last=self.config.keep_last, keep_steps=keep)
            return path

        path = self.processes.from_first(write)
        self.saved_step = self.state.step
        return path

    def resume(self) -> bool:
        """Take everything from the last good checkpoint; False when there is none.

        Raises:
            ValueError: if the checkpoint is of other data, of another configuration or of other frozen weights.
        """
        checkpoint = self._read(lambda: load_last_good(self.folder))
        if checkpoint is None:
            return False
        saved = checkpoint.state
        meanings = {"data": "training records", "held_out": "held-out records", "frozen": "frozen weights"}
        for key, meaning in meanings.items():
            if saved["identity"].get(key, self._identity[key]) != self._identity[key]:
                raise ValueError(f"{checkpoint.path}: made with other {meaning}; resume with the same or start afresh")
        compare_configurations(json.loads(saved["config"]), self.config, checkpoint.path)
        load_trainable_state(self.trained, saved["trained"])
        put_optimizer(self.optimizer, saved["optimizer"])
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        self._set_random_state(saved["random"])
        self.state = RunState(**saved["run"])
        self.best.load_state_dict(saved["best"])
        self.saved_step = self.state.step
        return True

    def write_configuration(self) -> None:
        """Write `configuration.yaml`, once it is known that the run goes on with it; the first process does."""
        if self.processes.first:
            (self.config.output / "configuration.yaml").write_text(dump_config(self.config), encoding="utf-8")

    def keep_best_weights(self) -> dict[str, float]:
        """Put the weights of the best evaluation in place where the configuration keeps them.

        Returns:
            The held-out metrics of the weights that are now in place; empty where nothing was evaluated.
        """
        if not self.keeps_best or self.best.step in (-1, self.state.step):
            return self.state.evaluation
        try:
            best = self._read(lambda: load_checkpoint(checkpoint_path(self.folder, self.best.step)))
        except (DamagedCheckpointError, OtherProcessError) as error:
            warn(f"DAMAGED CHECKPOINT of the best step {self.best.step}, keeping the last weights instead: {error}")
            self.best.step = self.state.step
            return self.state.evaluation
        assert best is not None  # load_checkpoint raises where there is none
        load_trainable_state(self.trained, best.state["trained"])
        if not self.config.quiet:
            say(f"keeping the weights of step {self.best.step}, the best on the held-out records")
        return self.state.best_evaluation

    def _read(self, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """The checkpoint that the first process finds and verifies; the others read the same one."""
        found: list[Checkpoint | None] = []

        def search() -> Path | None:
            found.append(find())
            return None if found[0] is None else found[0].path

        path = self.processes.from_first(search)
        return found[0] if found or path is None else read_checkpoint(path)

    def _set_random_state(self, saved: list[dict[str, Any]]) -> None:
        """This process's own random state; with another number of processes the draws cannot be the same."""
        rank, count = self.processes.rank, self.processes.world_size
        if len(saved) == count:
            set_random_state(saved[rank])
        elif self.processes.first:
            warn(
                f"the checkpoint is of {len(saved)} processes and {count} go on with it: sums are rounded differently "
                "and dropout draws other numbers, so the run is the same only within that"
            )


def compare_configurations(saved: dict[str, Any], config: FolderConfig, path: Path) -> None:
    """See that a run goes on as it was begun: other places, limits, lengths and pieces may change, nothing else.

    Args:
        saved: the checkpoint's configuration as JSON holds it.
        config: of the run that goes on.
        path: the checkpoint, for the message.

    Raises:
        ValueError: naming each key that must not change, with both values.
    """
    now = json.loads(config.model_dump_json())
    changed = [key for key in sorted(now.keys() | saved.keys()) if now.get(key) != saved.get(key)]
    refused = [key for key in changed if key not in FREE_KEYS | LENGTH_KEYS | MEMORY_KEYS]
    if refused:
        details = "; ".join(line for key in refused for line in _differences(key, saved.get(key), now.get(key)))
        raise ValueError(f"{path}: cannot go on with another configuration ({details}); put it back or start afresh")
    if LENGTH_KEYS & set(changed):
        warn("the length of the run was changed, so its learning-rate schedule goes on along the new length")
    if pieces := sorted(MEMORY_KEYS & set(changed)):
        warn(
            f"{', '.join(pieces)}: the run goes on in other pieces than it was begun in; sums are rounded differently "
            "and dropout draws other numbers, so the run is the same only within that"
        )


def _differences(key: str, then: Any, now: Any) -> list[str]:
    """What differs between two values of a configuration, by the keys inside; of another `name` nothing but that."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [f"{key}: {then!r} then, {now!r} now"]
    changed = [inner for inner in sorted(then.keys() | now.keys()) if then.get(inner) != now.get(inner)]
    inside = ["name"] if "name" in changed else changed
    return [line for inner in inside for line in _differences(f"{key}.{inner}", then.get(inner), now.get(inner))]


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Names and values of the trainable parameters and of all buffers that a state dict holds."""
    frozen = {name for name, value in module.named_parameters(remove_duplicate=False) if not value.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trainable_state` returned.

    Raises:
        ValueError: if a name is missing or unknown, so that nothing is left at its initial value in silence.
    """
    expected = trainable_state(module)
    if differing := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"the checkpoint is of another model; differing names: {', '.join(differing[:5])}")
    if any(isinstance(each, DTensor) for each in module.parameters()):
        put_state(module, state)
    else:
        module.load_state_dict(state, strict=False)


def frozen_hash(module: nn.Module) -> str:
    """SHA-256 of names and bytes of all frozen parameters, put together from shards; empty where all are trained."""
    digest = hashlib.sha256()
    frozen = [(name, value) for name, value in module.named_parameters() if not value.requires_grad]
    for name, value in frozen:
        digest.update(name.encode())
        digest.update(whole(value.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def records_hash(records: Sequence[object]) -> str:
    """SHA-256 of records in their order, from their dataclass representation."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()
