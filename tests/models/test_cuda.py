"""On a GPU, else skipped: packed rows, generation and training agree with padded rows and with the CPU's float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import AutoConfig

from plaudit.configs.align import AlignConfig
from plaudit.configs.generation import SamplingConfig
from plaudit.configs.sft import LanguageModelConfig
from plaudit.data.packing import pack_groups
from plaudit.data.records import PromptRecord
from plaudit.data.vocabulary import train_tokenizer
from plaudit.models.causal_lm import CausalLM
from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from plaudit.models.policy import LanguagePolicy, to_steps
from plaudit.models.probe import probe_batch
from plaudit.models.states import packed_states, padded_states
from plaudit.rollout.generate import generate
from plaudit.training import align
from plaudit.training.trackers import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(40, [30, 1, 22]), (3, [9, 50]), (90, [17])]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXTS = [f"question number {i}: what is {i} and {7 * i}? answer {8 * i} or so" for i in range(60)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small Llama with grouped heads."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300).save_pretrained(folder)
    return {"model_type": "llama", "backbone_config": SIZES, "tokenizer": str(folder)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": 20})])
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(
    dtype: torch.dtype, tolerance: float, kind: str, more: dict[str, Any]
) -> None:
    register_packed_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, vocab_size=100, **more)
    config._attn_implementation = PACKED_ATTENTION
    model = AutoModel.from_config(config).cuda().to(dtype).eval()
    batch = probe_batch(True, SHAPES, 100).to(torch.device("cuda"))
    mix = torch.randn(batch.input_ids.shape[0], SIZES["hidden_size"], generator=torch.Generator().manual_seed(1)).cuda()

    def outcome(path: Any) -> list[Tensor]:
        model.zero_grad()
        states = path(model, batch)
        # Not a sum of squares: behind a norm it is the same for all weights.
        (states.float() * mix).sum().backward()
        return [states.float().detach(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]

    for ours, theirs in zip(outcome(packed_states), outcome(padded_states), strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def test_sampled_tokens_have_the_logprobs_of_the_training_forward(options: dict[str, Any]) -> None:
    model = CausalLM.from_backbone(LanguageModelConfig(**options)).cuda().eval()
    prompts = [model.tokenizer(text)["input_ids"] for text in TEXTS[:5]]
    found = generate(model, model.tokenizer, prompts, samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=20))
    batch = pack_groups(found.groups(), causal=True).to(torch.device("cuda"))
    with torch.no_grad():
        output = LanguagePolicy(model).evaluate(batch)
    table = to_steps(output.logprobs, output.spans).cpu()
    for row, logprobs in zip(table, found.logprobs, strict=True):
        torch.testing.assert_close(row[: len(logprobs)], torch.tensor(logprobs), atol=1e-4, rtol=0)


def test_aligning_on_the_gpu_is_aligning_on_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    CausalLM.from_backbone(LanguageModelConfig(**options)).save_pretrained(tmp_path / "start")

    def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        return [float(len(completion)) for completion in completions]

    found = {}
    for device in ("cpu", "cuda"):
        config = AlignConfig.model_validate(
            {
                "model": {"backbone": str(tmp_path / "start"), "template": "raw"},
                "algorithm": {"name": "grpo", "kl_coefficient": 0.05},
                "prompts_per_iteration": 4,
                "samples_per_prompt": 3,
                "iterations": 2,
                "sampling": {"max_new_tokens": 12},
                "output": tmp_path / device,
                "device": device,
                "quiet": True,
                "save_every": None,
            }
        )
        align.main(config, prompts=[PromptRecord(prompt=text) for text in TEXTS[:8]], reward=length)
        found[device] = read_metrics(tmp_path / device / "metrics.jsonl")
    # The random numbers are the CPU's on both; a token may differ where rounding decides, so only the first iteration.
    for name in ("reward/mean", "objective/entropy", "objective/length", "policy/gradient_norm"):
        if name in found["cpu"][0]:
            assert found["cuda"][0][name] == pytest.approx(found["cpu"][0][name], rel=1e-2)
