"""Trained tokenizers round-trip any text, are reproducible, and every tokenizer gets a pad token of its own."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plaudit.data.vocabulary import ensure_pad_token, train_tokenizer, without_surrogates

TEXTS = ["Where is my order? It was promised for Monday.", "Your order is on its way.", "注文はどこですか。"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_special_tokens_template_and_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 320)
    chat = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", " u\n"), ("assistant", "a"))]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False)
        == "<|system|>s<|end|><|user|> u\n<|end|><|assistant|>a<|end|>"
    )
    ids = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True)["input_ids"]
    assert ids[0] == 2
    assert ids[-1] == 4
    # Merges were learnt: the trained text is shorter than its bytes.
    assert len(tokenizer("order", add_special_tokens=False)["input_ids"]) < 5


def test_same_texts_same_tokenizer_also_after_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 320)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>Where is it?<|end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.chat_template) == ("<|pad|>", "<|end|>", tokenizer.chat_template)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 261"):
        train_tokenizer(TEXTS, 261)
    assert len(train_tokenizer(["a \ud800 b"], 262)) == 262


def test_surrogates() -> None:
    assert without_surrogates("plain é") == "plain é"
    assert without_surrogates("a\ud800b") == "a�b"
    assert without_surrogates("\ud83d\ude00") == "😀"


def word_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_pad_token_of_its_own_stays() -> None:
    tokenizer = word_tokenizer(["<unk>", "<s>", "</s>"], eos_token="</s>", pad_token="<s>")
    result = ensure_pad_token(tokenizer)
    assert (result.token, result.changed, result.rows_needed) == ("<s>", False, 3)


def test_a_reserved_token_is_taken_before_one_is_added(caplog: pytest.LogCaptureFixture) -> None:
    words = ["<unk>", "</s>", "<|finetune_right_pad_id|>"]
    tokenizer = word_tokenizer(words, eos_token="</s>", pad_token="</s>")
    with caplog.at_level(logging.INFO):
        result = ensure_pad_token(tokenizer)
    assert (result.token, result.token_id, result.changed) == ("<|finetune_right_pad_id|>", 2, True)
    assert result.rows_needed == 3
    assert "padded with '</s>', which also stands in texts" in caplog.text


def test_an_added_pad_token_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(["<unk>", "</s>"], eos_token="</s>")
    result = ensure_pad_token(tokenizer)
    assert (result.token, result.token_id, result.rows_needed) == ("<|pad|>", 2, 3)
    assert tokenizer.pad_token_id == 2
    assert "embeddings with fewer than 3 rows are resized" in caplog.text
    assert not ensure_pad_token(tokenizer).changed
