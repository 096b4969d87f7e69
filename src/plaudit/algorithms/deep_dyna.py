"""Dyna with a learned user: every batch of real dialogues teaches policy and user, and then imagined ones the policy.

Real dialogues cost people's time; imagined ones are free and as good as the user model is. Any algorithm learns from
both alike, since an imagined dialogue is a trajectory like a real one (Sutton 1990; for dialogues Peng et al. 2018,
"Deep Dyna-Q", arXiv:1801.06176). Departures from the latter: a policy gradient with the divergence from the reference
in its reward in place of a deep Q-network, and no human-made rules to begin with.
"""

import torch
from torch import Tensor, nn

from plaudit.algorithms.base import Algorithm
from plaudit.algorithms.stepping import guarded_step
from plaudit.models.user import User
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.imagined_dialogue import imagined_dialogue, turns_of, user_tables
from plaudit.rollout.trajectory import StepPolicy, Trajectory


def user_loss(user: User, words: Tensor, replies: Tensor, rewards: Tensor) -> Tensor:
    """`-mean log P(u_t | s_t, a_t) + ½ mean (r̂_t - r_t)²` over dialogues: replies `[B, T - 1]`, rewards `[B, T]`."""
    found = user(words, replies)
    missed = 0.5 * (found.rewards - rewards.to(found.rewards.dtype)).square().mean()
    if not replies.shape[1]:
        return missed
    return missed - found.reply_logprobs[:, :-1].gather(2, replies.unsqueeze(2)).mean()


def fit_user(
    user: nn.Module,
    words: Tensor,
    replies: Tensor,
    rewards: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    rows_per_step: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    """`steps` optimizer steps of `user_loss` on dialogues `[N, T]`, drawn at random; returns the last loss.

    Raises:
        NonFiniteError: if a loss is not finite; the user has not been moved by it.
    """
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(words), (min(rows_per_step, len(words)),), generator=generator)
        loss = user_loss(user, words[rows], replies[rows], rewards[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        guarded_step(optimizer, loss.item(), max_norm=None, where="learning a user")
    return loss.item()


class DialogueDyna:
    """Real dialogues in, a better policy and a better user model out.

    Attributes:
        imagined: imagined dialogues for each real one, in batches of the same size.
        num_real: real dialogues so far, which is the true feedback used.
        user: the learned user.
    """

    def __init__(
        self,
        mdp: DialogueMDP,
        policy: StepPolicy,
        algorithm: Algorithm,
        user: nn.Module,
        *,
        imagined: int,
        fit_steps: int = 50,
        learning_rate: float = 1e-2,
        seed: int = 0,
        shuffled: bool = False,
    ) -> None:
        """Nothing is learned yet.

        Args:
            mdp: the problem; only its states and its reference are looked at, never its user.
            policy: is improved.
            algorithm: improves it.
            user: a `User` that is learned.
            imagined: `n`.
            fit_steps: optimizer steps of the user after each batch of real dialogues.
            learning_rate: of the user's Adam.
            seed: of draws.
            shuffled: a control: the user learns what *other* dialogues led to, so that it is wrong.

        Raises:
            ValueError: for a negative `imagined`.
        """
        if imagined < 0:
            raise ValueError(f"imagined must not be negative, got {imagined}")
        self.mdp, self.policy, self.algorithm, self.user = mdp, policy, algorithm, user
        self.imagined, self.fit_steps, self.shuffled = imagined, fit_steps, shuffled
        self.optimizer = torch.optim.Adam(user.parameters(), lr=learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_real = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, real: Trajectory) -> dict[str, float]:
        """Learn from real dialogues `[B, 2T - 1]`, and from `imagined` times as many that never took place."""
        metrics = self.algorithm.update(real, generator=self.generator)
        self.num_real += real.num_rows
        if not self.imagined:
            return metrics
        self._seen.append(turns_of(real))
        words, replies, rewards = (torch.cat(each) for each in zip(*self._seen, strict=True))
        if self.shuffled:
            order = torch.randperm(len(words), generator=self.generator)
            replies, rewards = replies[order], rewards[order]
        metrics["user/loss"] = fit_user(
            self.user,
            words,
            replies,
            rewards,
            optimizer=self.optimizer,
            steps=self.fit_steps,
            generator=self.generator,
        )
        world = imagined_dialogue(self.mdp, *user_tables(self.user, self.mdp))
        for _ in range(self.imagined):
            dreamed = world.sample(self.policy, real.num_rows, generator=self.generator)
            # All dialogues begin alike: where real ones are one group, imagined ones are.
            self.algorithm.update(dreamed.with_fields(group_ids=real.group_ids), generator=self.generator)
        return metrics
