"""From token states to one vector per completion, over packed states, without a loop over tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedLayout


@dataclass(frozen=True)
class TokenSpans:
    """The tokens that each of `C` completions is read from, as flat lists of length `M`.

    Attributes:
        places: `[M]` place in the packed row.
        owner: `[M]` completion; non-decreasing.
        step: `[M]` 0, 1, 2, … within its completion.
        lengths: `[C]` number of tokens of each completion, at least 1.
    """

    places: Tensor
    owner: Tensor
    step: Tensor
    lengths: Tensor


def token_spans(layout: PackedLayout, over: str = "completion") -> TokenSpans:
    """Which tokens each completion is read from.

    Args:
        layout: `N` tokens, `C` completions.
        over: `completion` for its own tokens alone, `text` for its prompt's before them.

    Returns:
        The spans; prompt tokens are listed once for each completion that reads them.

    Raises:
        ValueError: for any other `over`.
    """
    if over not in ("completion", "text"):
        raise ValueError(f"aggregate_over is {over!r}; use 'completion' or 'text'")
    prefix_lengths = layout.prefix_ends - layout.prefix_starts if over == "text" else layout.prefix_starts * 0
    lengths = prefix_lengths + layout.completion_ends - layout.completion_starts
    owner = torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)
    step = torch.arange(owner.shape[0], device=lengths.device) - (lengths.cumsum(0) - lengths)[owner]
    place = torch.where(
        step < prefix_lengths[owner],
        layout.prefix_starts[owner] + step,
        layout.completion_starts[owner] + step - prefix_lengths[owner],
    )
    return TokenSpans(place, owner, step, lengths)


def span_sum(values: Tensor, spans: TokenSpans) -> Tensor:
    """Sum `values` (`[M]` or `[M, …]`) over each completion's tokens: `[C]` or `[C, …]`."""
    return values.new_zeros(spans.lengths.shape[0], *values.shape[1:]).index_add(0, spans.owner, values)


def span_softmax(logits: Tensor, spans: TokenSpans) -> Tensor:
    """Softmax of `logits` `[M]` within each completion: `[M]`, each completion's weights adding to 1."""
    highest = logits.new_full((spans.lengths.shape[0],), -torch.inf)
    highest = highest.scatter_reduce(0, spans.owner, logits.detach(), "amax")
    weights = (logits - highest[spans.owner]).exp()
    return weights / span_sum(weights, spans)[spans.owner]


class Last(nn.Module):
    """`h_T`: the state of the completion's own last token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.output_size = hidden_size

    def forward(self, states: Tensor, layout: PackedLayout) -> Tensor:
        """`[N, H]` states to `[C, H]`."""
        return states[layout.completion_ends - 1]


class Weighted(nn.Module):
    """`Σ_t w_t h_t` with weights that a plain function of the spans gives: mean, sum, discounted sum.

    - mean: `w_t = 1/T`.
    - sum: `w_t = 1`; the head then gives `Σ_t W·h_t + b`, the trajectory form with one bias for the whole text.
    - discounted sum: `w_t = γ^t` with `t = 0` at the first token read, the discounted return of the per-token rewards.
    """

    def __init__(self, hidden_size: int, over: str, weights: Callable[[TokenSpans], Tensor]) -> None:
        super().__init__()
        self.output_size, self.over, self.weights = hidden_size, over, weights

    def forward(self, states: Tensor, layout: PackedLayout) -> Tensor:
        """`[N, H]` states to `[C, H]`."""
        spans = token_spans(layout, self.over)
        return span_sum(states[spans.places] * self.weights(spans).to(states.dtype)[:, None], spans)


class PositionWeighted(nn.Module):
    """`(1/T) Σ_t c(u_t) h_t` with a learned curve `c` over the relative position `u_t = (t + ½)/T` in (0, 1).

    The curve is piecewise linear through `knots` learned values, all 1 at first: training starts from the mean.
    """

    def __init__(self, hidden_size: int, over: str, knots: int = 9) -> None:
        super().__init__()
        self.output_size, self.over = hidden_size, over
        self.curve = nn.Parameter(torch.ones(knots))

    def forward(self, states: Tensor, layout: PackedLayout) -> Tensor:
        """`[N, H]` states to `[C, H]`."""
        spans = token_spans(layout, self.over)
        lengths = spans.lengths[spans.owner].to(states.dtype)
        knot = (spans.step.to(states.dtype) + 0.5) / lengths * (self.curve.shape[0] - 1)
        left = knot.floor().long().clamp(max=self.curve.shape[0] - 2)
        share = knot - left
        weights = (self.curve[left] * (1 - share) + self.curve[left + 1] * share) / lengths
        return span_sum(states[spans.places] * weights[:, None], spans)


class AttentionPool(nn.Module):
    """`Σ_t softmax_t(q·h_t/√H) h_t` with one learned query `q`, zero at first: training starts from the mean."""

    def __init__(self, hidden_size: int, over: str) -> None:
        super().__init__()
        self.output_size, self.over = hidden_size, over
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: Tensor, layout: PackedLayout) -> Tensor:
        """`[N, H]` states to `[C, H]`."""
        spans = token_spans(layout, self.over)
        read = states[spans.places]
        weights = span_softmax(read @ self.query / self.query.shape[0] ** 0.5, spans)
        return span_sum(read * weights[:, None], spans)


class SmallTransformer(nn.Module):
    """One pre-norm transformer layer over the tokens read and a learned summary token, whose state is the result.

    The states are projected to at most 128 dimensions and get sinusoidal positions counted from the first token read.
    Rows are padded to the longest completion; a mask from the lengths keeps padding out.
    """

    def __init__(self, hidden_size: int, over: str, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.output_size = min(width, max(heads, hidden_size // heads * heads))
        self.over = over
        self.project = nn.Linear(hidden_size, self.output_size)
        self.summary = nn.Parameter(torch.randn(self.output_size) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            self.output_size, heads, 2 * self.output_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(self.output_size)

    def forward(self, states: Tensor, layout: PackedLayout) -> Tensor:
        """`[N, H]` states to `[C, D]` with `D = output_size`."""
        spans = token_spans(layout, self.over)
        count, longest = spans.lengths.shape[0], int(spans.lengths.max())
        read = self.project(states[spans.places]) + sinusoids(spans.step, self.output_size).to(states.dtype)
        table = read.new_zeros(count, longest + 1, self.output_size)
        table = table.index_put((spans.owner, spans.step + 1), read)
        first = torch.zeros(count, longest + 1, 1, dtype=torch.bool, device=states.device)
        first[:, 0] = True
        table = torch.where(first, self.summary, table)
        padding = torch.arange(longest + 1, device=states.device)[None, :] > spans.lengths[:, None]
        summary: Tensor = self.norm(self.layer(table, src_key_padding_mask=padding)[:, 0])
        return summary


def sinusoids(steps: Tensor, size: int) -> Tensor:
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5).

    Args:
        steps: `[M]` positions.
        size: `D`, even or odd.

    Returns:
        `[M, D]` float32: sines, then cosines.
    """
    half = (size + 1) // 2
    rates = torch.exp(torch.arange(half, device=steps.device) * (-torch.log(torch.tensor(10000.0)) / half))
    angles = steps[:, None].float() * rates
    return torch.cat((angles.sin(), angles.cos()), -1)[:, :size]


def build_aggregation(name: str, hidden_size: int, *, over: str = "completion", discount: float = 0.99) -> nn.Module:
    """The aggregation of that name.

    Args:
        name: `last`, `mean`, `sum`, `weighted_sum`, `discounted_sum`, `attention` or `transformer`.
        hidden_size: `H`.
        over: `completion` or `text`; `last` always reads the completion's last token.
        discount: `γ` of the discounted sum.

    Returns:
        A module from `(states [N, H] float32, layout)` to `[C, output_size]`.

    Raises:
        ValueError: for an unknown name.
    """

    def mean(spans: TokenSpans) -> Tensor:
        return 1.0 / spans.lengths[spans.owner]

    def ones(spans: TokenSpans) -> Tensor:
        return torch.ones_like(spans.step)

    def discounted(spans: TokenSpans) -> Tensor:
        return torch.pow(discount, spans.step)

    builders: dict[str, Callable[[], nn.Module]] = {
        "last": lambda: Last(hidden_size),
        "mean": lambda: Weighted(hidden_size, over, mean),
        "sum": lambda: Weighted(hidden_size, over, ones),
        "weighted_sum": lambda: PositionWeighted(hidden_size, over),
        "discounted_sum": lambda: Weighted(hidden_size, over, discounted),
        "attention": lambda: AttentionPool(hidden_size, over),
        "transformer": lambda: SmallTransformer(hidden_size, over),
    }
    if name not in builders:
        raise ValueError(f"unknown aggregation {name!r}; known: {', '.join(builders)}")
    return builders[name]()
