"""Answers sampled by other processes while the learner learns: asynchronous alignment.

The learner asks for the answers of iteration `j` as soon as it has finished `j - max_staleness` updates, and goes on
learning from earlier ones. A worker takes the newest published weights when it begins, so answers are at most
`max_staleness` updates old when they are learned from. The log-probabilities that they were sampled with come along;
`algorithm.importance_cap` weighs by `π_old/μ`, where `π_old` is the learner's own forward of the same answers.

With `max_staleness: 0` nothing overlaps and a run is, to the bit, the synchronous one.
"""

import copy
import os
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, multiprocessing, nn

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.packed_attention import register_packed_attention
from plaudit.rollout.generate import GenerationResult, generate
from plaudit.training.workers import PATIENCE, how_it_ended, leave_signals


class Request(NamedTuple):
    """Answers that are wanted: of which iteration, to what, the state of the generator that draws them, and how many
    may be written together."""

    iteration: int
    prompt_ids: list[list[int]]
    samples_per_prompt: int
    sampling: SamplingConfig
    generator_state: Tensor
    max_rows: int = 256


@dataclass(frozen=True)
class Rollout:
    """Answers of a worker.

    Attributes:
        iteration: that they were asked for.
        version: updates that the weights had seen which wrote them.
        generation: the answers.
        seconds: that writing them took.
        error: the traceback, where the worker has failed.
    """

    iteration: int
    version: int
    generation: GenerationResult | None
    seconds: float
    error: str | None = None


class PublishedWeights:
    """The weights that workers read, in shared memory, with the number of updates that they have seen.

    A lock keeps a reader from taking half of an update: unlike a small network's, a torn language model would write
    text that no policy has written, with log-probabilities that belong to none.
    """

    def __init__(self, model: nn.Module, version: int, lock: Any) -> None:
        """Copies of the parameters that learn."""
        self.weights = {
            name: each.detach().cpu().clone().share_memory_()  # type: ignore[no-untyped-call]
            for name, each in model.named_parameters()
            if each.requires_grad
        }
        self.version = torch.tensor(version)
        self.version.share_memory_()  # type: ignore[no-untyped-call]
        self.lock = lock

    @torch.no_grad()
    def write(self, model: nn.Module, version: int) -> None:
        """Publish a model's weights."""
        with self.lock:
            for name, weight in self.weights.items():
                weight.copy_(model.get_parameter(name))
            self.version.fill_(version)

    @torch.no_grad()
    def read(self, model: nn.Module) -> int:
        """Put the newest weights into a model; returns their version."""
        with self.lock:
            for name, weight in self.weights.items():
                model.get_parameter(name).copy_(weight)
            return int(self.version)


def write_answers(model: CausalLM, published: PublishedWeights, channel: Connection) -> None:
    """What runs in a worker's process: answer requests with the newest weights until the channel closes."""
    leave_signals()
    torch.set_num_threads(1)
    register_packed_attention()  # the model came by pickling, which registers nothing
    parent, iteration = os.getppid(), -1
    requests: SimpleQueue[Request | None] = SimpleQueue()
    # Read at once: a learner that waits for room in the channel, and a worker that does, would wait for each other.
    threading.Thread(target=_receive, args=(channel, requests), daemon=True).start()
    try:
        while os.getppid() == parent:
            try:
                request = requests.get(timeout=0.5)
            except Empty:
                continue
            if request is None:
                return
            iteration, version, begun = request.iteration, published.read(model), time.perf_counter()
            generator = torch.Generator()
            generator.set_state(request.generator_state)
            found = generate(
                model,
                model.tokenizer,
                request.prompt_ids,
                samples_per_prompt=request.samples_per_prompt,
                sampling=request.sampling,
                generator=generator,
                max_rows=request.max_rows,
            )
            channel.send(Rollout(iteration, version, found, time.perf_counter() - begun))
    except Exception:
        channel.send(Rollout(iteration, -1, None, 0.0, traceback.format_exc()))


def _receive(channel: Connection, requests: "SimpleQueue[Request | None]") -> None:
    """Pass requests on until there are no more."""
    request: Request | None = None
    try:
        while (request := channel.recv()) is not None:
            requests.put(request)
    except (EOFError, OSError):
        pass
    requests.put(None)


class RolloutWorkers:
    """Processes that answer ahead of the learner. Enter it to start them; leaving ends them.

    Attributes:
        max_staleness: how many updates old answers may be.
        waited: seconds that the learner has waited for the last answers.
    """

    def __init__(self, model: CausalLM, *, workers: int, max_staleness: int, version: int) -> None:
        """Workers begin with copies of `model`, which has seen `version` updates."""
        self.max_staleness = max_staleness
        self.waited = 0.0
        self._context = multiprocessing.get_context("spawn")
        self._published = PublishedWeights(model, version, self._context.Lock())
        self._model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self._workers = workers
        self._processes: list[Any] = []
        self._channels: list[Connection] = []
        self._version, self._asked = version, version

    def __enter__(self) -> "RolloutWorkers":
        """Start every worker."""
        for _ in range(self._workers):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(
                target=write_answers, args=(self._model, self._published, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._channels.append(mine)
        return self

    def __exit__(self, *exception: object) -> None:
        """End every worker, by force where it is still writing."""
        for channel in self._channels:
            try:
                channel.send(None)
            except OSError:
                continue  # it has ended already
        deadline = time.monotonic() + PATIENCE
        for process, channel in zip(self._processes, self._channels, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
            channel.close()

    def begin_after(self, iteration: int) -> None:
        """No answers are wanted for iterations before this one (whose own were saved with a checkpoint)."""
        self._asked = max(self._asked, iteration)

    def wanted(self, last: int) -> range:
        """The iterations, before `last`, whose answers may be asked for now and have not been."""
        return range(self._asked, min(self._version + self.max_staleness + 1, last))

    def ask(self, request: Request) -> None:
        """Hand the next request to the worker whose turn it is."""
        channel = self._channels[request.iteration % self._workers]
        try:
            channel.send(request)
        except OSError:
            self._ended(request.iteration % self._workers)
        self._asked = request.iteration + 1

    def take(self, iteration: int) -> tuple[GenerationResult, dict[str, float]]:
        """The answers of an iteration, once they are there, with what is logged of them.

        Raises:
            RuntimeError: if a worker has failed or died.
        """
        place = iteration % self._workers
        begun = time.perf_counter()
        try:
            found: Rollout = self._channels[place].recv()
        except (EOFError, ConnectionError):
            self._ended(place)
        if found.error is not None or found.generation is None:
            raise RuntimeError(f"rollout worker {place} failed, so the run stops:\n{found.error}")
        self.waited = time.perf_counter() - begun
        metrics = {
            "workers/staleness": float(iteration - found.version),
            "workers/wait": self.waited,
            "workers/writing": found.seconds,
        }
        return found.generation, metrics

    def publish(self, model: nn.Module, version: int) -> None:
        """Give workers the weights after an update."""
        self._published.write(model, version)
        self._version = version

    def _ended(self, place: int) -> NoReturn:
        process = self._processes[place]
        process.join()
        raise RuntimeError(
            f"rollout worker {place} of {self._workers} {how_it_ended(process.exitcode)}, so the run stops; go on from "
            "the last checkpoint with resume"
        )
