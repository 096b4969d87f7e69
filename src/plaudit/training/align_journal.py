"""Where an alignment run is told: numbers for trackers, sampled texts, and lines for people."""

from collections.abc import Mapping

from plaudit.configs.align import AlignConfig
from plaudit.training.align_job import Iteration
from plaudit.training.progress import ProgressReport
from plaudit.training.trackers import JsonlTracker, Trackers

SHOWN = {"reward/mean": "reward", "objective/kl": "KL", "objective/length": "length"}
PHASES = ("generation", "scoring", "evaluation", "update")


class Journal:
    """`metrics.jsonl` and the other trackers, `samples.jsonl`, and the progress of one run.

    Attributes:
        progress: the lines on the terminal; a context of its own.
    """

    def __init__(self, config: AlignConfig, *, step: int, resumed: bool) -> None:
        """Open the files; of a run that goes on after `step` what comes later is cut off."""
        resume_step = step if resumed else None
        settings = config.model_dump(mode="json")
        self._trackers = Trackers(config.trackers, config.output, settings=settings, resume_step=resume_step)
        self._samples = JsonlTracker(config.output / "samples.jsonl", resume_step=resume_step)
        self.progress = ProgressReport(
            config.iterations, first_step=step, every=config.log_every, label="align", quiet=config.quiet
        )

    def log(self, step: int, iteration: Iteration, metrics: Mapping[str, float], *, rate: float, tokens: int) -> None:
        """Write the metrics and texts of an iteration, and show the main numbers.

        Args:
            step: its number, from 1.
            iteration: as it was learned from.
            metrics: of the whole of it.
            rate: the learning rate.
            tokens: sampled in the run so far.
        """
        total = max(metrics["time/iteration"], 1e-9)
        shares = {f"time/share_{name}": metrics.get(f"time/{name}", 0.0) / total for name in PHASES}
        entry = {"learning_rate": rate, "num_tokens": float(tokens)}
        shown = {name: metrics[key] for key, name in SHOWN.items() if key in metrics}
        shown |= {f"% {name}": 100 * shares[f"time/share_{name}"] for name in PHASES}
        clock = self.progress.update(step, tokens=iteration.tokens, metrics=shown)
        self._trackers.log(step, {**metrics, **entry, **shares, **clock})
        for row in iteration.rows:
            self._samples.write(step, row)

    def log_evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Write and show what the held-out prompts earn after so many iterations."""
        self._trackers.log(step, {f"eval/{name}": value for name, value in found.items()})
        shown = ", ".join(f"{name} {found[key]:.4g}" for key, name in SHOWN.items() if key in found)
        self.progress.note(f"iteration {step}, held out: {shown}")

    def flush(self) -> None:
        """Write through to the disk."""
        self._trackers.flush()
        self._samples.flush()

    def close(self) -> None:
        """Write through and close the files."""
        self._samples.close()
        self._trackers.close()
