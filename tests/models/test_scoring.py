"""Scores of groups do not depend on what else is scored, on the budget, or on who shares a prompt."""

import pytest
import torch

from plaudit.core.layout import PackedBatch
from plaudit.models.scoring import score_groups
from tests.models.test_saving import COMPLETIONS, PROMPTS, build

MANY = ["yes", "no no", "the cat sat on the mat", "very bad", "yes"]


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "padded"}, {"attributes": ("helpful", "brief")}])
@pytest.mark.parametrize("budget", [1, 9, 30, 8192])
def test_equal_to_one_group_at_a_time(options: dict[str, object], budget: int, decoder_folder: str) -> None:
    model = build(decoder_folder, **options).train()
    prompts = [*PROMPTS, PROMPTS[0]]
    completions = [*COMPLETIONS, MANY]
    groups = [model.text_tokeniser.group(p, c) for p, c in zip(prompts, completions, strict=True)]
    got = score_groups(model, groups, token_budget=budget)
    for prompt, texts, scores in zip(prompts, completions, got, strict=True):
        alone = model.score([prompt], [texts])[0]
        wanted = alone.raw if alone.attributes is None else alone.attributes
        assert scores.shape == wanted.shape
        assert torch.allclose(scores, wanted, atol=1e-5)
    assert model.training, "the mode was not put back"


def test_encoders(encoder_folder: str) -> None:
    model = build(encoder_folder, "bert")
    groups = [model.text_tokeniser.group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for prompt, texts, scores in zip(PROMPTS, COMPLETIONS, score_groups(model, groups, token_budget=16), strict=True):
        assert torch.allclose(scores, model.score([prompt], [texts])[0].raw, atol=1e-5)


def test_a_shared_prompt_is_read_once_and_the_budget_is_kept(
    decoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(decoder_folder)
    seen: list[int] = []
    forward = model.forward

    def counting(batch: PackedBatch) -> torch.Tensor:
        seen.append(batch.layout.num_tokens)
        return forward(batch)

    monkeypatch.setattr(model, "forward", counting)
    groups = [model.text_tokeniser.group("why is it so good", [text]) for text in MANY]
    prefix = len(groups[0].blocks[0].prefix)
    answers = sum(group.num_tokens - prefix for group in groups)
    score_groups(model, groups)
    assert seen == [prefix + answers]
    seen.clear()
    budget = prefix + answers // 2
    score_groups(model, groups, token_budget=budget)
    assert len(seen) > 1
    assert max(seen) <= budget
    padded = build(decoder_folder, attn_implementation="padded")
    sizes: list[int] = []
    padded.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_groups(padded, groups, token_budget=2 * (prefix + 10))
    assert max(sizes) <= 2 * (prefix + 10), "rows that share a prompt each repeat it"
    with pytest.raises(ValueError, match="token_budget is 0"):
        score_groups(model, groups, token_budget=0)


def test_scores_carry_no_gradients(decoder_folder: str) -> None:
    model = build(decoder_folder)
    groups = [model.text_tokeniser.group(PROMPTS[0], COMPLETIONS[0])]
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert not score_groups(model, groups)[0].requires_grad
