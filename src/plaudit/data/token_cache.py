"""Token ids kept on the disk, found again by what they were made from: tokenizer, template, options and text."""

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plaudit.data import special_tokens, templates, tokenising, vocabulary
from plaudit.data.records import Prompt
from plaudit.data.tokenising import TextTokeniser, TokenisedBlock, TokenisedGroup

logger = logging.getLogger(__name__)

COUNTED = (
    "groups",
    "completions",
    "prompts_truncated",
    "prompt_tokens_dropped",
    "completions_truncated",
    "completion_tokens_dropped",
    "unstable",
    "verbatim",
    "surrogates",
)
"""What tokenising a group counts, in the order of the file's columns."""

MAX_BYTES = 8 << 30
"""What all files of the cache may take together; the longest unused go first."""

PARTIAL = ".partial-"
SECONDS_TO_WRITE = 3600.0
"""What is still partial after this time was left by a process that was killed."""

Arrays = dict[str, npt.NDArray[Any]]


def cache_folder() -> Path:
    """Where caches stand: `$PLAUDIT_CACHE`, else `$XDG_CACHE_HOME/plaudit`, else `~/.cache/plaudit`."""
    if own := os.environ.get("PLAUDIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plaudit"


def fingerprint(tokeniser: TextTokeniser) -> str | None:
    """SHA-256 of everything besides the text that token ids depend on; None where that cannot be known.

    That is the tokenizer's own file (as it stands in memory, so added tokens count), its chat template and special
    tokens, the options, the versions of the libraries, and the code that puts texts together. A tokenizer written in
    Python has no such file, and its ids are not kept.
    """
    backend = getattr(tokeniser.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    # What an earlier call left switched on; every call of ours says what it wants.
    description.pop("truncation", None)
    description.pop("padding", None)
    code = [Path(module.__file__ or "").read_bytes() for module in (special_tokens, templates, tokenising, vocabulary)]
    parts = {
        "tokenizer": description,
        "class": type(tokeniser.tokenizer).__name__,
        "chat_template": getattr(tokeniser.tokenizer, "chat_template", None),
        "special_tokens": {name: str(token) for name, token in tokeniser.tokenizer.special_tokens_map.items()},
        "options": [tokeniser.causal, tokeniser.max_length, tokeniser.too_long, tokeniser.template],
        "end_token": tokeniser.end_token,
        "template_options": tokeniser.template_options,
        "versions": [version("transformers"), version("tokenizers")],
        "code": [hashlib.sha256(text).hexdigest() for text in code],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def text_key(prompt: Prompt, completions: Sequence[str]) -> bytes:
    """SHA-256 of a prompt and its completions, apart from each other and in order."""
    plain = prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]
    return hashlib.sha256(json.dumps([plain, list(completions)]).encode()).digest()


class TokenCache:
    """The token ids that one tokeniser has made, on the disk.

    A folder per fingerprint, in it files that are written once and never changed, each named after the SHA-256 of its
    bytes. So writers need not know of each other: same content, same name; and a damaged file is told by its name, said
    aloud, removed, and its texts tokenised again.

    Attributes:
        hits: groups found.
        misses: groups that were not there.
    """

    def __init__(self, folder: Path, tokeniser: TextTokeniser) -> None:
        """Read what is there for this tokeniser; a folder that cannot be used is said aloud and does without.

        Args:
            folder: where caches of all tokenisers stand.
            tokeniser: whose ids are kept.
        """
        self.hits = self.misses = 0
        self._tokeniser = tokeniser
        self._found: dict[bytes, tuple[Arrays, int]] = {}
        self._new: dict[bytes, tuple[TokenisedGroup, Counter[str]]] = {}
        print_of = fingerprint(tokeniser)
        self._root, self._folder = folder, None if print_of is None else folder / print_of
        if self._folder is not None and self._folder.is_dir():
            for path in sorted(self._folder.glob("*.npz")):
                self._read(path)

    def group(self, prompt: Prompt, completions: Sequence[str]) -> TokenisedGroup:
        """What `TextTokeniser.group` returns, counts and errors included; from the disk where it is there."""
        if self._folder is None:
            return self._tokeniser.group(prompt, completions)
        key = text_key(prompt, completions)
        if (place := self._found.get(key)) is not None:
            self.hits += 1
            group, counts = _unpack(*place)
            self._tokeniser.recount(counts)
            return group
        self.misses += 1
        before = Counter(self._tokeniser.counts)
        group = self._tokeniser.group(prompt, completions)
        self._new[key] = group, Counter(self._tokeniser.counts) - before
        return group

    def write(self) -> Path | None:
        """Write what was not there yet as one file; returns it, or None where there is nothing to write."""
        if self._folder is None or not self._new:
            return None
        buffer = io.BytesIO()
        np.savez(buffer, **_pack(self._new))  # type: ignore[arg-type]
        data = buffer.getvalue()
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.npz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=PARTIAL) as partial:
                # Removed with its folder where the disk is full: what is not whole must not fill it further.
                file = Path(partial) / "whole.npz"
                file.write_bytes(data)
                os.replace(file, path)
            self._prune(keep=path)
        except OSError as error:
            logger.warning("token ids cannot be kept in %s: %s; name another token_cache, or off", self._folder, error)
            return None
        self._new.clear()
        return path

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != path.stem:
                logger.warning("DAMAGED file of token ids removed, its texts are tokenised again: %s", path)
                path.unlink(missing_ok=True)
                return
            os.utime(path)
        except OSError as error:
            logger.warning("token ids in %s cannot be read: %s", path, error)
            return
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            arrays: Arrays = {name: loaded[name] for name in loaded.files}
        for row, key in enumerate(arrays["keys"]):
            self._found[key.tobytes()] = arrays, row

    def _prune(self, keep: Path) -> None:
        """Remove what killed processes left, and the longest unused files until all together fit into `MAX_BYTES`."""
        for path in self._root.glob(f"*/{PARTIAL}*"):
            try:
                if time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                    shutil.rmtree(path, ignore_errors=True)
            except FileNotFoundError:
                # Its writer is done.
                continue
        files = []
        for path in self._root.glob("*/*.npz"):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                # Another process was quicker.
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MAX_BYTES:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _pack(groups: dict[bytes, tuple[TokenisedGroup, Counter[str]]]) -> Arrays:
    """Groups as flat arrays: `ids` end to end, and for each group in `forms` the numbers that cut them up again.

    A form is: number of blocks; then for each block the length of its prefix, the number of its completions, and slot
    and length of each.
    """
    ids: list[int] = []
    forms: list[int] = []
    id_ends, form_ends = [], []
    for group, _ in groups.values():
        forms.append(len(group.blocks))
        for block in group.blocks:
            ids += block.prefix
            forms += [len(block.prefix), len(block.completions)]
            for slot, completion in zip(block.slots, block.completions, strict=True):
                forms += [slot, len(completion)]
                ids += completion
        id_ends.append(len(ids))
        form_ends.append(len(forms))
    return {
        "keys": np.frombuffer(b"".join(groups), np.uint8).reshape(-1, 32),
        "counts": np.array([[counts[name] for name in COUNTED] for _, counts in groups.values()], np.int32),
        "ids": np.array(ids, np.int32),
        "forms": np.array(forms, np.int32),
        "id_ends": np.array(id_ends, np.int64),
        "form_ends": np.array(form_ends, np.int64),
    }


def _unpack(arrays: Arrays, row: int) -> tuple[TokenisedGroup, Counter[str]]:
    first_id, first_form = (int(arrays[name][row - 1]) if row else 0 for name in ("id_ends", "form_ends"))
    ids: list[int] = arrays["ids"][first_id : int(arrays["id_ends"][row])].tolist()
    form = iter(arrays["forms"][first_form : int(arrays["form_ends"][row])].tolist())

    blocks, place = [], 0
    for _ in range(next(form)):
        length, count = next(form), next(form)
        prefix, place = ids[place : place + length], place + length
        slots, completions = [], []
        for _ in range(count):
            slot, length = next(form), next(form)
            slots.append(slot)
            completions.append(ids[place : place + length])
            place += length
        blocks.append(TokenisedBlock(prefix, completions, slots))
    counts = dict(zip(COUNTED, arrays["counts"][row].tolist(), strict=True))
    return TokenisedGroup(tuple(blocks)), Counter({name: count for name, count in counts.items() if count})
