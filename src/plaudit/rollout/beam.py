"""Beam search over a decoder that shares each prompt's keys and values; the same answers as transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from plaudit.configs.generation import SamplingConfig

_NEVER = -1.0e9
"""The score of what may not be chosen; a number that transformers uses too, so that ties break alike."""

BeamAnswer = tuple[list[int], list[float], list[float], bool, float | None]
"""Tokens, log-probabilities, zeros, whether it ended, score."""


class BeamDecoder(Protocol):
    """What a beam search needs of a decoder."""

    rows: list[int]

    def prefill(self) -> Tensor:
        """Read every prompt once: `[P, H]`."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row: `[R]` to `[R, H]`."""

    def reorder(self, source: Tensor) -> None:
        """Let row `r` go on from row `source[r]`, `[R]`."""


@dataclass
class _Beams:
    """`B` sequences per prompt: tokens `[P, B, T]`, their log-probabilities `[P, B, T]`, scores `[P, B]`, lengths."""

    tokens: Tensor
    logprobs: Tensor
    scores: Tensor
    lengths: Tensor
    finished: Tensor

    def take(self, index: Tensor) -> "_Beams":
        """The beams at `index [P, B']`."""
        wide = index[:, :, None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(
            self.tokens.gather(1, wide),
            self.logprobs.gather(1, wide),
            self.scores.gather(1, index),
            self.lengths.gather(1, index),
            self.finished.gather(1, index),
        )

    def join(self, other: "_Beams") -> "_Beams":
        """Both sets of beams, `[P, B + B']`."""
        mine, theirs = vars(self), vars(other)
        columns: dict[str, Any] = {name: torch.cat((mine[name], theirs[name]), 1) for name in mine}
        return _Beams(**columns)


def beam_search(
    decoder: BeamDecoder,
    head: Callable[[Tensor], Tensor],
    end_ids: Tensor,
    sampling: SamplingConfig,
    samples_per_prompt: int,
) -> list[list[BeamAnswer]]:
    """The best answers by log-probability over `length ** length_penalty`.

    Every step keeps the `B` best continuations that have not ended; those that end among the best `B` compete for the
    `B` finished places. It stops by `early_stopping` as transformers does (`GenerationMixin._beam_search`).

    Args:
        decoder: with `B` rows per prompt.
        head: states `[R, H]` to logits `[R, V]`.
        end_ids: `[E]` ids that end an answer.
        sampling: `num_beams`, `length_penalty`, `early_stopping`, `max_new_tokens`.
        samples_per_prompt: how many of the finished places to return.

    Returns:
        For each prompt its answers, best first.
    """
    beams, limit, device = sampling.num_beams, sampling.max_new_tokens, end_ids.device
    prompts = len(decoder.rows) // beams
    running = _start(prompts, beams, limit, device)
    # Only the first beam counts at first: all of them hold the same prompt.
    running.scores[:, 1:] = _NEVER
    done = _start(prompts, beams, limit, device)
    done.scores.fill_(_NEVER)
    open_prompts = torch.ones(prompts, 1, dtype=torch.bool, device=device)
    width = max(2, 1 + len(end_ids)) * beams
    logits = head(decoder.prefill()).repeat_interleave(beams, 0)
    for step in range(limit):
        candidates, source = _continuations(running, logits, step, width)
        ended = torch.isin(candidates.tokens[:, :, step], end_ids) | (step + 1 == limit)
        alive = torch.topk(candidates.scores + ended * _NEVER, beams).indices
        running = candidates.take(alive)
        running.scores = running.scores + ended.gather(1, alive) * _NEVER
        done = _finish(done, candidates, ended, open_prompts, sampling)
        longest = limit if sampling.early_stopping == "never" and sampling.length_penalty > 0.0 else step + 1
        possible = running.scores[:, :1] / longest**sampling.length_penalty
        worst = torch.where(done.finished, done.scores.amin(1, keepdim=True), _NEVER)
        open_prompts &= (possible > worst).any(1, keepdim=True)
        full = bool(done.finished.all()) and sampling.early_stopping is True
        if not bool(open_prompts.any()) or full or step + 1 == limit:
            break
        rows = source.gather(1, alive) + torch.arange(prompts, device=device)[:, None] * beams
        decoder.reorder(rows.flatten())
        logits = head(decoder.step(running.tokens[:, :, step].flatten()))
    return _answers(done, end_ids, samples_per_prompt)


def _start(prompts: int, beams: int, limit: int, device: torch.device) -> _Beams:
    return _Beams(
        tokens=torch.zeros(prompts, beams, limit, dtype=torch.long, device=device),
        logprobs=torch.zeros(prompts, beams, limit, device=device),
        scores=torch.zeros(prompts, beams, device=device),
        lengths=torch.zeros(prompts, beams, dtype=torch.long, device=device),
        finished=torch.zeros(prompts, beams, dtype=torch.bool, device=device),
    )


def _continuations(running: _Beams, logits: Tensor, step: int, width: int) -> tuple[_Beams, Tensor]:
    """The `width` best one-token continuations of each prompt's beams, and the beam `[P, width]` each comes from."""
    prompts, beams = running.scores.shape
    logprobs = logits.log_softmax(-1).view(prompts, beams, -1)
    vocabulary = logprobs.shape[-1]
    total = (logprobs + running.scores[:, :, None]).flatten(1)
    scores, flat = torch.topk(total, min(width, total.shape[1]))
    source, tokens = flat // vocabulary, flat % vocabulary
    found = running.take(source)
    found.scores = scores
    found.tokens[:, :, step] = tokens
    found.logprobs[:, :, step] = logprobs.flatten(1).gather(1, flat)
    found.lengths = torch.full_like(found.lengths, step + 1)
    return found, source


def _finish(done: _Beams, candidates: _Beams, ended: Tensor, open_prompts: Tensor, sampling: SamplingConfig) -> _Beams:
    """The best `B` of what was finished before and what just ended among the best `B` candidates."""
    beams = sampling.num_beams
    best = torch.arange(ended.shape[1], device=ended.device) < beams
    just_ended = ended & best
    step = int(candidates.lengths[0, 0])
    scores = candidates.scores / step**sampling.length_penalty
    full = done.finished.all(1, keepdim=True) & (sampling.early_stopping is True)
    scores = scores + full * _NEVER
    scores = scores + ~open_prompts * _NEVER
    scores = scores + ~just_ended * _NEVER
    offered = _Beams(candidates.tokens, candidates.logprobs, scores, candidates.lengths, just_ended)
    merged = done.join(offered)
    return merged.take(torch.topk(merged.scores, beams).indices)


def _answers(done: _Beams, end_ids: Tensor, samples_per_prompt: int) -> list[list[BeamAnswer]]:
    results: list[list[BeamAnswer]] = []
    for prompt in range(done.scores.shape[0]):
        found: list[BeamAnswer] = []
        for beam in range(samples_per_prompt):
            length = int(done.lengths[prompt, beam])
            tokens = done.tokens[prompt, beam, :length].tolist()
            logprobs = done.logprobs[prompt, beam, :length].tolist()
            ended = bool(tokens) and tokens[-1] in end_ids.tolist()
            found.append((tokens, logprobs, [0.0] * length, ended, float(done.scores[prompt, beam])))
        results.append(found)
    return results
