"""`plaudit generate`: answers of a language model to prompts."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from cyclopts import Parameter


def generate(
    model: str,
    *,
    prompt: str | None = None,
    input: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    samples: int = 1,
    method: Literal["sample", "greedy", "beam"] = "sample",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    seed: int = 0,
    logprobs: bool = False,
    server: str | None = None,
    endpoint: Literal["chat", "text"] = "chat",
    one_answer_a_request: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Answer prompts: `plaudit generate MODEL --prompt TEXT`, or `< prompts.jsonl > answers.jsonl`.

    Each input line holds a `prompt` (text or messages); each output line is the same with `completions`, a list, and
    `finished`, which is false where an answer reached the token limit. `plaudit score` reads them as they are.

    Parameters
    ----------
    model
        Folder (or Hugging Face name) of a causal language model.
    prompt
        One prompt; its answers are printed as plain text.
    input
        Read this file of JSON Lines instead of the standard input.
    output
        Write this file instead of the standard output.
    overwrite
        Replace a file that exists.
    samples
        Answers to each prompt; with beams, the best of them.
    method
        Draw from the distribution, take its most likely token, or search with several beams.
    max_new_tokens
        Most tokens of an answer.
    temperature
        Logits are divided by it.
    top_k
        Draw from the `k` most likely tokens.
    top_p
        Draw from the fewest tokens whose probability reaches `p`.
    min_p
        Draw from tokens of at least `min_p` times the probability of the most likely one.
    num_beams
        Beams of `--method beam`.
    length_penalty
        A beam's log-probability is divided by its length to this power: above 0 favours long answers.
    stop
        An answer ends where this text appears; may be given several times.
    seed
        Seed of the draws.
    logprobs
        Also write the log-probability of each answer.
    server
        Ask a server that speaks the OpenAI protocol, `http://localhost:8000/v1`; MODEL is the name by which it serves
        the model. A key is read from OPENAI_API_KEY.
    endpoint
        The server's `chat/completions`, whose own template renders a prompt, or its `completions` for plain `text`.
    one_answer_a_request
        For servers that take no `n`: every answer is a request with a seed of its own.
    device
        `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    dtype
        Number type of the weights: float32, bfloat16 or float16.
    trust_remote_code
        Let code in the model's folder run.
    """
    if prompt is not None and input is not None:
        raise ValueError("give --prompt or --input, not both")
    if prompt is None and input is None and sys.stdin.isatty():
        raise ValueError("nothing to answer: plaudit generate MODEL --prompt TEXT, or < prompts.jsonl")
    if output is not None and output.exists() and not overwrite:
        raise ValueError(f"{output} exists; replace it (--overwrite) or name another file")
    if output is not None and input is not None and output.exists() and output.samefile(input):
        raise ValueError(f"{output} is the input as well, which is read while answers are written; name another file")
    if samples < 1:
        raise ValueError(f"--samples: must be at least 1, not {samples}")
    from plaudit.cli.verb import config_of_options
    from plaudit.configs.generation import SamplingConfig

    sampling = config_of_options(
        SamplingConfig,
        method=method,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        stop_strings=stop,
        seed=seed,
    )
    options: dict[str, Any] = {"samples_per_prompt": samples, "sampling": sampling}
    if server is not None:
        if logprobs:
            raise ValueError("--logprobs: a server's are not of the tokens that Plaudit would score; leave it out")
        answer = _by_server(server, model, endpoint=endpoint, several=not one_answer_a_request, options=options)
    else:
        if endpoint != "chat" or one_answer_a_request:
            raise ValueError("--endpoint and --one-answer-a-request say how a server is asked: give --server too")
        options["logprobs"] = logprobs
        answer = _by_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, options=options)
    lines = _lines(answer, prompt, input)
    if output is None:
        _write(lines, sys.stdout)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as target:
        _write(lines, target)


def _lines(answer: "Answer", prompt: str | None, source: Path | None) -> Iterator[str]:
    """The answers to one prompt as they are, or to prompts of a file (or the standard input) as JSON Lines."""
    from plaudit.rollout.answering import read_prompts

    if prompt is not None:
        return (text for row in answer([{"prompt": prompt}]) for text in row["completions"])
    # What is no UTF-8 becomes surrogates, which `read_prompts` refuses with their line.
    lines = sys.stdin if source is None else source.open(encoding="utf-8", errors="surrogateescape")
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(errors="surrogateescape")
    rows = read_prompts(lines, str(source or "standard input"))
    return (json.dumps(row, ensure_ascii=False) for row in answer(rows))


def _write(lines: Iterator[str], target: TextIO) -> None:
    for line in lines:
        target.write(line + "\n")
        target.flush()


Answer = Callable[[Any], Iterator[dict[str, Any]]]
"""Rows with a prompt to rows with answers."""


def _by_model(model: str, *, device: str, dtype: str, trust_remote_code: bool, options: dict[str, Any]) -> Answer:
    from plaudit.cli.chat import open_language_model
    from plaudit.rollout.answering import answer_rows

    loaded = open_language_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return partial(answer_rows, loaded, **options)


def _by_server(
    url: str, model: str, *, endpoint: Literal["chat", "text"], several: bool, options: dict[str, Any]
) -> Answer:
    from plaudit.rollout.remote import CompletionClient, server_rows

    key = os.environ.get("OPENAI_API_KEY")
    client = CompletionClient(url=url, model=model, endpoint=endpoint, several=several, api_key=key)
    return partial(server_rows, client, **options)
