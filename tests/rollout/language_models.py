"""Tiny language models that the tests of generation share."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plaudit.models.causal_lm import CausalLM
from tests.models.conftest import ARCHITECTURES, word_tokenizer

DECODERS = [name for name in ARCHITECTURES if name not in ("bert", "modernbert-window", "roberta")]


def tiny_hub_model(name: str, *, seed: int = 0, std: float = 0.2) -> Any:
    """A causal language model of transformers with weights large enough that it has preferences."""
    model_type, sizes = ARCHITECTURES.get(name, (name, {}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
    model.generation_config.eos_token_id = 2
    return model.eval()


def tiny_lm(name: str = "llama", **options: Any) -> CausalLM:
    """The same as a `CausalLM`, in evaluation mode."""
    return CausalLM(tiny_hub_model(name), word_tokenizer(), max_length=400, **options).eval()


def random_prompts(lengths: tuple[int, ...], *, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids in `3..63`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
