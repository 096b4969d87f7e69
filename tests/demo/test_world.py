"""The built-in world: the same everywhere, gold by hand, annotators that behave as their formulas say."""

import hashlib
import math
import os
import random
import subprocess
import sys
from itertools import combinations

import pytest

from plaudit.data.records import Best, Comparison, Message, Ranking
from plaudit.demo import world as world_module
from plaudit.demo import world_text as text
from plaudit.demo.world import ANNOTATORS, GOOD_REWARD, MAX_WORDS, Annotator, World, gold_reward, split_of
from plaudit.demo.world_gold import completion_templates, prompt_topic, sides

PROMPT = (
    "Hello, this is Mabel from Goosebury. My snoring clock broke on the first evening, with a sound like a "
    "sneezing piano."
)
GOOD = (
    "Dear Mabel, thank you for writing to us. A fresh replacement for your clock leaves our workshop on Friday, "
    "free of charge. Warm wishes, Pip."
)
FINGERPRINT = """
import hashlib
from plaudit.demo.world import World
world = World(7)
records = [world.demonstrations(20), world.comparisons(20), world.comparisons(20, "test"), world.prompts(20, "test")]
print(hashlib.sha256(repr(records).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def test_comparisons():
    return World(0).comparisons(250, "test")


def test_the_same_in_every_process():
    prints = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    world = World(7)
    records = [
        world.demonstrations(20),
        world.comparisons(20),
        world.comparisons(20, "test"),
        world.prompts(20, "test"),
    ]
    assert prints == {hashlib.sha256(repr(records).encode()).hexdigest() + "\n"}


def test_asking_for_more_keeps_the_first_and_seeds_differ():
    world = World(3)
    assert world.comparisons(30)[:10] == world.comparisons(10)
    assert world.demonstrations(30)[:10] == world.demonstrations(10)
    assert world.prompts(30)[:10] == world.prompts(10)
    assert World(4).comparisons(3) != world.comparisons(3)


def test_prompts_of_train_and_test_never_meet(test_comparisons):
    world = World(0)
    train = {c.prompt for c in world.comparisons(400)} | {d.prompt for d in world.demonstrations(400)}
    test = {c.prompt for c in test_comparisons} | set(world.prompts(400, "test"))
    assert not train & test
    assert {split_of(p) for p in train} == {"train"}
    assert {split_of(p) for p in test} == {"test"}
    assert len({c.prompt for c in test_comparisons}) == len(test_comparisons)


def test_a_prompt_seen_before_is_drawn_again():
    (first,) = World(0).prompts(1)
    seen = {first}
    again = world_module._new_request(World(0)._rng("prompts", "train"), "train", seen)
    assert again.prompt != first
    assert seen == {first, again.prompt}


def test_records_are_what_they_claim(test_comparisons):
    assert {len(c.completions) for c in test_comparisons} == set(range(4, 10))
    assert {c.annotator for c in test_comparisons} == {a.name for a in ANNOTATORS}
    assert {c.subset for c in test_comparisons} == set(text.TOPICS)
    assert len({c.id for c in test_comparisons}) == len(test_comparisons)
    for comparison in test_comparisons:
        assert isinstance(comparison.judgement, Ranking)
        assert sorted(k for tier in comparison.judgement.tiers for k in tier) == list(
            range(len(comparison.completions))
        )
        assert len(set(comparison.completions)) == len(comparison.completions)
        assert prompt_topic(comparison.prompt) == comparison.subset
        assert len(comparison.prompt.split()) <= 40
        assert max(len(completion.split()) for completion in comparison.completions) <= MAX_WORDS


def test_the_language_is_small(test_comparisons):
    words = {
        word.strip(".,?!").lower()
        for c in (*test_comparisons, *World(0).comparisons(400))
        for piece in (c.prompt, *c.completions)
        for word in piece.split()
    }
    assert 500 < len(words) < 1500


# ---- gold, by hand


def test_gold_of_a_good_reply_by_hand():
    found = sides(PROMPT, GOOD)
    assert (found.product, found.topic, found.concrete) == (1, 1, 1)
    assert found.manners == 1  # thank, warm, wishes
    assert (found.rambling, found.repetition, found.length, found.strangeness) == (0, 0, 0, 0)
    assert gold_reward(PROMPT, GOOD) == pytest.approx(1.5 + 2 + 1 + 1.25)


@pytest.mark.parametrize(
    ("change", "side", "value"),
    [
        (lambda t: t.replace("clock", "teapot"), "product", -1),
        (lambda t: t.replace("for your clock", "for your clock, or teapot,"), "product", 0),
        (lambda t: t.replace("replacement", "courier").replace("fresh", "parcel"), "topic", -1),
        (lambda t: t.replace("on Friday", "soon"), "concrete", 0),
        (lambda t: t.replace("Warm wishes, Pip.", "What a silly question."), "manners", 1 / 3 - 1),
        (lambda t: t.replace("thank you for writing to us", "we heard"), "manners", 2 / 3),
        (lambda t: t + " The clouds here are rented.", "rambling", 1 / 4),
        (lambda t: t + " Warm wishes, Pip.", "repetition", 1 / 26),
        (lambda t: "Mend clock two. Thank you.", "length", 7 / 12),
        (lambda t: t + " Thank you" * 14, "length", (25 + 28 - 45) / 15),
        (lambda t: t + " The cat sat.", "strangeness", 3 / 32),
        (lambda t: t.removesuffix("."), "strangeness", 1 / 28),
    ],
)
def test_each_side_by_hand(change, side, value):
    changed = change(GOOD)
    assert changed != GOOD
    assert getattr(sides(PROMPT, changed), side) == pytest.approx(value)
    assert gold_reward(PROMPT, changed) < gold_reward(PROMPT, GOOD)


def test_a_perfect_reply_to_another_letter_is_a_bad_one():
    other = "Mabel here. Where is my gossiping teapot? It is so overdue that my birthday has been and gone."
    reply = GOOD.replace(GOOD.split(". ")[1], "The courier has your teapot and will knock on Friday")
    assert gold_reward(other, reply) == gold_reward(PROMPT, GOOD) == 5.75
    assert gold_reward(PROMPT, reply) == gold_reward(other, GOOD) == pytest.approx(5.75 - 2 * 1.5 - 2 * 2 - 1)


def test_gold_takes_any_text():
    for completion in ("", "   ", "?!", "你好，世界。", "a", "\ud800", "thank " * 5000, GOOD.upper(), "x\ny\tz"):
        assert math.isfinite(gold_reward(PROMPT, completion))
        assert gold_reward(PROMPT, completion) < 3 or completion == GOOD.upper()
        assert math.isfinite(gold_reward(completion, GOOD))
    messages = (Message("system", "teapot"), Message("user", PROMPT))
    for reply in (GOOD, GOOD.replace("clock", "teapot")):  # only the user's words say what was asked
        assert gold_reward(messages, reply) == gold_reward(PROMPT, reply)


def test_tricks_do_not_pay():
    """Stuffing words, repeating and going on for ever stay below an honest reply."""
    honest = gold_reward(PROMPT, GOOD)
    for trick in (
        "thank sorry please glad kind lovely clock replacement mend Friday.",
        " ".join(["Warm wishes, Pip."] * 10),
        GOOD + " " + GOOD,
        GOOD + " " + " ".join(text.RAMBLINGS),
        "Warm wishes, Pip.",
    ):
        assert gold_reward(PROMPT, trick) < honest - 1


def test_every_sentence_is_recognised_as_what_it_is():
    for name, topic in text.TOPICS.items():
        for problem in topic.problems:
            for fill in text.STRAYS[::4]:
                filled = problem.format(
                    product="shy compass", day="Friday", number="two", place="Goosebury", stray=fill
                )
                for other in (*text.PROMPT_OPENINGS, *text.PROMPT_ENDINGS):
                    around = other.format(name="Mabel", place="Goosebury")
                    assert prompt_topic(f"{filled} {around}") == name, (problem, other)
        prompt = topic.problems[0].format(product="shy compass", day="Friday", number="two", place="x", stray="y")
        for remedy in topic.remedies:
            filled = remedy.format(item="compass", day="Friday", number="two", place="Goosebury", staff="Pip")
            found = sides(prompt, filled)
            assert (found.product, found.topic, found.concrete, found.manners) == (1, 1, 1, 0), remedy
    prompt = PROMPT
    for sentences, rude, polite in (
        (text.INSULTS, True, False),
        (text.GREETINGS, False, True),
        (text.CLOSINGS, False, True),
    ):
        for sentence in sentences:
            found = sides(prompt, sentence.format(item="clock", name="Mabel", staff="Pip"))
            assert (found.manners < 0) == rude, sentence
            assert (found.manners > 0) == polite, sentence
            assert (found.topic, found.rambling) == (0, 0)
    for sentence in (*text.RAMBLINGS, *(v for v in text.VAGUE_ANSWERS if "{item}" not in v)):
        assert sides(prompt, sentence).rambling == 1, sentence
        assert sides(prompt, sentence).topic == 0, sentence


def test_the_shop_speaks_its_own_language(test_comparisons):
    assert all(sides(c.prompt, y).strangeness == 0 for c in test_comparisons[:60] for y in c.completions)
    assert len(completion_templates()) == len(set(completion_templates()))


def test_demonstrations_are_good(test_comparisons):
    demonstrations = [gold_reward(d.prompt, d.completion) for d in World(0).demonstrations(200)]
    replies = sorted(gold_reward(c.prompt, y) for c in test_comparisons for y in c.completions)
    assert min(demonstrations) >= GOOD_REWARD
    assert sum(reward >= GOOD_REWARD for reward in replies) < len(replies) / 6
    assert min(gold_reward(d.prompt, d.completion) for d in World(1).demonstrations(50, "test")) >= GOOD_REWARD


# ---- annotators


@pytest.mark.parametrize("step", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("difference", [0.0, 0.7, -2.0])
def test_pairs_are_won_as_often_as_the_formula_says_whatever_else_is_ranked(step, difference):
    annotator = Annotator(name="x", step=step)
    rng = random.Random(f"{step}{difference}")
    utilities, draws = [difference, 0.0, 1.0, -0.3], 20_000
    wins = ties = 0
    for _ in range(draws):
        place = {k: tier for tier, members in enumerate(annotator.rank(utilities, rng).tiers) for k in members}
        wins += place[0] < place[1]
        ties += place[0] == place[1]
    win, loss = annotator.win_probability(difference), annotator.win_probability(-difference)
    # four standard errors of a share
    assert wins / draws == pytest.approx(win, abs=4 * math.sqrt(0.25 / draws))
    assert ties / draws == pytest.approx(1 - win - loss, abs=4 * math.sqrt(0.25 / draws))
    if step == 0:
        assert ties == 0
        assert win == pytest.approx(1 / (1 + math.exp(-difference)))  # Bradley-Terry


def test_without_ties_a_ranking_is_plackett_luce():
    annotator, rng, draws = Annotator(name="x", step=0.0), random.Random(1), 20_000
    utilities = [1.0, 0.0, -0.5]
    count = sum(annotator.rank(utilities, rng).tiers == ((0,), (2,), (1,)) for _ in range(draws))
    weights = [math.exp(u) for u in utilities]
    expected = weights[0] / sum(weights) * weights[2] / (weights[1] + weights[2])
    assert count / draws == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))


def test_the_formula_of_a_win_is_its_integral():
    annotator = Annotator(name="x", step=0.8)
    for difference in (-40.0, -1.0, 0.0, 2.5, 40.0):
        slices = [1 / (1 + math.exp(-(difference - 0.8 * (k + 0.5) / 10_000))) for k in range(10_000)]
        assert annotator.win_probability(difference) == pytest.approx(sum(slices) / 10_000, abs=1e-9)


def test_the_optimum_is_what_redrawn_annotators_agree_with(test_comparisons):
    """Every stated expectation against fresh judgements of the same replies, within four standard errors."""
    world, rng = World(0), random.Random(5)
    sample = test_comparisons[:80]
    stated = world.bayes_optimum(sample)
    drawn = []
    for _ in range(16):
        redrawn = []
        for c in sample:
            (annotator,) = rng.choices(world.annotators, [a.share for a in world.annotators])
            ranking = annotator.rank(annotator.utilities([sides(c.prompt, y) for y in c.completions]), rng)
            redrawn.append(Comparison(prompt=c.prompt, completions=c.completions, judgement=ranking))
        drawn.append(world.bayes_optimum(redrawn))
    num_pairs = sum(math.comb(len(c.completions), 2) for c in sample)
    for name, expected, values in (
        ("best", stated.accuracy, [d.drawn_accuracy for d in drawn]),
        ("gold", stated.gold_accuracy, [d.drawn_gold_accuracy for d in drawn]),
        ("ties", stated.tie_rate, [1 - d.num_pairs / num_pairs for d in drawn]),
    ):
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        assert mean == pytest.approx(expected, abs=4 * error), name
        assert error < 0.008
    assert stated.accuracy >= stated.gold_accuracy


def test_the_optimum_by_hand():
    """One pair, one annotator without ties: the probability, its entropy, and 1 or 0 for what was drawn."""
    annotator = Annotator(name="x", temperature=2.0, step=0.0)
    world = World(0, [annotator])
    bad = GOOD.replace("clock", "teapot")  # 3 points of gold less
    pair = Comparison(prompt=PROMPT, completions=(bad, GOOD), judgement=Ranking(((0,), (1,))))
    found, p = world.bayes_optimum([pair]), 1 / (1 + math.exp(-1.5))
    assert (found.accuracy, found.gold_accuracy) == (pytest.approx(p), pytest.approx(p))
    assert found.log_loss == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert (found.drawn_accuracy, found.drawn_gold_accuracy, found.num_pairs) == (0, 0, 1)
    assert found.tie_rate == pytest.approx(0)
    careless = World(0, [Annotator(name="y", temperature=math.inf)]).bayes_optimum([pair])
    assert careless.accuracy == pytest.approx(0.5)
    assert careless.log_loss == pytest.approx(math.log(2))


def test_annotators_disagree_and_one_does_not_look(test_comparisons):
    by_name = {a.name: a for a in ANNOTATORS}
    assert World(0, [by_name["Mo"]]).bayes_optimum(test_comparisons[:30]).accuracy == pytest.approx(0.5)
    preferred = []
    for name in ("Ada", "Basil", "Cleo", "Dov"):
        row = []
        for c in test_comparisons[:60]:
            utilities = by_name[name].utilities([sides(c.prompt, y) for y in c.completions])
            row += [utilities[i] > utilities[j] for i, j in combinations(range(len(utilities)), 2)]
        preferred.append(row)
    for first, second in combinations(preferred, 2):
        assert 0.02 < sum(a != b for a, b in zip(first, second, strict=True)) / len(first) < 0.3


def test_the_noise_is_where_it_should_be(test_comparisons):
    """Gold gets 80 to 85 % of held-out judged pairs; length says nothing."""
    found = World(0).bayes_optimum(test_comparisons)
    assert 0.80 < found.drawn_gold_accuracy < 0.86
    assert 0.80 < found.gold_accuracy <= found.accuracy < 0.86
    assert 0.02 < found.tie_rate < 0.1
    longer = total = 0.0
    for c in test_comparisons:
        place = {k: tier for tier, members in enumerate(c.judgement.tiers) for k in members}
        for i, j in combinations(range(len(place)), 2):
            if place[i] != place[j]:
                winner, loser = (i, j) if place[i] < place[j] else (j, i)
                difference = len(c.completions[winner]) - len(c.completions[loser])
                longer += 0.5 * ((difference > 0) - (difference < 0) + 1)
                total += 1
    assert 0.4 < longer / total < 0.6


def test_refuses_what_makes_no_sense(test_comparisons):
    with pytest.raises(ValueError, match="'dev'"):
        World(0).comparisons(1, "dev")
    with pytest.raises(ValueError, match="Best"):
        World(0).bayes_optimum([Comparison(prompt="x", completions=("a", "b"), judgement=Best(0), id="7")])
    with pytest.raises(ValueError, match="no untied pair"):
        World(0).bayes_optimum([Comparison(prompt="x", completions=("a", "b"), judgement=Ranking(((0, 1),)))])
