"""Generation in process: greedy, sampling and beam search over one shared prefill per prompt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plaudit.configs.generation import SamplingConfig
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.causal_lm import CausalLM
from plaudit.rollout.beam import beam_search
from plaudit.rollout.lean import lean_step
from plaudit.rollout.paths import SHARING, decoding_path, open_decoder
from plaudit.rollout.products import Product
from plaudit.rollout.sampling import draw, row_uniforms
from plaudit.rollout.steered_decoding import GoalHead, StyleHead, steered_head
from plaudit.rollout.stopping import StopStrings, decode


class Decoder(Protocol):
    """What reads tokens and gives states; see `SharedPrefixDecoder`."""

    rows: list[int]
    steps: int

    def prefill(self) -> Tensor:
        """Read every prompt once: `[P, H]`."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row: `[R]` to `[R, H]`."""

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Let rows leave."""

    def reorder(self, source: Tensor) -> None:
        """Let row `r` go on from row `source[r]`, `[R]`."""


@dataclass(frozen=True)
class GenerationResult:
    """`B` answers to `P` prompts, in the order of prompts and, within one, of samples.

    Attributes:
        prompt_ids: `P` lists of token ids.
        prompt_index: `B` places in `prompt_ids`.
        sample_index: `B` numbers from 0 within a prompt.
        token_ids: `B` lists of generated ids, with the end token where the answer ended by one.
        logprobs: `B` lists, log-probability of each token under the model at the sampling temperature: what the
            training forward computes.
        behaviour_logprobs: `B` lists, log-probability under the distribution that was drawn from: the same unless
            top-k, top-p or min-p cut it, and 0 where nothing was drawn (greedy, beams).
        finished: whether an end token or a stop string ended the answer; False at the token limit.
        text: the answers without end token and special tokens, cut before a stop string.
        scores: of beams, their log-probability over length to the `length_penalty`; None otherwise.
    """

    prompt_ids: list[list[int]]
    prompt_index: list[int]
    sample_index: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    behaviour_logprobs: list[list[float]]
    finished: list[bool]
    text: list[str]
    scores: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        """Generated tokens, all answers together."""
        return sum(map(len, self.token_ids))

    def groups(self) -> list[TokenisedGroup]:
        """One group per prompt, ready for `plaudit.data.packing.pack_groups`; slots are sample numbers."""
        answers: list[list[list[int]]] = [[] for _ in self.prompt_ids]
        for prompt, ids in zip(self.prompt_index, self.token_ids, strict=True):
            answers[prompt].append(ids)
        return [
            TokenisedGroup((TokenisedBlock(prefix, found, list(range(len(found)))),))
            for prefix, found in zip(self.prompt_ids, answers, strict=True)
        ]


@dataclass
class _Answers:
    """What has been generated: the rows of a batch, filled step by step."""

    tokens: Tensor
    logprobs: Tensor
    behaviour: Tensor
    lengths: list[int]
    finished: list[bool]


_WORTH_PREPARING = 128
"""Rows times steps from which the vocabulary head is laid out for them."""
_LARGEST_COPY = 100_000_000

OnTokens = Callable[[list[tuple[int, int]], list[int]], None]
"""Called after every step with the `(prompt, sample)` of every row and its new token."""


@torch.no_grad()
def generate(
    model: CausalLM,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int = 1,
    sampling: SamplingConfig | None = None,
    end_token_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    max_rows: int = 256,
    on_tokens: OnTokens | None = None,
) -> GenerationResult:
    """Answer prompts; each is read once, however many answers it gets.

    A sample depends on the seed, its prompt's place, its number and the prompt alone: not on how many others are drawn,
    how they are batched, or which of them end (up to rounding in the model's own arithmetic).

    Args:
        model: the language model; run in evaluation mode, and left as it was. What steers it is taken into account
            (not with beams).
        tokenizer: its tokenizer, for text and stop strings.
        prompt_ids: `P` lists of token ids, unpadded; see `strip_padding` for padded ones.
        samples_per_prompt: `K` answers each; with beams, the best `K` of them.
        sampling: how tokens are chosen; the defaults if None.
        end_token_ids: ids that end an answer; None takes all of the model's, see `CausalLM.end_token_ids`.
        generator: draws the seed of all rows; None takes `sampling.seed`.
        max_rows: most rows in one forward; prompts are batched by length.
        on_tokens: is told every token as it comes (not with beams).

    Returns:
        `P · K` answers.

    Raises:
        ValueError: for an empty prompt, one that leaves no room for `max_new_tokens`, an end token that the vocabulary
            does not have, more answers than beams, or logits that are not finite.
    """
    sampling = sampling or SamplingConfig()
    prompts = [list(prompt) for prompt in prompt_ids]
    ends = model.end_token_ids if end_token_ids is None else list(end_token_ids)
    end_ids = torch.tensor(ends, dtype=torch.long)
    _check(model, prompts, samples_per_prompt, sampling, end_ids, max_rows)
    seed = sampling.seed if generator is None else int(torch.randint(2**62, (), generator=generator))
    beams = sampling.num_beams if sampling.method == "beam" else 0
    rows_per_prompt = beams or samples_per_prompt
    if beams and model.steering is not None:
        raise ValueError("beams are not searched over styles or goals; use method: sample or greedy")
    answers: dict[int, list[tuple[list[int], list[float], list[float], bool, float | None]]] = {}
    with _evaluating(model):
        path = decoding_path(model)
        most = rows_per_prompt * max(1, min(len(prompts), max_rows // rows_per_prompt))
        tokens = sum(map(len, prompts)) + len(prompts) * rows_per_prompt * sampling.max_new_tokens
        lean = lean_step(model.base, rows=most, tokens=tokens) if path == "lean" else None
        head = _Head(model, rows=most, steps=sampling.max_new_tokens)
        for batch in _batches(prompts, rows_per_prompt, max_rows, ragged=path in SHARING):
            decoder = open_decoder(model.base, [prompts[place] for place in batch], rows_per_prompt, path, lean)
            end_ids = end_ids.to(next(model.parameters()).device)
            if beams:
                found = beam_search(decoder, head, end_ids, sampling, samples_per_prompt)
                answers |= dict(zip(batch, found, strict=True))
                continue
            stops = StopStrings(tokenizer, sampling.stop_strings)
            chosen = steered_head(model, sampling.temperature) or head
            filled = _decode(decoder, chosen, batch, sampling, end_ids, seed, stops, on_tokens)
            for index, place in enumerate(batch):
                rows = range(index * samples_per_prompt, (index + 1) * samples_per_prompt)
                answers[place] = [_answer(filled, row) for row in rows]
    return as_result(prompts, answers, tokenizer, sampling, ends)


def strip_padding(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Padded prompts `[P, T]` and their mask `[P, T]` (1 or True counts), padded on either side, as lists of ids."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


class _Head:
    """The vocabulary head: states `[R, H]` to float32 logits `[R, V]`."""

    def __init__(self, model: CausalLM, *, rows: int, steps: int) -> None:
        weight, bias, self._softcap = model.head
        self._scale = model.logit_scale
        worth = rows * steps >= _WORTH_PREPARING and weight.numel() <= _LARGEST_COPY
        self._product = Product(weight, bias, rows=rows if worth else 0)

    def __call__(self, states: Tensor) -> Tensor:
        if self._scale != 1.0:
            states = states * self._scale
        logits = self._product(states).float()
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def read(self, tokens: Tensor) -> None:
        """Nothing to remember."""

    def keep(self, order: Tensor) -> None:
        """Nothing to remember."""


def _decode(
    decoder: Decoder,
    head: _Head | StyleHead | GoalHead,
    places: list[int],
    sampling: SamplingConfig,
    end_ids: Tensor,
    seed: int,
    stops: StopStrings,
    on_tokens: OnTokens | None,
) -> _Answers:
    """Sample or take the best until every row has ended or reached the limit; rows that end leave the batch."""
    device, count, limit = end_ids.device, len(decoder.rows), sampling.max_new_tokens
    per_prompt = count // len(places)
    names = [(places[prompt], row % per_prompt) for row, prompt in enumerate(decoder.rows)]
    uniforms = torch.zeros(count, limit, device=device)
    if sampling.method == "sample":
        uniforms = row_uniforms(seed, names, limit).to(device)
    answers = _Answers(
        tokens=torch.zeros(count, limit, dtype=torch.long, device=device),
        logprobs=torch.zeros(count, limit, device=device),
        behaviour=torch.zeros(count, limit, device=device),
        lengths=[limit] * count,
        finished=[False] * count,
    )
    # Where each row of the batch stands in `answers`: rows move when others leave.
    homes = torch.arange(count, device=device)
    logits = _first_logits(decoder, head, per_prompt)
    for step in range(limit):
        drawn = draw(logits, uniforms[homes, step], sampling)
        answers.tokens[homes, step] = drawn.tokens
        answers.logprobs[homes, step] = drawn.logprobs
        answers.behaviour[homes, step] = drawn.behaviour_logprobs
        head.read(drawn.tokens)
        ended = torch.isin(drawn.tokens, end_ids)
        if on_tokens is not None:
            on_tokens([names[row] for row in homes.tolist()], drawn.tokens.tolist())
        if stops.strings:
            texts = answers.tokens[homes, : step + 1].tolist()
            ended |= torch.tensor([stops.reached(ids) for ids in texts], device=device)
        tokens = drawn.tokens
        if bool(ended.any()):
            for row in homes[ended].tolist():
                answers.lengths[row], answers.finished[row] = step + 1, True
            if bool(ended.all()):
                break
            order = torch.tensor(decoder.keep((~ended).tolist()), device=device)
            homes, tokens = homes[order], tokens[order]
            head.keep(order)
        if step + 1 < limit:
            logits = head(decoder.step(tokens))
    return answers


def _first_logits(decoder: Decoder, head: _Head | StyleHead | GoalHead, per_prompt: int) -> Tensor:
    states = decoder.prefill()
    if isinstance(head, _Head):
        return head(states).repeat_interleave(per_prompt, 0)
    return head(states.repeat_interleave(per_prompt, 0))  # it remembers every row


def _answer(filled: _Answers, row: int) -> tuple[list[int], list[float], list[float], bool, float | None]:
    length = filled.lengths[row]
    columns = (filled.tokens, filled.logprobs, filled.behaviour)
    tokens, logprobs, behaviour = (column[row, :length].tolist() for column in columns)
    return tokens, logprobs, behaviour, filled.finished[row], None


def as_result(
    prompts: list[list[int]],
    answers: Mapping[int, list[Any]],
    tokenizer: Any,
    sampling: SamplingConfig,
    end_token_ids: Sequence[int] = (),
) -> GenerationResult:
    """Answers by the place of their prompt, `(ids, logprobs, behaviour_logprobs, finished, score)` each, in order.

    An end token is no part of the text, whether the tokenizer calls it special or not.
    """
    stops = StopStrings(tokenizer, sampling.stop_strings)
    flat = [(place, number, *answer) for place in range(len(prompts)) for number, answer in enumerate(answers[place])]
    index, numbers, tokens, logprobs, behaviour, finished, scores = map(list, zip(*flat, strict=True))
    return GenerationResult(
        prompt_ids=prompts,
        prompt_index=index,
        sample_index=numbers,
        token_ids=tokens,
        logprobs=logprobs,
        behaviour_logprobs=behaviour,
        finished=finished,
        text=[stops.cut(decode(tokenizer, ids[:-1] if ids and ids[-1] in end_token_ids else ids)) for ids in tokens],
        scores=scores if sampling.method == "beam" else None,
    )


def _batches(prompts: list[list[int]], rows_per_prompt: int, max_rows: int, *, ragged: bool) -> Iterator[list[int]]:
    """Places of prompts that go together: near in length (`ragged`) or of one length, at most `max_rows` rows."""
    most = max(1, max_rows // rows_per_prompt)
    batch: list[int] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        if batch and (len(batch) == most or not (ragged or len(prompts[batch[0]]) == len(prompts[place]))):
            yield batch
            batch = []
        batch.append(place)
    yield batch


def _check(
    model: CausalLM,
    prompts: list[list[int]],
    samples_per_prompt: int,
    sampling: SamplingConfig,
    end_ids: Tensor,
    max_rows: int,
) -> None:
    if samples_per_prompt < 1 or max_rows < 1:
        raise ValueError(f"samples_per_prompt {samples_per_prompt}, max_rows {max_rows}: both must be at least 1")
    if not prompts or not all(prompts):
        raise ValueError("generation needs at least one prompt, and every prompt at least one token")
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > model.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} do not fit into the "
            f"{model.max_length} tokens that the model reads; lower max_new_tokens or shorten the prompt"
        )
    vocabulary = model.head[0].shape[0]
    if bool(((end_ids < 0) | (end_ids >= vocabulary)).any()):
        raise ValueError(f"end_token_ids {end_ids.tolist()} are not all in the vocabulary of {vocabulary} tokens")
    if sampling.method == "beam" and samples_per_prompt > sampling.num_beams:
        raise ValueError(f"{samples_per_prompt} answers of {sampling.num_beams} beams; raise num_beams")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
