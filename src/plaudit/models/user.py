"""Learned users of a dialogue: what they reply, and how pleased they are, given what was said before.

Both models have the same `forward`; they differ in what they suppose. `RecurrentUser` supposes nothing. `LatentUser`
supposes a hidden mood of a few kinds that moves by what is said, and can therefore be read.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Foretold(NamedTuple):
    """What a model expects at each turn: `reply_logprobs [B, T, U]`, `rewards [B, T]`."""

    reply_logprobs: Tensor
    rewards: Tensor


class User(Protocol):
    """A learned user."""

    def __call__(self, words: Tensor, replies: Tensor) -> Foretold:
        """`words [B, T]` and the replies to all but the last, `[B, T - 1]`, to what is expected at each turn."""
        ...


class RecurrentUser(nn.Module):
    """A GRU over the turns so far, and a perceptron over its state and the word that is being said."""

    def __init__(self, num_words: int, num_replies: int, *, hidden_size: int = 32, seed: int = 0) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(num_words, num_replies, hidden_size) < 1:
            raise ValueError(f"sizes must be at least 1, got {num_words}, {num_replies}, {hidden_size}")
        self.num_words, self.num_replies = num_words, num_replies
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.memory = nn.GRU(num_words + num_replies, hidden_size, batch_first=True)
            self.head = nn.Sequential(
                nn.Linear(hidden_size + num_words, hidden_size), nn.SiLU(), nn.Linear(hidden_size, num_replies + 1)
            )

    def forward(self, words: Tensor, replies: Tensor) -> Foretold:
        """See `User`."""
        said = nn.functional.one_hot(words, self.num_words).float()
        heard = nn.functional.one_hot(replies, self.num_replies).float()
        turns = torch.cat([said[:, :-1], heard], -1)
        # Before the first word the memory is empty.
        memory = said.new_zeros(len(words), 1, self.memory.hidden_size)
        if turns.shape[1]:
            memory = torch.cat([memory, self.memory(turns)[0]], 1)
        found = self.head(torch.cat([memory, said], -1))
        return Foretold(torch.log_softmax(found[..., :-1], -1), found[..., -1])


class LatentUser(nn.Module):
    """A hidden Markov user: mood `m ~ p_1`, moved by each word, `P(m'|m, a)`, shown in replies, `P(u|m')`.

        b_1 = p_1,   r̂_t = Σ_m b_t(m) R(m, a_t),   P(u|s, a) = Σ_m' (b_t P_a)(m') P(u|m'),   b_{t+1} ∝ (b_t P_a) P(u|·)

    The family of `plaudit.rollout.dialogue.DialogueMDP` itself, with everything unknown; source of the recursion:
    Rabiner 1989, with inputs as in Bengio and Frasconi 1996.

    Attributes:
        num_moods, num_words, num_replies: `M`, `A`, `U`.
    """

    def __init__(self, num_words: int, num_replies: int, num_moods: int, *, seed: int = 0) -> None:
        """Draw the tables' logits from `seed`.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(num_words, num_replies, num_moods) < 1:
            raise ValueError(f"sizes must be at least 1, got {num_words}, {num_replies}, {num_moods}")
        self.num_words, self.num_replies, self.num_moods = num_words, num_replies, num_moods
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator))

        self.first_logits = drawn(num_moods)
        self.move_logits = drawn(num_moods, num_words, num_moods)
        self.reply_logits = drawn(num_moods, num_replies)
        self.mood_rewards = drawn(num_moods, num_words)

    @property
    def moves(self) -> Tensor:
        """`P(m'|m, a)`, `[M, A, M]`."""
        return self.move_logits.softmax(-1)

    @property
    def replies(self) -> Tensor:
        """`P(u|m)`, `[M, U]`."""
        return self.reply_logits.softmax(-1)

    def forward(self, words: Tensor, replies: Tensor) -> Foretold:
        """See `User`."""
        beliefs, logprobs, rewards = self.beliefs(words, replies), [], []
        for turn in range(words.shape[1]):
            moved = self._moved(beliefs[turn], words[:, turn])
            logprobs.append((moved @ self.replies).log())
            rewards.append((beliefs[turn] * self.mood_rewards[:, words[:, turn]].T).sum(-1))
        return Foretold(torch.stack(logprobs, 1), torch.stack(rewards, 1))

    def beliefs(self, words: Tensor, replies: Tensor) -> list[Tensor]:
        """The distribution of the mood before each word, `T` times `[B, M]`."""
        found = [self.first_logits.softmax(-1).expand(len(words), -1)]
        for turn in range(words.shape[1] - 1):
            seen = self._moved(found[-1], words[:, turn]) * self.replies[:, replies[:, turn]].T
            found.append(seen / seen.sum(-1, keepdim=True))
        return found

    def _moved(self, beliefs: Tensor, words: Tensor) -> Tensor:
        return torch.einsum("bm,bmn->bn", beliefs, self.moves[:, words].transpose(0, 1))
