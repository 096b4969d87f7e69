"""Tiny models and tokenizers that every model test shares."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "why", "is", "it", "so"),
    *("good", "bad", "very", "yes", "no", "thanks", "help", "me", "please", "here", "you", "go"),
)


def word_tokenizer(*, encoder: bool = False, pad: str | None = "<pad>") -> Any:
    """One token per word, an end token, and for encoders the usual specials around a pair of texts."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if encoder else ["<unk>", "<s>", "</s>"]
    if pad and not encoder and pad not in specials:
        specials.append(pad)
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=specials[0]))
    inner.pre_tokenizer = Whitespace()
    if encoder:
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )


@pytest.fixture
def decoder_folder(tmp_path: Any) -> str:
    """A folder with a decoder's tokenizer."""
    folder = tmp_path / "decoder_tokenizer"
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def encoder_folder(tmp_path: Any) -> str:
    """A folder with an encoder's tokenizer."""
    folder = tmp_path / "encoder_tokenizer"
    word_tokenizer(encoder=True).save_pretrained(folder)
    return str(folder)
