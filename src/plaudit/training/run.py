"""The services around a training loop as one context: stop requests, trackers, progress, checkpoints, cadence."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from plaudit.configs.training import TrainingConfig
from plaudit.core.transfer import to_device
from plaudit.training.guards import require_finite_gradient, require_finite_losses
from plaudit.training.messages import say
from plaudit.training.optimizers import set_learning_rate
from plaudit.training.progress import ProgressReport
from plaudit.training.random_state import random_state
from plaudit.training.schedules import learning_rate_factor, warmup_steps_of
from plaudit.training.session import RunState, Session
from plaudit.training.signals import StopRequest
from plaudit.training.trackers import Trackers

SHOWN = ("loss", "accuracy")
STOP_SIGNALS = ("SIGTERM", "SIGINT")
STEPS_WORTH_SAVING = 50
"""Epochs of fewer steps do not each get a checkpoint: flushing to the disk would take longer than the steps."""


class Run:
    """What a loop needs besides its own mathematics.

    The order inside a step is fixed: update, log, evaluate, save. So a checkpoint holds everything that was logged
    for its step, and a run that goes on from it repeats bit by bit what an uninterrupted run would have done.

    Attributes:
        state: where the run stands.
        total_steps: optimizer steps of the whole run.
        stop: the request to stop by SIGTERM or SIGINT.
    """

    def __init__(
        self, config: TrainingConfig, session: Session, *, steps_per_epoch: int, evaluates: bool, label: str
    ) -> None:
        self.config, self.session, self.label = config, session, label
        self.steps_per_epoch, self.evaluates = steps_per_epoch, evaluates
        if config.patience is not None and not evaluates:
            raise ValueError(f"patience: {config.patience} needs held-out records; give held_out or held_out_fraction")
        self.total_steps = total_steps(config, steps_per_epoch)
        self.processes = session.processes
        self.stop = StopRequest(patient=self.processes.several)
        self._agreed: str | None = None
        resumed = config.resume and session.resume()
        session.write_configuration()
        if resumed and not config.quiet:
            say(f"{label}: going on after step {self.state.step} of {self.total_steps}")
        self.trackers: Trackers | None = None
        if self.processes.first:
            self.trackers = Trackers(
                config.trackers,
                config.output,
                settings=config.model_dump(mode="json"),
                resume_step=self.state.step if resumed else None,
            )
        self.progress = ProgressReport(
            self.total_steps, first_step=self.state.step, every=config.log_every, label=label, quiet=config.quiet
        )
        self._step_randomness: dict[str, Any] = {}
        self._waiting: list[tuple[Tensor, Callable[[list[float]], None]]] = []
        self._held_back: Tensor | None = None

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self.session.state

    def __enter__(self) -> Self:
        self.stop.__enter__()
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        if self.trackers is not None:
            self.trackers.close()
        self.stop.__exit__(kind, error, trace)

    def begin_step(self) -> None:
        """Remember the random state, in case the step is broken off, and set the learning rate of this step."""
        self._step_randomness = random_state()
        settings = self.config.optimizer
        factor = learning_rate_factor(
            self.state.step,
            schedule=settings.schedule,
            total_steps=self.total_steps,
            warmup_steps=warmup_steps_of(settings.warmup, self.total_steps),
            final_fraction=settings.final_fraction,
        )
        set_learning_rate(self.session.optimizer, factor)

    def break_off(self) -> str:
        """Save the run as it stood before the step that was begun; returns the name of the signal."""
        self.settle()
        self.session.optimizer.zero_grad(set_to_none=True)
        if self.trackers is not None:
            self.trackers.flush()
        path = self.session.saved_path or self.session.save(self._step_randomness)
        if self.processes.first:
            say(f"{self.label}: stopped by {self.stopping} after step {self.state.step}; go on with --resume ({path})")
        return str(self.stopping)

    @property
    def stopping(self) -> str | None:
        """The signal by which the run is to stop: at once in a single process, between two steps in several."""
        return self._agreed if self.processes.several else self.stop.requested

    def exchange(
        self, losses: Sequence[Tensor], norm: Tensor, tally: Mapping[str, Tensor]
    ) -> tuple[list[float], float, dict[str, float]]:
        """What a step gave, in all processes together; the one wait for the device in a step.

        Processes also agree here whether to stop, so that all of them do after the same step.

        Args:
            losses: a scalar per micro-batch, as many in every process.
            norm: scalar, of the whole gradient, the same everywhere.
            tally: scalars that add up over micro-batches and processes, under the same names in every process.

        Returns:
            The losses, process by process, the norm, and the sums.
        """
        count, rank, world = len(losses), self.processes.rank, self.processes.world_size
        own = torch.stack([*losses, *tally.values()])
        table = own.new_zeros(world, count)
        table[rank] = own[:count]
        flags = torch.tensor([float(self.stop.requested == name) for name in STOP_SIGNALS], dtype=own.dtype)
        shared = self.processes.sum(torch.cat([table.flatten(), own[count:], to_device(flags, own.device)]))
        *numbers, terminated, interrupted, norm_value = torch.cat([shared, norm.to(own)[None]]).tolist()
        if terminated or interrupted:
            self._agreed = STOP_SIGNALS[0] if terminated else STOP_SIGNALS[1]
        return numbers[: world * count], norm_value, dict(zip(tally, numbers[world * count :], strict=True))

    def require_finite(
        self, losses: Sequence[float], norm: float, record_names: Sequence[Sequence[str]], trained: nn.Module
    ) -> None:
        """Stop all processes before the weights move, if a loss or the gradient of any of them is not finite.

        Args:
            losses: of every micro-batch, process by process, as `exchange` returns them.
            norm: of the whole gradient.
            record_names: of this process's micro-batches.
            trained: whose gradients are looked at for the message.

        Raises:
            NonFiniteError: naming the records, those of other processes included.
        """
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            return
        everyone = [names for each in self.processes.gather(list(record_names)) for names in each]
        require_finite_losses(losses, everyone, step=self.state.step)
        require_finite_gradient(norm, trained, everyone, step=self.state.step)

    def update(
        self,
        losses: Sequence[Tensor],
        norm: Tensor,
        tally: Mapping[str, Tensor],
        *,
        trained: nn.Module,
        record_names: Sequence[Sequence[str]],
        tokens: int,
        records: int,
        summarise: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
    ) -> None:
        """Move the weights, unless a loss or the gradient is not finite; count the step and log it.

        Where `defers` holds nothing waits for the device: the check is made there, the fused optimizer skips the update
        (`found_inf`) and every later one, and the numbers are read, and the run stopped, at the next printed line,
        evaluation or checkpoint. The weights are then those before the offending step, as everywhere.

        Args:
            losses: a scalar per micro-batch.
            norm: scalar, of the whole gradient.
            tally: see `exchange`.
            trained: whose gradients are looked at for the message.
            record_names: of each micro-batch of this process.
            tokens: of the step, in all processes.
            records: of the step, in all processes.
            summarise: metrics from the sums of `tally`.

        Raises:
            NonFiniteError: naming the records.
        """
        optimizer, number = self.session.optimizer, self.state.step
        waiting: Tensor | None = None
        if self.defers:
            waiting = torch.stack([*losses, norm.to(losses[0]), *tally.values()])
            bad = (~waiting[: len(losses) + 1].isfinite().all()).float()
            self._held_back = bad if self._held_back is None else torch.maximum(self._held_back, bad)
            optimizer.found_inf = self._held_back  # type: ignore[attr-defined]
            optimizer.step()
            found = None
        else:
            found = self.exchange(losses, norm, tally)
            self.require_finite(found[0], found[1], record_names, trained)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        entry = self._count(tokens, records)

        def log(found: tuple[list[float], float, dict[str, float]]) -> None:
            metrics = {"loss": sum(found[0]), **summarise(found[2]), "gradient_norm": found[1]}
            self._log_step(entry, metrics)

        if found is not None:
            log(found)
            return
        assert waiting is not None

        def settle(numbers: list[float]) -> None:
            step_losses, norm_value = numbers[: len(losses)], numbers[len(losses)]
            require_finite_losses(step_losses, record_names, step=number)
            require_finite_gradient(norm_value, None, record_names, step=number)
            log((step_losses, norm_value, dict(zip(tally, numbers[len(losses) + 1 :], strict=True))))

        self._waiting.append((waiting, settle))
        step, config = self.state.step, self.config
        if step % config.log_every == 0 or self._due(config.evaluate_every) or self._due(config.save_every):
            self.settle()

    def settle(self) -> None:
        """Read the numbers of the steps whose check was left to the device: one wait for all of them."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        numbers = torch.cat([each for each, _ in waiting]).tolist()
        for each, settle in waiting:
            settle(numbers[: len(each)])
            numbers = numbers[len(each) :]

    @property
    def defers(self) -> bool:
        """Whether the weights are guarded on the device: one process with a GPU and a fused optimizer.

        Several processes exchange numbers in every step anyway, and on the CPU there is nothing to wait for.
        """
        fused = all(group.get("fused") for group in self.session.optimizer.param_groups)
        return self.processes.device.type == "cuda" and not self.processes.several and fused

    def _count(self, tokens: int, records: int) -> dict[str, float]:
        """Count a step; returns what is logged of it besides its metrics, with its number and the time."""
        state = self.state
        state.step, state.tokens, state.records = state.step + 1, state.tokens + tokens, state.records + records
        return {
            "learning_rate": self.session.optimizer.param_groups[0]["lr"],
            "epoch": state.step / self.steps_per_epoch,
            "num_tokens": float(state.tokens),
            "step": state.step,
            "tokens": tokens,
            "at": time.perf_counter(),
        }

    def _log_step(self, entry: dict[str, float], metrics: Mapping[str, float]) -> None:
        shown = {name: metrics[name] for name in SHOWN if name in metrics}
        entry = dict(entry)
        step, tokens, at = int(entry.pop("step")), int(entry.pop("tokens")), entry.pop("at")
        clock = self.progress.update(step, tokens=tokens, metrics=shown, at=at)
        if self.trackers is not None:
            self.trackers.log(step, {**metrics, **entry, **clock})

    @property
    def evaluation_due(self) -> bool:
        """True after a step that an evaluation on held-out records follows."""
        return self.evaluates and self._due(self.config.evaluate_every)

    def end_evaluation(self, metrics: dict[str, float], *, monitored: str) -> None:
        """Log an evaluation, judge whether it is the best, and if so save it."""
        state = self.state
        state.evaluation = metrics
        if self.session.best.update(state.step, metrics[monitored]):
            state.best_evaluation = metrics
        self._log({f"eval/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.progress.note(f"step {state.step}, held out: {shown}")

    def save_if_due(self) -> None:
        """Write a checkpoint where the configuration asks for one, where the best weights are, and at the end."""
        best_here = self.config.keep_best and self.session.best.step == self.state.step
        due = self._due(self.config.save_every)
        if self.config.save_every is None:
            due = due and self.state.step - self.session.saved_step >= STEPS_WORTH_SAVING
        if due or best_here or self.finished:
            if self.trackers is not None:
                self.trackers.flush()
            self.session.save()

    @property
    def finished(self) -> str | None:
        """Why the run is over: `patience`, `max_steps`, `epochs`; None while it goes on."""
        if self.session.best.exhausted:
            return "patience"
        if self.state.step < self.total_steps:
            return None
        return "max_steps" if self.state.step == self.config.max_steps else "epochs"

    def _log(self, metrics: Mapping[str, float]) -> None:
        if self.trackers is not None:
            self.trackers.log(self.state.step, metrics)

    def _due(self, every: int | None) -> bool:
        step = self.state.step
        if every is None:
            return step % self.steps_per_epoch == 0 or step == self.total_steps
        return step % every == 0 or step == self.total_steps


def total_steps(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: its epochs, a broken one rounded up, but at most `max_steps`."""
    # The tolerance keeps 0.1 × 30 at 3 steps, although it is a little more in floating point.
    steps = max(1, math.ceil(config.epochs * steps_per_epoch - 1e-6))
    return steps if config.max_steps is None else min(steps, config.max_steps)
