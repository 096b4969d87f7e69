"""Answers to prompts as text: what rewards score, `plaudit generate` writes and `plaudit chat` says."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.data.fields import prompt_of
from plaudit.data.records import Message, Prompt, PromptRecord, RecordError
from plaudit.models.causal_lm import CausalLM
from plaudit.rewards.base import Sample
from plaudit.rollout.generate import GenerationResult, generate
from plaudit.rollout.stopping import decode


def sample_answers(
    model: CausalLM,
    prompts: Sequence[PromptRecord],
    *,
    sampling: SamplingConfig,
    samples_per_prompt: int = 1,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
    max_rows: int = 256,
) -> tuple[GenerationResult, list[Sample]]:
    """Answers as token ids and, in the same order, as what a reward reads: text without white space around it.

    Alignment, evaluation, the demo and `plaudit generate` answer through this one function.

    Args:
        model: the language model, left in the mode it was in.
        prompts: `P` prompts; their columns go into the samples.
        sampling: how tokens are chosen.
        samples_per_prompt: `K` answers each.
        prompt_ids: the prompts as token ids; None tokenises them.
        generator: draws the seed of all answers; None takes `sampling.seed`.
        max_rows: most answers that are generated together.

    Returns:
        `P · K` answers, those of a prompt side by side.

    Raises:
        ValueError: for a prompt that leaves no room for an answer.
    """
    if prompt_ids is None:
        tokeniser = model.text_tokeniser()
        prompt_ids = [tokeniser.prompt(record.prompt) for record in prompts]
    found = generate(
        model,
        model.tokenizer,
        prompt_ids,
        samples_per_prompt=samples_per_prompt,
        sampling=sampling,
        generator=generator,
        max_rows=max_rows,
    )
    return found, as_samples(found, prompts)


def as_samples(found: GenerationResult, prompts: Sequence[PromptRecord]) -> list[Sample]:
    """Answers as what a reward reads: text without white space around it, with the columns of its prompt."""
    return [
        Sample(prompts[index].prompt, text.strip(), finished, prompts[index].columns)
        for index, text, finished in zip(found.prompt_index, found.text, found.finished, strict=True)
    ]


def read_prompts(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    """Rows with a `prompt` from JSON Lines; other keys (`id`, …) are kept for the output.

    Args:
        lines: one JSON object a line; empty lines are left out.
        name: the file's name, for errors.

    Raises:
        ValueError: for a line that is no object with a prompt, with its place.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix("\ufeff") if number == 1 else line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object with a prompt, not {type(row).__name__}")
            prompt_of(row.get("prompt"))
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}:{number}: this is not JSON: {error.msg[:1].lower()}{error.msg[1:]}; expected one JSON object "
                'with a prompt per line, {"prompt": …} (one prompt alone: --prompt TEXT; a table: plaudit data convert)'
            ) from error
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}:{number}: not UTF-8, or half a character: a text was cut in its middle; write the line anew"
            ) from error
        except RecordError as error:
            raise ValueError(f"{name}:{number}: prompt: {error.reason}, expected {error.expected}") from error
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from error
        yield row


def answer_rows(
    model: CausalLM,
    rows: Iterable[dict[str, Any]],
    *,
    samples_per_prompt: int,
    sampling: SamplingConfig,
    window: int = 64,
    logprobs: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answer rows in order, some at a time, so that memory does not grow with their number.

    Args:
        model: the language model.
        rows: objects with a `prompt`.
        samples_per_prompt: answers each.
        sampling: how tokens are chosen; windows after the first use the following seeds.
        window: prompts that are answered together.
        logprobs: whether the sum of each answer's log-probabilities is written too.

    Returns:
        The rows with `completions`, `finished`, and `logprobs` where asked for.
    """
    waiting, number = iter(rows), 0
    while batch := list(islice(waiting, window)):
        prompts = [PromptRecord(prompt=prompt_of(row["prompt"])) for row in batch]
        seeded = sampling.model_copy(update={"seed": sampling.seed + number})
        found, samples = sample_answers(model, prompts, samples_per_prompt=samples_per_prompt, sampling=seeded)
        number += 1
        for place, row in enumerate(batch):
            own = slice(place * samples_per_prompt, (place + 1) * samples_per_prompt)
            texts = [sample.completion for sample in samples[own]]
            answer: dict[str, Any] = {"completions": texts, "finished": found.finished[own]}
            if logprobs:
                answer["logprobs"] = [sum(values) for values in found.logprobs[own]]
            yield row | answer


def reply(model: CausalLM, messages: Sequence[Message], sampling: SamplingConfig, say: Callable[[str], None]) -> str:
    """One answer to a conversation, told piece by piece as it comes.

    Args:
        model: the language model.
        messages: the conversation so far, a user's turn last.
        sampling: how tokens are chosen.
        say: is told each new piece of text.

    Returns:
        The whole answer.
    """
    prompt: Prompt = tuple(messages)
    ends = model.end_token_ids
    ids: list[int] = []
    said = ""

    def told(_: list[tuple[int, int]], tokens: list[int]) -> None:
        nonlocal said
        ids.extend(token for token in tokens if token not in ends)
        text = decode(model.tokenizer, ids)
        # Part of a character, which the next token may complete.
        if not text.endswith("\ufffd") and text.startswith(said):
            say(text[len(said) :])
            said = text

    found = generate(
        model,
        model.tokenizer,
        [model.text_tokeniser().prompt(prompt)],
        sampling=sampling,
        on_tokens=None if sampling.method == "beam" else told,
    )
    if sampling.method == "beam":
        say(found.text[0])
    return found.text[0].strip()
