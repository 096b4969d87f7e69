"""Exported folders and reward functions inside TRL: its trainers see what Plaudit scores, or the gap is known."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from plaudit.configs.model import RewardModelConfig
from plaudit.data.records import Message
from plaudit.data.vocabulary import train_tokenizer
from plaudit.models.export import export_reward_model
from plaudit.models.interop import as_prompt_and_text, text_notes, trl_reward_function
from plaudit.models.reward_model import RewardModel
from plaudit.models.scoring import score_groups
from tests.models.conftest import ARCHITECTURES, word_tokenizer
from tests.models.test_saving import build, largest_difference

pytest.importorskip("trl")

# A conversation as plain words. The word behind the end token stands for the line end that many templates put there.
CHAT = (
    "{% for m in messages %}{{ '<s> ' if loop.first else ' ' }}{{ m['content'] }}"
    "{{ ' </s> go' if m['role'] == 'assistant' else '' }}{% endfor %}{{ ' here' if add_generation_prompt else '' }}"
)
PROMPTS = ["why is it so ", "the cat "]
TRAINERS = {"GRPO": ("trl.trainer.grpo_trainer", "GRPOTrainer", "trl.trainer.grpo_config", "GRPOConfig"),
            "RLOO": ("trl.trainer.rloo_trainer", "RLOOTrainer", "trl.trainer.rloo_config", "RLOOConfig")}  # fmt: skip
QUIET = {"use_cpu": True, "report_to": "none", "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, str]:
    """A last-token model without a template, as plain-text tools expect, and its exported folder."""
    place = tmp_path_factory.mktemp("interop")
    word_tokenizer().save_pretrained(place / "tokenizer")
    model = build(str(place / "tokenizer"), template="raw")
    model.set_normalisation(-1.5, 2.0)
    model.save_pretrained(place / "model")
    export_reward_model(place / "model", place / "exported")
    return model, str(place / "exported")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, str]:
    """A model with a chat template, and its exported folder."""
    place = tmp_path_factory.mktemp("chatty")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(place / "tokenizer")
    model = build(str(place / "tokenizer"))
    model.save_pretrained(place / "model")
    export_reward_model(place / "model", place / "exported")
    return model, str(place / "exported")


def trainer(kind: str, rewards: Any, tokenizer: Any, prompts: list[Any], folder: Path, **options: Any) -> Any:
    """A trainer over a policy of a few thousand weights."""
    module, name, config_module, config_name = TRAINERS[kind]
    config = getattr(importlib.import_module(config_module), config_name)(
        output_dir=str(folder), max_steps=1, logging_steps=1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=5, beta=0.0, seed=3, **QUIET, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=64,
        )
    )
    policy.save_pretrained(folder / "policy")
    return getattr(importlib.import_module(module), name)(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


def seen_by(one: Any, prompts: list[Any], completions: list[Any]) -> list[float]:
    """The rewards that a trainer computes for given texts."""
    ids = [[5, 2]] * len(prompts)
    rewards = one._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, ids)
    return [float(value) for value in rewards[:, 0]]


def without_end(model: RewardModel, prompt: str, text: str) -> float:
    group = model.text_tokeniser.group(prompt, [text], cut_off=[True])
    return float(score_groups(model, [group])[0])


def test_the_reward_trainer_starts_from_the_same_scores(exported: tuple[RewardModel, str], tmp_path: Path) -> None:
    """Its first loss is the Bradley-Terry loss of Plaudit's scores; what it saves opens in Plaudit."""
    from trl import RewardConfig, RewardTrainer

    model, folder = exported
    rows = {"prompt": PROMPTS, "chosen": ["yes it is", "sat on the mat"], "rejected": ["no", "very bad yes no"]}
    config = RewardConfig(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        center_rewards_coefficient=None, **QUIET,
    )  # fmt: skip
    one = RewardTrainer(model=folder, args=config, train_dataset=Dataset.from_dict(rows))
    one.train()
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    scores = model.score(PROMPTS, list(zip(rows["chosen"], rows["rejected"], strict=True)))
    wanted = torch.stack([-torch.nn.functional.logsigmoid(s.raw[0] - s.raw[1]) for s in scores]).mean()
    assert losses[0] == pytest.approx(wanted.item(), abs=1e-4)
    one.save_model(str(tmp_path / "trained"))
    trained = RewardModel.from_pretrained(tmp_path / "trained", template="raw")
    assert largest_difference(model, trained) > 1e-3, "nothing was trained"


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_folder_as_reward_is_scored_without_end_token(
    kind: str, exported: tuple[RewardModel, str], tmp_path: Path
) -> None:
    """A step goes, and the number is that of the bare text: not what the model was trained to read."""
    model, folder = exported
    one = trainer(kind, folder, AutoTokenizer.from_pretrained(folder), PROMPTS, tmp_path)
    completions = ["yes it is", "ran"]
    seen = seen_by(one, PROMPTS, completions)
    assert seen == pytest.approx(
        [without_end(model, p, c) for p, c in zip(PROMPTS, completions, strict=True)], abs=1e-5
    )
    right = [s.raw.item() for s in model.score(PROMPTS, [[c] for c in completions])]
    assert all(abs(a - b) > 1e-2 for a, b in zip(seen, right, strict=True))
    # With the end token written out by the caller the folder gives the right score.
    assert seen_by(one, PROMPTS, [c + " </s>" for c in completions]) == pytest.approx(right, abs=1e-5)
    one.train()
    assert any("reward" in entry for entry in one.state.log_history)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_reward_function_scores_as_in_training(
    kind: str, exported: tuple[RewardModel, str], tmp_path: Path
) -> None:
    model, folder = exported
    function = trl_reward_function(RewardModel.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calls: list[tuple[Any, Any, Any]] = []

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        rewards = function(prompts, completions, **columns)
        calls.append((prompts, completions, rewards))
        return rewards

    one = trainer(kind, [function, watched], tokenizer, PROMPTS, tmp_path)
    completions = ["yes it is", "ran"]
    right = [s.raw.item() for s in model.score(PROMPTS, [[c] for c in completions])]
    assert seen_by(one, PROMPTS, completions) == pytest.approx(right, abs=1e-5)
    calls.clear()
    one.train()
    prompts, texts, rewards = calls[0]
    assert rewards == pytest.approx([s.raw.item() for s in model.score(prompts, [[t] for t in texts])], abs=1e-5)
    log = next(entry for entry in one.state.log_history if "rewards/plaudit_reward/mean" in entry)
    assert log["rewards/plaudit_reward/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)


def test_conversations(chatty: tuple[RewardModel, str], tmp_path: Path) -> None:
    """A folder is read at whatever stands behind the end token; the function at the end token."""
    model, folder = chatty
    assert model.text_tokeniser.template == "chat"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [[{"role": "user", "content": text.strip()}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in ("yes it is", "ran")]
    right = [
        model.score([(Message("user", p.strip()),)], [[c]])[0].raw.item()
        for p, c in zip(PROMPTS, ("yes it is", "ran"), strict=True)
    ]
    one = trainer("GRPO", [folder, trl_reward_function(folder)], tokenizer, prompts, tmp_path)
    rewards = one._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, [[5, 2]] * 2)
    assert rewards[:, 1].tolist() == pytest.approx(right, abs=1e-5)
    assert all(abs(a - b) > 1e-2 for a, b in zip(rewards[:, 0].tolist(), right, strict=True))
    one.train()
    log = next(entry for entry in one.state.log_history if "rewards/plaudit_reward/mean" in entry)
    assert math.isfinite(log["rewards/plaudit_reward/mean"])


def test_conversations_are_exact_where_the_template_ends_in_the_end_token(tmp_path: Path) -> None:
    """Plaudit's own tokenizer is of this kind, so its folders are scored rightly by themselves."""
    texts = ["why is it so good", "yes it is", "the cat sat on the mat"]
    train_tokenizer(texts, 270).save_pretrained(tmp_path / "tokenizer")
    sizes = {**ARCHITECTURES["llama"][1], "vocab_size": 270, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = RewardModelConfig(model_type="llama", backbone_config=sizes, tokenizer=str(tmp_path / "tokenizer"))
    model = RewardModel.from_backbone(config).eval()
    model.save_pretrained(tmp_path / "model")
    result = export_reward_model(tmp_path / "model", tmp_path / "exported")
    assert "texts must end in '<|end|>', which other tools do not append" in result.notes
    assert not any("chat template" in note for note in result.notes)
    one = trainer(
        "GRPO",
        str(tmp_path / "exported"),
        AutoTokenizer.from_pretrained(tmp_path / "exported"),
        [[{"role": "user", "content": "why is it so good"}]],
        tmp_path,
    )
    seen = seen_by(
        one, [[{"role": "user", "content": "why is it so good"}]], [[{"role": "assistant", "content": "yes it is"}]]
    )
    assert seen == pytest.approx(model.score(["why is it so good"], [["yes it is"]])[0].raw.tolist(), abs=1e-5)


def test_notes_on_texts(chatty: tuple[RewardModel, str], exported: tuple[RewardModel, str], tmp_path: Path) -> None:
    assert "' go' where an answer ends" in " ".join(text_notes(chatty[0]))
    assert text_notes(exported[0]) == ["texts must end in '</s>', which other tools do not append"]
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(tmp_path)
    model = build(str(tmp_path))
    assert model.text_tokeniser.prompt("the cat")[0] == 1
    assert "add_special_tokens=False" in " ".join(text_notes(model))


def test_texts_conversations_and_cut_off_answers(exported: tuple[RewardModel, str]) -> None:
    model, folder = exported
    function = trl_reward_function(folder, end_token_ids={2})
    raw = model.score(["the cat "], [["ran"]])[0].raw.item()
    ended, cut, nothing = function(["the cat "] * 3, ["ran", "ran", ""], completion_ids=[[7, 2], [7], [3]])
    assert ended == pytest.approx(raw, abs=1e-5)
    assert cut == pytest.approx(without_end(model, "the cat ", "ran"), abs=1e-5)
    assert nothing is None
    with pytest.raises(ValueError, match="no completion_ids"):
        function(["the cat "], ["ran"])
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        function(["the cat ", "a"], ["ran"], completion_ids=[[2]])
    plain = trl_reward_function(model)
    too_long, short = plain(["the cat "] * 2, ["cat " * 500, "ran"], answer=["x", "y"])
    assert too_long is None
    assert short == pytest.approx(raw, abs=1e-5)
    normalised = trl_reward_function(model, normalised=True, name="mine")
    assert normalised.__name__ == "mine"
    assert normalised(["the cat "], ["ran"]) == pytest.approx([raw + 1.5], abs=1e-5)
    assert plain([], []) == []


def test_one_forward_reads_a_sampled_prompt_once(
    exported: tuple[RewardModel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = exported
    tokens: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: tokens.append(batch.layout.num_tokens) or forward(batch))
    trl_reward_function(model)(["why is it so "] * 8, ["yes", "no"] * 4)
    assert tokens == [4 + 8 * 2]


def test_attributes_give_their_weighted_total(decoder_folder: str) -> None:
    model = build(decoder_folder, attributes=("helpful", "brief"), attribute_weights=(1.0, 3.0))
    model.set_normalisation([1.0, 2.0], [1.0, 1.0])
    scores = model.score(["the cat"], [["ran"]])[0]
    assert trl_reward_function(model)(["the cat"], ["ran"]) == pytest.approx(scores.raw.tolist(), abs=1e-5)
    normalised = trl_reward_function(model, normalised=True)(["the cat"], ["ran"])
    assert normalised == pytest.approx(scores.normalised.tolist(), abs=1e-5)


def test_what_trainers_hand_over() -> None:
    user, tool = {"role": "user", "content": "hi"}, {"role": "tool", "content": "42"}
    said, call = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": None}
    assert as_prompt_and_text("hi", "yes") == ("hi", "yes")
    assert as_prompt_and_text([user], [said]) == ((Message("user", "hi"),), "yes")
    assert as_prompt_and_text([user], "yes") == ((Message("user", "hi"),), "yes")
    before = (Message("user", "hi"), Message("assistant", ""), Message("tool", "42"))
    assert as_prompt_and_text("hi", [call, tool, said]) == (before, "yes")
    assert as_prompt_and_text("hi", [call, tool])[1] is None
    assert as_prompt_and_text("hi", [])[1] is None
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}]
    assert as_prompt_and_text("hi", parts)[1] == "yes"
    with pytest.raises(ValueError, match="images are not scored"):
        as_prompt_and_text("hi", [{"role": "assistant", "content": [{"type": "image"}]}])
