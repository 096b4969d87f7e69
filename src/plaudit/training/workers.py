"""Asynchronous workers: processes that play and learn over shared weights, watched by the process that started them."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import multiprocessing

from plaudit.algorithms.a3c import A3CAgent, SharedWeights
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.updating import combine_metrics
from plaudit.configs.a3c import A3CConfig
from plaudit.rollout.environments import Collector, make_environments

SEED_STRIDE = 1000
"""Between the seeds of two workers' environments; the first worker has the run's own."""
PATIENCE = 5.0
"""Seconds that a worker gets to end by itself."""


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker process has to know; it travels by pickling.

    Attributes:
        config: of the algorithm.
        sizes: of the task.
        env, env_options: which environment.
        total_steps: of the run, all workers together.
        seed: of the run.
        report_every: updates between two reports.
    """

    config: A3CConfig
    sizes: TaskSizes
    env: str
    env_options: dict[str, Any]
    total_steps: int
    seed: int
    report_every: int


@dataclass
class Report:
    """What a worker has done since its last report.

    Attributes:
        place: which worker.
        steps: environment steps.
        metrics: means over its updates.
        staleness: of each of its gradients.
        returns, lengths: of the episodes that ended.
        error: the traceback, where it has failed.
    """

    place: int
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    staleness: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    error: str | None = None


def leave_signals() -> None:
    """Let a worker live through Ctrl-C and SIGTERM, which often reach every process: the first one ends the others.

    A worker that died of the signal would stop a run that is about to save itself. It ends with the first process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def work(task: WorkerTask, shared: SharedWeights, place: int, stop: torch.Tensor, reports: Connection) -> None:
    """What runs in a worker's process: play, learn, report, until all workers together have played enough."""
    leave_signals()
    torch.set_num_threads(1)
    parent = os.getppid()
    try:
        seed = task.seed + SEED_STRIDE * place
        agent = A3CAgent(
            task.config, task.sizes, total_steps=task.total_steps, seed=task.seed, shared=shared, place=place
        )
        environments = make_environments(task.env, 1, **task.env_options)
        collector = Collector(environments, seed=seed)
        done = 0
        while shared.steps < task.total_steps and not bool(stop) and os.getppid() == parent:
            taken = []
            for _ in range(task.report_every):
                taken.append(agent.update(collector.collect(agent.policy, agent.num_steps)))
                if shared.steps >= task.total_steps or bool(stop):
                    break
            returns, lengths = collector.episode_returns, collector.episode_lengths
            collector.episode_returns, collector.episode_lengths = [], []
            reports.send(
                Report(
                    place,
                    collector.num_steps_taken - done,
                    combine_metrics(taken),
                    [metrics["workers/staleness"] for metrics in taken],
                    returns,
                    lengths,
                )
            )
            done = collector.num_steps_taken
        environments.close()
    except Exception:
        reports.send(Report(place, error=traceback.format_exc()))


class WorkerPool:
    """Worker processes over an agent's shared weights. Enter it to start them; leaving ends them.

    Attributes:
        task: what they do.
        processes: one for each worker.
    """

    def __init__(self, task: WorkerTask, agent: A3CAgent) -> None:
        """Weights of `agent` go into shared memory; processes start with `__enter__`."""
        self.task = task
        self.agent = agent
        agent.shared.share()
        self.stop = torch.zeros((), dtype=torch.bool)
        self.stop.share_memory_()  # type: ignore[no-untyped-call]
        self.processes: list[Any] = []
        # A pipe for each: one that is shared could be left locked, or half written, by a worker that dies.
        self._reports: dict[Connection, int] = {}

    def __enter__(self) -> "WorkerPool":
        """Start every worker."""
        context = multiprocessing.get_context("spawn")
        for place in range(self.task.config.workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(self.task, self.agent.shared, place, self.stop, sender), daemon=True
            )
            process.start()
            sender.close()
            self.processes.append(process)
            self._reports[receiver] = place
        return self

    def __exit__(self, *exception: object) -> None:
        """End every worker, by force where it does not by itself."""
        self.stop.fill_(True)
        deadline = time.monotonic() + PATIENCE
        while self._reports and time.monotonic() < deadline:
            for receiver in self._waiting(0.05):
                # A worker whose reports nobody reads cannot end.
                try:
                    receiver.recv()
                except EOFError:
                    del self._reports[receiver]
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
            process.join()

    def next_report(self, interrupted: Callable[[], bool] = lambda: False) -> Report | None:
        """Wait for a report; None where the run was interrupted, or where all workers have ended.

        Raises:
            RuntimeError: if a worker has failed, or has died without a word.
        """
        while self._reports and not interrupted():
            for receiver in self._waiting(0.2):
                try:
                    report: Report = receiver.recv()
                except EOFError:
                    self._ended(self._reports.pop(receiver))
                    continue
                if report.error is not None:
                    raise RuntimeError(f"worker {report.place} failed, so the run stops:\n{report.error}")
                return report
        return None

    def _waiting(self, seconds: float) -> list[Connection]:
        """Pipes that have something to read, an end perhaps."""
        ready = wait(list(self._reports), timeout=seconds)
        return [receiver for receiver in self._reports if receiver in ready]

    def _ended(self, place: int) -> None:
        """A worker has ended: all is well if it said so."""
        process = self.processes[place]
        process.join()
        if process.exitcode:
            raise RuntimeError(
                f"worker {place} of {len(self.processes)} {how_it_ended(process.exitcode)} after "
                f"{int(self.agent.shared.counts[place, 0])} of its steps, so the run stops; go on from the last "
                "checkpoint with resume"
            )

    def advance(self, interrupted: Callable[[], bool] = lambda: False) -> tuple[Report | None, dict[str, float]]:
        """The next report, and its metrics as they are logged."""
        report = self.next_report(interrupted)
        if report is None:
            return None, {}
        staleness = report.staleness
        metrics = report.metrics | {
            "workers/worker": float(report.place),
            "workers/staleness": sum(staleness) / len(staleness),
            "workers/staleness_max": max(staleness),
        }
        return report, metrics


def how_it_ended(code: int) -> str:
    """How a process ended."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
