"""Tokenising: a prompt once and its completions separately, ready for packing."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from plaudit.data.records import Prompt
from plaudit.data.special_tokens import find_anchor, leading_specials, pair_specials
from plaudit.data.templates import ChatTemplate, TextTemplate, bare_prompt
from plaudit.data.vocabulary import without_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TooLong = Literal["refuse", "truncate_prompt", "truncate"]
TemplateChoice = Literal["auto", "chat", "plain", "raw"]


class TextTooLongError(ValueError):
    """A text that does not fit into the maximal length and may not, or cannot, be shortened."""


@dataclass(frozen=True)
class TokenisedBlock:
    """One prefix and the completions that share it, as token ids.

    Attributes:
        prefix: ids of the prompt with everything that stands before an answer; may be empty.
        completions: ids of each completion, with its end token; never empty.
        slots: which of the prompt's completions each one is.
    """

    prefix: list[int]
    completions: list[list[int]]
    slots: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that the block takes in a packed row."""
        return len(self.prefix) + sum(map(len, self.completions))


@dataclass(frozen=True)
class TokenisedGroup:
    """The completions of one prompt: one block where all share the prefix, else one block per completion.

    Attributes:
        blocks: the group's blocks.
    """

    blocks: tuple[TokenisedBlock, ...]

    @property
    def num_slots(self) -> int:
        """One more than the largest slot, the width that the group needs in a `[P, K]` table."""
        return max((slot for block in self.blocks for slot in block.slots), default=-1) + 1

    @property
    def num_completions(self) -> int:
        """How many completions the group has."""
        return sum(len(block.completions) for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in a packed row."""
        return sum(block.num_tokens for block in self.blocks)

    @property
    def longest(self) -> int:
        """Tokens of the longest text `prefix + completion`."""
        return max(len(block.prefix) + max(map(len, block.completions)) for block in self.blocks)


class TextTokeniser:
    """Turns a prompt and its completions into token ids, with one rule for training, scoring and generation.

    Decoders: the prompt is rendered up to where an answer starts and tokenised once, with a bos token where the
    tokenizer (or its chat template) puts one; each completion is tokenised on its own and ends in the end token,
    which is appended where it is missing, unless the answer is marked as cut off. That is what a policy sees when it
    samples, so a merge across the border of prompt and completion never happens. Where the template renders the
    prompt differently once an answer follows, the group gets one block per completion (counted as `unstable`).

    Encoders: one block per completion, `[CLS] prompt [SEP] completion [SEP]` or whatever the tokenizer builds from a
    pair of texts; the completion's tokens include the separator that ends it. `completion_token_type` says which
    token type the tokenizer gives to the second text. With template "plain" or "raw" an encoder reads one text
    instead, `[CLS] prompt completion [SEP]`: sentence encoders were never shown pairs.

    Special tokens that a text spells out are read as special tokens, as everywhere in the field. Lone surrogates,
    which no tokenizer takes, become U+FFFD (counted).

    Attributes:
        tokenizer: the tokenizer.
        causal: True for decoders.
        max_length: most tokens of `prefix + completion`.
        too_long: "refuse" raises `TextTooLongError`; "truncate_prompt" drops tokens from the left of the prompt, behind
            bos or CLS, as many for every completion of the group as the longest one needs; a completion that does not
            fit even alone is refused. "truncate" keeps a quarter of `max_length` for the prompt's end in that case and
            drops tokens from the right of longer completions, which a decoder then reads as cut-off answers.
        template: "chat", "plain" or "raw": what is in use (see `plaudit.data.templates`); "pair" for encoders, unless
            "plain" or "raw" was asked for.
        end_token: text of the token that ends every answer; None for encoders.
        completion_token_type: token type of the second text of a pair; 0 for decoders.
        template_options: further arguments of the chat template.
        counts: what happened so far: `groups`, `completions`, `prompts_truncated`, `prompt_tokens_dropped`,
            `completions_truncated`, `completion_tokens_dropped`, `refused`, `unstable`, `verbatim`, `surrogates`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        causal: bool,
        max_length: int,
        too_long: TooLong = "refuse",
        template: TemplateChoice = "auto",
        end_token: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose the template and derive the end token and the special tokens around texts.

        Args:
            tokenizer: the tokenizer.
            causal: True for decoders, False for encoders.
            max_length: most tokens of `prefix + completion`.
            too_long: what happens to longer ones, see the class.
            template: "auto" takes the chat template where the tokenizer has one, else the plain one; for encoders a
                pair of texts.
            end_token: text of the end token, where the derived one is wrong.
            template_options: further arguments of the chat template.

        Raises:
            ValueError: if a choice is unknown or contradicts the others, or there is no end token.
        """
        if too_long not in get_args(TooLong):
            raise ValueError(f"too_long is {too_long!r}; use one of {', '.join(get_args(TooLong))}")
        if template not in ("auto", "chat", "plain", "raw"):
            raise ValueError(f'template is {template!r}; use "auto", "chat", "plain" or "raw"')
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1")
        self.tokenizer = tokenizer
        self.causal = causal
        self.max_length = max_length
        self.too_long = too_long
        self.end_token: str | None = None
        self.completion_token_type = 0
        self.counts: Counter[str] = Counter()
        self.template: str = "pair"
        self.template_options = dict(template_options or {})
        self._template: ChatTemplate | TextTemplate
        if causal:
            self._set_template(template, end_token, template_options)
            self._head = [] if self.template == "chat" else leading_specials(tokenizer)
            self._anchor = find_anchor(tokenizer)
        else:
            if template == "chat":
                raise ValueError("template='chat' is for decoders; an encoder reads a pair of texts, use 'auto'")
            self._pair = pair_specials(tokenizer)
            if template != "auto":
                self.template = template
                self._template = TextTemplate("", headers=template == "plain")
                self._anchor = find_anchor(tokenizer)
                self._pair = replace(self._pair, middle=[], token_type=0)
            self.completion_token_type = self._pair.token_type

    def _set_template(self, template: TemplateChoice, end_token: str | None, options: Mapping[str, Any] | None) -> None:
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if template == "chat" and not has_chat:
            raise ValueError("template='chat' but the tokenizer has no chat template; use 'plain' or set one")
        if template == "chat" or (template == "auto" and has_chat):
            self.template = "chat"
            self._template = ChatTemplate(self.tokenizer, end_token=end_token, options=options)
        else:
            self.template = "raw" if template == "raw" else "plain"
            end = end_token or self.tokenizer.eos_token
            if not end:
                raise ValueError("the tokenizer has no eos token; give end_token")
            self._template = TextTemplate(end, headers=self.template == "plain")
        self.end_token = self._template.end_token
        if len(self._encode([self._template.end_token])[0]) != 1:
            raise ValueError(f"end_token {self.end_token!r} is not one token of the tokenizer")

    @property
    def end_token_id(self) -> int | None:
        """The id of the end token; None for encoders."""
        return None if self.end_token is None else self._encode([self.end_token])[0][0]

    def prompt(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt as a policy reads them before it answers (decoders only, never truncated)."""
        if not self.causal:
            raise ValueError("an encoder has no prompt of its own; use group(prompt, completions)")
        return self._head + self._encode([self._template.prompt(self._clean_prompt(prompt))])[0]

    def cut_prompt(self, ids: list[int], room: int) -> list[int]:
        """The end of a prompt's ids, behind its bos token where it has one, in at most `room` tokens (counted).

        Raises:
            TextTooLongError: if there is no room for a token of the prompt.
        """
        if len(ids) <= room:
            return ids
        head = self._head_length(ids)
        if room <= head:
            raise TextTooLongError(f"there is room for {max(room, 0)} tokens of the prompt's {len(ids)}")
        self.counts["prompts_truncated"] += 1
        self.counts["prompt_tokens_dropped"] += len(ids) - room
        return ids[:head] + ids[len(ids) - (room - head) :]

    def group(
        self, prompt: Prompt, completions: Sequence[str], *, cut_off: Sequence[bool] | None = None
    ) -> TokenisedGroup:
        """Tokenise one prompt with its completions.

        Args:
            prompt: text or messages.
            completions: the `K` answers, `K >= 1`; their places become the slots.
            cut_off: which answers reached a length limit and therefore get no end token; default: none.

        Returns:
            One block, or one per completion (encoders, unstable templates).

        Raises:
            TextTooLongError: by the policy in `too_long`, counted as `refused`.
            ValueError: if there is no completion, `cut_off` has another length, a cut-off answer has no token, or the
                template refuses the conversation.
        """
        if not completions:
            raise ValueError("a group needs at least one completion")
        cuts = [False] * len(completions) if cut_off is None else list(cut_off)
        if len(cuts) != len(completions):
            raise ValueError(f"cut_off has {len(cuts)} entries for {len(completions)} completions")
        prompt = self._clean_prompt(prompt)
        texts = [self._clean(text) for text in completions]
        if self.causal:
            head, blocks = self._decoder_blocks(prompt, texts, cuts)
        else:
            head, blocks = self._encoder_blocks(prompt, texts)
        for block in blocks:
            for slot, ids in zip(block.slots, block.completions, strict=True):
                if not ids:
                    raise ValueError(f"completion {slot} is empty and has no end token; nothing would carry its score")
        group = self._fit(TokenisedGroup(tuple(blocks)), head)
        self.counts["groups"] += 1
        self.counts["completions"] += len(texts)
        return group

    def recount(self, counts: Mapping[str, int]) -> None:
        """Count a group that was tokenised earlier and kept, as if it had been tokenised now."""
        if counts.get("unstable"):
            self._report_unstable(counts["completions"])
        self.counts.update({name: count for name, count in counts.items() if name != "unstable"})

    def _decoder_blocks(
        self, prompt: Prompt, texts: list[str], cut_off: list[bool]
    ) -> tuple[int, list[TokenisedBlock]]:
        end = self._template.end_token
        bare = [text if cut else _without_end(text, end) for text, cut in zip(texts, cut_off, strict=True)]
        renderings = self._template.completions(prompt, bare, cut_off)
        self.counts["verbatim"] += sum(r.verbatim for r in renderings)
        continuations = self._continue([r.completion for r in renderings])
        slots = list(range(len(texts)))
        if all(r.stable for r in renderings):
            prefix = self._head + self._encode([renderings[0].prefix])[0]
            return self._head_length(prefix), [TokenisedBlock(prefix, continuations, slots)]
        self._report_unstable(len(renderings))
        prefixes = [self._head + ids for ids in self._encode([r.prefix for r in renderings])]
        blocks = [TokenisedBlock(prefixes[k], [continuations[k]], [k]) for k in slots]
        return self._head_length(prefixes[0]), blocks

    def _encoder_blocks(self, prompt: Prompt, texts: list[str]) -> tuple[int, list[TokenisedBlock]]:
        pair = self._pair
        if self.template == "pair":
            prompt_ids, *continuations = self._encode([bare_prompt(prompt), *texts])
        else:
            renderings = self._template.completions(prompt, texts, [False] * len(texts))
            [prompt_ids] = self._encode([renderings[0].prefix])
            continuations = self._continue([rendering.completion for rendering in renderings])
        prefix = pair.head + prompt_ids + pair.middle
        return len(pair.head), [
            TokenisedBlock(prefix, [ids + pair.tail], [slot]) for slot, ids in enumerate(continuations)
        ]

    def _head_length(self, prefix: list[int]) -> int:
        """How many tokens at the front of a prefix survive truncation: the bos token, wherever it came from."""
        return len(self._head) or int(bool(prefix) and prefix[0] == self.tokenizer.bos_token_id)

    def _fit(self, group: TokenisedGroup, head: int) -> TokenisedGroup:
        """The group cut to `max_length` by the policy; `head` leading tokens of each prefix stay."""
        excess = group.longest - self.max_length
        if excess <= 0:
            return group
        if self.too_long == "refuse":
            self.counts["refused"] += 1
            raise TextTooLongError(
                f"prompt and completion have {group.longest} tokens, more than max_length {self.max_length}; "
                'raise max_length or use too_long="truncate_prompt"'
            )
        # The separator between an encoder's texts must stay as well.
        kept_behind = 0 if self.causal else len(self._pair.middle)
        if self.too_long == "truncate":
            group = self._cut_completions(group)
        longest = max(len(ids) for block in group.blocks for ids in block.completions)
        room = self.max_length - longest - head - kept_behind
        if room < 0:
            self.counts["refused"] += 1
            raise TextTooLongError(
                f"a completion of {longest} tokens does not fit into max_length {self.max_length} even without its "
                'prompt; raise max_length, leave the record out or use too_long="truncate", which shortens completions'
            )
        self.counts["prompts_truncated"] += 1
        blocks = []
        for block in group.blocks:
            drop = max(0, len(block.prefix) - head - kept_behind - room)
            self.counts["prompt_tokens_dropped"] += drop
            blocks.append(
                TokenisedBlock(block.prefix[:head] + block.prefix[head + drop :], block.completions, block.slots)
            )
        return TokenisedGroup(tuple(blocks))

    def _cut_completions(self, group: TokenisedGroup) -> TokenisedGroup:
        """The group with completions cut from the right, so that a quarter of `max_length` is left for prompts."""
        tail = [] if self.causal else self._pair.tail
        blocks = []
        for block in group.blocks:
            room = self.max_length - min(len(block.prefix), self.max_length // 4)
            completions = []
            for ids in block.completions:
                if len(ids) > room:
                    self.counts["completions_truncated"] += 1
                    self.counts["completion_tokens_dropped"] += len(ids) - room
                    ids = ids[: room - len(tail)] + tail
                completions.append(ids)
            blocks.append(TokenisedBlock(block.prefix, completions, block.slots))
        return TokenisedGroup(tuple(blocks))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _continue(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts as continuations, without the space that some tokenizers put before every text."""
        if self._anchor is None:
            return self._encode(texts)
        length = len(self._encode([self._anchor])[0])
        return [ids[length:] for ids in self._encode([self._anchor + text for text in texts])]

    def _clean(self, text: str) -> str:
        clean = without_surrogates(text)
        self.counts["surrogates"] += clean != text
        return clean

    def _clean_prompt(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return self._clean(prompt)
        return tuple(type(m)(m.role, self._clean(m.content)) for m in prompt)

    def _report_unstable(self, num_completions: int) -> None:
        if not self.counts["unstable"]:
            logger.warning(
                "the chat template renders a prompt differently once an answer follows; such groups take one block "
                "per completion (first seen with %d completions)",
                num_completions,
            )
        self.counts["unstable"] += 1


def _without_end(text: str, end_token: str) -> str:
    """The text without end tokens at its end, so that exactly one is appended."""
    while text.endswith(end_token):
        text = text.removesuffix(end_token)
    return text
