"""The built-in world's annotators as judges of a policy's answers: the annotator `plaudit.demo.annotators:shop`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from plaudit.data.records import Comparison
from plaudit.demo.world import ANNOTATORS, Annotator
from plaudit.demo.world_gold import sides
from plaudit.rewards.annotators import Question


@dataclass(frozen=True)
class Shop:
    """One of the shop's annotators ranks the answers, drawn by their shares; the same question always alike.

    Attributes:
        annotators: who may be drawn.
        seed: of draw and noise, together with the question.
    """

    annotators: tuple[Annotator, ...] = ANNOTATORS
    seed: int = 0

    takes_questions = True

    def __call__(self, questions: Sequence[Question]) -> list[Comparison]:
        """All of them, ranked."""
        found = []
        for question in questions:
            rng = random.Random(f"{self.seed} {question.id}")
            (annotator,) = rng.choices(self.annotators, [each.share for each in self.annotators])
            utilities = annotator.utilities([sides(question.prompt, text) for text in question.completions])
            found.append(question.judged(annotator.rank(utilities, rng), annotator.name))
        return found


shop = Shop()
"""The annotators of the demo."""
