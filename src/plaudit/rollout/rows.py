"""The plain way to decode, for models that the shared way does not fit: equal rows, transformers' own cache or none."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.models.states import position_offset, takes_argument


class RowsDecoder:
    """Rows of one length, so that nothing is padded, each with its own copy of its prompt.

    It is used as `plaudit.rollout.decoding.SharedPrefixDecoder` is, by models whose attention cannot be replaced
    (`cached`), and by those whose cache does not give the numbers of the plain forward (not `cached`: the whole text is
    read again for every token).

    Attributes:
        rows: for each row the prompt (as given) that it continues.
        steps: tokens of each row that have been read.
    """

    def __init__(
        self, base: nn.Module, prompts: Sequence[Sequence[int]], samples_per_prompt: int, *, cached: bool = True
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            base: any transformers base model of a decoder.
            prompts: `P` lists of token ids of one length, none empty.
            samples_per_prompt: rows of each prompt.
            cached: whether the model's own cache is used.

        Raises:
            ValueError: if there is no prompt, one has no token, or lengths differ.
        """
        if not prompts or not all(prompts):
            raise ValueError("generation needs at least one prompt, and every prompt at least one token")
        if len(set(map(len, prompts))) > 1:
            raise ValueError(f"plain rows have one length, got prompts of {sorted(set(map(len, prompts)))} tokens")
        self._base: Any = base
        self._device = next(base.parameters()).device
        self._ids = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        self._samples = samples_per_prompt
        self._cached = cached
        self._offset = position_offset(base)
        self._takes_positions = takes_argument(base, "position_ids")
        self._takes_cache = takes_argument(base, "use_cache")
        self._cache: Any = None
        self.rows = [prompt for prompt in range(len(prompts)) for _ in range(samples_per_prompt)]
        self.steps = 0

    def prefill(self) -> Tensor:
        """Read every prompt once: `[P, H]`, the state of each prompt's last token."""
        states = self._forward(self._ids, 0)
        self._ids = self._ids.repeat_interleave(self._samples, 0)
        if self._cached and self._samples > 1:
            self._cache.batch_repeat_interleave(self._samples)
        return states

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row: `[R]` int64 to its states `[R, H]`."""
        before = self._ids.shape[1]
        self._ids = torch.cat((self._ids, tokens[:, None]), 1)
        self.steps += 1
        return self._forward(tokens[:, None], before) if self._cached else self._forward(self._ids, 0)

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Let rows leave; for each row that is left, which row it was before."""
        order = [row for row, lives in enumerate(alive) if lives]
        self.rows = [self.rows[row] for row in order]
        self._select(torch.tensor(order, dtype=torch.long, device=self._device))
        return order

    def reorder(self, source: Tensor) -> None:
        """Let row `r` go on from what row `source[r]` (`[R]` int64) of the same prompt has read."""
        self._select(source)

    def _select(self, rows: Tensor) -> None:
        self._ids = self._ids[rows]
        if self._cached and self._cache is not None:
            self._cache.reorder_cache(rows)

    def _forward(self, ids: Tensor, first: int) -> Tensor:
        options: dict[str, Any] = {"use_cache": self._cached} if self._takes_cache else {}
        if self._takes_positions:
            positions = torch.arange(first, first + ids.shape[1], device=self._device) + self._offset
            options["position_ids"] = positions.expand(ids.shape[0], -1)
        if self._cache is not None:
            options["past_key_values"] = self._cache
        output = self._base(input_ids=ids, **options)
        if self._cached:
            self._cache = output.past_key_values
        states: Tensor = output.last_hidden_state[:, -1]
        return states
