from plaudit.demo.annotators import Shop, shop
from plaudit.demo.world import ANNOTATORS, World, gold_reward
from plaudit.rewards.annotators import Question, open_annotator


def test_the_shop_ranks_like_its_annotators(tmp_path):
    """The same question is always ranked alike; over many, the better reply wins about as often as noise allows."""
    records = World(0).comparisons(150, min_completions=2, max_completions=2)
    questions = [Question(id=str(r.id), prompt=r.prompt, completions=r.completions) for r in records]
    found = open_annotator("plaudit.demo.annotators:shop", tmp_path)(questions)
    assert found == shop(questions) != Shop(seed=1)(questions)
    assert {record.annotator for record in found} == {each.name for each in ANNOTATORS}
    right = pairs = 0
    for record in found:
        tiers = record.judgement.tiers
        if len(tiers) == 2:
            better, worse = (gold_reward(record.prompt, record.completions[tier[0]]) for tier in tiers)
            right, pairs = right + (better > worse), pairs + 1
    assert pairs > 100
    assert 0.65 < right / pairs < 0.95
