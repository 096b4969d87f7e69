"""Rewards from a server over HTTP: vLLM's (and SGLang's) `/classify`, OpenRLHF's `/get_reward`."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from plaudit.data.records import prompt_text
from plaudit.data.tokenising import TextTokeniser
from plaudit.rewards.base import Sample, Score, score_values

logger = logging.getLogger(__name__)

Protocol = Literal["classify", "get_reward"]
Render = Callable[[Sample], str]

_SAMPLES_FAULT = frozenset({400, 413, 422})
"""Answers that are about the texts: too long, or nothing the server can read."""

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Answers that may be others a moment later."""


def error_text(error: urllib.error.HTTPError) -> str:
    """The code of an answer and the beginning of what it says, as far as that arrived."""
    try:
        return f"{error.code}: {error.read(300).decode(errors='replace')}"
    except (OSError, http.client.HTTPException):
        return f"{error.code}: {error.reason}"


def plain_text(sample: Sample) -> str:
    """A plain prompt and its completion, one behind the other.

    Raises:
        ValueError: for a conversation, which only the reward model's own template can render.
    """
    if isinstance(sample.prompt, str):
        return sample.prompt + sample.completion
    raise ValueError(
        f"a conversation ({prompt_text(sample.prompt)[:60]!r} …) has to be rendered by the reward model's own "
        "template: RemoteReward(…, render=rendered_by(tokenizer)), in a file `options: {tokenizer: FOLDER}`"
    )


def rendered_by(tokenizer: Any) -> Render:
    """Texts as a reward model reads them: by its tokenizer's template, with its end token unless cut off.

    Args:
        tokenizer: the reward model's tokenizer, or its folder or Hugging Face name.
    """
    from plaudit.models.backbone import load_tokenizer

    loaded = load_tokenizer(tokenizer, trust_remote_code=False) if isinstance(tokenizer, str) else tokenizer
    # Whether a text is too long is for the server to say.
    tokeniser = TextTokeniser(loaded, causal=True, max_length=1 << 30)

    def render(sample: Sample) -> str:
        block = tokeniser.group(sample.prompt, [sample.completion], cut_off=[not sample.finished]).blocks[0]
        return str(loaded.decode(block.prefix + block.completions[0], clean_up_tokenization_spaces=False))

    return render


@dataclass(frozen=True)
class RemoteReward:
    """Scores of a server.

    Texts are sent in batches, several at once. What fails for a passing reason (no connection, time-out, overload) is
    tried again with growing pauses. A batch that the server refuses for its texts is halved until the text at fault
    stands alone. What remains without a number is invalid, and `Score.problems` says why; never 0.

    `classify` sends `{"model", "input": [text, …], "use_activation": false}` and reads `data[i]["probs"]`, which is the
    raw score then: one number, or several that are averaged with `outputs` as weights. `get_reward` sends
    `{"query": [text, …], "prompts": […]}` and reads `rewards`.

    Attributes:
        url: the full address; `…/classify` and `…/get_reward` say which protocol it is.
        name: its name in logs.
        protocol: `classify` or `get_reward`; None goes by the address.
        model: the name under which a `classify` server knows its model.
        render: from a sample to the text that is sent.
        outputs: index and weight of the numbers that count, where a server gives several; None allows one only.
        batch_size: texts of one request.
        parallel: requests at once.
        timeout: seconds to wait for an answer.
        retries: how often a request is tried again.
        pause: seconds before the second try; doubled for each further one, up to 30.
        headers: more headers, e.g. `{"Authorization": "Bearer …"}`.
        extra: more keys of the request.
    """

    url: str
    name: str = "remote"
    protocol: Protocol | None = None
    model: str | None = None
    render: Render = plain_text
    outputs: Mapping[int, float] | None = None
    batch_size: int = 32
    parallel: int = 4
    timeout: float = 60.0
    retries: int = 4
    pause: float = 0.5
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    is_checked = True
    waits = True

    def __post_init__(self) -> None:
        path = urlsplit(self.url).path.rstrip("/")
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"{self.url!r} is no address; it must begin with http:// or https://")
        if self.protocol is None:
            found = next((p for p in ("classify", "get_reward") if path.endswith(f"/{p}")), None)
            if found is None:
                raise ValueError(
                    f"{self.url}: how does this server speak? Give the full address, ending in /classify or "
                    "/get_reward, or protocol="
                )
            object.__setattr__(self, "protocol", found)
        if self.batch_size < 1 or self.parallel < 1 or min(self.retries, self.pause) < 0 or not self.timeout > 0:
            raise ValueError(
                f"batch_size {self.batch_size}, parallel {self.parallel}, retries {self.retries}, pause {self.pause}, "
                f"timeout {self.timeout}: batch size and parallel must be at least 1, retries and pause at least 0, "
                "the time-out above 0"
            )

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """One score per sample.

        Raises:
            ValueError: if the server has no such address, refuses the caller, or answers in another form.
        """
        texts = [self.render(sample) for sample in samples]
        prompts = [prompt_text(sample.prompt) for sample in samples]
        values: list[float | None] = [None] * len(samples)
        problems: dict[int, str] = {}
        batches = [range(i, min(i + self.batch_size, len(texts))) for i in range(0, len(texts), self.batch_size)]
        with ThreadPoolExecutor(self.parallel) as threads:
            work = [threads.submit(self._score, texts, prompts, batch, values, problems) for batch in batches]
            for each in work:
                each.result()
        if problems:
            first = min(problems)
            logger.warning(
                "reward %r: %d of %d samples have no score, e.g. sample %d: %s",
                self.name, len(problems), len(samples), first, problems[first],
            )  # fmt: skip
        return score_values(samples, values, name=self.name, problems=problems)

    def _score(
        self,
        texts: list[str],
        prompts: list[str],
        batch: range,
        values: list[float | None],
        problems: dict[int, str],
    ) -> None:
        """Fill in the values of one batch, or why they are missing."""
        try:
            answer = self._request([texts[i] for i in batch], [prompts[i] for i in batch])
        except _RefusedError as refusal:
            if len(batch) > 1:
                middle = batch.start + len(batch) // 2
                for half in (range(batch.start, middle), range(middle, batch.stop)):
                    self._score(texts, prompts, half, values, problems)
            else:
                problems[batch.start] = str(refusal)
            return
        except _FailedError as failure:
            problems.update(dict.fromkeys(batch, str(failure)))
            return
        for place, value in zip(batch, answer, strict=True):
            values[place] = value
            if value is None:
                problems[place] = f"{self.url} gave no score"

    def _request(self, texts: list[str], prompts: list[str]) -> list[float | None]:
        if self.protocol == "classify":
            body: dict[str, Any] = {"input": texts, "use_activation": False, **self.extra}
            if self.model is not None:
                body["model"] = self.model
        else:
            body = {"query": texts, "prompts": prompts, **self.extra}
        answer = self._post(json.dumps(body).encode())
        try:
            found = self._read(answer)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{self.url} answered {str(answer)[:200]!r}, which is not the form of {self.protocol}"
            ) from error
        if len(found) != len(texts):
            raise ValueError(f"{self.url} gave {len(found)} scores for {len(texts)} texts")
        return found

    def _read(self, answer: Any) -> list[float | None]:
        if self.protocol == "get_reward":
            return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in answer["rewards"]]
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return [self._weigh(row["probs"]) for row in rows]

    def _weigh(self, numbers: list[float] | None) -> float | None:
        if numbers is None:
            return None
        if self.outputs is not None:
            return sum(weight * numbers[index] for index, weight in self.outputs.items())
        if len(numbers) != 1:
            raise ValueError(
                f"{self.url} gives {len(numbers)} numbers per text; say which of them count, e.g. outputs={{1: 1.0}}"
            )
        return numbers[0]

    def _post(self, body: bytes) -> Any:
        """Send a request, again where that may help."""
        headers = {"Content-Type": "application/json", **self.headers}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), 30.0))
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = f"{self.url} answered {error_text(error)}"
                if error.code in _SAMPLES_FAULT:
                    raise _RefusedError(said) from error
                if error.code not in PASSING:
                    raise ValueError(f"{said}; check the address and the permissions") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                # No connection, a time-out, an answer that broke off or is no JSON.
                said = f"{self.url}: {error or type(error).__name__}"
            logger.info("reward %r, try %d of %d: %s", self.name, attempt + 1, self.retries + 1, said)
        raise _FailedError(f"{said} (tried {self.retries + 1} times)")


def server_reward(
    url: str,
    *,
    tokenizer: str | None = None,
    protocol: Protocol | None = None,
    model: str | None = None,
    outputs: dict[int, float] | None = None,
    batch_size: int = 32,
    parallel: int = 4,
    timeout: float = 60.0,
    retries: int = 4,
    pause: float = 0.5,
    headers: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
) -> RemoteReward:
    """A server's reward from options as a configuration file can hold them.

    Args:
        url: the full address.
        tokenizer: folder or Hugging Face name of the reward model's tokenizer, by which texts are rendered as that
            model reads them, see `rendered_by`; None sends plain prompts with their completions behind them.
        protocol, model, outputs, batch_size, parallel, timeout, retries, pause, headers, extra: see `RemoteReward`.

    Raises:
        ValueError: for an address or a number that cannot be, or a tokenizer that cannot be opened.
    """
    return RemoteReward(
        url,
        protocol=protocol,
        model=model,
        render=plain_text if tokenizer is None else rendered_by(tokenizer),
        outputs=outputs,
        batch_size=batch_size,
        parallel=parallel,
        timeout=timeout,
        retries=retries,
        pause=pause,
        headers=headers or {},
        extra=extra or {},
    )


class _RefusedError(Exception):
    """The server cannot read a text."""


class _FailedError(Exception):
    """No answer after all tries."""
