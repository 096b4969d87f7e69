"""Readers of demonstrations: a prompt with a completion that a person wrote."""

from collections.abc import Mapping
from typing import Any

from plaudit.data.fields import (
    completion_of,
    messages_of,
    need,
    number_of,
    optional_text,
    prompt_of,
    split_transcript,
    text_of,
)
from plaudit.data.native import TEXT_ROLE
from plaudit.data.records import Demonstration, Prompt, RecordError

Row = Mapping[str, Any]

COMPLETION_KEYS = ("completion", "response", "output", "answer", "chosen")


def read_prompt_completion(row: Row) -> list[Demonstration]:
    """`{prompt, completion | response | output | answer}`, each as text or messages."""
    key = next((key for key in COMPLETION_KEYS if row.get(key) is not None), "completion")
    completion = completion_of(need(row, key, "text"), key)
    return [_demonstration(row, _prompt(need(row, "prompt", "text or a list of messages")), completion)]


def read_instruction(row: Row) -> list[Demonstration]:
    """Alpaca and Dolly: an instruction, perhaps with an input, and the output."""
    prompt = text_of(row, "instruction")
    extra = optional_text(row, "input") or optional_text(row, "context")
    key = "output" if "output" in row else "response"
    return [_demonstration(row, f"{prompt}\n\n{extra}" if extra else prompt, text_of(row, key))]


def read_conversation(row: Row) -> list[Demonstration]:
    """A list of messages that ends with an assistant turn: the last turn is the completion, the rest the prompt."""
    key = "messages" if "messages" in row else "conversations"
    messages = messages_of(row.get(key), key)
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise RecordError(
            "conversation does not end with an answer",
            key=f"{key}[{len(messages) - 1}]",
            expected="a prompt and a last message of the assistant",
        )
    return [_demonstration(row, messages[:-1], messages[-1].content)]


def read_chosen_transcript(row: Row) -> list[Demonstration]:
    """The chosen side of HH transcripts, as demonstrations."""
    _, prompt, completion = split_transcript(text_of(row, "chosen"), "chosen")
    return [_demonstration(row, prompt, completion)]


def _demonstration(row: Row, prompt: Prompt, completion: str) -> Demonstration:
    weight = 1.0 if row.get("weight") is None else number_of(row, "weight", parse=True)
    group = optional_text(row, "group")
    return Demonstration(prompt=prompt, completion=completion, id=optional_text(row, "id"), weight=weight, group=group)


def _prompt(value: object) -> Prompt:
    prompt = prompt_of(value)
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0].role == TEXT_ROLE:
        return prompt[0].content
    return prompt
