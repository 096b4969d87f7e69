"""Styles of a language model: the marginal against every sequence of styles, decoding, saving, alignment."""

import itertools
from pathlib import Path

import pytest
import torch

from plaudit.configs.align import AlignConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.data.packing import pack_groups
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy, ReferencePolicy
from plaudit.models.steering import steering_beside
from plaudit.models.styles import StyleHeads, sentence_end_tokens
from plaudit.rollout.generate import generate
from plaudit.training import align
from plaudit.training.trackers import read_metrics
from tests.models.conftest import random_batch, texts_of, word_tokenizer
from tests.rollout.language_models import random_prompts, tiny_lm
from tests.training.conftest import SIZES, save_tokenizer
from tests.training.test_align import PROMPTS, count_good

SHAPES = [(5, [3, 1, 4]), (2, [4])]


def shaken(model: CausalLM, *, num_options: int = 2, seed: int = 0) -> StyleHeads:
    """Styles with weights large enough to matter; every third token ends a sentence."""
    rows, width = model.head[0].shape
    styles = StyleHeads(width, torch.arange(rows) % 3 == 0, num_options=num_options, spread=0.5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (styles.choice, styles.ending):
            layer.weight.normal_(std=0.5, generator=generator)
            layer.bias.normal_(generator=generator)
    return styles


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap"])
def test_answers_have_the_probability_of_all_their_style_sequences(name: str) -> None:
    model, batch, temperature = tiny_lm(name), random_batch(SHAPES), 0.7
    styles = shaken(model)
    model.steering = styles
    found = LanguagePolicy(model).evaluate(batch, temperature)
    weight, bias, softcap = model.head
    layout = batch.layout
    for row, text in enumerate(texts_of(batch)):
        length = int(layout.completion_ends[row] - layout.completion_starts[row])
        own = model.model(text[None], output_hidden_states=True).hidden_states[-1][0][-length - 1 : -1]  # type: ignore[operator]
        actions = []
        for vector in styles.vectors:
            logits = (own + vector) @ weight.T + (0.0 if bias is None else bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logprobs = (logits / temperature).log_softmax(-1)
            actions.append(logprobs.gather(1, text[-length:, None]).squeeze(1).exp())
        choices, ends = styles.choice(own).softmax(-1), styles.ending(own).sigmoid()
        total = torch.zeros(())
        for path in itertools.product(range(2), repeat=length):
            chance = choices[0, path[0]] * actions[path[0]][0]
            for step in range(1, length):
                stop = ends[step, path[step - 1]] * styles.sentence_ends[text[-length + step - 1]]
                stays = (1 - stop) * (path[step] == path[step - 1])
                chance = chance * (stays + stop * choices[step, path[step]]) * actions[path[step]][step]
            total = total + chance
        mine = found.logprobs[found.spans.owner == row].sum()
        assert mine.item() == pytest.approx(total.log().item(), abs=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_decoding_draws_what_the_training_forward_evaluates(temperature: float) -> None:
    model = tiny_lm()
    sampling = SamplingConfig(max_new_tokens=9, temperature=temperature)
    plain = generate(model, model.tokenizer, random_prompts((4, 7)), samples_per_prompt=6, sampling=sampling)
    model.steering = shaken(model, num_options=3)
    found = generate(model, model.tokenizer, random_prompts((4, 7)), samples_per_prompt=6, sampling=sampling)
    assert len({len(ids) for ids in found.token_ids}) > 1  # rows leave, the others keep their beliefs
    output = LanguagePolicy(model).evaluate(pack_groups(found.groups(), causal=True), temperature)
    wanted = torch.tensor([value for answer in found.logprobs for value in answer])
    torch.testing.assert_close(output.logprobs, wanted, atol=3e-5, rtol=0)
    assert plain.token_ids != found.token_ids
    beams = SamplingConfig(method="beam", num_beams=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="beams"):
        generate(model, model.tokenizer, random_prompts((4,)), sampling=beams)


def test_styles_that_are_alike_are_the_plain_model() -> None:
    model, batch = tiny_lm(), random_batch(SHAPES)
    styles = shaken(model)
    with torch.no_grad():
        styles.vectors.zero_()
    reference = ReferencePolicy(model).logprobs(batch)
    plain = LanguagePolicy(model).evaluate(batch)
    model.steering = styles
    styled = LanguagePolicy(model).evaluate(batch)
    torch.testing.assert_close(styled.logprobs, plain.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(styled.entropy, plain.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(reference, plain.logprobs, atol=1e-5, rtol=0)


def test_gradients_reach_every_part_and_usage_is_kept(tmp_path: Path) -> None:
    model, batch = tiny_lm(), random_batch(SHAPES)
    model.steering = styles = shaken(model)
    LanguagePolicy(model).evaluate(batch).logprobs.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in styles.parameters())
    metrics = styles.metrics()
    assert metrics["options/share_0"] + metrics["options/share_1"] == pytest.approx(1, abs=1e-5)
    assert 0 < metrics["options/termination_rate"] < 1
    # β = ½ behind every third kind of token: every answer's tokens but the first are places to end.
    with torch.no_grad():
        styles.ending.weight.zero_()
        styles.ending.bias.zero_()
    spans = LanguagePolicy(model).evaluate(batch).spans
    may_end = sum(int(styles.sentence_ends[text[-length:-1]].sum()) for text, length in zip(
        texts_of(batch), spans.lengths.tolist(), strict=True))  # fmt: skip
    assert styles.metrics()["options/duration"] == pytest.approx((int(spans.lengths.sum()) - 4) / (0.5 * may_end))
    assert styles.metrics()["options/collapsed"] == 0
    styles.sentence_ends.fill_(True)
    with torch.no_grad():
        styles.ending.bias.fill_(9.0)
    LanguagePolicy(model).evaluate(batch)
    assert styles.metrics()["options/duration"] == pytest.approx(1, abs=1e-3)
    assert styles.metrics()["options/collapsed"] == 1
    styles.sentence_ends.zero_()
    LanguagePolicy(model).evaluate(batch)
    assert "options/duration" not in styles.metrics()
    styles.save(tmp_path)
    loaded = StyleHeads.load(tmp_path)
    for name, tensor in styles.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="no styles"):
        StyleHeads.load(tmp_path / "elsewhere")


def test_sentence_ends_are_found_by_their_text() -> None:
    tokenizer = word_tokenizer()
    word = tokenizer.decode([5])
    assert sentence_end_tokens(tokenizer, 70, [word])[5]
    assert len(sentence_end_tokens(tokenizer, 70, [word])) == 70
    with pytest.raises(ValueError, match="could never end"):
        sentence_end_tokens(tokenizer, 70, ["¶"])


def test_alignment_with_styles_climbs_and_saves_them(tmp_path: Path) -> None:
    config = AlignConfig.model_validate(
        {
            "model": {
                "model_type": "llama",
                "backbone_config": SIZES,
                "tokenizer": save_tokenizer(tmp_path),
                "template": "raw",
            },
            "output": tmp_path / "run",
            "prompts_per_iteration": 5,
            "samples_per_prompt": 8,
            "iterations": 12,
            "sampling": {"max_new_tokens": 5},
            "optimizer": {"learning_rate": 1e-2},
            "algorithm": {
                "name": "option_critic",
                "baseline": "leave_one_out",
                "num_options": 2,
                "style_spread": 0.3,
                "sentence_ends": ["good", "cat"],
                "kl_coefficient": 0.02,
            },
            "quiet": True,
        }
    )
    align.main(config, prompts=PROMPTS, held_out=PROMPTS[:1], reward=count_good)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in line]
    assert lines[-1]["reward/mean"] > lines[0]["reward/mean"] + 0.5
    assert 0 < lines[-1]["options/usage_entropy"] <= 1.0001
    saved = CausalLM.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(saved.steering, StyleHeads)
    assert saved.steering.num_options == 2
    assert steering_beside("a-name-of-the-hub") is None
    # Saved over by a model without styles, the folder holds none.
    saved.steering = None
    saved.save_pretrained(tmp_path / "run" / "model")
    assert CausalLM.from_pretrained(tmp_path / "run" / "model").steering is None
