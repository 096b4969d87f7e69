"""The built-in world: letters to a small shop, replies of every kind, a gold reward, and the people who rank replies.

Everything comes from a seed; nothing is downloaded. The gold preferences are known, so it can be said exactly how well
any reward model could do on the noisy annotators (`World.bayes_optimum`).
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType

from plaudit.data.records import Comparison, Demonstration, Ranking
from plaudit.demo import world_text as text
from plaudit.demo.world_gold import GOLD_WEIGHTS, Sides, gold_reward, sides, weigh

__all__ = ["ANNOTATORS", "Annotator", "BayesOptimum", "World", "gold_reward", "split_of"]

MAX_WORDS = 60
GOOD_REWARD = 4.25
"""What a demonstration is worth at least; fewer than one in six of the replies that are ranked reaches it."""


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """One simulated person who ranks replies.

    The person sees the utility `u_i = Σ_s taste_s · weight_s · side_s / temperature + Gumbel noise` of every reply, so
    that without ties the ranking is Plackett-Luce and every pair is Bradley-Terry. Then comes a sorting onto shelves of
    height `step` whose edges start at random: replies on one shelf are tied. For a pair with noise-free difference `d`
    this gives, whatever else is on the list,
        `P(i above j) = (1/step) ∫_0^step σ(d - t) dt = [softplus(d) - softplus(d - step)] / step`.

    Attributes:
        name: as written into the records.
        share: relative number of comparisons that this person judges.
        temperature: gold units per unit of noise; inf is somebody who does not look at all.
        taste: factors on the gold weights by side; 1 where not named.
        step: height of a shelf in units of noise; 0 for no ties.
    """

    name: str
    share: float = 1.0
    temperature: float = 1.0
    taste: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    step: float = 0.5

    def utilities(self, replies: Sequence[Sides]) -> list[float]:
        """The noise-free part of this person's utility of every reply."""
        if math.isinf(self.temperature):
            return [0.0] * len(replies)
        weights = {side: weight * self.taste.get(side, 1.0) for side, weight in GOLD_WEIGHTS.items()}
        return [weigh(reply, weights) / self.temperature for reply in replies]

    def win_probability(self, difference: float) -> float:
        """Probability that a reply ends strictly above another whose noise-free utility is lower by `difference`."""
        if self.step == 0:
            return 1 / (1 + math.exp(-difference))
        return (_softplus(difference) - _softplus(difference - self.step)) / self.step

    def rank(self, utilities: Sequence[float], rng: random.Random) -> Ranking:
        """Draw one ranking of all completions, best tier first."""
        noisy = [utility - math.log(rng.expovariate(1.0)) for utility in utilities]
        if self.step == 0:
            return Ranking(tuple((k,) for k in sorted(range(len(noisy)), key=lambda k: -noisy[k])))
        edge = rng.random()
        shelves: dict[int, list[int]] = {}
        for place, utility in enumerate(noisy):
            shelves.setdefault(math.floor(utility / self.step + edge), []).append(place)
        return Ranking(tuple(tuple(shelves[shelf]) for shelf in sorted(shelves, reverse=True)))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


ANNOTATORS = (
    Annotator(name="Ada", taste=MappingProxyType({})),
    Annotator(name="Basil", taste=MappingProxyType({"manners": 1.8, "concrete": 0.6})),
    Annotator(name="Cleo", taste=MappingProxyType({"rambling": 1.8, "length": 2.0, "manners": 0.6})),
    Annotator(name="Dov", taste=MappingProxyType({"concrete": 1.8, "topic": 1.3, "manners": 0.3}), temperature=1.2),
    Annotator(name="Mo", share=0.35, temperature=math.inf),
)
"""Ada judges by the gold reward, Basil minds manners, Cleo is in a hurry, Dov wants a solution, Mo does not look."""


@dataclass(frozen=True, kw_only=True)
class BayesOptimum:
    """How well pairs of noisy judgements can be foretold at all; the fields of `World.bayes_optimum`."""

    accuracy: float
    log_loss: float
    gold_accuracy: float
    drawn_accuracy: float
    drawn_gold_accuracy: float
    tie_rate: float
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Probability that the first is placed above the second, and below; what gold says; what was drawn (None: tied)."""

    win: float
    loss: float
    gold: float
    above: bool | None

    @property
    def best(self) -> float:
        """1 where the first is the better bet, 0 where the second is, 1/2 where it does not matter."""
        return 0.5 + 0.5 * ((self.win > self.loss) - (self.win < self.loss))

    @property
    def entropy(self) -> float:
        """`(win + loss) · H(win / (win + loss))` in nats."""
        untied = self.win + self.loss
        return -sum(p * math.log(p / untied) for p in (self.win, self.loss) if p > 0)


@dataclass(frozen=True)
class _Request:
    prompt: str
    name: str
    product: str
    topic: str


def split_of(prompt: str) -> str:
    """`test` for about one prompt in five, `train` for the others; by the prompt's SHA-256, so for ever the same."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0 else "train"


class World:
    """Puddle & Finch and its letters, from one seed.

    The first `n` records are the same whatever `n` is. Prompts of `train` and `test` never meet.
    """

    def __init__(self, seed: int = 0, annotators: Sequence[Annotator] = ANNOTATORS) -> None:
        self.seed = seed
        self.annotators = tuple(annotators)

    def prompts(self, n: int, split: str = "train") -> list[str]:
        """`n` different requests of at most 40 words."""
        rng = self._rng("prompts", split)
        seen: set[str] = set()
        return [_new_request(rng, split, seen).prompt for _ in range(n)]

    def demonstrations(self, n: int, split: str = "train") -> list[Demonstration]:
        """`n` good replies to different requests: the right remedy for the right product, polite, rarely rambling."""
        rng = self._rng("demonstrations", split)
        seen: set[str] = set()
        records = []
        for index in range(n):
            request = _new_request(rng, split, seen)
            completion = _good_reply(rng, request)
            records.append(Demonstration(prompt=request.prompt, completion=completion, id=f"demo-{split}-{index:05d}"))
        return records

    def letter_book(self, n: int, split: str = "train") -> list[Demonstration]:
        """`n` replies as the shop's staff have written them so far: every other one good, the others as they come.

        What a language model learns from them is to write like the shop, well or badly.
        """
        rng, seen = self._rng("letter book", split), set[str]()
        records = []
        for index in range(n):
            request = _new_request(rng, split, seen)
            completion = _good_reply(rng, request) if index % 2 == 0 else _any_reply(rng, request)
            records.append(Demonstration(prompt=request.prompt, completion=completion, id=f"book-{split}-{index:05d}"))
        return records

    def comparisons(
        self,
        n: int,
        split: str = "train",
        *,
        min_completions: int = 4,
        max_completions: int = 9,
        answers: Sequence[Sequence[str]] | None = None,
    ) -> list[Comparison]:
        """`n` different requests, each with K different replies of every kind and one annotator's ranking.

        K is uniform in `min_completions..max_completions`. `subset` is the kind of request, `group` the record's id.

        Args:
            n: how many.
            split: whose requests.
            min_completions, max_completions: bounds of K.
            answers: for each of `comparison_prompts(n, split)` replies that a policy wrote; half of every K are taken
                from these, as far as they differ.
        """
        rng, shuffling = self._rng("comparisons", split), self._rng("shuffled answers", split)
        seen: set[str] = set()
        records = []
        for index in range(n):
            request = _new_request(rng, split, seen)
            num_completions = rng.randint(min_completions, max_completions)
            completions: dict[str, None] = {}
            while len(completions) < num_completions:
                completions[_any_reply(rng, request)] = None
            replies = tuple(completions)
            if answers is not None:
                given = [reply for reply in dict.fromkeys(answers[index][: num_completions // 2]) if reply]
                others = [reply for reply in replies if reply not in given]
                mixed = [*given, *others[: num_completions - len(given)]]
                # Their place must not give away who wrote them.
                replies = tuple(shuffling.sample(mixed, len(mixed)))
            (annotator,) = rng.choices(self.annotators, [a.share for a in self.annotators])
            records.append(
                Comparison(
                    prompt=request.prompt,
                    completions=replies,
                    judgement=annotator.rank(annotator.utilities([sides(request.prompt, y) for y in replies]), rng),
                    id=f"{split}-{index:05d}",
                    annotator=annotator.name,
                    group=f"{split}-{index:05d}",
                    subset=request.topic,
                )
            )
        return records

    def comparison_prompts(self, n: int, split: str = "train") -> list[str]:
        """The requests of the first `n` comparisons, for a policy to answer."""
        return [str(comparison.prompt) for comparison in self.comparisons(n, split)]

    def bayes_optimum(self, comparisons: Sequence[Comparison]) -> BayesOptimum:
        """The best that any reward model `r(x, y)`, which does not know who judged, can do on these replies.

        With `p_ij = Σ_a share_a P_a(i above j)` (exact, see `Annotator`), over all pairs of all comparisons:
        - `accuracy = Σ max(p_ij, p_ji) / Σ (p_ij + p_ji)`, the expected share of *untied* judged pairs that the best
          decision for each pair gets right. No reward model can expect more; an order that fits all pairs reaches it.
        - `log_loss`, in nats per untied pair: the mean entropy of `q_ij = p_ij / (p_ij + p_ji)`, weighted the same way.
        - `gold_accuracy`: the same expectation for ordering by the gold reward, equal rewards counting half.
        - `drawn_accuracy`, `drawn_gold_accuracy`: what those two decisions get on the labels that were really drawn;
          they differ from the expectations by sampling alone.
        - `tie_rate`: expected share of tied pairs; `num_pairs`: untied pairs drawn.

        Args:
            comparisons: drawn by a world with these annotators; each judgement a ranking of all its completions.

        Raises:
            ValueError: if no pair was judged, or a judgement is not a ranking.
        """
        pairs = [pair for comparison in comparisons for pair in self._pairs(comparison)]
        drawn = [pair for pair in pairs if pair.above is not None]
        if not drawn:
            raise ValueError(f"no untied pair in {len(comparisons)} comparisons")
        untied = sum(pair.win + pair.loss for pair in pairs)
        return BayesOptimum(
            accuracy=sum(max(pair.win, pair.loss) for pair in pairs) / untied,
            log_loss=sum(pair.entropy for pair in pairs) / untied,
            gold_accuracy=sum(pair.gold * pair.win + (1 - pair.gold) * pair.loss for pair in pairs) / untied,
            drawn_accuracy=sum(pair.best if pair.above else 1 - pair.best for pair in drawn) / len(drawn),
            drawn_gold_accuracy=sum(pair.gold if pair.above else 1 - pair.gold for pair in drawn) / len(drawn),
            tie_rate=1 - untied / len(pairs),
            num_pairs=len(drawn),
        )

    def _pairs(self, comparison: Comparison) -> Iterator["_Pair"]:
        """All pairs of one comparison with their exact probabilities and what was drawn."""
        if not isinstance(comparison.judgement, Ranking):
            raise ValueError(f"comparison {comparison.id} holds {comparison.judgement!r}, not a ranking")
        place = {k: tier for tier, members in enumerate(comparison.judgement.tiers) for k in members}
        replies = [sides(comparison.prompt, completion) for completion in comparison.completions]
        gold = [weigh(reply, GOLD_WEIGHTS) for reply in replies]
        utilities = [annotator.utilities(replies) for annotator in self.annotators]
        total_share = sum(annotator.share for annotator in self.annotators)
        for i, j in combinations(range(len(replies)), 2):
            win = loss = 0.0
            for annotator, utility in zip(self.annotators, utilities, strict=True):
                difference = utility[i] - utility[j]
                win += annotator.share / total_share * annotator.win_probability(difference)
                loss += annotator.share / total_share * annotator.win_probability(-difference)
            yield _Pair(
                win=win,
                loss=loss,
                gold=0.5 + 0.5 * ((gold[i] > gold[j]) - (gold[i] < gold[j])),
                above=None if place[i] == place[j] else place[i] < place[j],
            )

    def _rng(self, purpose: str, split: str) -> random.Random:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        return random.Random(f"puddle-and-finch/{self.seed}/{purpose}/{split}")


def _new_request(rng: random.Random, split: str, seen: set[str]) -> _Request:
    """A request of this split that was not seen before."""
    while True:
        request = _request(rng)
        if split_of(request.prompt) == split and request.prompt not in seen:
            seen.add(request.prompt)
            return request


def _request(rng: random.Random) -> _Request:
    name, product = rng.choice(text.NAMES), rng.choice(text.PRODUCTS)
    topic = rng.choice(tuple(text.TOPICS))
    parts = [rng.choice(text.PROMPT_OPENINGS), rng.choice(text.TOPICS[topic].problems)]
    if rng.random() < 0.75:
        parts.append(rng.choice(text.PROMPT_ENDINGS))
    fill = _filler(rng, name, product)
    return _Request(" ".join(fill(part) for part in parts), name, product, topic)


def _filler(rng: random.Random, name: str, product: str) -> Callable[[str], str]:
    """A function that fills the slots of a sentence, drawing anew for each sentence what is not given."""

    def fill(sentence: str) -> str:
        return sentence.format(
            product=product,
            item=product.split()[-1],
            name=name,
            staff=rng.choice(text.STAFF),
            day=rng.choice(text.DAYS),
            number=rng.choice(text.NUMBERS),
            place=rng.choice(text.PLACES),
            stray=rng.choice(text.STRAYS),
        )

    return fill


def _good_reply(rng: random.Random, request: _Request) -> str:
    """The right remedy for the right product, polite, rarely rambling."""
    while True:
        completion = _write(rng, request, "right", "warm", num_ramblings=int(rng.random() < 0.08))
        if gold_reward(request.prompt, completion) >= GOOD_REWARD:
            return completion


def _any_reply(rng: random.Random, request: _Request) -> str:
    """A reply with sides drawn independently of each other, so that no single one gives the others away."""
    (help_kind,) = rng.choices(("right", "wrong product", "wrong topic", "vague", "none"), (40, 20, 20, 12, 8))
    (manner,) = rng.choices(("warm", "plain", "rude"), (40, 35, 25))
    (num_ramblings,) = rng.choices((0, 1, 2, 3), (50, 25, 15, 10))
    return _write(rng, request, help_kind, manner, num_ramblings, num_repeats=rng.choices((0, 1, 2), (85, 10, 5))[0])


def _write(
    rng: random.Random, request: _Request, help_kind: str, manner: str, num_ramblings: int, num_repeats: int = 0
) -> str:
    """Compose one reply of at most `MAX_WORDS` words; what would not fit is left out from the rambling first."""
    product, topic = request.product, request.topic
    if help_kind == "wrong product":
        product = rng.choice([other for other in text.PRODUCTS if other != product])
    elif help_kind == "wrong topic":
        topic = rng.choice([other for other in text.TOPICS if other != topic])
    fill = _filler(rng, request.name, product)
    body = []
    if help_kind == "vague":
        body = [rng.choice(text.VAGUE_ANSWERS)]
    elif help_kind != "none":
        body = rng.sample(text.TOPICS[topic].remedies, 2 if rng.random() < 0.3 else 1)
    ramblings = rng.sample(text.RAMBLINGS, num_ramblings)
    opening, closing = [], []
    if manner == "warm":
        opening = [rng.choice(text.GREETINGS)] + ([rng.choice(text.SYMPATHIES)] if rng.random() < 0.6 else [])
        closing = [rng.choice(text.CLOSINGS)] if rng.random() < 0.8 else []
    elif manner == "rude":
        opening = [rng.choice(text.INSULTS)] if rng.random() < 0.6 else []
        closing = [rng.choice(text.INSULTS)] if rng.random() < 0.6 or not opening else []
    cut = rng.randint(0, len(ramblings))
    while True:
        order = [*opening, *ramblings[:cut], *body, *ramblings[cut:], *closing]
        if not order:
            order = [rng.choice(text.RAMBLINGS)]
        sentences = [fill(sentence) for sentence in order]
        if num_repeats:
            at = rng.randrange(len(sentences))
            sentences[at:at] = [sentences[at]] * num_repeats
        if sum(len(sentence.split()) for sentence in sentences) <= MAX_WORDS:
            return " ".join(sentences)
        if ramblings:
            ramblings.pop()
        elif num_repeats:
            num_repeats -= 1
        else:
            body = body[:1]
            opening = opening[:1]
