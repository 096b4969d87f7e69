"""When to stop, and which step was the best."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BestSoFar:
    """The best held-out value seen (lower is better), where, and for how many evaluations it has not improved.

    Attributes:
        tolerance: how much lower a value must be to count as an improvement for the patience.
        patience: evaluations without such an improvement after which to stop; None never stops.
        step: of the lowest value of all, whatever the tolerance: the step that is kept as the best.
        value: that lowest value.
        reference: the value that the next improvement is measured against.
        stale: evaluations since the last improvement by the tolerance.
    """

    tolerance: float = 0.0
    patience: int | None = None
    step: int = -1
    value: float = math.inf
    reference: float = math.inf
    stale: int = 0

    def update(self, step: int, value: float) -> bool:
        """Take the value of an evaluation; True if it is the lowest so far.

        Raises:
            ValueError: if it is not a number: a comparison with it would always be False, and the run go on for ever.
        """
        if math.isnan(value):
            raise ValueError(f"step {step}: the held-out value is not a number")
        if value < self.reference - self.tolerance:
            self.reference, self.stale = value, 0
        else:
            self.stale += 1
        if value < self.value:
            self.step, self.value = step, value
            return True
        return False

    @property
    def exhausted(self) -> bool:
        """True when the patience has run out."""
        return self.patience is not None and self.stale >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """All fields, as numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the history from `state`; tolerance and patience stay as configured now."""
        self.step, self.value = int(state["step"]), float(state["value"])
        self.reference, self.stale = float(state["reference"]), int(state["stale"])
