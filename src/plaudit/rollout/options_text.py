"""Options as hidden styles of a text: summed out of every log-probability, so any update of a policy can learn them.

A style `ω` is chosen before the first token, stays in force, and may end only where a sentence has ended. What the
policy is judged by is the text alone, `π(y|x) = Σ_ω P(ω, y|x)`; with the penalty towards the reference on that marginal
the optimum stays `π* ∝ π_ref exp(r/β)`, whatever the styles do.
"""

import torch
from torch import Tensor, nn

from plaudit.core.hierarchy_losses import marginal_option_logprobs, next_belief
from plaudit.core.kl import categorical_entropy
from plaudit.core.reduction import expect_shape
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, observations_of


class StylePolicy(nn.Module):
    """Tables over states: `π_ω(a|s)`, `β_ω(s)` where sentences end, `μ(ω|s)`, and a critic `V(s)`.

    Satisfies `StepPolicy` and `StatefulPolicy`. `sample` draws from the marginal by its belief about the style in
    force, which is its memory; `evaluate` gives the marginal's log-probabilities by the forward algorithm, and its
    entropy. The column `options` is a style drawn from the belief after the token.

    Attributes:
        logits: `[S, W, A]` parameter.
        endings: `[S, W]` parameter, `β = σ(endings)` where a style may end.
        choices: `[S, W]` parameter, `μ = softmax(choices)`.
        critic: `[S]` parameter.
        may_end: `[S]` bool, states behind the end of a sentence.
    """

    may_end: Tensor

    def __init__(
        self, logits: Tensor, may_end: Tensor, *, num_options: int, spread: float = 0.1, seed: int = 0
    ) -> None:
        """Begin with `logits [S, A]` for every style, apart from noise of deviation `spread` that tells them apart.

        Raises:
            ValueError: for shapes that do not fit, or fewer than one option.
        """
        super().__init__()
        if num_options < 1:
            raise ValueError(f"num_options must be at least 1, got {num_options}")
        expect_shape("may_end", may_end, (len(logits),))
        generator = torch.Generator().manual_seed(seed)
        shape = (len(logits), num_options, logits.shape[1])
        noise = spread * torch.randn(shape, generator=generator, dtype=logits.dtype)
        self.logits = nn.Parameter(logits.detach().unsqueeze(1) + noise)
        self.endings = nn.Parameter(logits.new_zeros(shape[:2]))
        self.choices = nn.Parameter(logits.new_zeros(shape[:2]))
        self.critic = nn.Parameter(logits.new_zeros(len(logits)))
        self.register_buffer("may_end", may_end)
        self._belief = torch.zeros(0, num_options, dtype=logits.dtype)
        self._begun = torch.zeros(0, dtype=torch.bool)

    def memory(self, num_rows: int) -> Tensor:
        """`[B, W]`, the log-belief about the style in force after the last token; 0 for rows that have not begun."""
        if len(self._belief) != num_rows:
            self._belief = self.logits.new_zeros(num_rows, self.logits.shape[1]).detach()
            self._begun = torch.zeros(num_rows, dtype=torch.bool)
        return self._belief

    def end_episodes(self, ended: Tensor) -> None:
        """Forget the rows `[B]` bool whose text is complete."""
        self._belief = self._belief.masked_fill(ended.unsqueeze(1), 0.0)
        self._begun = self._begun & ~ended

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """Draw one token for each state `[B]` int64."""
        before = self.memory(len(observations))
        logprobs, ends, choices = self._tables(observations)
        arrived = torch.where(self._begun.unsqueeze(1), next_belief(before, choices, ends), choices)
        joint = arrived.unsqueeze(2) + logprobs
        marginal = torch.logsumexp(joint, 1)
        actions = torch.multinomial(marginal.exp(), 1, generator=generator)
        chosen = marginal.gather(1, actions)
        self._belief = joint.gather(2, actions.unsqueeze(1).expand(-1, joint.shape[1], 1)).squeeze(2) - chosen
        self._begun = torch.ones_like(self._begun)
        styles = torch.multinomial(self._belief.exp(), 1, generator=generator).squeeze(1)
        return Sampled(actions.squeeze(1), chosen.squeeze(1), self.critic[observations], {"options": styles})

    def values(self, observations: Tensor) -> Tensor:
        """`V(s)` of states of any shape `[...]`."""
        return self.critic[observations]

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities and entropies of the marginal, and values, `[B, T]`, with gradients.

        Raises:
            ValueError: if the trajectory has no observations `[B, T]`.
        """
        states = observations_of(trajectory)
        expect_shape("observations", states, tuple(trajectory.actions.shape))
        logprobs, ends, choices = self._tables(states)
        places = trajectory.actions[..., None, None].expand(*logprobs.shape[:3], 1)
        taken = logprobs.gather(3, places).squeeze(3)
        marginal, beliefs = marginal_option_logprobs(taken, choices, ends, trajectory.mask)
        entropy = categorical_entropy(torch.logsumexp(beliefs.unsqueeze(3) + logprobs, 2))
        return Evaluation(marginal, entropy, self.critic[states])

    def beliefs(self, trajectory: Trajectory) -> Tensor:
        """`P(ω_t | y_<t)`, `[B, T, W]`: how much each style is thought to be in force as each token is drawn."""
        logprobs, ends, choices = self._tables(observations_of(trajectory))
        places = trajectory.actions[..., None, None].expand(*logprobs.shape[:3], 1)
        return marginal_option_logprobs(logprobs.gather(3, places).squeeze(3), choices, ends, trajectory.mask)[1].exp()

    def _tables(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log π_ω [..., W, A]`, `β_ω` and `log μ`, both `[..., W]`."""
        ends = self.endings[states].sigmoid() * self.may_end[states].unsqueeze(-1)
        return self.logits[states].log_softmax(-1), ends, self.choices[states].log_softmax(-1)


def style_policy(
    mdp: TokenMDP, *, num_options: int, sentence_ends: tuple[int, ...] = (1,), spread: float = 0.1, seed: int = 0
) -> StylePolicy:
    """Styles over the prefixes of a `TokenMDP`; a style may end behind each of the tokens `sentence_ends`."""
    behind = torch.tensor([bool(prefix) and prefix[-1] in sentence_ends for prefix in mdp.prefixes])
    logits, may_end = mdp.reference_logprobs.flatten(0, 1), behind.repeat(mdp.num_prompts)
    return StylePolicy(logits, may_end, num_options=num_options, spread=spread, seed=seed)


def marginal_table(mdp: TokenMDP, policy: StylePolicy) -> Tensor:
    """What a policy that remembers does after every prefix: the marginal's log-probabilities `[P, S, V]`."""
    with torch.no_grad():
        found = policy.evaluate(mdp.enumerate()).logprobs.view(mdp.num_prompts, mdp.num_strings, mdp.max_length)
    table = torch.zeros_like(mdp.reference_logprobs)
    rows = mdp.string_mask
    table[:, mdp.string_prefixes[rows], mdp.string_tokens[rows]] = found[:, rows]
    return table
