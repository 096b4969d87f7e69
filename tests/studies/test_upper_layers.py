"""The shortcuts of the study of upper layers must give what the long way gives."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from repeated import fit_pairs
from transformers import BertConfig, BertModel
from upper_layers import CANDIDATES, FROZEN, Lower, Upper, chosen_recipe, mean_of, steps_of

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Best, Comparison
from plaudit.data.targets import make_targets
from plaudit.training.head_fit import fit_linear
from plaudit.training.objectives import PreferenceObjective


def test_a_fit_in_as_many_dimensions_as_pairs_is_the_same_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 2, 30, generator=generator) * torch.rand(30, generator=generator)
    records = [
        Comparison(prompt=f"q{row}", completions=("a", "b"), judgement=Best(row % 2)) for row in range(len(features))
    ]
    objective = PreferenceObjective(RewardTrainingConfig(model=RewardModelConfig(backbone="x"), loss="pairwise"))
    theirs, _ = fit_linear(features, make_targets(records), ["pairwise"] * len(records), objective, ridge=0.1)
    spread = features.flatten(0, 1).double().std(0)
    rows, winners = torch.arange(len(records)), torch.arange(len(records)) % 2
    differences = (features[rows, winners] - features[rows, 1 - winners]).double() / spread
    scaled = differences.T @ fit_pairs(differences @ differences.T, 0.1)
    slope = 0.1 * scaled - differences.T @ torch.sigmoid(-differences @ scaled) / len(records)
    assert slope.abs().max() < 1e-9
    # The library's own fit ends where a step no longer pays, a little before the optimum.
    assert torch.allclose((scaled / spread).float(), theirs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CANDIDATES)
def test_upper_layers_on_kept_states_score_like_the_whole_encoder(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6}
    whole = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).eval()
    whole.save_pretrained(tmp_path)
    texts = {(0, 0): torch.randint(50, (1, 9)), (0, 1): torch.randint(50, (1, 5))}
    prefix, read = 3, CANDIDATES[name].read
    weight = torch.randn(8 * len(read))
    lower = Lower({}, dict.fromkeys(texts, prefix), torch.zeros(1, 2, 6 * 8))
    wanted = []
    with torch.no_grad():
        for (place, slot), ids in texts.items():
            layers = whole(input_ids=ids, output_hidden_states=True).hidden_states
            lower.tokens[place, slot] = layers[FROZEN][0]
            means = torch.stack([states[0, prefix:].mean(0) for states in layers[:6]])
            lower.features[place, slot] = means.flatten()
            wanted.append(means[list(read)].flatten() @ weight)
        found = Upper(str(tmp_path), weight, read)(lower, list(texts))
    assert torch.allclose(found, torch.stack(wanted), atol=1e-5)


def test_a_fold_takes_what_was_best_inside_it(tmp_path: Path) -> None:
    arguments = argparse.Namespace(output=tmp_path, name="hh", same=False)
    first, second = CANDIDATES
    for fold, losses in enumerate(((0.6, 0.7), (0.7, 0.6))):
        found = {name: {"tuned log_loss": loss} for name, loss in zip(CANDIDATES, losses, strict=True)}
        (tmp_path / f"hh-upper-choice-fold{fold}.json").write_text(json.dumps(found))
    assert [chosen_recipe(arguments, fold) for fold in (0, 1)] == [first, second]
    arguments.same = True
    assert chosen_recipe(arguments, 1) == first


def test_an_epoch_shows_every_row_once() -> None:
    recipe = CANDIDATES["all layers"]
    steps = list(steps_of([row % 7 for row in range(300)], recipe, seed=0))
    assert sorted(row for step in steps for row in step) == list(range(300))
    assert max(len(step) for step in steps) == recipe.records
    assert mean_of([[1.0, 2.0]], [[3.0, 6.0]]) == [[2.0, 4.0]]
