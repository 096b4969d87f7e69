"""The gate of the alignment benchmark: Plaudit's update of a batch against TRL's published formulas on padded rows."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import against_trl_rl
import pytest
import torch
from agreement_rl import agreement
from peer_model import move_weights
from phases import Phases
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from work_plaudit_rl import align_config

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
PROMPTS, SAMPLES, LONGEST = 3, 4, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with prompts of six tokens."""
    rng, data = random.Random(0), tmp_path_factory.mktemp("data")
    words = [f"word{i}" for i in range(40)]
    path = data / "hh_harmless_base" / "train.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        for _ in range(30):
            texts = [" ".join(rng.choices(words, k=12)) for _ in range(3)]
            file.write(json.dumps({"prompt": texts[0], "completions": texts[1:], "scores": [1, 0]}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(against_trl_rl, "PROMPT_TOKENS", 6)
        patch.setattr(against_trl_rl, "SIZES", against_trl_rl.SIZES | {"prompts": PROMPTS, "samples": SAMPLES})
        return against_trl_rl.prepare(1, data, sizes=TINY, cache=tmp_path_factory.mktemp("cache"))


def published(folder: Path, algorithm: str) -> dict[str, Any]:
    """What TRL 1.16 computes, on padded rows with transformers alone; rewards and answers by chance."""
    generator = torch.Generator().manual_seed(1)
    settings = json.loads((folder / "settings.json").read_text())
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model").eval() for _ in range(2))
    move_weights(policy)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = torch.tensor([tokenizer(text)["input_ids"] for text in settings["texts"]]).repeat_interleave(SAMPLES, 0)
    rows = PROMPTS * SAMPLES
    lengths = torch.randint(1, LONGEST + 1, (rows, 1), generator=generator)
    mask = torch.arange(LONGEST) < lengths
    answers = torch.randint(5, len(tokenizer), (rows, LONGEST), generator=generator)
    ended = (torch.arange(LONGEST) == lengths - 1) & (torch.rand(rows, 1, generator=generator) < 0.5)
    answers = answers.masked_fill(ended, tokenizer.eos_token_id).masked_fill(~mask, tokenizer.pad_token_id)
    rewards = torch.randn(rows, generator=generator)

    def logprobs(model: Any) -> Tensor:
        ids = torch.cat([prompts, answers], 1)
        logits = model(input_ids=ids, attention_mask=torch.cat([torch.ones_like(prompts), mask.long()], 1)).logits
        return logits[:, -LONGEST - 1 : -1].log_softmax(-1).gather(2, answers[..., None]).squeeze(2)

    new, beta = logprobs(policy), settings["kl_coefficient"]
    with torch.no_grad():
        theirs = logprobs(reference)
    if algorithm == "grpo":
        groups = rewards.view(-1, SAMPLES)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        divergence = (theirs - new).exp() - (theirs - new) - 1
        each = -(new - new.detach()).exp() * advantages[:, None] + beta * divergence
        loss = ((each * mask).sum(1) / mask.sum(1)).mean()
    else:
        charged = rewards - beta * ((new.detach() - theirs) * mask).sum(1)
        groups = charged.view(-1, SAMPLES)
        advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (SAMPLES - 1)).flatten()
        whole = (new * mask).sum(1)
        loss = -((whole - whole.detach()).exp() * advantages).mean()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers,
        "completion_mask": mask.long(),
        "rewards": rewards[:, None],
        "advantages": advantages,
        "loss": loss.detach(),
        "gradients": gradients,
    }


@pytest.mark.parametrize("algorithm", against_trl_rl.ALGORITHMS)
def test_the_published_formulas_on_padded_rows_give_the_same_and_another_gradient_is_seen(
    algorithm: str, folder: Path, tmp_path: Path
) -> None:
    kept, config = published(folder, algorithm), align_config(folder, algorithm)
    torch.save(kept, tmp_path / "kept.pt")
    found = agreement(folder, tmp_path / "kept.pt", config)
    assert found["advantages"] < 1e-5
    assert found["loss"] < 1e-6
    assert found["gradient"] < 1e-5
    name = "model.layers.0.self_attn.q_proj.weight"
    gradient = kept["gradients"][name]
    gradient.view(-1)[gradient.abs().argmax()] *= 1.01
    torch.save(kept, tmp_path / "kept.pt")
    assert agreement(folder, tmp_path / "kept.pt", config)["gradient"] > 100 * found["gradient"]


def test_operations_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_trl_rl, "SIZES", {"prompts": 2, "samples": 3, "new_tokens": 2})
    monkeypatch.setattr(against_trl_rl, "PROMPT_TOKENS", 3)
    monkeypatch.setattr(against_trl_rl, "VOCABULARY", 10)
    sizes = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 2}
    monkeypatch.setattr(against_trl_rl, "LLAMA_7M", sizes)
    # Layers hold 2 * (64 + 60) = 248 weights. Packed: 2 * 3 + 6 * 2 = 18 tokens and 2 * 6 + 6 * (6 + 3) = 66 pairs.
    inside, head = 2 * 18 * 248 + 4 * 2 * 4 * 66, 2 * 12 * 4 * 10
    assert against_trl_rl.operations(packed=True, evaluations=1) == 6 * inside + 5 * head
    # Padded rows: 6 * (3 + 2) = 30 tokens and 6 * (6 + 6 + 3) = 90 pairs.
    inside = 2 * 30 * 248 + 4 * 2 * 4 * 90
    assert against_trl_rl.operations(packed=False, evaluations=2) == 7 * inside + 6 * head


def test_phases_are_timed_where_they_happen_and_the_rest_is_the_update() -> None:
    class Work:
        def answer(self) -> int:
            return sum(range(200_000))

    phases, work = Phases(), Work()
    phases.wrap(work, "answer", "generation")
    assert work.answer() == sum(range(200_000))
    phases.sampled(5)
    phases.end()
    phases.end()
    assert phases.steps[0]["generation"] > 0
    assert (phases.steps[1], phases.tokens) == ({}, [5, 0])
    part = {"generation": 1.0, "scoring": 0.5, "evaluation": 0.25}
    found: dict[str, Any] = {
        "algorithm": "grpo",
        "processor_seconds": {"trl": [9.0] * 3, "plaudit": [3.0] * 3},
        "phases": {"trl": [part] * 3, "plaudit": [part] * 3},
    }
    table = {row["phase"]: row for row in against_trl_rl.rows([found])}
    assert (table["update"]["TRL s"], table["update"]["Plaudit s"]) == (7.25, 1.25)
    assert table["whole iteration"]["times faster"] == 3.0
    assert table["iteration without scoring"]["times faster"] == pytest.approx(8.5 / 2.5)
