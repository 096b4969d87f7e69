"""Rendering: how a prompt and a completion become text, by the tokenizer's chat template or by a plain one.

Plain template, for tokenizers without a chat template (`\\n\\n` stands for two line ends):

    {bos}\\n\\nSystem: {system}\\n\\nHuman: {user}\\n\\nAssistant: {assistant}\\n\\nHuman: {user}\\n\\nAssistant:

A completion follows with one space before it (none is added where it starts with white space) and the end token
behind it: ` {completion}{end}`. A prompt given as plain text is one user turn. Template "raw" adds nothing at all: the
prompt's text, then the completion's text and the end token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plaudit.data.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADERS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
# Two probes that differ in their first character, so that at least one differs from any completion's first one.
PROBES = ("plaudit-probe-answer", "answer-of-plaudit-probe")


@dataclass(frozen=True)
class Rendering:
    """Text of one completion behind its prompt: the model reads `prefix`, then `completion`.

    Attributes:
        prefix: text before the completion.
        completion: text of the completion with what the template puts around it, ending in the end token unless the
            answer was cut off.
        stable: True if `prefix` is the prompt rendered for generation, so that all completions can share it.
        verbatim: True if the template would have dropped a part of the completion, which was then put in as it is.
    """

    prefix: str
    completion: str
    stable: bool = True
    verbatim: bool = False


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: plain text is one user turn.

    Raises:
        ValueError: if there is no message, a role is unknown, or the last turn is already an assistant's.
    """
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    for message in prompt:
        if message.role not in HEADERS:
            raise ValueError(f"unknown role {message.role!r}; use one of {', '.join(HEADERS)}")
    if not prompt:
        raise ValueError("the prompt has no message; give at least one user turn")
    if prompt[-1].role == "assistant":
        raise ValueError(
            "the prompt ends in an assistant turn; it must end before the answer "
            "(move the last assistant turn into the completions)"
        )
    return prompt


def plain_prompt(prompt: Prompt) -> str:
    """The prompt in the plain template, ready for an answer: `\\n\\nHuman: {text}\\n\\nAssistant:`."""
    turns = "".join(f"\n\n{HEADERS[m.role]}: {m.content}" for m in as_messages(prompt))
    return turns + "\n\nAssistant:"


def bare_prompt(prompt: Prompt) -> str:
    """The prompt's text without a header for the answer: a lone user turn as it is, several turns with headers."""
    messages = as_messages(prompt)
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{HEADERS[m.role]}: {m.content}" for m in messages)


@dataclass(frozen=True)
class TextTemplate:
    """The plain template (`headers=True`) or none at all (`headers=False`, template "raw").

    Attributes:
        end_token: the text of the token that ends every answer.
        headers: whether roles are written as in this file's head.
    """

    end_token: str
    headers: bool = True

    def prompt(self, prompt: Prompt) -> str:
        """The prompt's text up to where an answer starts."""
        return plain_prompt(prompt) if self.headers else bare_prompt(prompt)

    def completions(self, prompt: Prompt, texts: list[str], cut_off: list[bool]) -> list[Rendering]:
        """The renderings of a prompt's completions; all share one prefix."""
        prefix = self.prompt(prompt)
        renderings = []
        for text, cut in zip(texts, cut_off, strict=True):
            space = " " if self.headers and not text[:1].isspace() else ""
            renderings.append(Rendering(prefix, space + text + ("" if cut else self.end_token)))
        return renderings


class ChatTemplate:
    """The tokenizer's own chat template, with its end of turn found by rendering.

    A probe answer is rendered; what stands behind it is the tail of a turn, such as `<|im_end|>\\n`. The first special
    token in it is the end token, and what follows that token is dropped, because a policy stops there. A tail
    without a special token gets the tokenizer's eos token straight after the answer.

    A system message that the template refuses or loses is put at the head of the first user turn.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        end_token: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Derive the tail and the end token.

        Args:
            tokenizer: a tokenizer with a chat template.
            end_token: the text of the end token, where the derived one is wrong.
            options: further arguments of the template, such as `{"enable_thinking": False}`.

        Raises:
            ValueError: if the template does not show an answer, or no end token can be found.
        """
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        rendered = self._render([Message("user", "question"), Message("assistant", PROBES[0])])
        if PROBES[0] not in rendered:
            raise ValueError("the chat template does not show the assistant's answer; use template='plain'")
        self._tail = rendered[rendered.rindex(PROBES[0]) + len(PROBES[0]) :]
        self.end_token = end_token or _first_special(tokenizer, self._tail) or tokenizer.eos_token
        if not self.end_token:
            raise ValueError("neither the chat template nor the tokenizer has an end token; give end_token")
        cut = self._tail.find(self.end_token)
        self._end = self._tail[: cut + len(self.end_token)] if cut >= 0 else self.end_token
        self._takes_system = self._shows_system()

    def prompt(self, prompt: Prompt) -> str:
        """The prompt rendered up to where an answer starts (with the generation prompt)."""
        return self._render(self._prepare(prompt), add_generation_prompt=True)

    def completions(self, prompt: Prompt, texts: list[str], cut_off: list[bool]) -> list[Rendering]:
        """The renderings of a prompt's completions, each checked for whether it starts with the prompt's own."""
        messages = self._prepare(prompt)
        prefix = self._render(messages, add_generation_prompt=True)
        return [self._one(messages, prefix, text, cut) for text, cut in zip(texts, cut_off, strict=True)]

    def _one(self, messages: list[Message], prefix: str, text: str, cut_off: bool) -> Rendering:
        end = "" if cut_off else self._end
        full = self._render([*messages, Message("assistant", text)])
        body = full.removesuffix(self._tail)
        whole = full.endswith(self._tail) and text.strip() in body
        if whole and body.startswith(prefix) and text.strip() in body[len(prefix) :]:
            return Rendering(prefix, body[len(prefix) :] + end)
        start = self._answer_start(messages, text, body)
        if whole and not body.startswith(prefix) and text.strip() in body[start:]:
            return Rendering(body[:start], body[start:] + end, stable=False)
        return Rendering(prefix, text + end, verbatim=True)

    def _answer_start(self, messages: list[Message], text: str, body: str) -> int:
        """Where the answer starts in its rendering: as far as it agrees with that of another answer."""
        probe = next(p for p in PROBES if p[0] != text.lstrip()[:1])
        other = self._render([*messages, Message("assistant", probe)])
        pairs = enumerate(zip(body, other, strict=False))
        return next((place for place, (a, b) in pairs if a != b), min(len(body), len(other)))

    def _prepare(self, prompt: Prompt) -> list[Message]:
        messages = list(as_messages(prompt))
        if messages[0].role != "system" or self._takes_system:
            return messages
        system, *rest = messages
        if rest and rest[0].role == "user":
            return [Message("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:]]
        return [Message("user", system.content), *rest]

    def _shows_system(self) -> bool:
        try:
            return PROBES[0] in self._render([Message("system", PROBES[0]), Message("user", "question")])
        except ValueError:
            return False

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
                )
            )
        except TemplateError as error:
            roles = ", ".join(m.role for m in messages)
            raise ValueError(
                f"the chat template refuses a conversation with roles {roles}: {error}; use template='plain'"
            ) from error


def _first_special(tokenizer: "PreTrainedTokenizerBase", text: str) -> str | None:
    """The special token that stands first in `text` (the longest of those that start there), or None."""
    specials = set(tokenizer.all_special_tokens)
    specials |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [(text.find(token), -len(token), token) for token in specials if token and token in text]
    return min(found)[2] if found else None
