"""What tells that reinforcement learning is going bad, in plain words, and what stops it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plaudit.configs.align import GuardsConfig


@dataclass
class Guards:
    """Looks at the metrics of every iteration; warns once when something goes bad, and again if it comes back.

    Attributes:
        config: the limits.
        first: metrics of the first iteration, against which entropy and length are held.
        active: what was bad at the last look.
    """

    config: GuardsConfig
    first: dict[str, float] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that are new at this iteration, a sentence each."""
        if not self.first:
            self.first = {name: metrics[name] for name in ("objective/entropy", "objective/length") if name in metrics}
        found = self._faults(metrics)
        fresh = [text for name, text in found.items() if name not in self.active]
        self.active = set(found)
        return fresh

    def stop_reason(self, metrics: Mapping[str, float]) -> str | None:
        """Why the run has to stop after this iteration; None to go on."""
        limit, kl = self.config.stop_kl, metrics.get("objective/kl", 0.0)
        if limit is not None and kl > limit:
            return f"the policy is {kl:.1f} nats per answer from its reference, past guards.stop_kl {limit:g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was first, and what is bad now."""
        return {"first": dict(self.first), "active": sorted(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.first, self.active = dict(state["first"]), set(state["active"])

    def _faults(self, metrics: Mapping[str, float]) -> dict[str, str]:
        limits, found = self.config, {}
        kl = metrics.get("objective/kl", 0.0)
        if limits.kl_limit is not None and kl > limits.kl_limit:
            found["kl"] = (
                f"answers are {kl:.1f} nats from the reference (guards.kl_limit {limits.kl_limit:g}): the reward "
                "judges texts unlike any it was trained on; raise algorithm.kl_coefficient"
            )
        entropy, start = metrics.get("objective/entropy"), self.first.get("objective/entropy")
        if entropy is not None and start and entropy < limits.entropy_fraction * start:
            found["entropy"] = (
                f"entropy fell from {start:.3g} to {entropy:.3g} nats per token: answers become all alike; lower the "
                "learning rate or raise algorithm.entropy_coefficient"
            )
        change = max(metrics.get("policy/ratio_max", 1.0), 1 / max(metrics.get("policy/ratio_min", 1.0), 1e-30))
        if change > limits.ratio_limit:
            found["ratio"] = (
                f"within one batch an action (token, or answer with view: answer) became {change:.3g} times as likely "
                "or unlikely: updates are too large; lower the learning rate or algorithm.epochs"
            )
        length, start = metrics.get("objective/length", 0.0), self.first.get("objective/length")
        if start and length > limits.length_factor * start:
            found["length"] = (
                f"answers grew from {start:.0f} to {length:.0f} tokens: the reward may pay for length; look at "
                "samples.jsonl, or add a length_penalty"
            )
        unfinished = metrics.get("objective/unfinished", 0.0)
        if unfinished > limits.unfinished:
            found["unfinished"] = (
                f"{100 * unfinished:.0f} % of answers reach the token limit without an end; raise "
                "sampling.max_new_tokens or missing_end_penalty"
            )
        equal = metrics.get("objective/equal_groups", 0.0)
        if equal > limits.equal_groups:
            found["equal"] = (
                f"in {100 * equal:.0f} % of prompts all answers earn the same: nothing is learned from them; raise "
                "the temperature or samples_per_prompt, or take a finer reward"
            )
        return found
