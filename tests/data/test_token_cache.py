"""Kept token ids: the same groups, counts and errors as tokenising; never another tokeniser's; damage is noticed."""

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plaudit.data import token_cache
from plaudit.data.records import Message, Prompt
from plaudit.data.token_cache import TokenCache, cache_folder, fingerprint, text_key
from plaudit.data.tokenising import TextTokeniser, TextTooLongError

UNSTABLE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>think' }}{% endif %}"
)
TEXTS: list[tuple[Prompt, tuple[str, ...]]] = [
    ("Why?", ("So.", "", "Because it is.")),
    ((Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "天气")), ("No", "\ud800 lone")),
    ("", ("a",)),
    ("a rather long prompt that is cut " * 3, ("short", "x" * 70)),
]


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<s>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", **options)


def tokeniser(template: str | None = None, **options: Any) -> TextTokeniser:
    settings: dict[str, Any] = {"causal": True, "max_length": 80, "too_long": "truncate_prompt"}
    return TextTokeniser(tokenizer(chat_template=template), **(settings | options))


def groups(source: TokenCache | TextTokeniser, texts: Sequence[tuple[Prompt, tuple[str, ...]]] = TEXTS) -> list[Any]:
    return [source.group(prompt, completions) for prompt, completions in texts]


@pytest.mark.parametrize("template", [None, UNSTABLE])
def test_what_is_kept_is_what_was_tokenised_counts_included(
    tmp_path: Path, template: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tokeniser(template)
    expected = groups(plain)
    first = TokenCache(tmp_path, tokeniser(template))
    assert groups(first) == expected
    assert (first.hits, first.misses) == (0, 4)
    assert first.write() is not None
    assert first.write() is None
    again = tokeniser(template)
    caplog.clear()
    second = TokenCache(tmp_path, again)
    assert groups(second) == expected
    assert (second.hits, second.misses) == (4, 0)
    assert +again.counts == +plain.counts
    assert again.counts["surrogates"] == 1
    assert again.counts["prompts_truncated"] >= 1
    assert ("renders a prompt differently" in caplog.text) == (template is not None)


def test_only_what_is_new_is_tokenised_and_written(tmp_path: Path) -> None:
    first = TokenCache(tmp_path, tokeniser())
    groups(first, TEXTS[:2])
    first.write()
    second = TokenCache(tmp_path, tokeniser())
    groups(second)
    assert (second.hits, second.misses) == (2, 2)
    second.write()
    third = TokenCache(tmp_path, tokeniser())
    assert groups(third) == groups(tokeniser())
    assert (third.hits, third.misses) == (4, 0)
    assert len(list(tmp_path.rglob("*.npz"))) == 2


def test_errors_are_never_kept(tmp_path: Path) -> None:
    for _ in range(2):
        strict = tokeniser(too_long="refuse")
        cache = TokenCache(tmp_path, strict)
        with pytest.raises(TextTooLongError):
            cache.group(*TEXTS[3])
        assert strict.counts["refused"] == 1
        assert cache.write() is None


def test_every_choice_has_its_own_fingerprint() -> None:
    def with_token() -> TextTokeniser:
        changed = tokenizer()
        changed.add_tokens(["because"])
        return TextTokeniser(changed, causal=True, max_length=80, too_long="truncate_prompt")

    other = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    variants = [
        tokeniser(),
        tokeniser(max_length=81),
        tokeniser(too_long="truncate"),
        tokeniser(template_options={"enable_thinking": False}, template=other),
        tokeniser(other),
        tokeniser(UNSTABLE),
        tokeniser(end_token="<pad>"),
        with_token(),
        TextTokeniser(tokenizer(), causal=True, max_length=80, too_long="truncate_prompt", template="raw"),
    ]
    prints = [fingerprint(each) for each in variants]
    assert None not in prints
    assert len(set(prints)) == len(prints)
    # What an earlier call switched on in the tokenizer is not part of it.
    used = tokeniser()
    used.tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert fingerprint(used) == prints[0]


def test_texts_that_differ_have_different_keys() -> None:
    keys = [
        text_key("a", ("b", "c")),
        text_key("a", ("c", "b")),
        text_key("a", ("bc",)),
        text_key("ab", ("c",)),
        text_key((Message("user", "a"),), ("b", "c")),
        text_key((Message("system", "a"),), ("b", "c")),
        text_key("\ud800", ("b",)),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_said_removed_and_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TokenCache(tmp_path, tokeniser())
    expected = groups(cache)
    path = cache.write()
    assert path is not None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    again = TokenCache(tmp_path, tokeniser())
    assert "DAMAGED" in caplog.text
    assert not path.exists()
    assert groups(again) == expected
    assert again.misses == 4
    assert again.write() == path


def test_writers_at_once_leave_whole_files(tmp_path: Path) -> None:
    caches = [TokenCache(tmp_path, tokeniser()) for _ in range(6)]
    for number, cache in enumerate(caches):
        groups(cache, TEXTS[: 1 + number % 3])
    threads = [threading.Thread(target=cache.write) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*.npz"))) == 3
    assert not list(tmp_path.rglob(".partial-*"))
    last = TokenCache(tmp_path, tokeniser())
    assert groups(last, TEXTS[:3]) == groups(tokeniser(), TEXTS[:3])
    assert last.misses == 0


def test_a_folder_that_cannot_be_used_is_said_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    cache = TokenCache(file, tokeniser())
    assert groups(cache) == groups(tokeniser())
    assert cache.write() is None
    assert "cannot be kept" in caplog.text


def test_a_full_disk_is_said_and_not_filled_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = TokenCache(tmp_path, tokeniser())
    wanted = groups(tokeniser())
    assert groups(cache) == wanted
    assert cache.write() is None
    assert "No space left on device" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob(".partial-*"))
    monkeypatch.undo()
    assert cache.write() is not None
    assert groups(TokenCache(tmp_path, tokeniser())) == wanted


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, tokeniser())
    groups(cache, TEXTS[:1])
    path = cache.write()
    assert path is not None
    old, fresh = path.parent / ".partial-old", path.parent / ".partial-fresh"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "whole.npz").write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = TokenCache(tmp_path, tokeniser())
    groups(cache, TEXTS[:2])
    cache.write()
    assert not old.exists()
    assert fresh.exists()


def test_the_longest_unused_files_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for number, text in enumerate(TEXTS[:3]):
        cache = TokenCache(tmp_path, tokeniser(max_length=80 + number))
        groups(cache, [text])
        paths.append(cache.write())
    assert all(path is not None and path.exists() for path in paths)
    TokenCache(tmp_path, tokeniser())  # reads, and so uses, the oldest
    sizes = [path.stat().st_size for path in paths if path is not None]
    monkeypatch.setattr(token_cache, "MAX_BYTES", 2 * max(sizes) + max(sizes) // 2)
    cache = TokenCache(tmp_path, tokeniser(max_length=99))
    groups(cache, TEXTS[:1])
    newest = cache.write()
    left = set(tmp_path.rglob("*.npz"))
    assert left == {paths[0], newest}


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PLAUDIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "plaudit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "plaudit"
    monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
