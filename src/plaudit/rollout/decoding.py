"""Decoding with one prefill and one copy of a prompt's keys and values, whatever number of rows continue it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedLayout
from plaudit.models.packed_attention import BACKENDS, AttentionOptions, PackedAttention
from plaudit.models.quick_products import quick_products
from plaudit.models.states import num_attention_layers, position_offset, takes_argument
from plaudit.rollout.lean import LeanStep

_FIRST_CAPACITY = 64


class SharedPrefixDecoder:
    """Keys and values of `P` prompts, once each, and of the `R` rows that continue them.

    Every step reads the prompt's keys once for all of its rows, `[P, g, K·h/g, d] @ [P, g, d, L]`, and each row's own
    keys beside them; one softmax runs over both, so the result is plain causal attention. Nothing is copied per step:
    own keys are written into place, rows that end are overwritten by the last ones.

    A decoder is used in this order: `prefill`, then `step` with one token for every row, and between steps `keep` (rows
    that go on) or `reorder` (beams). All rows are at the same step.

    Attributes:
        rows: for each row the prompt (as given) that it continues.
        steps: tokens of each row that have been read.
    """

    def __init__(
        self,
        base: nn.Module,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        lean: LeanStep | None = None,
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            base: a transformers base model that uses packed attention, see `plaudit.models.probe`.
            prompts: `P` lists of token ids, none empty.
            samples_per_prompt: rows of each prompt; row `p · K + k` is sample `k` of prompt `p`.
            lean: the model's `plaudit.rollout.lean.lean_step`, which steps then take instead of its modules; or None.

        Raises:
            ValueError: if there is no prompt, or one has no token.
        """
        if not prompts or not all(prompts):
            raise ValueError("generation needs at least one prompt, and every prompt at least one token")
        self._base = base
        self._lean = lean
        self._prompts = [list(prompt) for prompt in prompts]
        self._device = next(base.parameters()).device
        self._offset = position_offset(base)
        self._options: dict[str, Any] = {"use_cache": False} if takes_argument(base, "use_cache") else {}
        # Four dimensions: transformers hands such a mask on as it is and builds none; `attend` ignores it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        self._layers = num_attention_layers(base)
        self._layer = 0
        self._prefilling: PackedAttention | None = None
        self._places = torch.empty(0)
        self._prompt_cache: list[tuple[Tensor, Tensor]] = []
        self._own_cache: list[tuple[Tensor, Tensor]] = []
        self._slots = list(range(len(prompts)))
        self.rows = [prompt for prompt in self._slots for _ in range(samples_per_prompt)]
        self.steps = 0
        self._masks: dict[int | None, Tensor | None] = {}
        self._arrange()

    def prefill(self) -> Tensor:
        """Read every prompt once: `[P, H]`, the state of each prompt's last token."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts])
        ends = lengths.cumsum(0)
        block = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        positions = torch.arange(int(ends[-1])) - (ends - lengths)[block]
        index = torch.arange(len(lengths))
        layout = PackedLayout(
            positions=positions,
            block_ids=block,
            segment_ids=torch.ones_like(block),
            completion_starts=ends - lengths,
            completion_ends=ends,
            prefix_starts=ends - lengths,
            prefix_ends=ends - lengths,
            group_index=index,
            slot_index=index * 0,
            num_groups=len(lengths),
            num_slots=1,
        ).to(self._device)
        self._prefilling = PackedAttention(layout)
        self._places = (block * int(lengths.max()) + positions).to(self._device)
        ids = torch.tensor([token for prompt in self._prompts for token in prompt], device=self._device)
        with quick_products(self._base, len(ids)):
            states = self._forward(ids, layout.positions)
        self._prefilling = None
        return states[layout.completion_ends - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row: `[R]` int64 to its states `[R, H]`."""
        self._make_room()
        self._masks = {}
        states = self._forward(tokens, self._row_lengths + self.steps)
        self.steps += 1
        return states

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Let rows leave. The last ones take the places of those that left.

        Args:
            alive: for each row whether it goes on.

        Returns:
            For each row that is left, which row it was before.
        """
        order = _fill_holes(alive)
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            to, source = (torch.tensor(column, device=self._device) for column in zip(*moved, strict=True))
            for cache in (tensor for pair in self._own_cache for tensor in pair):
                cache[to, :, : self.steps] = cache[source, :, : self.steps]
        self.rows = [self.rows[old] for old in order]
        left = set(self.rows)
        slots = _fill_holes([prompt in left for prompt in self._slots])
        for new, old in enumerate(slots):
            if new != old:
                for cache in (tensor for pair in self._prompt_cache for tensor in pair):
                    cache[new] = cache[old]
        self._slots = [self._slots[old] for old in slots]
        self._arrange()
        return order

    def reorder(self, source: Tensor) -> None:
        """Let row `r` go on from what row `source[r]` (`[R]` int64) of the same prompt has read."""
        if torch.equal(source, torch.arange(len(self.rows), device=source.device)):
            return
        for cache in (tensor for pair in self._own_cache for tensor in pair):
            cache[: len(self.rows), :, : self.steps] = cache[source, :, : self.steps]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the layer whose turn it is; called by `plaudit.models.packed_attention`.

        Args:
            query: `[1, h, n, d]`, `n` all prompts' tokens in the prefill and one token per row afterwards.
            key: `[1, g, n, d]`.
            value: `[1, g, n, d]`.
            window: sliding window in positions, or None.
            scaling: factor on the scores.
            softcap: cap on the scores, or None.
            sinks: `[h]` sink logits, or None.

        Returns:
            `[1, n, h, d]`.
        """
        layer, self._layer = self._layer, self._layer + 1
        if self._prefilling is not None:
            self._prompt_cache.append((self._as_prompts(key), self._as_prompts(value)))
            options = AttentionOptions(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
            output = BACKENDS["blocks"](query, key, value, self._prefilling, options)
            return output.transpose(1, 2)
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self._attend_rows(layer, *rows, window=window, scaling=scaling, softcap=softcap, sinks=sinks)[None]

    def attend_rows(self, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scaling: float) -> Tensor:
        """The same for one token per row, called by the lean step: `[R, h, d]`, `[R, g, d]` twice, to `[R, h, d]`."""
        layer, self._layer = self._layer, self._layer + 1
        return self._attend_rows(layer, query, key, value, window=window, scaling=scaling)

    def _attend_rows(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write a row's own key and value, then attend to the prompt's and to its own.

        With `m` heads per group: scores of the shared part are `[P, g, W·m, L]`, `W` rows of each prompt, and stay in
        that order; the smaller tensors (queries, a row's own scores and weights, outputs) are brought into it and back.
        """
        if len(self._own_cache) == layer:
            self._own_cache.append((self._as_rows(key), self._as_rows(value)))
        rows, steps = len(self.rows), self.steps + 1
        own_keys, own_values = self._own_cache[layer]
        own_keys[:rows, :, steps - 1] = key
        own_values[:rows, :, steps - 1] = value
        first = 0 if window is None else max(0, steps - window)
        own_keys, own_values = own_keys[:rows, :, first:steps], own_values[:rows, :, first:steps]
        keys, values = (cache[: len(self._slots), :, : self._longest] for cache in self._prompt_cache[layer])
        groups, size = key.shape[1], key.shape[2]
        query = (query * scaling).reshape(rows, groups, -1, size)

        shared = self._to_grid(query) @ keys.transpose(-1, -2)
        mask = self._prompt_mask(window)
        if mask is not None:
            shared = shared.masked_fill_(mask, torch.finfo(shared.dtype).min)
        scores = torch.cat((shared, self._to_grid(query @ own_keys.transpose(-1, -2))), -1)
        weights = _softmax(scores, softcap, sinks, mask).to(values.dtype)
        output = self._to_rows(weights[..., : self._longest] @ values, query.shape[2])
        output += self._to_rows(weights[..., self._longest :], query.shape[2]) @ own_values
        return output.reshape(rows, -1, size)

    def _to_grid(self, tensor: Tensor) -> Tensor:
        """`[R, g, m, n]` to `[P, g, W·m, n]`; places that no row fills hold copies of row 0."""
        tensor = tensor if self._grid is None else tensor[self._grid]
        _, groups, heads, last = tensor.shape
        grid = tensor.view(len(self._slots), self._width, groups, heads, last).transpose(1, 2)
        return grid.reshape(len(self._slots), groups, self._width * heads, last)

    def _to_rows(self, tensor: Tensor, heads: int) -> Tensor:
        """`[P, g, W·m, n]` to `[R, g, m, n]`, `heads` being `m`."""
        prompts, groups, _, last = tensor.shape
        # A view: the last dimension may be a part of a longer one.
        grid = tensor.view(prompts, groups, self._width, heads, last).transpose(1, 2)
        rows: Tensor = grid.reshape(prompts * self._width, groups, heads, last)
        return rows if self._flat is None else rows[self._flat]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self._layer = 0
        if self._lean is not None and self._prefilling is None:
            states: Tensor = self._lean(ids, positions, self.attend_rows)
        else:
            output = self._base(
                input_ids=ids[None],
                attention_mask=self._no_mask,
                position_ids=positions[None] + self._offset,
                decoding=self,
                **self._options,
            )
            states = output.last_hidden_state[0]
        if self._layer != self._layers:
            raise RuntimeError(f"attention was called {self._layer} times in {self._layers} layers")
        return states

    def _as_prompts(self, tensor: Tensor) -> Tensor:
        """`[1, g, N, d]` of the packed prompts to `[P, g, L, d]`, zeros behind shorter ones."""
        prompts, heads, size = len(self._slots), tensor.shape[1], tensor.shape[3]
        packed = tensor[0].transpose(0, 1)
        if packed.shape[0] < prompts * self._longest:
            padded = packed.new_zeros(prompts * self._longest, heads, size)
            padded[self._places] = packed
            packed = padded
        return packed.reshape(prompts, self._longest, heads, size).transpose(1, 2).contiguous()

    def _as_rows(self, tensor: Tensor) -> Tensor:
        """Room for the rows' own keys or values, `[R, g, T, d]`, of the type of `[R, g, d]`."""
        return tensor.new_empty(*tensor.shape[:2], _FIRST_CAPACITY, tensor.shape[2])

    def _make_room(self) -> None:
        """Double the room for own keys and values when it is used up."""
        if not self._own_cache or self.steps < self._own_cache[0][0].shape[2]:
            return
        for layer, pair in enumerate(self._own_cache):
            # Rows that left earlier are not carried along.
            grown = [torch.cat((t, torch.empty_like(t)), dim=2) for t in (c[: len(self.rows)] for c in pair)]
            self._own_cache[layer] = (grown[0], grown[1])

    def _arrange(self) -> None:
        """Work out which row stands where in the grid `[prompts, width]` of the shared part."""
        self._longest = max((len(self._prompts[prompt]) for prompt in self._slots), default=0)
        place = {prompt: slot for slot, prompt in enumerate(self._slots)}
        members: list[list[int]] = [[] for _ in self._slots]
        for row, prompt in enumerate(self.rows):
            members[place[prompt]].append(row)
        self._width = max(map(len, members), default=0)
        lengths = [len(self._prompts[prompt]) for prompt in self.rows]
        self._row_lengths = torch.tensor(lengths, dtype=torch.long, device=self._device)
        self._grid: Tensor | None = None
        self._flat: Tensor | None = None
        flat = [0] * len(self.rows)
        grid = [0] * (len(members) * self._width)
        for slot, found in enumerate(members):
            for column, row in enumerate(found):
                flat[row] = slot * self._width + column
                grid[flat[row]] = row
        if grid != list(range(len(self.rows))):
            self._grid = torch.tensor(grid, device=self._device)
            self._flat = torch.tensor(flat, device=self._device)
        ragged = any(length != self._longest for length in lengths)
        found = [len(self._prompts[prompt]) for prompt in self._slots]
        self._slot_lengths = torch.tensor(found, dtype=torch.long, device=self._device)[:, None, None, None]
        self._columns = torch.arange(self._longest, device=self._device)
        self._padding = self._columns >= self._slot_lengths if ragged else None
        self._masks = {}

    def _prompt_mask(self, window: int | None) -> Tensor | None:
        """`[P, 1, 1, L]` bool, True on prompt positions that no row of it sees in this step; None if all are seen."""
        if window not in self._masks:
            mask = self._padding
            if window is not None and self._longest + self.steps >= window:
                far = self._slot_lengths + self.steps - self._columns >= window
                mask = far if mask is None else mask | far
            self._masks[window] = mask
        return self._masks[window]


def _softmax(scores: Tensor, softcap: float | None, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """Softmax in float32 over `[P, g, W·m, L + t]`, with a cap on the scores and a sink per head where there are."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores[..., : mask.shape[-1]].masked_fill_(mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    groups, rows = scores.shape[1:3]
    heads = sinks.numel() // groups
    sink = sinks.to(scores.dtype).view(groups, heads).repeat(1, rows // heads)[None, ..., None]
    return torch.cat((scores, sink.expand(scores.shape[0], -1, -1, 1)), -1).softmax(-1, dtype=torch.float32)[..., :-1]


def _fill_holes(alive: Sequence[bool]) -> list[int]:
    """Which old place each new one takes when those that stay close up: `[new] -> old`, as few moved as possible."""
    left = sum(alive)
    order = list(range(left))
    movers = iter(place for place in range(left, len(alive)) if alive[place])
    for place in range(left):
        if not alive[place]:
            order[place] = next(movers)
    return order
