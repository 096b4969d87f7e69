"""Align a language model with a reward: `main(config)`, one visible loop of sampling, scoring and updating."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.align import AlignConfig
from plaudit.data.records import Comparison, PromptRecord
from plaudit.models.causal_lm import CausalLM
from plaudit.rewards.annotators import Annotator
from plaudit.rollout.engine import Engine, require_plain_policy
from plaudit.rollout.text_policy import TextPolicy
from plaudit.training.align_build import HEADS, build_learner, build_policy
from plaudit.training.align_estimate import AlignEstimate, check_replay, estimate_alignment
from plaudit.training.align_guards import Guards
from plaudit.training.align_job import AlignJob, fitting_prompts
from plaudit.training.align_journal import Journal
from plaudit.training.align_reward import check_unchanged, model_reward_of, open_reward, reward_model_of
from plaudit.training.folder import check_output, output_folder
from plaudit.training.messages import say, warn
from plaudit.training.optimizers import build_optimizer, set_learning_rate
from plaudit.training.precision import pick_device, threads
from plaudit.training.processes import Processes
from plaudit.training.random_state import seeded
from plaudit.training.reading import RecordCounts, read_run_prompts
from plaudit.training.refresh import RewardRefresher, build_refresher
from plaudit.training.results import ENDS, TrainingResult, count_table, save_whole
from plaudit.training.rollout_workers import RolloutWorkers
from plaudit.training.schedules import learning_rate_factor, warmup_steps_of
from plaudit.training.session import Session, records_hash
from plaudit.training.signals import RunStopped, StopRequest


def main(
    config: AlignConfig,
    *,
    dry_run: bool = False,
    prompts: Sequence[PromptRecord] | None = None,
    held_out: Sequence[PromptRecord] | None = None,
    model: CausalLM | None = None,
    reward: Any = None,
    comparisons: Sequence[Comparison] | None = None,
    annotator: Annotator | None = None,
    engine: Engine | None = None,
    on_iteration: Callable[[int, CausalLM], object] | None = None,
) -> TrainingResult | AlignEstimate:
    """Align a language model and save it as `<output>/model`, a plain transformers folder.

    Args:
        config: everything about the run.
        dry_run: only say what the run would need; nothing is written.
        prompts: prompts to learn on, instead of `config.data`.
        held_out: prompts to evaluate on, instead of `config.held_out`.
        model: the policy's start, instead of building `config.model`; it is changed.
        reward: whatever `plaudit.rewards.base.as_reward` takes, instead of `config.reward` or `config.rewards`.
        comparisons: what the reward model was trained on, instead of `config.refresh_reward.data`.
        annotator: judges the policy's answers, instead of `config.refresh_reward.annotator`.
        engine: samples the answers that are learned from, instead of the policy itself; it is handed the weights before
            every iteration. Held-out and greedy answers stay the policy's.
        on_iteration: called after every iteration with its number, from 1, and the policy's model, to look at it or
            to keep a copy.

    Returns:
        The result with the model; in a dry run the estimate.

    Raises:
        ValueError: for prompts, rewards, configurations and folders that cannot be used, and for losses and rewards
            that are not finite.
    """
    started = time.perf_counter()
    with seeded(config.seed), threads(config.threads):
        if not dry_run:
            check_output(config)
        job, optimizer, counts = prepare(config, prompts, held_out, model, reward)
        if engine is not None:
            require_plain_policy(job.policy, workers=config.asynchronous is not None)
            job.engine = engine
        if dry_run:
            estimate = estimate_alignment(job)
            estimate.print()
            return estimate
        hashed = records_hash([*job.prompts, "held out", *job.held_out])
        if config.refresh_reward is not None:
            job.refresher = build_refresher(
                config, model_reward_of(job.reward), comparisons=comparisons, annotator=annotator
            )
            hashed = records_hash([hashed, *job.refresher.old])
        with output_folder(config, Processes(device=job.device)):
            session = Session(config, job.trained, optimizer, data_hash=hashed, parts={"job": job})
            stopped_by = run_iterations(job, session, on_iteration)
            return conclude(job, session, stopped_by, counts, started=started)


def prepare(
    config: AlignConfig,
    prompts: Sequence[PromptRecord] | None = None,
    held_out: Sequence[PromptRecord] | None = None,
    model: CausalLM | None = None,
    reward: Any = None,
) -> tuple[AlignJob, torch.optim.Optimizer, dict[str, RecordCounts]]:
    """Read the prompts, open the reward, and build policy, critic, reference and algorithm.

    Returns:
        The job, its optimizer, and the counts by kind of record.
    """
    warn_of_penalty(config)
    split = read_run_prompts(config, prompts, held_out)
    counts = {"prompts": split.train_counts}
    device = pick_device(config.device)
    scorer = open_reward(config, reward, device=str(device))
    language_model = (CausalLM.from_backbone(config.model) if model is None else model).to(device)
    check_replay(config, language_model.head[0].shape[0])
    source = reward_model_of(scorer) if config.critic_start == "reward" else None
    policy, reference = build_policy(config, language_model, device, reward_model=source)
    kept, ids = fitting_prompts(policy, split.train, split.train_counts, config)
    held: list[PromptRecord] = []
    held_ids: list[list[int]] = []
    if split.held_out:
        counts["held-out prompts"] = split.held_out_counts
        held, held_ids = fitting_prompts(policy, split.held_out, split.held_out_counts, config)
    if not config.quiet:
        for (kind, count), records in zip(counts.items(), (kept, held), strict=False):
            different = f"; {len(records)} different ones" if len(records) != count.used else ""
            say(f"{kind}: {count}{different}")
    optimizer = build_optimizer(policy, config.optimizer, head_prefixes=HEADS)
    text_policy = TextPolicy(
        policy,
        temperature=config.sampling.temperature,
        token_budget=config.tokens_per_micro_batch,
        max_rows=config.max_rows,
    )
    algorithm = build_algorithm(
        config.algorithm,
        build_learner(config, text_policy, reference),
        optimizer,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        total_updates=config.iterations,
    )
    guards = Guards(config.guards)
    job = AlignJob(config, policy, reference, scorer, text_policy, algorithm, kept, ids, held, held_ids, device, guards)
    return job, optimizer, counts


def run_iterations(
    job: AlignJob, session: Session, on_iteration: Callable[[int, CausalLM], object] | None = None
) -> str:
    """The loop: from where the session stands to the end of the run; returns what ended it."""
    config = job.config
    resumed = config.resume and session.resume()
    state = session.state
    session.write_configuration()
    if resumed and not config.quiet:
        say(f"align: going on after iteration {state.step} of {config.iterations}")
    with ExitStack() as stack:
        journal = Journal(config, step=state.step, resumed=resumed)
        stack.callback(journal.close)
        stop = stack.enter_context(StopRequest())
        stack.enter_context(journal.progress)
        if config.asynchronous is not None:
            job.rollouts = stack.enter_context(open_workers(job, state.step))

        while state.step < config.iterations:
            try:
                metrics = run_iteration(job, session, journal, stop)
            except RunStopped as stopped:
                return break_off(job, session, journal, stopped.signal)
            if on_iteration is not None:
                on_iteration(state.step, job.policy.language_model)
            guard = job.guards.stop_reason(metrics)
            keep(job, session, journal, last=state.step == config.iterations or guard is not None)
            if guard:
                warn(f"stopping after iteration {state.step}: {guard}")
                return "guard"
    return "iterations"


def run_iteration(job: AlignJob, session: Session, journal: Journal, stop: StopRequest) -> dict[str, float]:
    """Sample and score answers, or take up those of an iteration that was broken off, and learn from them.

    Returns:
        The metrics of the iteration, which are logged.

    Raises:
        RunStopped: if a signal came; what has been done so far is `job.pending`.
    """
    config, state = job.config, session.state
    stop.heed()  # before the next answers are sampled, which may take minutes
    if job.pending is None and job.refresher is not None and job.refresher.due(state.step):
        refresh(job, job.refresher, state.step, journal, stop)
        stop.heed()
    set_learning_rate(session.optimizer, schedule_factor(config, state.step))
    if job.pending is None:
        job.pending = job.collect(state.step)
    iteration = job.pending
    stop.heed()
    if job.held_out and not state.evaluation:
        # Not earlier: a reward's running scale knows nothing before the first answers.
        evaluate(job, session, journal)
    going_on = True
    while going_on and iteration.done < len(iteration.plan):
        stop.heed()
        going_on = job.take_step(iteration)
    metrics = job.finish(iteration)
    if job.refresher is not None:
        metrics |= job.refresher.take_metrics()
    job.pending = None
    state.step, state.tokens = state.step + 1, state.tokens + iteration.tokens
    job.publish(state.step)
    state.records += config.prompts_per_iteration * config.samples_per_prompt
    rate = session.optimizer.param_groups[0]["lr"]
    journal.log(state.step, iteration, metrics, rate=rate, tokens=state.tokens)
    for text in job.guards.look(metrics):
        warn(f"iteration {state.step}: {text}")
    return metrics


def keep(job: AlignJob, session: Session, journal: Journal, *, last: bool) -> None:
    """After an iteration: evaluate, keep the policy and save a checkpoint, where it is time for that."""
    config, step = job.config, session.state.step
    if job.held_out and (last or _due(config.evaluate_every, step)):
        evaluate(job, session, journal)
    if _due(config.keep_model_every, step):
        save_whole(job.save_model, config.output / "models" / f"{step:05d}")
    if last or _due(config.save_every, step):
        check_unchanged(job.reward)
        journal.flush()
        session.save()


def conclude(
    job: AlignJob, session: Session, stopped_by: str, counts: dict[str, RecordCounts], *, started: float
) -> TrainingResult:
    """Save the policy where the run has come to its end, and write what came of it.

    Args:
        job, session: of the run.
        stopped_by: what ended it.
        counts: by kind of record.
        started: the clock (`time.perf_counter`) when it began.
    """
    config, folder = job.config, None
    if stopped_by in ENDS:
        folder = save_whole(job.save_model, config.output / "model")
        if job.refresher is not None:
            save_whole(job.refresher.reward.model.save_pretrained, config.output / "reward-model")
        if not config.quiet:
            say(f"align: saved {folder}")
    job.policy.eval()
    result = TrainingResult(
        output=config.output,
        model_folder=folder,
        stopped_by=stopped_by,
        steps=session.state.step,
        best_step=-1,
        tokens=session.state.tokens,
        seconds=time.perf_counter() - started,
        metrics=session.state.evaluation,
        records=count_table(**counts),
        model=job.policy.language_model,
    )
    result.write()
    return result


def open_workers(job: AlignJob, step: int) -> RolloutWorkers:
    """The processes that sample for a run which stands at this iteration."""
    settings = job.config.asynchronous
    assert settings is not None
    workers = RolloutWorkers(
        job.policy.language_model, workers=settings.workers, max_staleness=settings.max_staleness, version=step
    )
    workers.begin_after(step if job.pending is None else step + 1)
    return workers


def evaluate(job: AlignJob, session: Session, journal: Journal) -> None:
    """Answer the held-out prompts and log what they earn."""
    session.state.evaluation = job.evaluate(session.state.step)
    journal.log_evaluation(session.state.step, session.state.evaluation)


def refresh(job: AlignJob, refresher: RewardRefresher, iteration: int, journal: Journal, stop: StopRequest) -> None:
    """Have some of the policy's answers judged, let the reward model learn from that, and say what it cost."""
    check_unchanged(job.reward)
    found = refresher.refresh(job.text_policy, job.prompts, job.prompt_ids, iteration, heed=stop.heed)
    shown = ""
    if "refresh/accuracy_after" in found:
        before, after = 100 * found["refresh/accuracy_before"], 100 * found["refresh/accuracy_after"]
        shown = f"; orders {before:.0f} % of their pairs alike before learning, {after:.0f} % after"
    journal.progress.note(
        f"iteration {iteration}, refresh: {found['refresh/comparisons']:.0f} of {found['refresh/asked']:.0f} judged, "
        f"{refresher.labels} of {refresher.settings.budget} in all{shown}"
    )


def warn_of_penalty(config: AlignConfig) -> None:
    """Say it where the penalty towards the reference will not do what one asks of it."""
    settings = config.algorithm.resolved() if isinstance(config.algorithm, AlgorithmConfig) else None
    if settings is None or settings.kl_placement != "reward" or settings.kl_estimator == "k1":
        return
    if settings.kl_coefficient:
        warn(
            f"algorithm.kl_estimator: {settings.kl_estimator} in the reward does not hold the policy near its "
            "reference: it makes what has become rarer rarer still. Use k1 there, or kl_placement: loss"
        )


def break_off(job: AlignJob, session: Session, journal: Journal, signal: str) -> str:
    """Save the run as it stands, in the middle of an iteration, and say how to go on."""
    check_unchanged(job.reward)
    journal.flush()
    path = session.save()
    say(f"align: stopped by {signal} in iteration {session.state.step + 1}; go on with --resume ({path})")
    return signal


def schedule_factor(config: AlignConfig, iteration: int) -> float:
    """What the peak learning rate is multiplied by in an iteration."""
    settings = config.optimizer
    return learning_rate_factor(
        iteration,
        schedule=settings.schedule,
        total_steps=config.iterations,
        warmup_steps=warmup_steps_of(settings.warmup, config.iterations),
        final_fraction=settings.final_fraction,
    )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
