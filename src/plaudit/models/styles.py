"""Options of a language model: a few learned styles, each a vector added to the states that the vocabulary head reads.

A style `ω` is chosen at the first token of an answer by `μ(ω|h) = softmax(C h)`, stays in force, and may end behind a
token that ends a sentence, with `β_ω(h) = σ(D h)_ω`; the next one is then chosen by μ. Under it the next token has
`π_ω(·|h) = softmax(head(h + e_ω) / temperature)`. What the model is judged by is the marginal over all styles.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plaudit.configs.option_critic import StyledConfig
from plaudit.core.entropy import logprobs_and_entropy
from plaudit.core.hierarchy_losses import ending_probabilities, marginal_option_logprobs
from plaudit.models.aggregation import TokenSpans
from plaudit.models.beside import read_beside, write_beside

if TYPE_CHECKING:
    from plaudit.models.causal_lm import CausalLM


class StyleHeads(nn.Module):
    """`W` style vectors with the heads that choose and end them.

    Attributes:
        vectors: `[W, H]` parameter, `e_ω`; normal noise at first, which is what tells styles apart.
        choice, ending: linear maps `H → W`, 0 at first (`β` then is `termination`).
        sentence_ends: `[V]` bool, tokens behind which a style may end.
        usage: `[W]`, the mean belief about the style in force of the last evaluation; `ending_rate`, its mean β where
            one may end; `duration`, how many tokens a style lasted in it, infinite where none could end.
    """

    kind = "styles"
    sentence_ends: Tensor
    usage: Tensor

    def __init__(
        self,
        hidden_size: int,
        sentence_ends: Tensor,
        *,
        num_options: int,
        spread: float = 0.02,
        termination: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Draw the vectors from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for fewer than one style, or a termination that is not between 0 and 1.
        """
        super().__init__()
        if num_options < 1 or not 0 < termination < 1:
            raise ValueError(f"num_options ≥ 1 and 0 < termination < 1, got {num_options} and {termination}")
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter(spread * torch.randn(num_options, hidden_size, generator=generator))
        # Uninitialised, so that the global generator is not drawn from.
        empty: Callable[..., nn.Linear] = partial(nn.utils.skip_init, nn.Linear)
        self.choice, self.ending = (empty(hidden_size, num_options) for _ in range(2))
        for layer in (self.choice, self.ending):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.ending.bias, float(torch.logit(torch.tensor(termination))))
        self.register_buffer("sentence_ends", sentence_ends)
        self.register_buffer("usage", torch.full((num_options,), 1 / num_options), persistent=False)
        self.ending_rate, self.duration = termination, float("inf")

    @property
    def num_options(self) -> int:
        """`W`."""
        return len(self.vectors)

    def choices(self, states: Tensor) -> Tensor:
        """`log μ(ω|h)` of states `[..., H]`, `[..., W]` float32."""
        return torch.log_softmax(self.choice(states.float()), -1)

    def terminations(self, states: Tensor, last_tokens: Tensor) -> Tensor:
        """`β_ω(h)` of states `[..., H]` behind `last_tokens [...]`, `[..., W]`; 0 where no sentence has ended."""
        found: Tensor = self.ending(states.float()).sigmoid() * self.sentence_ends[last_tokens].unsqueeze(-1)
        return found

    def terms(
        self,
        states: Tensor,
        last_tokens: Tensor,
        targets: Tensor,
        spans: TokenSpans,
        *,
        head: tuple[Tensor, Tensor | None, float | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens with the styles summed out, and entropies.

        The entropy is `Σ_ω b(ω) H(π_ω)`, of the token when the style is known: at most the marginal's, which would need
        the whole vocabulary of every style at once.

        Args:
            states: `[M, H]`, what the head reads for each token of the completions.
            last_tokens: `[M]` int64, the tokens that those states have read last.
            targets: `[M]` int64, the tokens.
            spans: owner and step of each.
            head: `(weight, bias, softcap)` of the language model.
            temperature: logits are divided by it.

        Returns:
            both `[M]`.
        """
        weight, bias, softcap = head
        found = [
            logprobs_and_entropy(
                states + vector.to(states.dtype), weight, targets, bias=bias, temperature=temperature, softcap=softcap
            )
            for vector in self.vectors
        ]
        logprobs, entropies = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
        where = (spans.owner, spans.step)
        size = (spans.lengths.shape[0], int(spans.lengths.max()), self.num_options)
        zeros = logprobs.new_zeros(size)
        mask = torch.zeros(size[:2], dtype=torch.bool, device=states.device).index_put(
            where, torch.ones((), dtype=torch.bool, device=states.device)
        )
        ends = self.terminations(states, last_tokens)
        actions, choices, stops = (
            zeros.index_put(where, part.to(zeros.dtype)) for part in (logprobs, self.choices(states), ends)
        )
        marginal, beliefs = marginal_option_logprobs(actions, choices, stops, mask)
        shares = beliefs[where].exp()
        with torch.no_grad():
            self.usage.copy_(shares.mean(0))
            may_end = self.sentence_ends[last_tokens] & (spans.step > 0)
            self.ending_rate = float(ends[may_end].mean()) if bool(may_end.any()) else 0.0
            ended = ending_probabilities(beliefs, actions, marginal, stops, mask)[where][spans.step > 0]
            self.duration = float(len(ended) / ended.sum()) if bool(ended.sum() > 0) else float("inf")
        return marginal[where], (shares.detach() * entropies).sum(-1)

    def metrics(self) -> dict[str, float]:
        """Usage of the styles, as of the last evaluation, by the names that `option_metrics` has."""
        shares = self.usage.double()
        entropy = torch.special.entr(shares).sum() / torch.log(torch.tensor(float(max(self.num_options, 2))))
        found = {f"options/share_{option}": float(share) for option, share in enumerate(shares)}
        if self.duration < float("inf"):
            found["options/duration"] = self.duration
        return found | {
            "options/usage_entropy": float(entropy),
            "options/most_used": float(shares.max()),
            "options/termination_rate": self.ending_rate,
            "options/collapsed": float((self.num_options > 1 and float(shares.max()) > 0.95) or self.duration < 1.05),
        }

    def save(self, folder: Path) -> None:
        """Write the styles beside a saved model."""
        write_beside(self, folder, self.kind, {"num_options": self.num_options})

    @classmethod
    def load(cls, folder: Path) -> "StyleHeads":
        """The styles that `save` wrote.

        Raises:
            ValueError: if the folder holds none.
        """
        weights, _ = read_beside(folder, cls.kind)
        size = weights["vectors"].shape
        found = cls(size[1], weights["sentence_ends"], num_options=size[0])
        found.load_state_dict(weights)
        return found


def sentence_end_tokens(tokenizer: Any, rows: int, marks: Sequence[str]) -> Tensor:
    """`[rows]` bool: tokens whose text, without white space behind it, ends with one of the marks.

    Raises:
        ValueError: if no token does, so that a style could never end.
    """
    texts = [tokenizer.decode([token]).rstrip(" ") for token in range(min(rows, len(tokenizer)))]
    found = [bool(text) and text.endswith(tuple(marks)) for text in texts]
    if not any(found):
        raise ValueError(
            f"sentence_ends: no token of the vocabulary ends with one of {list(marks)}, so a style could never end"
        )
    return torch.tensor(found + [False] * (rows - len(found)))


def build_styles(model: "CausalLM", config: StyledConfig, *, seed: int) -> StyleHeads:
    """Style vectors and heads that fit a language model."""
    rows, width = model.head[0].shape
    marks = sentence_end_tokens(model.tokenizer, rows, config.sentence_ends)
    return StyleHeads(
        width,
        marks,
        num_options=config.num_options,
        spread=config.style_spread,
        termination=config.initial_termination,
        seed=seed,
    )
