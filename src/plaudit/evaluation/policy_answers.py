"""Answers of language models to held-out prompts: sampled here, or read from a file; and how far they are."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.core.kl import kl_k1, kl_k3
from plaudit.data.batching import fill_batches, fill_padded_batches
from plaudit.data.fields import prompt_of
from plaudit.data.packing import pack_groups
from plaudit.data.records import Prompt, PromptRecord, RecordError, prompt_text
from plaudit.data.sources import iterate_rows
from plaudit.data.splitting import split_group
from plaudit.data.templates import as_messages
from plaudit.data.tokenising import TokenisedGroup
from plaudit.evaluation.metrics import FloatArray
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.rollout.answering import sample_answers
from plaudit.rollout.generate import GenerationResult

WINDOW = 32
"""Prompts that are answered together."""

Progress = Callable[[int], None]
"""Is told how many prompts have been answered since the last call."""


@dataclass(frozen=True)
class Answers:
    """What one model answered to `P` prompts.

    Attributes:
        completions: for each prompt its answers, one or more.
        finished: whether each ended by itself; None where nobody knows.
        measures: what only the model itself can say of its answers, by name `[P, K]`, nan where it is unknown:
            `tokens`; `entropy`, the sum over tokens of the entropy at each; `kl` and `kl_k3`, the sums of k1 and k3.

    Raises:
        ValueError: if a prompt has no answer, or shapes do not fit.
    """

    completions: Sequence[Sequence[str]]
    finished: Sequence[Sequence[bool | None]]
    measures: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [len(row) for row in self.completions]
        if 0 in counts:
            raise ValueError(f"prompt {counts.index(0)} has no answer; every prompt needs at least one")
        if counts != [len(row) for row in self.finished]:
            raise ValueError("`finished` must have one entry per completion")
        for name, table in self.measures.items():
            if table.shape != self.shape:
                raise ValueError(f"measure {name!r} is {table.shape}; it must be {self.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, K)`: prompts, and the most answers that one of them has."""
        return len(self.completions), max(map(len, self.completions), default=0)

    def table(self, values: Callable[[str], float]) -> FloatArray:
        """A number for every answer, from its text: `[P, K]`, nan where a prompt has fewer answers."""
        found = np.full(self.shape, np.nan)
        for row, texts in enumerate(self.completions):
            found[row, : len(texts)] = [values(text) for text in texts]
        return found

    def unfinished(self) -> FloatArray:
        """1 where an answer was cut off, 0 where it ended, nan where that is unknown: `[P, K]`."""
        found = np.full(self.shape, np.nan)
        for row, ends in enumerate(self.finished):
            found[row, : len(ends)] = [math.nan if end is None else float(not end) for end in ends]
        return found


def given_answers(completions: Sequence[Sequence[str]]) -> Answers:
    """Answers made elsewhere, one list of texts per prompt."""
    return Answers(completions, [[None] * len(row) for row in completions])


@torch.no_grad()
def answer_prompts(
    model: CausalLM,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    sampling: SamplingConfig,
    seed: int,
    name: str,
    reference: CausalLM | None = None,
    token_budget: int = 8192,
    max_rows: int = 256,
    progress: Progress | None = None,
) -> Answers:
    """Let a model answer every prompt and measure entropy and divergence on its own answers.

    The draws depend on `(seed, name)`: models with different names are independent, and no model's answers depend on
    which others are measured beside it.

    Args:
        model: the language model, left in the mode it was in.
        prompts: `P` prompts.
        samples: `K` answers each.
        sampling: how it answers; its own seed is not used.
        seed: of the whole evaluation.
        name: of this model.
        reference: the starting model; the model itself gives divergence 0; None leaves divergences out.
        token_budget: most tokens of a forward pass over finished answers.
        max_rows: most answers that are generated together.
        progress: is told of every window.

    Returns:
        The answers; divergences only where they can be estimated, see `comparable`.

    Raises:
        ValueError: for a prompt that leaves no room for an answer.
    """
    kl_to = reference if reference is not None and comparable(model, reference, sampling) else None
    completions: list[list[str]] = []
    finished: list[list[bool | None]] = []
    measures: dict[str, list[FloatArray]] = {}
    for number, start in enumerate(range(0, len(prompts), WINDOW)):
        window = [PromptRecord(prompt=prompt) for prompt in prompts[start : start + WINDOW]]
        found, answers = sample_answers(
            model,
            window,
            samples_per_prompt=samples,
            sampling=sampling.model_copy(update={"seed": _seed(seed, name, number)}),
            max_rows=max_rows,
        )
        for row in range(len(window)):
            own = answers[row * samples : (row + 1) * samples]
            completions.append([answer.completion for answer in own])
            finished.append([answer.finished for answer in own])
        for key, table in measure_answers(model, found, sampling.temperature, kl_to, token_budget).items():
            measures.setdefault(key, []).append(table)
        if progress is not None:
            progress(len(window))
    return Answers(completions, finished, {key: np.concatenate(tables) for key, tables in measures.items()})


def comparable(model: CausalLM, reference: CausalLM, sampling: SamplingConfig) -> bool:
    """Whether a divergence can be estimated: same tokens, and answers drawn from the model's whole distribution."""
    if sampling.method != "sample" or sampling.filtered:
        return False
    return model is reference or model.tokenizer.get_vocab() == reference.tokenizer.get_vocab()


@torch.no_grad()
def measure_answers(
    model: CausalLM,
    found: GenerationResult,
    temperature: float,
    reference: CausalLM | None = None,
    token_budget: int = 8192,
) -> dict[str, FloatArray]:
    """Sums over the tokens of each answer, under the model that gave it, at its temperature.

    `tokens = T`, `entropy = Σ_t H(π(·|s_t))`, `kl = Σ_t k1_t`, `kl_k3 = Σ_t k3_t` with `k1, k3` of
    `log π(y_t|s_t)` and `log π_ref(y_t|s_t)`. Both sums are unbiased for the divergence of whole answers, because
    `E[π_ref/π − 1 | s_t] = 0` at every state.

    Args:
        model: the model that gave the answers.
        found: `P` prompts with `K` answers each.
        temperature: at which they were drawn.
        reference: the starting model; the model itself gives 0; None leaves both divergences out.
        token_budget: most tokens of one forward pass.

    Returns:
        `[P, K]` by name.
    """
    groups = found.groups()
    samples = len(found.token_ids) // len(groups)
    tables = {"tokens": _per_answer([len(ids) for ids in found.token_ids], samples)}
    names = ("entropy",) if reference is None else ("entropy", "kl", "kl_k3")
    tables |= {name: np.zeros((len(groups), samples)) for name in names}
    models = [model] if reference is None or reference is model else [model, reference]
    modes = [each.training for each in models]
    try:
        for each in models:
            each.eval()
        for parts, owners in _batches(groups, token_budget, packed=all(each.packed for each in models)):
            _add_sums(tables, parts, owners, models, temperature)
    finally:
        for each, mode in zip(models, modes, strict=True):
            each.train(mode)
    return tables


def _add_sums(
    tables: Mapping[str, FloatArray],
    parts: list[TokenisedGroup],
    owners: list[int],
    models: Sequence[CausalLM],
    temperature: float,
) -> None:
    """Put the sums of one batch where they belong."""
    batch = pack_groups(parts, causal=True)
    outputs = [
        LanguagePolicy(model).evaluate(batch.to(next(model.parameters()).device), temperature) for model in models
    ]
    own = outputs[0]
    spans, rows = own.spans, [owners[part] for part in batch.layout.group_index.tolist()]
    slots = batch.layout.slot_index.tolist()
    entries = {"entropy": own.entropy}
    if len(models) == 2:
        other = outputs[1].logprobs.to(own.logprobs.device)
        entries |= {"kl": kl_k1(own.logprobs, other), "kl_k3": kl_k3(own.logprobs, other)}
    for name, values in entries.items():
        sums = torch.zeros(len(slots), dtype=torch.float64).index_add(0, spans.owner.cpu(), values.double().cpu())
        tables[name][rows, slots] = sums.numpy()


def _batches(
    groups: Sequence[TokenisedGroup], token_budget: int, *, packed: bool
) -> list[tuple[list[TokenisedGroup], list[int]]]:
    """Groups, cut where they are too large, in batches within the budget, each part with the place of its prompt."""
    cut = [(part, row) for row, group in enumerate(groups) for part in split_group(group, token_budget, packed=packed)]
    if packed:
        chosen = fill_batches(range(len(cut)), [part.num_tokens for part, _ in cut], token_budget)
    else:
        widths, heights = [part.longest for part, _ in cut], [part.num_completions for part, _ in cut]
        chosen = fill_padded_batches(range(len(cut)), widths, heights, token_budget)
    return [([cut[i][0] for i in batch], [cut[i][1] for i in batch]) for batch in chosen]


def _per_answer(values: Sequence[float], samples: int) -> FloatArray:
    return np.array(values, dtype=np.float64).reshape(-1, samples)


def _seed(seed: int, name: str, window: int) -> int:
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode()), window]).generate_state(2)
    return int(words[0]) << 30 | int(words[1]) & (2**30 - 1)


def read_answers(path: Path | str, prompts: Sequence[Prompt]) -> Answers:
    """Answers from JSON Lines as `plaudit generate` writes them: `{"prompt", "completions", "finished"}`.

    Lines are matched by their prompt; `completion` with one text does too, `finished` may be absent, several lines of
    one prompt add up. Lines of other prompts are passed over.

    Args:
        path: the file.
        prompts: `P` prompts, all of which need an answer.

    Raises:
        ValueError: naming file and line for one that cannot be read, or prompts without an answer.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file of completions")
    places = {as_messages(prompt): place for place, prompt in enumerate(prompts)}
    completions: list[list[str]] = [[] for _ in prompts]
    finished: list[list[bool | None]] = [[] for _ in prompts]
    for row in iterate_rows(path):
        try:
            if row.value is None:
                raise row.error or RecordError("no object", expected="an object with a prompt and its completions")
            prompt, texts, ends = _answers_of(row.value)
        except RecordError as error:
            error.place = row.place
            raise
        place = places.get(as_messages(prompt))
        if place is not None:
            completions[place] += texts
            finished[place] += ends
    missing = [place for place, texts in enumerate(completions) if not texts]
    if missing:
        raise ValueError(
            f"{path} has no answer to {len(missing)} of {len(prompts)} prompts, the first of which is "
            f"{prompt_text(prompts[missing[0]])[:80]!r}; let the model answer them, or leave them out of the data"
        )
    return Answers(completions, finished)


def _answers_of(values: Mapping[str, Any]) -> tuple[Prompt, list[str], list[bool | None]]:
    texts = values.get("completions", values.get("completion"))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError("wrong type", key="completions", problem=repr(texts)[:60], expected="a list of texts")
    ends = values.get("finished")
    ends = [ends] * len(texts) if ends is None or isinstance(ends, bool) else ends
    if not isinstance(ends, list) or len(ends) != len(texts) or not all(e is None or isinstance(e, bool) for e in ends):
        raise RecordError(
            "wrong type", key="finished", problem=repr(ends)[:60], expected="true or false for each completion"
        )
    return prompt_of(values.get("prompt")), texts, ends
