"""Tiny tokenizers, models and records that the training tests share."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from plaudit.configs.model import LoraConfig, RewardModelConfig

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "why", "is", "it", "so", "good", "bad", "very", "yes")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save_tokenizer(folder: Path) -> str:
    """One token per word, with begin, end and pad tokens."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_model(tokenizer: str, *, lora: bool = False, dropout: float = 0.0, **sizes: Any) -> RewardModelConfig:
    """A Llama of a few thousand parameters."""
    return RewardModelConfig(
        model_type="llama",
        backbone_config=SIZES | sizes,
        tokenizer=tokenizer,
        template="raw",
        dropout=dropout,
        lora=LoraConfig(rank=2, dropout=dropout) if lora else None,
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
