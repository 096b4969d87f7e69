"""Decoding with one prefill and one copy of a prompt's keys and values, whatever number of rows continue it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedLayout
from plaudit.models.packed_attention import BACKENDS, AttentionOptions, PackedAttention
from plaudit.models.quick_products import quick_products
from plaudit.models.states import num_attention_layers, position_offset, takes_argument
from plaudit.rollout.lean import LeanStep
from plaudit.rollout.own_keys import more_room, new_room

_TOKENS_AT_ONCE = 512
"""Tokens of prompts that are read together where the weights were laid out before: what a layer makes of them stays in
the cache, and its memory is taken from the system only once."""


class SharedPrefixDecoder:
    """Keys and values of `P` prompts, once each, and of the `R` rows that continue them.

    Every step reads the prompt's keys once for all of its rows, `[P, g, K·h/g, d] @ [P, g, d, L]`, and each row's own
    keys beside them; one softmax runs over both, so the result is plain causal attention. Nothing is copied per step:
    own keys are written into place (of which more is made every 16 tokens), rows that end are overwritten by the last
    ones.

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
            lean: the model's `plaudit.rollout.lean.lean_step`, which is then taken instead of its modules; or None.

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
        self._reading = range(0)
        self._packed: PackedAttention | None = None
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
        few = _TOKENS_AT_ONCE if self._lean is not None and self._lean.prepared else None
        lengths = list(map(len, self._prompts))
        return torch.cat([self._read(group) for group in _groups(lengths, few)])

    def _read(self, group: range) -> Tensor:
        """Read these prompts at once: `[p, H]`."""
        lengths = torch.tensor([len(self._prompts[prompt]) for prompt in group])
        layout = _texts_layout(lengths).to(self._device)
        self._reading, self._packed = group, PackedAttention(layout)
        self._places = layout.block_ids * self._longest + layout.positions
        ids = torch.tensor([token for prompt in group for token in self._prompts[prompt]], device=self._device)
        with quick_products(self._base, len(ids)):
            states = self._forward(ids, layout.positions, layout.completion_ends - 1)
        self._packed = None
        return states

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
        options = AttentionOptions(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
        if self._packed is not None:
            return self._attend_prompts(layer, query, key, value, self._packed, options)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self._attend_rows(layer, query, key, value, options)[None]

    def attend_lean(self, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scaling: float) -> Tensor:
        """The same, called by the lean step: `[n, h, d]`, `[n, g, d]` twice, to `[n, h, d]`."""
        layer, self._layer = self._layer, self._layer + 1
        options = AttentionOptions(scaling=scaling, window=window)
        if self._packed is None:
            return self._attend_rows(layer, query, key, value, options)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return self._attend_prompts(layer, query, key, value, self._packed, options)[0]

    def _attend_prompts(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedAttention,
        options: AttentionOptions,
    ) -> Tensor:
        """Keep the keys and values `[1, g, N, d]` of the prompts that are read, and let every token attend to its own
        prompt: `[1, N, h, d]`."""
        if len(self._prompt_cache) == layer:
            shape = (len(self._prompts), key.shape[1], self._longest, key.shape[3])
            self._prompt_cache.append((key.new_empty(shape), value.new_empty(shape)))
        for cache, new in zip(self._prompt_cache[layer], (key, value), strict=True):
            cache[self._reading.start : self._reading.stop] = self._as_prompts(new)
        return BACKENDS["blocks"](query, key, value, packed, options).transpose(1, 2)

    def _attend_rows(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Write a row's own key and value, then attend to the prompt's and to its own.

        With `m` heads per group: scores are `[P, g, W, m, L + t]`, `W` rows of each prompt, and stay in that order; the
        smaller tensors (queries, a row's own scores and weights, outputs) are brought into it and back. All `t` places
        that there is room for are read, and those not yet written masked: a gap behind each row's keys would take
        longer to jump over than to read.
        """
        if len(self._own_cache) == layer:
            self._own_cache.append((new_room(key), new_room(value)))
        rows, (groups, size), steps = len(self.rows), key.shape[1:], self.steps + 1
        for cache, new in zip(self._own_cache[layer], (key, value), strict=True):
            cache[:rows, :, steps - 1] = new
        first = 0 if options.window is None else max(0, steps - options.window)
        own_keys, own_values = (cache[:rows, :, first:].flatten(0, 1) for cache in self._own_cache[layer])
        keys, values = (
            cache[: len(self._slots), :, : self._longest].flatten(0, 1) for cache in self._prompt_cache[layer]
        )
        query = (query * options.scaling).view(rows, groups, -1, size)
        heads = query.shape[2]

        own = _capped(torch.bmm(query.flatten(0, 1), own_keys.transpose(1, 2)), options.softcap)
        own[..., steps - first :] = -math.inf
        grid = self._to_grid(query)
        shared = torch.bmm(grid.reshape(keys.shape[0], -1, size), keys.transpose(1, 2))
        shared = _capped(shared, options.softcap).view(*grid.shape[:4], -1)
        mask = self._prompt_mask(options.window)
        if mask is not None:
            shared.masked_fill_(mask, -math.inf)
        scores = torch.cat((shared, self._to_grid(own.view(rows, groups, heads, -1))), -1)
        weights = _softmax(scores, options.sinks).to(values.dtype)
        output = torch.bmm(self._to_rows(weights[..., self._longest :]).flatten(0, 1), own_values)
        output = output.view(rows, groups, heads, size)
        seen = torch.bmm(weights.flatten(0, 1).flatten(1, 2)[..., : self._longest], values)
        output += self._to_rows(seen.view(*grid.shape))
        return output.view(rows, -1, size)

    def _to_grid(self, tensor: Tensor) -> Tensor:
        """`[R, g, m, n]` to a view `[P, g, W, m, n]`; places that no row fills hold copies of row 0."""
        tensor = tensor if self._grid is None else tensor[self._grid]
        return tensor.view(len(self._slots), self._width, *tensor.shape[1:]).transpose(1, 2)

    def _to_rows(self, tensor: Tensor) -> Tensor:
        """`[P, g, W, m, n]` to `[R, g, m, n]`."""
        rows = tensor.transpose(1, 2).flatten(0, 1)
        return rows if self._flat is None else rows[self._flat]

    def _forward(self, ids: Tensor, positions: Tensor, only: Tensor | None = None) -> Tensor:
        """The states of all these tokens, or of those at `only`."""
        self._layer = 0
        if self._lean is not None:
            states: Tensor = self._lean(ids, positions, self.attend_lean, only)
        else:
            output = self._base(
                input_ids=ids[None],
                attention_mask=self._no_mask,
                position_ids=positions[None] + self._offset,
                decoding=self,
                **self._options,
            )
            states = output.last_hidden_state[0] if only is None else output.last_hidden_state[0, only]
        if self._layer != self._layers:
            raise RuntimeError(f"attention was called {self._layer} times in {self._layers} layers")
        return states

    def _as_prompts(self, tensor: Tensor) -> Tensor:
        """`[1, g, N, d]` of the packed prompts to `[p, g, L, d]`, zeros behind shorter ones."""
        prompts, heads, size = len(self._reading), tensor.shape[1], tensor.shape[3]
        packed = tensor[0].transpose(0, 1)
        if packed.shape[0] < prompts * self._longest:
            padded = packed.new_zeros(prompts * self._longest, heads, size)
            padded[self._places] = packed
            packed = padded
        return packed.view(prompts, self._longest, heads, size).transpose(1, 2)

    def _make_room(self) -> None:
        """Make room for more own keys and values when it is used up. Rows that left earlier are not carried along."""
        if not self._own_cache or self.steps < self._own_cache[0][0].shape[2]:
            return
        for layer, (keys, values) in enumerate(self._own_cache):
            rows, steps = len(self.rows), self.steps
            self._own_cache[layer] = (more_room(keys, rows, steps), more_room(values, rows, steps))

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
        self._slot_lengths = torch.tensor(found, dtype=torch.long, device=self._device)[:, None, None, None, None]
        self._columns = torch.arange(self._longest, device=self._device)
        self._padding = self._columns >= self._slot_lengths if ragged else None
        self._masks = {}

    def _prompt_mask(self, window: int | None) -> Tensor | None:
        """`[P, 1, 1, 1, L]` bool, True on prompt positions that no row of it sees now; None if all are seen."""
        if window not in self._masks:
            mask = self._padding
            if window is not None and self._longest + self.steps >= window:
                far = self._slot_lengths + self.steps - self._columns >= window
                mask = far if mask is None else mask | far
            self._masks[window] = mask
        return self._masks[window]


def _groups(lengths: Sequence[int], most: int | None) -> Iterator[range]:
    """Neighbouring prompts that are read together: at most so many tokens, one prompt at least; None takes all."""
    start, tokens = 0, 0
    for place, length in enumerate(lengths):
        if most is not None and place > start and tokens + length > most:
            yield range(start, place)
            start, tokens = place, 0
        tokens += length
    yield range(start, len(lengths))


def _texts_layout(lengths: Tensor) -> PackedLayout:
    """The layout of texts of these lengths `[p]` one behind the other, each for itself."""
    ends = lengths.cumsum(0)
    block = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    index = torch.arange(len(lengths))
    return PackedLayout(
        positions=torch.arange(int(ends[-1])) - (ends - lengths)[block],
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
    )


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores with a cap where there is one: `cap · tanh(scores / cap)`."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 over `[P, g, W, m, L + t]`, with a sink per head where there are any."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    sink = sinks.to(scores.dtype).view(1, scores.shape[1], 1, scores.shape[3], 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), -1).softmax(-1, dtype=torch.float32)[..., :-1]


def _fill_holes(alive: Sequence[bool]) -> list[int]:
    """Which old place each new one takes when those that stay close up: `[new] -> old`, as few moved as possible."""
    left = sum(alive)
    order = list(range(left))
    movers = iter(place for place in range(left, len(alive)) if alive[place])
    for place in range(left):
        if not alive[place]:
            order[place] = next(movers)
    return order
