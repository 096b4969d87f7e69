"""Completions from a server that speaks the OpenAI protocol (vLLM, SGLang, llama.cpp, `transformers serve`, …)."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from plaudit.configs.generation import SamplingConfig
from plaudit.data.fields import prompt_of
from plaudit.data.records import Prompt
from plaudit.data.templates import as_messages
from plaudit.rewards.remote import PASSING, error_text


@dataclass(frozen=True)
class RemoteAnswer:
    """One completion from a server.

    Attributes:
        text: the completion.
        finished: whether it ended by itself or by a stop string rather than at the token limit.
    """

    text: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class CompletionClient:
    """Best-of-n, evaluation and collecting completions by a server; for training see `plaudit.rollout.engine`.

    Attributes:
        url: the server's base, up to and with `/v1`.
        model: the name under which it serves the model.
        endpoint: `chat` sends messages to `/chat/completions`, `text` a plain prompt to `/completions`.
        api_key: sent as a bearer token.
        timeout: seconds to wait for one answer.
        attempts: tries per request; a refusal that may pass is waited for, longer every time.
        workers: requests at a time.
        several: whether the server takes `n`; otherwise every sample is a request, with a seed of its own.
    """

    url: str
    model: str
    endpoint: Literal["chat", "text"] = "chat"
    api_key: str | None = None
    timeout: float = 600.0
    attempts: int = 4
    workers: int = 8
    several: bool = True

    def generate(
        self, prompts: Sequence[Prompt], *, samples_per_prompt: int = 1, sampling: SamplingConfig | None = None
    ) -> list[list[RemoteAnswer]]:
        """Answer prompts.

        Args:
            prompts: `P` texts or conversations; the server's own template renders them in the `chat` form.
            samples_per_prompt: `K`.
            sampling: `sample` or `greedy`; top-k and min-p are sent under the names that vLLM and SGLang know.

        Returns:
            `P` lists of `K` answers.

        Raises:
            ValueError: for beams, a conversation sent as plain text, a refused request, or an answer of another form.
            ConnectionError: if the server gives no whole answer after all attempts.
        """
        sampling = sampling or SamplingConfig()
        if sampling.method == "beam":
            raise ValueError("method 'beam' is not part of the protocol; use 'sample' or 'greedy'")
        bodies = [self._body(prompt, sampling) for prompt in prompts]
        if self.several:
            jobs = [{**body, "n": samples_per_prompt} for body in bodies]
        else:
            jobs = [{**body, "seed": sampling.seed + k} for body in bodies for k in range(samples_per_prompt)]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(self._ask, jobs))
        if not self.several:
            starts = range(0, len(found), samples_per_prompt)
            found = [[row[0] for row in found[start : start + samples_per_prompt]] for start in starts]
        for row in found:
            if len(row) != samples_per_prompt:
                raise ValueError(f"{self.url}: {len(row)} answers for n = {samples_per_prompt}; use several=False")
        return found

    def _body(self, prompt: Prompt, sampling: SamplingConfig) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": sampling.max_new_tokens, "seed": sampling.seed}
        body["temperature"] = 0.0 if sampling.method == "greedy" else sampling.temperature
        optional = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
        body |= {key: value for key, value in optional.items() if value is not None}
        if sampling.stop_strings:
            body["stop"] = list(sampling.stop_strings)
        if self.endpoint == "chat":
            return body | {"messages": [{"role": m.role, "content": m.content} for m in as_messages(prompt)]}
        if not isinstance(prompt, str):
            raise ValueError("endpoint 'text' takes plain text; a conversation needs endpoint 'chat'")
        return body | {"prompt": prompt}

    def _ask(self, body: dict[str, Any]) -> list[RemoteAnswer]:
        path = "chat/completions" if self.endpoint == "chat" else "completions"
        answer = self._post(f"{self.url.rstrip('/')}/{path}", json.dumps(body).encode())
        try:
            return [
                RemoteAnswer(
                    # Null where nothing was said, or nothing but what the server keeps to itself (reasoning, a call).
                    (choice["message"]["content"] if self.endpoint == "chat" else choice["text"]) or "",
                    choice.get("finish_reason") != "length",
                )
                for choice in sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.url}: an answer of another form: {json.dumps(answer)[:200]}") from error

    def _post(self, url: str, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        fault = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(0.5 * 2 ** (attempt - 1))
            request = urllib.request.Request(url, data=body, headers=headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                fault = error_text(error)
                if error.code not in PASSING:
                    raise ValueError(f"{url} refused the request: {fault}") from error
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                # No connection, a time-out, an answer that broke off or is no JSON.
                fault = str(error) or type(error).__name__
        raise ConnectionError(f"{url}: no answer after {self.attempts} attempts: {fault}")


def server_rows(
    client: CompletionClient,
    rows: Iterable[dict[str, Any]],
    *,
    samples_per_prompt: int,
    sampling: SamplingConfig,
    window: int = 64,
) -> Iterator[dict[str, Any]]:
    """Answer rows in order, some at a time, as `plaudit.rollout.answering.answer_rows` does with a model.

    Args:
        client: the server.
        rows: objects with a `prompt`.
        samples_per_prompt: answers each.
        sampling: how tokens are chosen.
        window: prompts that are asked about before the next rows are read.

    Returns:
        The rows with `completions` and `finished`.
    """
    waiting = iter(rows)
    while batch := list(islice(waiting, window)):
        prompts = [prompt_of(row["prompt"]) for row in batch]
        found = client.generate(prompts, samples_per_prompt=samples_per_prompt, sampling=sampling)
        for row, answers in zip(batch, found, strict=True):
            texts, finished = [answer.text.strip() for answer in answers], [answer.finished for answer in answers]
            yield row | {"completions": texts, "finished": finished}
