"""Tokenizers themselves: training a small one from texts, and seeing that one has a pad token of its own."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD, END = "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|tool|>"}
SPECIAL_TOKENS = (PAD, END, *ROLES.values())

# Every turn is a role token, the text as it is, and the end token: prefix-stable, and nothing of the text is lost.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Tokens that well-known vocabularies keep for padding or hold in reserve, best first.
PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|PAD|>",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|reserved_special_token_0|>",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer with a chat template from texts; the same texts give the same tokenizer.

    Every byte is in the vocabulary, so any text in any language round-trips and there is no unknown token. The
    special tokens are `<|pad|>` (id 0), `<|end|>` (id 1, the eos token and the end of every turn) and one token per
    role (ids 2 to 5). The chat template writes `<|user|>{text}<|end|><|assistant|>`.

    Args:
        texts: what merges are counted on; lone surrogates become U+FFFD.
        vocab_size: entries wanted, with 6 special tokens and 256 bytes among them; few texts may give fewer.

    Raises:
        ValueError: if `vocab_size` has no room for bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((without_surrogates(text) for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class PadToken:
    """What `ensure_pad_token` did.

    Attributes:
        token: the pad token.
        token_id: its id.
        changed: whether the tokenizer was changed.
        rows_needed: entries that an embedding must have now, `len(tokenizer)`; a smaller one must be resized.
    """

    token: str
    token_id: int
    changed: bool
    rows_needed: int


def ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> PadToken:
    """See that the tokenizer has a pad token that is not its eos (bos, unknown) token, changing it in place if needed.

    Other tools read a score at the rightmost token that is not the pad token; with pad equal to eos they would miss
    the end token. A pad token that the vocabulary already holds or reserves is taken first; otherwise `<|pad|>` is
    added, which may need larger embeddings: the caller compares `rows_needed` with them. Both are logged.
    """
    old = tokenizer.pad_token
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    if old is not None and old not in taken:
        return PadToken(old, tokenizer.pad_token_id, False, len(tokenizer))
    vocabulary = tokenizer.get_vocab()
    token = next((t for t in PAD_CANDIDATES if t in vocabulary and t not in taken), PAD)
    added = int(tokenizer.add_special_tokens({"pad_token": token}))
    why = "had no pad token" if old is None else f"padded with {old!r}, which also stands in texts"
    if added:
        logger.warning(
            "the tokenizer %s: %r was added with id %d; embeddings with fewer than %d rows are resized",
            why, token, tokenizer.pad_token_id, len(tokenizer),
        )  # fmt: skip
    else:
        logger.info("the tokenizer %s: %r of its vocabulary is used now", why, token)
    return PadToken(token, tokenizer.pad_token_id, True, len(tokenizer))


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as U+FFFD; surrogate pairs become their character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
