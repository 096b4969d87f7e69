"""Train an agent in a Gymnasium environment: `main(config)`, one visible loop of collecting, updating, evaluating."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from plaudit.algorithms.a3c import A3CAgent
from plaudit.algorithms.agents import build_agent
from plaudit.algorithms.base import Agent, TaskSizes
from plaudit.algorithms.curious import CuriousAgent, build_bonus
from plaudit.configs.a3c import A3CConfig
from plaudit.configs.base import dump_config
from plaudit.configs.gym import GymConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.training.checkpoints import load_last_good, prune_checkpoints, save_checkpoint
from plaudit.training.folder import check_output, output_folder
from plaudit.training.gym_agents import save_agent
from plaudit.training.gym_curve import write_curve
from plaudit.training.gym_play import EVALUATION_SEED, look_at, play, summary
from plaudit.training.gym_video import check_video, record_video
from plaudit.training.messages import say, warn
from plaudit.training.precision import threads
from plaudit.training.processes import Processes
from plaudit.training.progress import ProgressReport, duration_text
from plaudit.training.random_state import random_state, seeded, set_random_state
from plaudit.training.results import save_whole
from plaudit.training.session import compare_configurations
from plaudit.training.signals import StopRequest
from plaudit.training.trackers import Trackers
from plaudit.training.workers import WorkerPool, WorkerTask

REPORT_EVERY = 20
"""Updates of an asynchronous worker between two of its reports."""
RECENT = 100
"""Episodes over which the return of training is averaged."""
PATIENCE = 5.0
"""Seconds for which a dry run waits until an agent begins to learn."""


@dataclass(frozen=True, kw_only=True)
class GymResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        model_folder: the saved agent; None when a signal stopped the run.
        stopped_by: `steps`, or the name of a signal.
        steps: environment steps, all environments together.
        episodes: that ended in training.
        seconds: wall-clock time of this process.
        metrics: of the last evaluation: `return`, `return_deviation`, `length`.
        agent: the agent itself.
    """

    output: Path
    model_folder: Path | None
    stopped_by: str
    steps: int
    episodes: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    agent: Any = field(default=None, repr=False)

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the number of the signal that stopped it."""
        return 0 if self.model_folder is not None else 128 + signal.Signals[self.stopped_by].value

    def write(self) -> None:
        """Write `result.json`: every field but the agent."""
        values = {name: value for name, value in vars(self).items() if name != "agent"}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        (self.output / "result.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@dataclass
class GymJob:
    """The parts of a run.

    Attributes:
        config: of the run.
        agent: what learns.
        sizes: of the task.
        collector: its environments.
        steps: environment steps so far.
        metrics: of the last evaluation.
    """

    config: GymConfig
    agent: Agent
    sizes: TaskSizes
    collector: Collector
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write a checkpoint, and remove those that need not be kept."""
        folder = self.config.output / "checkpoints"
        state = {
            "agent": self.agent.state_dict(),
            "steps": self.steps,
            "metrics": self.metrics,
            "returns": torch.tensor(self.collector.episode_returns, dtype=torch.float64),
            "lengths": torch.tensor(self.collector.episode_lengths),
            "generator": self.collector.generator.get_state(),
            "random": random_state(),
            "config": self.config.model_dump_json(),
        }
        save_checkpoint(folder, self.steps, state)
        prune_checkpoints(folder, keep_last=self.config.keep_last, keep_steps=set())

    def resume(self) -> bool:
        """Go on from the last good checkpoint; False where there is none.

        The agent is as it was, bit by bit. The environments cannot be saved: they begin new episodes, from a seed that
        the number of steps gives, so a run that was stopped and went on differs from one that was not.
        """
        checkpoint = load_last_good(self.config.output / "checkpoints")
        if checkpoint is None:
            return False
        saved = checkpoint.state
        compare_configurations(json.loads(saved["config"]), self.config, checkpoint.path)
        self.agent.load_state_dict(saved["agent"])
        self.steps, self.metrics = int(saved["steps"]), dict(saved["metrics"])
        if isinstance(self.agent, A3CAgent):
            # Workers had gone on while reports of what they did were on their way.
            self.steps = self.agent.shared.steps
        self.collector = Collector(self.collector.environments, seed=self.config.seed + self.steps)
        self.collector.num_steps_taken = self.steps
        self.collector.episode_returns = saved["returns"].tolist()
        self.collector.episode_lengths = saved["lengths"].tolist()
        self.collector.generator.set_state(saved["generator"])
        set_random_state(saved["random"])
        return True


def main(config: GymConfig, *, dry_run: bool = False) -> GymResult | list[float]:
    """Train an agent and save it as `<output>/model`; or play with a saved one.

    Args:
        config: everything about the run.
        dry_run: only say what the run would need; nothing is written.

    Returns:
        How the run ended; with `config.evaluate` the returns of the episodes.

    Raises:
        ValueError: for environments and folders that cannot be used.
        NonFiniteError: (a ValueError) for losses that are not finite.
    """
    started = time.perf_counter()
    if config.evaluate is not None:
        return [] if dry_run else play(config, config.evaluate)
    with seeded(config.seed), threads(config.threads):
        if not dry_run:
            check_output(config)
        job = prepare(config)
        try:
            if dry_run:
                estimate(job)
                return []
            with output_folder(config, Processes(device=torch.device("cpu"))):
                stopped_by = run_updates(job)
                folder = finish(job) if stopped_by == "steps" else None
                result = GymResult(
                    output=config.output,
                    model_folder=folder,
                    stopped_by=stopped_by,
                    steps=job.steps,
                    episodes=len(job.collector.episode_returns),
                    seconds=time.perf_counter() - started,
                    metrics=job.metrics,
                    agent=job.agent,
                )
                result.write()
                return result
        finally:
            job.collector.environments.close()


def prepare(config: GymConfig) -> GymJob:
    """Make the environments and the agent that fits them."""
    sizes = look_at(config, config.env, config.env_options)
    if config.video:
        check_video(config.env, **config.env_options)
    agent = build_agent(config.algorithm, sizes, total_steps=config.total_steps, seed=config.seed)
    if config.bonus is not None:
        agent = CuriousAgent(agent, build_bonus(config.bonus, sizes, seed=config.seed))
    environments = make_environments(config.env, agent.num_environments, **config.env_options)
    return GymJob(config, agent, sizes, Collector(environments, seed=config.seed))


def run_updates(job: GymJob) -> str:
    """The loop: from where the run stands to its end; returns what ended it."""
    config, agent = job.config, job.agent
    resumed = config.resume and job.resume()
    (config.output / "configuration.yaml").write_text(dump_config(config), encoding="utf-8")
    if resumed and not config.quiet:
        say(f"gym: going on after step {job.steps} of {config.total_steps}, in new episodes")
    each = agent.num_environments * agent.num_steps
    tenth = max(1, config.total_steps // 10)
    with ExitStack() as stack:
        step = job.steps if resumed else None
        settings = config.model_dump(mode="json")
        trackers = Trackers(config.trackers, config.output, settings=settings, resume_step=step)
        stack.callback(trackers.close)
        progress = stack.enter_context(
            ProgressReport(
                -(-config.total_steps // each) * each,
                first_step=job.steps,
                every=config.log_every * each,
                label="gym",
                quiet=config.quiet,
                unit="steps",
            )
        )
        stop = stack.enter_context(StopRequest())
        advance: Callable[[], dict[str, float]] = partial(play_and_update, job)
        if isinstance(agent, A3CAgent):
            pool = stack.enter_context(WorkerPool(worker_task(job, agent.config), agent))
            advance = partial(from_workers, job, pool, lambda: bool(stop.requested))
        while job.steps < config.total_steps:
            if stop.requested:
                trackers.flush()
                job.save()
                say(f"gym: stopped by {stop.requested} after step {job.steps}; go on with --resume")
                return str(stop.requested)
            before = job.steps
            metrics = advance()
            if job.steps == before:  # interrupted while it waited for workers
                continue
            last = job.steps >= config.total_steps
            metrics |= training_metrics(job.collector)
            if last or _crossed(before, job.steps, config.evaluate_every or tenth):
                metrics |= evaluate(job, progress)
            shown = {"return": metrics["train/return"]} if "train/return" in metrics else {}
            metrics |= progress.update(job.steps, tokens=job.steps - before, metrics=shown)
            trackers.log(job.steps, metrics)
            if last or _crossed(before, job.steps, config.save_every or tenth):
                trackers.flush()
                job.save()
    return "steps"


def play_and_update(job: GymJob) -> dict[str, float]:
    """The next steps of every environment, and what the agent learns from them."""
    trajectory = job.collector.collect(job.agent.policy, job.agent.num_steps)
    job.steps += trajectory.num_rows * trajectory.num_steps
    return job.agent.update(trajectory)


def worker_task(job: GymJob, config: A3CConfig) -> WorkerTask:
    """What each worker process of an asynchronous run does."""
    options = job.config
    return WorkerTask(
        config=config,
        sizes=job.sizes,
        env=options.env,
        env_options=options.env_options,
        total_steps=options.total_steps,
        # A run that goes on plays other episodes than before.
        seed=options.seed + job.steps,
        report_every=REPORT_EVERY,
    )


def from_workers(job: GymJob, pool: WorkerPool, interrupted: Callable[[], bool]) -> dict[str, float]:
    """What one of the workers has done; all of it counts. Nothing where the run was interrupted.

    The last call waits until every worker has ended: what is evaluated and saved then moves no more.
    """
    found: dict[str, float] = {}
    while True:
        report, metrics = pool.advance(interrupted)
        if report is None:
            if job.steps < job.config.total_steps and not interrupted():
                raise RuntimeError(f"all workers ended after {job.steps} of {job.config.total_steps} steps")
            return found
        found = metrics
        job.steps += report.steps
        job.collector.episode_returns += report.returns
        job.collector.episode_lengths += report.lengths
        if job.steps < job.config.total_steps:
            return found


def training_metrics(collector: Collector) -> dict[str, float]:
    """Mean return and length of the last episodes that were played in training, exploration included."""
    if not collector.episode_returns:
        return {}
    return {
        "train/return": mean(collector.episode_returns[-RECENT:]),
        "train/length": mean(collector.episode_lengths[-RECENT:]),
        "train/episodes": float(len(collector.episode_returns)),
    }


def evaluate(job: GymJob, progress: ProgressReport) -> dict[str, float]:
    """Play without exploration, in environments of their own."""
    config = job.config
    returns = evaluate_policy(
        config.env,
        job.agent.greedy_policy(),
        num_episodes=config.episodes,
        seed=config.seed + EVALUATION_SEED,
        num_environments=min(8, config.episodes),
        episode_limit=config.episode_limit,
        **config.env_options,
    )
    job.metrics = {"return": mean(returns), "return_deviation": pstdev(returns)}
    progress.note(f"step {job.steps}: {summary(returns)}")
    return {f"eval/{name}": value for name, value in job.metrics.items()}


def finish(job: GymJob) -> Path:
    """Save the agent, its learning curve and perhaps a video."""
    config = job.config
    learns = config.algorithm
    if isinstance(learns, PolicyGradientConfig) and not learns.needs_critic and not job.collector.episode_returns:
        warn(
            f"no episode ended in {job.steps} steps, and {learns.name} without a learned value waits for that: nothing "
            "was learned; play longer, or set env_options.max_episode_steps"
        )
    folder = save_whole(
        lambda path: save_agent(
            path, job.agent, config.algorithm, job.sizes, env=config.env, env_options=config.env_options
        ),
        config.output / "model",
    )
    write_curve(config.output, f"{config.algorithm.name} in {config.env}")
    if not config.quiet:
        say(f"gym: saved {folder}")
    if config.video:
        path = record_video(
            config.env, job.agent.greedy_policy(), config.output / "video", seed=config.seed, **config.env_options
        )
        if not config.quiet:
            say(f"gym: recorded {path}")
    return folder


def estimate(job: GymJob) -> None:
    """Say what the run would need, from the first update of a fresh agent that learns; the agent is thrown away."""
    each = job.agent.num_environments * job.agent.num_steps
    starts = getattr(job.config.algorithm, "learning_starts", 0)
    begun = time.perf_counter()
    for played in itertools.count(each, each):
        last = time.perf_counter()
        job.agent.update(job.collector.collect(job.agent.policy, job.agent.num_steps))
        if played > starts or last - begun > PATIENCE:
            break
    workers = job.agent.config.workers if isinstance(job.agent, A3CAgent) else 0
    at_once = max(1, min(workers, os.cpu_count() or 1))
    seconds = (time.perf_counter() - last) * job.config.total_steps / each / at_once
    count, kind = (workers, "worker") if workers else (job.agent.num_environments, "environment")
    players = f"{count} {kind}{'s' if count > 1 else ''}"
    lines = [
        f"observations     {job.sizes.observation_size} numbers",
        f"actions          {job.sizes.num_actions}",
        f"updates          {-(-job.config.total_steps // each):,} of {each:,} steps ({players})",
        f"time             at least {duration_text(seconds)} (from one update; evaluation not included)",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every < after // every
