"""Supervised fine-tuning reaches the entropy of its data, and trains on nothing but completions."""

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.sft import LanguageModelConfig, SftConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.records import Demonstration
from plaudit.models.causal_lm import CausalLM
from plaudit.models.styles import StyleHeads
from plaudit.training.estimates import Estimate
from plaudit.training.results import TrainingResult
from plaudit.training.sft import MicroBatch, SftTrainer, main, predicted_tokens, prepare, token_weights
from tests.training.conftest import SIZES


def config_for(tokenizer: str, output: Path, **options: Any) -> SftConfig:
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 64}
    model = LanguageModelConfig(model_type="llama", backbone_config=sizes, tokenizer=tokenizer, template="raw")
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, warmup=0.0)
    defaults = {"records_per_step": 1000, "epochs": 150, "quiet": True, "device": "cpu"}
    return SftConfig(model=model, output=output, optimizer=optimizer, **{**defaults, **options})


def demonstrations(*texts: str, prompt: str = "why is it") -> list[Demonstration]:
    return [Demonstration(prompt=prompt, completion=text, id=f"{prompt}/{i}") for i, text in enumerate(texts)]


CORPUS = [
    *demonstrations("the cat sat", "the cat sat", "the dog ran", "a cat sat"),
    *demonstrations("yes", "yes", "so it is", prompt="is it good"),
]


def entropy_per_token(corpus: Sequence[Demonstration]) -> float:
    """The least possible mean loss: the empirical entropy of each prompt's completions, over all their tokens."""
    counts = Counter((each.prompt, each.completion) for each in corpus)
    prompts = Counter(each.prompt for each in corpus)
    nats = -sum(n * math.log(n / prompts[prompt]) for (prompt, _), n in counts.items())
    return nats / sum(len(each.completion.split()) + 1 for each in corpus)


def test_training_reaches_the_empirical_entropy(tokenizer_folder: str, tmp_path: Path) -> None:
    result = main(config_for(tokenizer_folder, tmp_path, evaluate_every=75), train=CORPUS, held_out=CORPUS)
    assert isinstance(result, TrainingResult)
    assert result.stopped_by == "epochs"
    floor = entropy_per_token(CORPUS)
    assert floor <= result.metrics["loss"] <= floor + 2e-3
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    opened = CausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor([opened.text_tokeniser(template="raw").prompt("is it good")])
    answer = opened.model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]  # type: ignore[operator]
    assert opened.tokenizer.decode(answer) == "yes </s>"


def first_gradient(config: SftConfig, records: Sequence[Demonstration]) -> tuple[float, dict[str, Tensor]]:
    trainer, _, _ = prepare(config, records)
    step = next(iter(trainer.train.schedule(config).steps(0, 1)))
    weights = token_weights(trainer.train)
    total = 0.0
    for chosen in step.micro_batches:
        loss = trainer.loss(trainer.micro_batch(trainer.train, chosen), sum(weights))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total, {name: p.grad.double() for name, p in trainer.trained.named_parameters() if p.grad is not None}


def test_loss_is_the_plain_one_on_completions_only(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path)
    loss, found = first_gradient(config, CORPUS)
    language_model = CausalLM.from_backbone(config.model)
    plain: Any = language_model.model
    tokenizer = language_model.tokenizer
    total, count = torch.zeros(()), 0
    for each in CORPUS:
        prefix = tokenizer(each.prompt, add_special_tokens=False)["input_ids"]
        prefix = language_model.text_tokeniser(template="raw").prompt(each.prompt)
        answer = [*tokenizer(each.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prefix + answer])
        labels = torch.tensor([[-100] * len(prefix) + answer])
        total = total + plain(input_ids=ids, labels=labels).loss * len(answer)
        count += len(answer)
    (total / count).backward()
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    expected = {name: p.grad.double() for name, p in plain.named_parameters() if p.grad is not None}
    assert {name.removeprefix("model.model.") for name in found} == expected.keys()
    for name, value in expected.items():
        assert (found[f"model.model.{name}"] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


def test_micro_batches_add_up_and_weights_repeat(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path)
    loss, expected = first_gradient(config, CORPUS)
    weighted = [Demonstration(prompt="why is it", completion="the cat sat", weight=2.0), *CORPUS[2:]]
    for again, found in (
        first_gradient(config.model_copy(update={"tokens_per_micro_batch": 1}), CORPUS),
        first_gradient(config, weighted),
        first_gradient(config.model_copy(update={"gradient_checkpointing": True}), CORPUS),
    ):
        assert again == pytest.approx(loss, rel=1e-6)
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 2e-6 * value.norm() + 1e-8, name


def test_first_token_after_an_empty_prompt_is_not_counted(tokenizer_folder: str, tmp_path: Path) -> None:
    trainer, _, _ = prepare(config_for(tokenizer_folder, tmp_path), CORPUS)
    counts = predicted_tokens(trainer.train)
    assert counts == [len(each.completion.split()) + 1 for each in CORPUS]
    for group in trainer.train.groups[:1]:
        group.blocks[0].prefix.clear()
    assert predicted_tokens(trainer.train)[0] == counts[0] - 1


def test_adapters_are_trained_and_merged_into_the_saved_model(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path, epochs=5)
    config = load_config(
        SftConfig, overrides=config.model_dump() | {"model": {**config.model.model_dump(), "lora": {"rank": 4}}}
    )
    trainer, _, _ = prepare(config, CORPUS)
    names = [name for name, p in trainer.trained.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    result = main(config, train=CORPUS, held_out=CORPUS)
    assert isinstance(result, TrainingResult)
    opened, _, _ = prepare(config, CORPUS, model=CausalLM.from_pretrained(tmp_path / "model"))
    assert opened.evaluate(opened.train)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert opened.evaluate(opened.train)["loss"] < trainer.evaluate(trainer.train)["loss"]


def test_dry_run_and_refusals(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path / "run", records_per_step=3, epochs=2)
    estimate = main(config, train=CORPUS, dry_run=True)
    assert isinstance(estimate, Estimate)
    assert estimate.steps == 6
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="name at least one file"):
        main(config)
    base = {"model": {"backbone": "x"}, "optimizer": {"head_learning_rate": 1.0}}
    with pytest.raises(ConfigError, match="head_learning_rate is for reward heads"):
        load_config(SftConfig, overrides=base)


def test_batches_made_ahead_change_nothing(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: list[set[str]] = []
    weights: list[dict[str, Tensor]] = []
    original = SftTrainer.micro_batch

    def micro_batch(self: SftTrainer, *arguments: Any) -> MicroBatch:
        makers[-1].add(threading.current_thread().name)
        return original(self, *arguments)

    monkeypatch.setattr(SftTrainer, "micro_batch", micro_batch)
    for depth in (0, 2):
        makers.append(set())
        options = {"epochs": 3, "records_per_step": 3, "tokens_per_micro_batch": 8, "prefetch": depth}
        result = main(config_for(tokenizer_folder, tmp_path / str(depth), **options), train=CORPUS)
        assert isinstance(result, TrainingResult)
        weights.append(result.model.state_dict())
    assert makers == [{"MainThread"}, {"plaudit-prefetch"}]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_other_held_out_records_are_refused_on_resume(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path, epochs=1)
    main(config, train=CORPUS, held_out=CORPUS[:3])
    resume = config.model_copy(update={"resume": True, "epochs": 2.0})
    for other in (CORPUS[:2], [], [replace(CORPUS[0], completion="no"), *CORPUS[1:3]]):
        with pytest.raises(ValueError, match="made with other held-out records"):
            main(resume, train=CORPUS, held_out=other)
    main(resume, train=CORPUS, held_out=CORPUS[:3])


def test_a_start_with_styles_is_refused_for_they_would_be_lost(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path / "run")
    model = CausalLM.from_backbone(config.model)
    rows, width = model.head[0].shape
    model.steering = StyleHeads(width, torch.arange(rows) == 0, num_options=2)
    model.save_pretrained(tmp_path / "styled")
    start = LanguageModelConfig(backbone=str(tmp_path / "styled"), template="raw")
    for options in ({"model": model}, {}):
        with pytest.raises(ValueError, match=r"has styles beside it.*leave out styles\.safetensors"):
            main(config.model_copy(update={"model": start}), train=CORPUS, **options)
    assert not (tmp_path / "run" / "model").exists()
    (tmp_path / "styled" / "styles.safetensors").unlink()
    main(config.model_copy(update={"model": start, "epochs": 1}), train=CORPUS)
    assert CausalLM.from_pretrained(tmp_path / "run" / "model").steering is None
