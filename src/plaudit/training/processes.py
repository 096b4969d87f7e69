"""Several processes as one run: who is who, what they tell each other, and what is refused before they start."""

import itertools
import os
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plaudit.configs.training import TrainingConfig
from plaudit.training.messages import warn
from plaudit.training.precision import pick_device

Value = TypeVar("Value")
_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
AnyTraining = TypeVar("AnyTraining", bound=TrainingConfig)

POLL_SECONDS = 0.02
LAUNCH = "torchrun --nproc-per-node 2 -m plaudit …"


class OtherProcessError(ValueError):
    """The first process met a fault in what it did for all."""


@dataclass(frozen=True)
class Processes:
    """The processes of one run, as one of them sees them; by default a single one.

    Attributes:
        rank: number of this process, from 0; number 0 writes files and speaks.
        local_rank: its number on this machine, which is that of its GPU.
        world_size: how many there are on all machines.
        device: where this process computes.
        strategy: `ddp` or `fsdp`; None for a single process that torchrun did not start.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str | None = None
    _name: str = field(default="", repr=False)
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, by rank, on all of them."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, on all of them; the others wait for it without a time-out.

        Raises:
            OtherProcessError: in the others, if it raised a `ValueError` or `OSError` there.
        """
        if not self.several:
            return work()
        # Through the store that torchrun keeps: a collective with a time-out of days would also take leave that slowly.
        store: Any = dist.distributed_c10d._get_default_store()
        key = f"{self._name}/{next(self._calls)}"
        if self.first:
            try:
                value = work()
            except (ValueError, OSError) as error:
                store.set(key, pickle.dumps((None, str(error) or type(error).__name__)))
                raise
            store.set(key, pickle.dumps((value, None)))
            return value
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
        found, fault = pickle.loads(store.get(key))
        if fault is not None:
            raise OtherProcessError(f"the first process stopped: {fault}")
        result: Value = found
        return result

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes; in place, any shape."""
        if self.several:
            dist.all_reduce(values)
        return values

    def add(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Numbers added over the processes by name; a name that a process does not have counts 0 there."""
        total: Counter[str] = Counter()
        for part in self.gather(dict(numbers)):
            total.update(part)
        return dict(total)

    def share(self, batches: Sequence[tuple[Sequence[int], int]]) -> list[tuple[Sequence[int], int]]:
        """This process's part of batches that all go through the network once, as many as every other process's.

        Args:
            batches: the indices of each, and the passes it takes.

        Returns:
            Batches with the passes that every process makes then; empty ones where there is nothing left to do.
        """
        rounds = [batches[start : start + self.world_size] for start in range(0, len(batches), self.world_size)]
        return [
            (batch[self.rank][0] if self.rank < len(batch) else (), max(passes for _, passes in batch))
            for batch in rounds
        ]

    def quieted(self, config: AnyTraining) -> AnyTraining:
        """The configuration with which only the first process speaks."""
        return config if self.first else config.model_copy(update={"quiet": True})

    def require_same(self, **values: object) -> None:
        """Refuse to go on with processes that were given different things.

        Raises:
            ValueError: naming what differs and which process has it.
        """
        for name, found in {name: self.gather(value) for name, value in values.items()}.items():
            others = [rank for rank, value in enumerate(found) if value != found[0]]
            if others:
                raise ValueError(
                    f"{name.replace('_', ' ')}: process {others[0]} has not the same as process 0; give every process "
                    "the same files, configuration and versions"
                )


@contextmanager
def joined(config: TrainingConfig, *, dry_run: bool = False) -> Iterator[Processes]:
    """Join the processes that torchrun started, for the length of a block; alone where it did not.

    A process group that the caller has made is used and left as it is.

    Raises:
        ValueError: if the configuration does not fit the number of processes.
    """
    world, rank, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    refuse_misuse(config, launched=launched, world_size=world, dry_run=dry_run)
    if config.parallel is None or not launched:
        yield Processes(device=pick_device(config.device))
        return
    device = process_device(config.device, local, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    made = not dist.is_initialized()
    if made:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.process_timeout))
    try:
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        processes = Processes(rank, local, world, device, config.parallel, name[0])
        processes.require_same(configuration=config.model_dump(mode="json"))
        yield processes
    except RuntimeError as error:
        if lost := lost_process(error):
            warn(f"process {rank}: {lost}")
        raise
    # Not after a fault: taking leave of processes that are gone could wait for them.
    if made:
        dist.destroy_process_group()


def refuse_misuse(config: TrainingConfig, *, launched: bool, world_size: int, dry_run: bool) -> None:
    """Refuse what cannot be meant, before anything is read.

    Raises:
        ValueError: saying what to change.
    """
    if config.parallel is None:
        if launched and world_size > 1:
            raise ValueError(
                f"torchrun started {world_size} processes, but parallel is not set, so each would train on its own: "
                "add --parallel auto (or ddp, fsdp), or start it once, without torchrun"
            )
        return
    if not launched:
        if config.parallel != "auto":
            raise ValueError(
                f"parallel: {config.parallel} shares a run among processes, and this is a single one: start it as "
                f"{LAUNCH}, or leave parallel out"
            )
        return
    if dry_run and world_size > 1:
        raise ValueError("--dry-run measures a single process: leave torchrun out (and its number of processes)")
    if world_size > config.records_per_step:
        raise ValueError(
            f"{world_size} processes cannot share records_per_step: {config.records_per_step}; every process needs "
            "at least one record in a step: raise records_per_step or start fewer processes"
        )
    if ":" in config.device:
        raise ValueError(
            f"device: {config.device} is one device, but each of {world_size} processes takes the one of its own "
            "number: use 'auto', 'cuda' or 'cpu'"
        )


def process_device(name: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of one process: the GPU of its number on this machine, or the CPU.

    Raises:
        ValueError: if there are more processes than GPUs here.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if local_world_size > count:
        raise ValueError(f"{local_world_size} processes on this machine, which has {count} GPUs: start {count} here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def lost_process(error: RuntimeError) -> str | None:
    """What to tell the user if the error is that of a collective whose partner is gone or silent; else None."""
    text = str(error)
    signs = ("onnection closed", "onnection reset", "imed out", "imeout", "Broken pipe", "NCCL", "gloo")
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in signs):
        return None
    return (
        "another process of this run has died or does not answer, so the run stops here; what it was stands above in "
        f"that process's output. Go on from the last checkpoint with resume ({text.splitlines()[0][:150]})"
    )
