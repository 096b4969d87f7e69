"""How text is generated."""

from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config


class SamplingConfig(Config):
    """How the next token is chosen, and when an answer ends."""

    method: Literal["sample", "greedy", "beam"] = "sample"
    """Draw from the distribution, take its most likely token, or search with several beams."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens of an answer; one that reaches them without its end token is unfinished."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before anything else; log-probabilities are those under it."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep the `k` most likely tokens (and those as likely as the last of them); None keeps all."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the fewest tokens whose probability reaches `p`; None keeps all."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens of at least `min_p` times the probability of the most likely one; None keeps all."""

    num_beams: int = Field(default=1, ge=1)
    """Beams of a beam search."""

    length_penalty: float = 1.0
    """A finished beam's score is its log-probability over its length to this power: above 0 favours long answers."""

    early_stopping: bool | Literal["never"] = False
    """Beam search ends when `num_beams` answers are finished (true), when a better one is unlikely (false), or only
    when none can become better (`never`)."""

    stop_strings: tuple[str, ...] = ()
    """An answer ends where one of these appears; the text is cut before it."""

    seed: int = Field(default=0, ge=0)
    """Seed of the draws, where no generator is given."""

    @property
    def filtered(self) -> bool:
        """Whether the distribution that is drawn from is a part of the model's: top-k, top-p or min-p is set."""
        return self.top_k is not None or self.top_p not in (None, 1.0) or self.min_p not in (None, 0.0)

    @model_validator(mode="after")
    def _combinations(self) -> "SamplingConfig":
        if self.method != "sample" and self.filtered:
            raise ValueError(f"top_k, top_p and min_p are for method 'sample', not {self.method!r}")
        if self.method == "beam" and self.num_beams < 2:
            raise ValueError(f"method 'beam' needs num_beams of at least 2, got {self.num_beams}")
        if self.method != "beam" and self.num_beams > 1:
            raise ValueError(f"num_beams {self.num_beams} is for method 'beam', not {self.method!r}")
        if self.method != "beam" and (self.length_penalty != 1.0 or self.early_stopping):
            raise ValueError(f"length_penalty and early_stopping are for method 'beam', not {self.method!r}")
        if self.method == "beam" and self.stop_strings:
            raise ValueError("stop_strings are for 'sample' and 'greedy'; a beam search ends at end tokens alone")
        if self.method == "beam" and self.temperature != 1.0:
            raise ValueError(f"a beam search ranks by the model's own probabilities; temperature is {self.temperature}")
        if not all(self.stop_strings):
            raise ValueError("stop_strings holds an empty string, which would end every answer at once")
        return self
